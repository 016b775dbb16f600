"""Messages over a socket of this machine: to a process that stays, from one that Flower starts for each message.

Needs neither torch nor transformers.
"""

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread
from time import sleep

from fedexperts.engines.message import Message, from_bytes, to_bytes
from fedexperts.errors import BadMessage, BadValue, FedExpertsError

TRIES = 2
"""A message that has ended so many processes is not handed to another."""
PIECE = 2**20  # bytes at a time
WATCH_SECONDS = 0.5
LONGEST = 103  # bytes of a socket's path, where the least is allowed
PARENT = "FEDEXPERTS_PARENT"
"""The environment variable that says which process has started this one; that may have ended before this one can look."""


def listening(path: Path) -> socket.socket:
    """A socket at `path` that only its owner can reach. Whoever holds it may hand it to another process, or to the next one.

    Raises:
        BadValue: `path` is too long for one.
    """
    if len(os.fsencode(path)) > LONGEST:
        raise BadValue(f"{path} is too long a path for a socket; set TMPDIR to a shorter folder")
    listener = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)
    listener.listen()
    return listener


def serve(listener: socket.socket, answer: Callable[[Message], Message]) -> None:
    """Answers messages that come to `listener`, one after the other, for ever; refusals go back as their sentence."""
    while True:
        connection, _ = listener.accept()
        with connection, suppress(ConnectionError, EOFError):  # whoever asked has gone
            send(connection, to_bytes(answered(receive(connection), answer)))


def answered(data: bytes, answer: Callable[[Message], Message]) -> Message:
    try:
        return answer(from_bytes(data))
    except FedExpertsError as error:
        return Message({"refused": str(error)}, {})


def ask(path: str, message: Message) -> Message:
    """What the process that listens at `path` answers; when it dies of the message, the one that takes its place is asked.

    Raises:
        BadMessage: it refuses it; or it died each time.
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
        EOFError: it ends before.
    """
    found = bytearray()
    while len(found) < size:
        piece = connection.recv(min(PIECE, size - len(found)))
        if not piece:
            raise EOFError(f"{len(found)} of {size} bytes came")
        found += piece
    return bytes(found)


def end_with_parent() -> None:
    """Ends this process soon after the one that started it, however that ends."""
    parent = int(os.environ[PARENT])

    def watch() -> None:
        while os.getppid() == parent:
            sleep(WATCH_SECONDS)
        os._exit(1)

    Thread(target=watch, name="end with parent", daemon=True).start()
