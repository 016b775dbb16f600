"""The ClientApp of a deployment: hands messages on to the worker of its machine. Each message starts a process of it."""

from collections.abc import Mapping
from typing import Any

from fedexperts.deploy.socket_rpc import ask
from fedexperts.engines.flower.client_app import client_app
from fedexperts.engines.message import Message


def relay(message: Message, node: Mapping[str, Any]) -> Message:
    """What the worker answers that listens where the node's configuration says."""
    return ask(str(node["socket"]), message)


app = client_app(relay)
