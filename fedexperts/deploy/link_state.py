"""What a SuperLink keeps of nodes and messages: nodes may reconnect at once, contents lie on disk, and no answer fills that disk.

A message of the server says in its group_id how many bytes its reply may take (`engines.flower`). What is stored and announced in
reply to it is counted against that; of a reply that takes more, nothing is kept but an error that says so.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import Any, cast

from flwr.app import Error, Message

from fedexperts.deploy.flower_internals import (
    InMemoryLinkState,
    InMemoryObjectStore,
    ObjectTree,
    create_message_error_unavailable_res_message,
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from fedexperts.engines.flower.client_app import REFUSED
from fedexperts.engines.message import require_size
from fedexperts.errors import BadMessage

FRAMING_BYTES = 2**16
"""Of a message without arrays, beside its own bytes."""
ENTRY_BYTES = 2**10
"""What an object costs besides its contents: about as much memory of the SuperLink."""
ATTEMPTS = 2
"""Times that a reply may come: one that was cut off is sent again, maybe by a node that has forgotten the first."""


GIVEN_UP = 2**62
"""Counted as taken by a reply of which nothing is kept."""


def with_framing(limit: float) -> float:
    """Bytes that Flower makes of a message of `limit` bytes: some 100 for each piece of 5 MB, and 400 for each array of ours."""
    return 1.001 * limit + FRAMING_BYTES


class DiskObjectStore(InMemoryObjectStore):
    """Keeps the list of objects in memory, and their contents in `folder`."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def put(self, object_id: str, object_content: bytes) -> None:
        with self.lock_store:
            if (entry := self.store.get(object_id)) and not entry.is_available:
                (self.folder / object_id).write_bytes(object_content)  # first, as a disk may be full
            super().put(object_id, object_content)
            self.store[object_id].content = b""

    def get(self, object_id: str) -> bytes | None:
        """None of an object that is not known; empty of one that has not come yet."""
        with self.lock_store:
            if object_id not in self.store:
                return None
            return (self.folder / object_id).read_bytes() if self.store[object_id].is_available else b""

    def missing(self, object_id: str) -> str | None:
        """An object of its tree that is still to come; None where it is whole."""
        with self.lock_store:
            entry = self.store.get(object_id)
            if entry is None:
                return None
            if not entry.is_available:
                return object_id
            return next(filter(None, map(self.missing, entry.child_object_ids)), None)

    def is_consistent(self, tree: ObjectTree) -> bool:
        """Whether `tree` says of no object two things, and of none that is here another than it was announced with.

        Flower goes by what comes first, and would keep what only the second has for ever.
        """
        parts: dict[str, list[str]] = {}
        with self.lock_store:
            for node in iterate_object_tree(tree):
                named = [child.object_id for child in node.children]
                known = self.store.get(node.object_id)
                if parts.setdefault(node.object_id, named) != named or (known and known.child_object_ids != named):
                    return False
        return True

    def delete(self, object_id: str) -> None:
        with self.lock_store:
            super().delete(object_id)
            if object_id not in self.store:
                (self.folder / object_id).unlink(missing_ok=True)


