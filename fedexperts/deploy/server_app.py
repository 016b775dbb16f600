"""The ServerApp of a deployment: lends its grid to the process that runs the rounds, and ends when that does."""

import json
import os
import socket
from contextlib import suppress

from flwr.serverapp import Grid

from fedexperts.deploy.flower_internals import HttpGrid, TaskIdentity
from fedexperts.engines.flower.server_app import server_app

SOCKET_VARIABLE = "FEDEXPERTS_GRID"
"""The environment variable with the path of the socket at which the process that runs the rounds listens."""


def lend(grid: Grid) -> None:
    """Sends what opens the grid to a socket that only its owner can reach, and waits for the other end to close it."""
    assert isinstance(grid, HttpGrid)
    identity = {"task": TaskIdentity.task_id, "run": TaskIdentity.run_id, "node": TaskIdentity.node_id}
    with socket.socket(socket.AF_UNIX) as connection, suppress(ConnectionError):
        connection.connect(os.environ[SOCKET_VARIABLE])
        connection.sendall(json.dumps({"token": grid._token, **identity}).encode() + b"\n")  # of the one version that we pin
        connection.recv(1)


app = server_app(lend)
