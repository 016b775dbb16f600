"""The ClientApp of a deployment, of which Flower starts a process for each message: forwards it to the worker of its machine."""

from collections.abc import Mapping
from typing import Any

from fedexperts.deploy.socket_rpc import call
from fedexperts.engines.flower.client_app import client_app
from fedexperts.engines.message import Message


def forward(message: Message, node_config: Mapping[str, Any]) -> Message:
    """What the worker answers that listens where the node's configuration says."""
    return call(str(node_config["socket"]), message)


app = client_app(forward)
