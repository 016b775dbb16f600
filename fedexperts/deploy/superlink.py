"""The process of Flower's SuperLink: as its own command starts it, and closed where that leaves it open.

Its APIs share one port, and one of them, which has no passwords, starts runs: so other machines are served only what nodes use.
What is let in is limited before it is known who sends it (`door`). A node that reconnects has its place back at once; Flower's
own refuses it until it is missed, for a minute. And messages wait on disk: those of ten clients that answer with a model each
would take as many models of memory.
"""

import os
import resource
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import uvicorn
from flwr.app import Message
from starlette.middleware import Middleware

from fedexperts.deploy.door import ImpatientProtocol, LimitedAccess
from fedexperts.deploy.flower_internals import SUPERLINK, InMemoryLinkState, InMemoryObjectStore, flower_superlink, replace
from fedexperts.deploy.processes import ABOUT_VARIABLE, OBJECTS_VARIABLE, end_with_parent


class ReconnectingLinkState(InMemoryLinkState):
    """Nodes by their keys, of which one that is still taken for connected may connect again."""

    current: "ReconnectingLinkState | None" = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        ReconnectingLinkState.current = self

    @classmethod
    def has(cls, public_key: bytes) -> bool:
        """Whether the only one of this process knows a node with this key."""
        return cls.current is not None and cls.current.get_node_id_by_public_key(public_key) is not None

    def activate_node(self, node_id: int, heartbeat_interval: float) -> bool:
        self.deactivate_node(node_id)
        return super().activate_node(node_id, heartbeat_interval)

    def get_message_res(self, message_ids: set[str], run_id: int) -> list[Message]:
        """The replies to `message_ids` that have come whole, or errors where their nodes have gone.

        Flower's own gives a reply as soon as it is announced, and who fetches it waits for the rest, whatever its deadline.
        """
        with self.lock:
            replies, store = self.message_ins_id_to_message_res_id, cast("DiskObjectStore", self.object_store)
            coming = {each: replies[each] for each in message_ids & replies.keys() if not store.is_whole(replies[each])}
            for each in coming:
                del replies[each]
            found: list[Message] = []
            try:
                found = super().get_message_res(message_ids, run_id)
            finally:
                given_up = {message.metadata.reply_to_message_id for message in found}
                replies.update({each: reply for each, reply in coming.items() if each not in given_up})
            return found


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

    def is_whole(self, object_id: str) -> bool:
        """Whether no object of its tree is still to come."""
        with self.lock_store:
            entry = self.store.get(object_id)
            return entry is None or (entry.is_available and all(self.is_whole(child) for child in entry.child_object_ids))

    def delete(self, object_id: str) -> None:
        with self.lock_store:
            super().delete(object_id)
            if object_id not in self.store:
                (self.folder / object_id).unlink(missing_ok=True)


def allow_open_files() -> None:
    """Lets this process open as many files, connections among them, as its user may."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main() -> None:
    end_with_parent()
    os.environ["FORWARDED_ALLOW_IPS"] = "127.0.0.1"  # whose word is taken on where a request comes from
    host = sys.argv[sys.argv.index("--host") + 1]
    registered = ReconnectingLinkState.has if "--enable-supernode-auth" in sys.argv else None
    about = Path(os.environ[ABOUT_VARIABLE])
    impatient: Any = {"http": ImpatientProtocol, "loop": "fedexperts.deploy.door:ImpatientLoop", "ws": "none"}
    replace(
        SUPERLINK,
        get_middleware=lambda: (Middleware(LimitedAccess, host, registered, about),),
        uvicorn=SimpleNamespace(run=partial(uvicorn.run, **impatient)),
        InMemoryLinkState=ReconnectingLinkState,
        InMemoryObjectStore=partial(DiskObjectStore, Path(os.environ[OBJECTS_VARIABLE])),
    )
    allow_open_files()
    flower_superlink()


if __name__ == "__main__":
    main()