class LimitedLinkState(InMemoryLinkState):
    """Nodes by their keys, which may connect again while they still count as connected, and messages with limited replies."""

    current: "LimitedLinkState | None" = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.taken: dict[str, int] = {}  # message → bytes that have come in reply to it
        self.replied_in: dict[str, str] = {}  # session of a node that sends a reply → the message to which it replies
        LimitedLinkState.current = self

    @classmethod
    def has(cls, public_key: bytes) -> bool:
        """Whether the only one of this process knows a node with this key."""
        return cls.current is not None and cls.current.get_node_id_by_public_key(public_key) is not None

    def activate_node(self, node_id: int, heartbeat_interval: float) -> bool:
        self.deactivate_node(node_id)
        return super().activate_node(node_id, heartbeat_interval)

    def store_message_and_object_tree(self, message: Message, object_tree: ObjectTree, session_id: str) -> tuple[bool, list[str]]:
        """Announces a message; a reply only as far as there is room for it, and of objects that belong together."""
        with self.locked():
            size = ENTRY_BYTES * sum(1 for _ in iterate_object_tree(object_tree))
            asked = message.metadata.reply_to_message_id
            if asked and not (self.is_sound(message, object_tree) and self.has_room(asked, size)):
                self._cleanup_push_session(session_id, cleanup_messages=False)
                return False, []
            stored, missing = super().store_message_and_object_tree(message, object_tree, session_id)
            if asked and stored:
                self.forget_the_gone()
                self.taken[asked] += size
                self.replied_in[session_id] = asked
            return stored, missing

    def is_sound(self, reply: Message, tree: ObjectTree) -> bool:
        """Whether `reply` comes from the node that was asked, and `tree` is of objects that belong to it."""
        request, store = (
            self.message_ins_store.get(reply.metadata.reply_to_message_id),
            cast("DiskObjectStore", self.object_store),
        )
        if request is None or request.metadata.dst_node_id != reply.metadata.src_node_id:
            return False
        return reply.metadata.message_id == tree.object_id and store.is_consistent(tree)

    def store_object(self, run_id: int, session_id: str, object_id: str, object_content: bytes) -> bool:
        """Keeps an object; of a reply, only as far as there is room for it. Whoever sends one says in which session."""
        with self._lock_object_push_sessions:
            asked = self.replied_in.get(session_id)
            with self.lock:
                if not session_id or (asked is not None and not self.has_room(asked, len(object_content))):
                    return False
            stored = super().store_object(run_id, session_id, object_id, object_content)
            if stored and asked is not None:
                self.taken[asked] += len(object_content)
            return stored

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Both of Flower's locks, in one order: it takes them in either, and could wait for itself."""
        with self._lock_object_push_sessions, self.lock:
            yield

    def has_room(self, asked: str, size: int) -> bool:
        """Whether `size` bytes more may come in reply to the message `asked`; if not, an error takes the place of the reply."""
        request = self.message_ins_store.get(asked)
        if request is None or self.taken.get(asked) == GIVEN_UP:
            return False
        whole = ATTEMPTS * (with_framing(float(request.metadata.group_id or inf)) + FRAMING_BYTES)  # as much for its list
        try:
            require_size(self.taken.setdefault(asked, 0) + size, whole)
        except BadMessage as error:
            self.give_up(asked, str(error))
            return False
        return True

    def give_up(self, asked: str, why: str) -> None:
        """Removes what has come in reply to the message `asked`, and puts an error in its place."""
        self.taken[asked] = GIVEN_UP
        reply = create_message_error_unavailable_res_message(self.message_ins_store[asked].metadata, "msg_unavail")
        reply.error = Error(REFUSED, why)
        reply.metadata.__dict__["_message_id"] = name = reply.object_id
        for session in [session for session, request in self.replied_in.items() if request == asked]:
            self._cleanup_push_session(session, cleanup_messages=False)
        if announced := self.message_ins_id_to_message_res_id.pop(asked, None):
            self.message_res_store.pop(announced, None)
            self.object_store.delete(announced)
        self.message_res_store[name], self.message_ins_id_to_message_res_id[asked] = reply, name
        self.object_store.preregister(reply.metadata.run_id, get_object_tree(reply))
        for each, part in get_all_nested_objects(reply).items():
            self.object_store.put(each, part.deflate())

    def forget_the_gone(self) -> None:
        """Forgets what was counted for messages that are no more."""
        self.taken = {asked: size for asked, size in self.taken.items() if asked in self.message_ins_store}
        self.replied_in = {session: asked for session, asked in self.replied_in.items() if asked in self.message_ins_store}

    def get_message_res(self, message_ids: set[str], run_id: int) -> list[Message]:
        """The replies to `message_ids` that have come whole, or errors where their nodes have gone.

        Flower's own gives a reply as soon as it is announced, and who fetches it waits for the rest, whatever its deadline.
        """
        with self.locked():
            replies, store = self.message_ins_id_to_message_res_id, cast("DiskObjectStore", self.object_store)
            missing = {each: store.missing(replies[each]) for each in message_ids & replies.keys()}
            for absent in filter(None, missing.values()):
                self.get_object(run_id, absent)  # which removes a reply that has stopped coming
            coming = {each: replies[each] for each, absent in missing.items() if absent and each in replies}
            for each in coming:
                del replies[each]
            found: list[Message] = []
            try:
                found = super().get_message_res(message_ids, run_id)
            finally:
                given_up = {message.metadata.reply_to_message_id for message in found}
                replies.update({each: reply for each, reply in coming.items() if each not in given_up})
            return found
