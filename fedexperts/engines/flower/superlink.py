"""The process of Flower's SuperLink: as its own command starts it, and closed where that leaves it open.

Its APIs share one port, and one of them, which has no passwords, starts runs. So only what nodes use is served to other machines.
And a node that comes back has the place that it had, at once; else it would be refused until it is missed, for a minute.
"""

import os
from ipaddress import IPv6Address, ip_address
from typing import Any

from flwr.server.superlink.linkstate import InMemoryLinkState, linkstate_factory
from flwr.supercore.app_utils import start_parent_process_monitor
from flwr.superlink import extensions
from flwr.superlink.cli import flower_superlink
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

FOR_NODES = "/v1/fleet/"


class OthersAreNodes:
    """Refuses other machines all but the fleet's paths."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"].startswith(FOR_NODES) or near(scope):
            await self.app(scope, receive, send)
        else:
            refusal = PlainTextResponse("this is served to the server's own machine only\n", status_code=403)
            await refusal(scope, receive, send)


def near(scope: Scope) -> bool:
    """Whether a request comes from this machine."""
    asking, asked = scope.get("client"), scope.get("server")
    if asking is None:
        return False
    address = ip_address(asking[0])
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    return address.is_loopback or (asked is not None and asking[0] == asked[0])


class Places(InMemoryLinkState):
    """Nodes by their keys, of which one that is still taken for connected may connect again."""

    def activate_node(self, node_id: int, heartbeat_interval: float) -> bool:
        self.deactivate_node(node_id)
        return super().activate_node(node_id, heartbeat_interval)


def main() -> None:
    start_parent_process_monitor(os.getppid())
    extensions.get_middleware = lambda: (Middleware(OthersAreNodes),)
    states: Any = linkstate_factory  # of the one version that we pin
    states.InMemoryLinkState = Places
    flower_superlink()


if __name__ == "__main__":
    main()
