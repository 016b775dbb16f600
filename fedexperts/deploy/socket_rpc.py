"""Messages over a socket of this machine: to a worker that stays, from the processes that Flower starts for each message.

Needs neither torch nor transformers.
"""

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fedexperts.engines.message import Message, from_bytes, to_bytes
from fedexperts.errors import BadMessage, BadValue, FedExpertsError

TRIES = 2
"""A message that has ended so many workers is not handed to another."""
PIECE_BYTES = 2**20
MAX_PATH_BYTES = 103
"""Of a socket's path, on the system that allows the least."""

Handler = Callable[[Message], Message]
Leaving = Callable[[Message | None, Message], Message]
"""Called with a request (None: one that cannot be read) and the answer to it before this leaves; returns what leaves."""


def listening(path: Path) -> socket.socket:
    """A socket at `path` that only its owner can reach. A process may hand it to another one, or to the next.

    Raises:
        BadValue: `path` is too long for one.
    """
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise BadValue(f"{path} is too long a path for a socket; set TMPDIR to a shorter folder")
    listener = socket.socket(socket.AF_UNIX)
    umask = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(umask)
    listener.listen()
    return listener


def unrecorded(request: Message | None, reply: Message) -> Message:
    return reply


def serve(listener: socket.socket, handle: Handler, leaving: Leaving = unrecorded) -> None:
    """Answers messages that come to `listener`, one after the other, for ever; refusals travel back as their sentence."""
    while True:
        connection, _ = listener.accept()
        with connection, suppress(ConnectionError, EOFError):  # the caller has gone
            send(connection, to_bytes(answered(receive(connection), handle, leaving)))


def answered(data: bytes, handle: Handler, leaving: Leaving = unrecorded) -> Message:
    """The answer of `handle` to the message in `data`, or its refusal, as `leaving` returns it."""
    request = None
    try:
        request = from_bytes(data)
        reply = handle(request)
    except FedExpertsError as error:
        reply = Message({"refused": str(error)}, {})
    return leaving(request, reply)


def call(path: str, message: Message) -> Message:
    """The answer of the worker that listens at `path`; when it dies of the message, the worker that takes its place gets it.

    Raises:
        BadMessage: the worker refuses it; or it died each time.
    """
    data = to_bytes(message)
    for _ in range(TRIES):
        with socket.socket(socket.AF_UNIX) as connection, suppress(ConnectionError, EOFError):
            connection.connect(path)
            send(connection, data)
            reply = from_bytes(receive(connection))
            if "refused" in reply.head:
                raise BadMessage(reply.head["refused"])
            return reply
    raise BadMessage(f"its worker process died {TRIES} times of one job; its log says why")


def send(connection: socket.socket, data: bytes) -> None:
    connection.sendall(len(data).to_bytes(8, "big"))
    connection.sendall(data)


def receive(connection: socket.socket) -> bytes:
    return exactly(connection, int.from_bytes(exactly(connection, 8), "big"))


def exactly(connection: socket.socket, size: int) -> bytes:
    """The next `size` bytes.

    Raises:
        EOFError: the connection ends before.
    """
    received = bytearray()
    while len(received) < size:
        piece = connection.recv(min(PIECE_BYTES, size - len(received)))
        if not piece:
            raise EOFError(f"{len(received)} of {size} bytes came")
        received += piece
    return bytes(received)
