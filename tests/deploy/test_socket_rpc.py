"""Messages over a socket to the worker that stays, and how little the processes need that Flower starts for each."""

import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from threading import Thread

import pytest

from fedexperts.deploy.processes import PARENT_VARIABLE
from fedexperts.deploy.socket_rpc import answered, call, exactly, listening, receive, send
from fedexperts.engines.message import Message, to_bytes
from fedexperts.errors import BadMessage, BadValue

LARGE = bytes(range(256)) * 20_000  # several pieces


@contextmanager
def worker(path, *lives):
    """Answers one connection in each of its lives: by a function, or, for None, by dying of the message."""

    def live(listener):
        for answer in lives:
            connection, _ = listener.accept()
            with connection:
                data = receive(connection)
                if answer is not None:
                    send(connection, to_bytes(answered(data, answer)))

    with listening(path) as listener:
        thread = Thread(target=live, args=(listener,))
        thread.start()
        try:
            yield
        finally:
            thread.join()


def echo(message):
    return Message({"echo": message.head["say"]}, message.parts)


def refuse(message):
    raise BadValue(f"{message.head['say']} cannot be had")


MESSAGE = Message({"say": "hello"}, {"a": LARGE, "b": b""})


def test_a_message_gets_its_answer_whole(tmp_path):
    with worker(tmp_path / "s", echo):
        assert call(str(tmp_path / "s"), MESSAGE) == Message({"echo": "hello"}, MESSAGE.parts)


def test_only_its_owner_can_reach_the_socket(tmp_path):
    with listening(tmp_path / "s"):
        assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600


def test_a_refusal_comes_back_as_its_sentence(tmp_path):
    with worker(tmp_path / "s", refuse), pytest.raises(BadMessage, match=r"^hello cannot be had$"):
        call(str(tmp_path / "s"), MESSAGE)


def test_a_message_that_was_cut_off_is_refused_and_the_worker_lives_on():
    reply = answered(to_bytes(MESSAGE)[:-1], echo)
    assert "cut off" in reply.head["refused"]


def test_when_the_worker_dies_of_a_message_the_next_one_gets_it(tmp_path):
    with worker(tmp_path / "s", None, echo):
        assert call(str(tmp_path / "s"), MESSAGE).head == {"echo": "hello"}


def test_a_message_that_ends_two_workers_is_given_up(tmp_path):
    with worker(tmp_path / "s", None, None), pytest.raises(BadMessage, match="died 2 times"):
        call(str(tmp_path / "s"), MESSAGE)


def test_a_process_whose_parent_ended_before_it_could_look_ends_too():
    """Else one that was still importing when its supervisor was killed would stay for ever."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    program = "import time; from fedexperts.deploy.processes import end_with_parent; end_with_parent(); time.sleep(100_000)"
    orphan = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, PARENT_VARIABLE: str(ended.pid)})
    try:
        assert orphan.wait(timeout=120) == 1
    finally:
        orphan.kill()


def test_bytes_that_end_early_are_no_answer(tmp_path):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"abc")
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(EOFError, match="3 of 8"):
            exactly(ours, 8)


@pytest.mark.parametrize("module", ["client_app", "server_app", "supervisor", "bundle"])
def test_what_flower_starts_and_the_supervisor_need_neither_torch_nor_transformers(module):
    code = f"import sys, fedexperts.deploy.{module}; print(*{{'torch', 'transformers'}} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == []
