"""The process of Flower's SuperLink: as its own command starts it, and closed where that leaves it open.

Its APIs share one port, and one of them, which has no passwords, starts runs. So only what nodes use is served to other machines.
A node that comes back has the place that it had, at once; else it would be refused until it is missed, for a minute. And messages
wait on disk: those of ten clients that answer with a model each would take as many models of memory.
"""

import os
import sys
from functools import partial
from ipaddress import IPv6Address, ip_address
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

from fedexperts.deploy.processes import ANYWHERE, OBJECTS
from fedexperts.deploy.socket_rpc import end_with_parent

FOR_NODES = "/v1/fleet/"


class OthersAreNodes:
    """Refuses other machines all but the fleet's paths."""

    def __init__(self, app: ASGIApp, host: str) -> None:
        self.app, self.host = app, host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"].startswith(FOR_NODES) or near(scope, self.host):
            await self.app(scope, receive, send)
        else:
            refusal = PlainTextResponse("this is served to the server's own machine only\n", status_code=403)
            await refusal(scope, receive, send)


def near(scope: Scope, host: str) -> bool:
    """Whether a request comes from this machine, which listens at `host`.

    Its own address counts only where it listens there alone, since its own processes then ask from there. One that listens
    anywhere may be in a container to which every request seems to come from the container's own address.
    """
    asking, asked = scope.get("client"), scope.get("server")
    if asking is None:
        return False
    address = ip_address(asking[0])
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    return address.is_loopback or (host not in ANYWHERE and asked is not None and asking[0] == asked[0])


class Places(InMemoryLinkState):
    """Nodes by their keys, of which one that is still taken for connected may connect again."""

    def activate_node(self, node_id: int, heartbeat_interval: float) -> bool:
        self.deactivate_node(node_id)
        return super().activate_node(node_id, heartbeat_interval)


class OnDisk(InMemoryObjectStore):
    """Keeps in memory which objects there are, and what they hold in `folder`."""

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
        """Nothing of one that is not known; of one that has not come it is empty."""
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
    extensions.get_middleware = lambda: (Middleware(OthersAreNodes, host),)
    states: Any = linkstate_factory  # of the one version that we pin
    states.InMemoryLinkState = Places
    stores: Any = object_store_factory
    stores.InMemoryObjectStore = partial(OnDisk, Path(os.environ[OBJECTS]))
    flower_superlink()


if __name__ == "__main__":
    main()
