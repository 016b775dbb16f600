"""The process of Flower's SuperLink: as its own command starts it, and closed where that leaves it open.

Its APIs share one port, and one of them, which has no passwords, starts runs: so other machines are served only what nodes use.
No request may be larger than those of nodes. A node that reconnects has its place back at once; Flower's own refuses it until it
is missed, for a minute. And messages wait on disk: those of ten clients that answer with a model each would take as many models
of memory.
"""

import os
import sys
from functools import partial
from ipaddress import IPv6Address, ip_address
from math import inf
from pathlib import Path
from typing import Any

from flwr.server.superlink.linkstate import InMemoryLinkState, linkstate_factory
from flwr.supercore.object_store import object_store_factory
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.superlink import extensions
from flwr.superlink.cli import flower_superlink
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from fedexperts.deploy.processes import ALL_NETWORKS, OBJECTS_VARIABLE, end_with_parent

FLEET_PATH = "/v1/fleet/"
MAX_REQUEST_BYTES = 2**24
"""Of a request's body, which is read into memory before it is known who sent it. Flower cuts arrays into objects of 5 MB, and the
record with a message's texts has at most twice codec.MAX_TEXT_BYTES."""


class LimitedAccess:
    """Refuses requests with large bodies, and from other machines those for paths that nodes do not use."""

    def __init__(self, app: ASGIApp, host: str) -> None:
        self.app, self.host = app, host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif not (scope["path"].startswith(FLEET_PATH) or is_from_here(scope, self.host)):
            refusal = PlainTextResponse("this is served to the server's own machine only\n", status_code=403)
            await refusal(scope, receive, send)
        elif body_size(scope) > MAX_REQUEST_BYTES:
            refusal = PlainTextResponse(f"a request has {MAX_REQUEST_BYTES:,} bytes at most, and says so\n", status_code=413)
            await refusal(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def is_from_here(scope: Scope, host: str) -> bool:
    """Whether a request comes from this machine, which listens at `host`.

    Its own address counts only where it listens there alone, since its own processes then connect from there. One that listens
    on all networks may be in a container to which every request seems to come from the container's own address.
    """
    client, server = scope.get("client"), scope.get("server")
    if client is None:
        return False
    address = ip_address(client[0])
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    return address.is_loopback or (host not in ALL_NETWORKS and server is not None and client[0] == server[0])


def body_size(scope: Scope) -> float:
    """Bytes of a request's body; infinite where it comes in chunks, without its size. Uvicorn reads no more than it says."""
    headers = dict(scope["headers"])
    return inf if b"transfer-encoding" in headers else int(headers.get(b"content-length", 0))


class ReconnectingLinkState(InMemoryLinkState):
    """Nodes by their keys, of which one that is still taken for connected may connect again."""

    def activate_node(self, node_id: int, heartbeat_interval: float) -> bool:
        self.deactivate_node(node_id)
        return super().activate_node(node_id, heartbeat_interval)


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

    def delete(self, object_id: str) -> None:
        with self.lock_store:
            super().delete(object_id)
            if object_id not in self.store:
                (self.folder / object_id).unlink(missing_ok=True)


def main() -> None:
    end_with_parent()
    os.environ["FORWARDED_ALLOW_IPS"] = "127.0.0.1"  # whose word is taken on where a request comes from
    host = sys.argv[sys.argv.index("--host") + 1]
    extensions.get_middleware = lambda: (Middleware(LimitedAccess, host),)
    states: Any = linkstate_factory  # of the one version that we pin
    states.InMemoryLinkState = ReconnectingLinkState
    stores: Any = object_store_factory
    stores.InMemoryObjectStore = partial(DiskObjectStore, Path(os.environ[OBJECTS_VARIABLE]))
    flower_superlink()


if __name__ == "__main__":
    main()
