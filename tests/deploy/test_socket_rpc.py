"""Messages over a socket to the process that stays, and how little the process needs that Flower starts for each."""

import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from threading import Thread

import pytest

from fedexperts.deploy.socket_rpc import PARENT, answered, ask, exactly, listening, receive, send
from fedexperts.engines.message import Message, to_bytes
from fedexperts.errors import BadMessage, BadValue

LARGE = bytes(range(256)) * 20_000  # several pieces


@contextmanager
def worker(path, *lives):
    """Answers a connection in each of its lives: by a function, or, for None, by dying of what came."""

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
    return Message({"said": message.head["say"]}, message.parts)


def refuse(message):
    raise BadValue(f"{message.head['say']} is not to be had")


LETTER = Message({"say": "hello"}, {"a": LARGE, "b": b""})


def test_a_letter_gets_its_answer_whole(tmp_path):
    with worker(tmp_path / "s", echo):
        assert ask(str(tmp_path / "s"), LETTER) == Message({"said": "hello"}, LETTER.parts)


def test_only_its_owner_can_reach_the_socket(tmp_path):
    with listening(tmp_path / "s"):
        assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600


def test_a_refusal_comes_back_as_its_sentence(tmp_path):
    with worker(tmp_path / "s", refuse), pytest.raises(BadMessage, match=r"^hello is not to be had$"):
        ask(str(tmp_path / "s"), LETTER)


def test_what_is_no_letter_is_refused_and_the_worker_lives_on():
    reply = answered(to_bytes(LETTER)[:-1], echo)
    assert "cut off" in reply.head["refused"]


def test_when_the_worker_dies_of_a_letter_the_next_one_gets_it(tmp_path):
    with worker(tmp_path / "s", None, echo):
        assert ask(str(tmp_path / "s"), LETTER).head == {"said": "hello"}


def test_a_letter_that_ends_two_workers_is_given_up(tmp_path):
    with worker(tmp_path / "s", None, None), pytest.raises(BadMessage, match="died 2 times"):
        ask(str(tmp_path / "s"), LETTER)


def test_a_process_whose_parent_ended_before_it_could_look_ends_too():
    """Else one that was still importing when its watcher was killed would stay for ever."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    program = "import time; from fedexperts.engines.flower.worker import end_with_parent; end_with_parent(); time.sleep(100_000)"
    orphan = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, PARENT: str(ended.pid)})
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


@pytest.mark.parametrize("module", ["relay", "lender", "member", "bundle"])
def test_what_flower_starts_for_each_message_and_what_watches_needs_neither_torch_nor_transformers(module):
    code = f"import sys, fedexperts.engines.flower.{module}; print(*{{'torch', 'transformers'}} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
