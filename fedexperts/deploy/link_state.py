"""What a SuperLink keeps of nodes and messages: nodes may reconnect at once, contents lie on disk, and no answer fills that disk.

A message of the server says in its group_id how many bytes its reply may take (`engines.flower`). What is stored and announced in
reply to it is counted against that; of a reply that takes more, nothing is kept but an error that says so.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from math import inf
from pathlib import Path
from typing import Any, cast

from flwr.app import ArrayRecord, Error, Message

from fedexperts.deploy.flower_internals import (
    ConfirmMessageReceivedResponse,
    InMemoryLinkState,
    InMemoryObjectStore,
    ObjectEntry,
    ObjectTree,
    PushMessagesResponse,
    create_message_error_unavailable_res_message,
    get_all_nested_objects,
    get_object_head_values_from_object_content,
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
MOST_HEAD_BYTES = 2**16
"""Of a reply as it is announced: its objects are not in it, an error is."""
MOST_WAITING = 3
"""Replies of one node that have come whole and that the server has not fetched; a client has one job at a time."""
SHA256 = re.compile("[0-9a-f]{64}")
GIVEN_UP = 2**62
"""Counted as taken by a reply of which nothing is kept."""


def with_framing(limit: float) -> float:
    """Bytes that Flower makes of a message of `limit` bytes: some 100 for each piece of 5 MB, and 400 for each array of ours."""
    return 1.001 * limit + FRAMING_BYTES


def require_reply(push: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """`push`, by which a SuperLink takes a message of a node, for replies in that node's own name alone; of others it takes none.

    Flower's own would take a message that says it comes from the server, or from another node.
    """

    def push_reply(request: Any, state: Any) -> Any:
        if len(request.messages_list) == 1 == len(request.message_object_trees):
            (message,) = request.messages_list
            if message.metadata.src_node_id == request.node.node_id and message.metadata.reply_to_message_id:
                if message.ByteSize() <= MOST_HEAD_BYTES:
                    return push(request, state)
                state.give_up_large(message.metadata.reply_to_message_id, request.node.node_id)
        return PushMessagesResponse()

    return push_reply


def require_recipient(confirm: Callable[..., Any]) -> Callable[..., Any]:
    """`confirm`, by which a SuperLink removes a message that a node has received, for messages to that node alone."""

    def confirm_own(request: Any, state: Any, store: Any) -> Any:
        if state.is_of(request.message_object_id, request.node.node_id):
            return confirm(request, state, store)
        return ConfirmMessageReceivedResponse()

    return confirm_own


class DiskObjectStore(InMemoryObjectStore):
    """Keeps the list of objects in memory, and their contents in `folder`."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        empty = ArrayRecord()  # which messages without arrays share, so that a lie about it would be about all of these
        self.store[empty.object_id] = ObjectEntry(b"", False, [], ref_count=1, runs=set())
        self.put(empty.object_id, empty.deflate())

    def has(self, object_id: str) -> bool:
        """Whether an object has come."""
        with self.lock_store:
            return object_id in self.store and self.store[object_id].is_available

    def preregister(self, run_id: int, object_tree: ObjectTree) -> list[str]:
        """In one step, so that no object goes before that of which it is a part is there."""
        with self.lock_store:
            return super().preregister(run_id, object_tree)

    def put(self, object_id: str, object_content: bytes) -> None:
        """Keeps what an announced object holds.

        Raises:
            ValueError: it has another hash, or names other parts than were announced.
        """
        with self.lock_store:
            entry = self.store.get(object_id)
            was_there = entry is None or entry.is_available
            super().put(object_id, object_content)
            if entry is None or was_there:
                return
            entry.content, entry.is_available = b"", False
            _, parts, _ = get_object_head_values_from_object_content(object_content)
            if parts != entry.child_object_ids:
                raise ValueError("it names other parts than were announced")
            (self.folder / object_id).write_bytes(object_content)  # which fails on a full disk
            entry.is_available = True

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

    def contradicted(self, tree: ObjectTree) -> list[str] | None:
        """The objects that were announced with other parts than `tree` says; None where `tree` itself cannot be.

        It cannot be with a name that is no sha256, with two different lists of parts of one object, or with others than an object
        has that has come. Flower goes by what is announced first, and would keep what only the second names for ever.
        """
        parts: dict[str, list[str]] = {}
        others: list[str] = []
        with self.lock_store:
            for node in iterate_object_tree(tree):
                named = [child.object_id for child in node.children]
                if not SHA256.fullmatch(node.object_id) or parts.setdefault(node.object_id, named) != named:
                    return None
                known = self.store.get(node.object_id)
                if known and known.child_object_ids != named:
                    if known.is_available:
                        return None
                    others.append(node.object_id)
        return others

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
        """Announces a message; a reply only as far as there is room for it, and of objects that belong together.

        Messages that are no replies come from the server: `require_reply` refuses others.
        """
        asked, stored, missing = message.metadata.reply_to_message_id, False, list[str]()
        with self.locked():
            try:
                size = self.size_of_list(message, object_tree) if asked else 0
                if size is not None and self.is_undisputed(object_tree):
                    stored, missing = super().store_message_and_object_tree(message, object_tree, session_id)
            finally:
                if not stored:
                    self._cleanup_push_session(session_id, cleanup_messages=False)
            if asked and stored:
                self.forget_the_gone()
                self.taken[asked] += size or 0
                self.replied_in[session_id] = asked
            return stored, missing

    def size_of_list(self, reply: Message, tree: ObjectTree) -> int | None:
        """What the list of the objects of `reply` takes; None where there is no room for it, or it replies to nothing.

        A node sends one reply at a time, so any other of which something is still to come is removed, and so are those that have
        come before its last MOST_WAITING ones.
        """
        asked, name, node = reply.metadata.reply_to_message_id, reply.metadata.message_id, reply.metadata.src_node_id
        known = self.message_res_store.get(name)
        if not self.is_of(asked, node) or name != tree.object_id or (known and known.metadata.reply_to_message_id != asked):
            return None
        whole = self.whole(asked)
        counted = None if whole == inf else int(whole) // ENTRY_BYTES + 1  # no more than that, of a list that may be long
        size = ENTRY_BYTES * sum(1 for _ in islice(iterate_object_tree(tree), counted))
        others = [other for other in self.taken if other != asked and self.is_of(other, node)]
        for other in [*filter(self.is_unfinished, others), *[*filter(self.is_waiting, others)][:-MOST_WAITING]]:
            self.remove(other)
        return size if self.has_room(asked, size) else None

    def is_of(self, asked: str, node: int) -> bool:
        request = self.message_ins_store.get(asked)
        return request is not None and request.metadata.dst_node_id == node

    def is_unfinished(self, asked: str) -> bool:
        """Whether a reply to the message `asked` was announced that has not come whole."""
        reply, store = self.message_ins_id_to_message_res_id.get(asked), cast("DiskObjectStore", self.object_store)
        return reply is not None and (not store.has(reply) or store.missing(reply) is not None)

    def is_waiting(self, asked: str) -> bool:
        """Whether a reply to the message `asked` has come whole."""
        return asked in self.message_ins_id_to_message_res_id and not self.is_unfinished(asked)

    def is_undisputed(self, tree: ObjectTree) -> bool:
        """Whether objects can be announced as `tree` has them.

        Replies that have announced one with other parts, and have not sent it, are given up: one of two has to be wrong.
        """
        store = cast("DiskObjectStore", self.object_store)
        for name in store.contradicted(tree) or ():
            sessions = [session for session, each in self._object_push_sessions.items() if name in each.pending_object_ids]
            for asked in {self.replied_in[session] for session in sessions if session in self.replied_in}:
                self.give_up(asked, "it announces an object that another message has with other parts")
        return store.contradicted(tree) == []

    def store_object(self, run_id: int, session_id: str, object_id: str, object_content: bytes) -> bool:
        """Keeps an object; of a reply, only as far as there is room for it. Whoever sends one says in which session."""
        with self._lock_object_push_sessions:
            asked = self.replied_in.get(session_id)
            if session_id and cast("DiskObjectStore", self.object_store).has(object_id):
                return True  # the response to the first time was lost
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

    def whole(self, asked: str) -> float:
        """Bytes that may be taken in reply to the message `asked`: for the reply, and as many for the list of its objects."""
        limit = float(self.message_ins_store[asked].metadata.group_id or inf)
        return ATTEMPTS * (with_framing(limit) + FRAMING_BYTES)

    def has_room(self, asked: str, size: int) -> bool:
        """Whether `size` bytes more may come in reply to the message `asked`; if not, an error takes the place of the reply."""
        if asked not in self.message_ins_store or self.taken.get(asked) == GIVEN_UP:
            return False
        taken = self.taken.setdefault(asked, 0) + size
        if taken <= self.whole(asked):
            return True
        try:
            require_size(taken // ATTEMPTS, float(self.message_ins_store[asked].metadata.group_id))
        except BadMessage as error:
            self.give_up(asked, str(error))
        return False

    def give_up(self, asked: str, why: str) -> None:
        """Removes what has come in reply to the message `asked`, and puts an error in its place, if it is still waited for."""
        self.remove(asked)
        if (request := self.message_ins_store.get(asked)) is None:
            return
        self.taken[asked] = GIVEN_UP
        reply = create_message_error_unavailable_res_message(request.metadata, "msg_unavail")
        reply.error = Error(REFUSED, why)
        reply.metadata.__dict__["_message_id"] = name = reply.object_id
        self.message_res_store[name], self.message_ins_id_to_message_res_id[asked] = reply, name
        self.object_store.preregister(reply.metadata.run_id, get_object_tree(reply))
        for each, part in get_all_nested_objects(reply).items():
            self.object_store.put(each, part.deflate())

    def give_up_large(self, asked: str, node: int) -> None:
        """Gives up the reply of `node` to the message `asked`, whose head is too large."""
        with self.locked():
            if self.is_of(asked, node):
                self.give_up(asked, f"the head of its answer has more than {MOST_HEAD_BYTES:,} bytes; its own log has all of it")

    def remove(self, asked: str, announced: str | None = None) -> None:
        """Removes the reply to the message `asked`, or the one that was `announced`, with its objects and its sessions."""
        for session in [session for session, request in self.replied_in.items() if request == asked]:
            self._cleanup_push_session(session, cleanup_messages=False)
        announced = announced or self.message_ins_id_to_message_res_id.pop(asked, None)
        if announced:
            self.message_res_store.pop(announced, None)
            self.object_store.delete(announced)

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
                for each in coming.keys() & given_up:  # of a node that has gone in the middle of it
                    self.remove(each, coming[each])
            return found
