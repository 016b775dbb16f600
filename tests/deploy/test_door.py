"""What a SuperLink lets in before it knows who sends it: sizes, signatures, pauses and connections."""

import asyncio
import socket
import time
from contextlib import ExitStack, contextmanager
from datetime import datetime, timedelta
from threading import Thread

import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_private_key
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fedexperts.deploy import door, site
from fedexperts.deploy.door import MAX_UNKNOWN_BYTES, ImpatientProtocol, LimitedAccess, is_signed, refusal, timed
from fedexperts.deploy.keys import make_keys
from fedexperts.deploy.site import signed_headers
from fedexperts.engines.message import PROTOCOL, VERSION

PATH = "/v1/fleet/push-object"


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    make_keys(folder, ["localhost"], ["north", "stranger"])
    return folder


@pytest.fixture(scope="module")
def registered(keys):
    """Knows north alone, as Flower registers a key."""
    north = public_key_to_bytes(load_ssh_private_key((keys / "north" / "node.key").read_bytes(), None).public_key())
    return lambda public: public == north


def in_bytes(headers):
    return {name.encode(): value.encode() for name, value in headers.items()}


def answer(registered, headers, path=PATH, length=10_000, client="10.0.0.2", about=None):
    """The status and the body of the answer to a request; 200 where the app beneath it answers."""
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "client": (client, 1), "server": ("10.0.0.1", 9092)}
    scope["headers"] = [*in_bytes({**headers, "content-length": str(length)}).items()]
    asyncio.run(LimitedAccess(app, "0.0.0.0", registered, about)(scope, None, send))
    return sent[0]["status"], sent[1]["body"], dict(sent[0]["headers"])


def test_headers_and_tolerances_are_flowers():
    """Flower's own, read from its constants: these are repeated here for processes that do not import it."""
    assert (site.KEY_HEADER, site.SIGNATURE_HEADER) == (FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER)
    assert TIMESTAMP_HEADER == site.TIME_HEADER
    assert (SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE) == (site.MOST_AHEAD, site.MOST_BEHIND)


def test_only_a_registered_key_that_signed_the_time_of_now_may_send_a_large_body(keys, registered):
    assert answer(registered, signed_headers(keys / "north"))[0] == 200
    code, _, headers = answer(registered, signed_headers(keys / "stranger"))
    assert code == 401 and headers[b"connection"] == b"close"
    assert answer(registered, {})[0] == 401
    mixed = {**signed_headers(keys / "stranger"), site.KEY_HEADER: signed_headers(keys / "north")[site.KEY_HEADER]}
    assert answer(registered, mixed)[0] == 401
    assert answer(registered, {}, length=MAX_UNKNOWN_BYTES)[0] == 200  # Flower refuses it, as soon as it has read it
    assert answer(None, {})[0] == 200  # without keys there is nothing to check


@pytest.mark.parametrize(("seconds", "is_allowed"), [(-400, False), (-200, True), (0, True), (10, False)])
def test_a_signature_of_another_time_does_not_count(keys, registered, monkeypatch, seconds, is_allowed):
    class Clock(datetime):
        @classmethod
        def now(cls, zone):
            return datetime.now(zone) + timedelta(seconds=seconds)

    monkeypatch.setattr(site, "datetime", Clock)
    assert is_signed(in_bytes(signed_headers(keys / "north")), registered) == is_allowed


@pytest.mark.parametrize("name", [site.KEY_HEADER, site.SIGNATURE_HEADER, site.TIME_HEADER])
@pytest.mark.parametrize("value", ["", "nonsense", "bm9uc2Vuc2U=", "\u00fc"])
def test_headers_of_nonsense_do_not_count(keys, registered, name, value):
    headers = in_bytes(signed_headers(keys / "north"))
    assert is_signed(headers, registered)
    assert not is_signed({**headers, name.encode(): value.encode()}, registered)
    assert not is_signed({key: each for key, each in headers.items() if key != name.encode()}, lambda public: True)


def test_a_key_of_another_kind_does_not_count(keys):
    other = ec.generate_private_key(ec.SECP256R1()).public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    headers = in_bytes(signed_headers(keys / "north"))
    assert not is_signed({**headers, site.KEY_HEADER.encode(): site.b64encode(other)}, lambda public: True)


def test_anyone_is_told_the_time_and_the_version_and_registered_nodes_what_the_run_is(keys, registered, tmp_path):
    (tmp_path / "about.json").write_text('{"model_hash": "abc"}')
    ask = {"path": site.ABOUT_PATH, "length": 0, "about": tmp_path / "about.json"}
    code, body, _ = answer(registered, {}, **ask)
    info = site.info_in(body, time.time(), None)
    assert code == 200 and abs(info.ahead_seconds) < 5
    assert (info.protocol, info.version) == (PROTOCOL, VERSION) and info.said.keys() == {"time", "protocol", "version"}
    more = site.info_in(answer(registered, signed_headers(keys / "north"), **ask)[1], time.time(), None)
    assert (more.said["registered"], more.said["model_hash"]) == (True, "abc")


def test_a_sender_that_pauses_in_its_body_is_taken_for_gone_and_one_that_has_sent_all_is_waited_for(monkeypatch):
    monkeypatch.setattr(door, "BODY_SECONDS", 0.1)
    pieces = [{"type": "http.request", "more_body": True}, None, {"type": "http.request", "more_body": False}]

    async def receive():
        piece = pieces.pop(0)
        if piece is None:
            await asyncio.sleep(0.5)
            return {"type": "late"}
        return piece

    async def both():
        slow = timed(receive)
        first = [await slow(), await slow()]
        quick = timed(receive)
        await quick()
        pieces.append(None)
        return first, await quick()  # what comes after the body may take its time

    (whole, gone), last = asyncio.run(both())
    assert (whole["type"], gone["type"], last["type"]) == ("http.request", "http.disconnect", "late")


async def empty(scope, receive, send):
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


@contextmanager
def serving(app=empty, **options):
    """The address of a server of `app` with the protocol and the loop of a SuperLink."""
    own = {"http": ImpatientProtocol, "loop": "fedexperts.deploy.door:ImpatientLoop", "lifespan": "off", "ws": "none"}
    running = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", **own, **options))
    thread = Thread(target=running.run)
    thread.start()
    while not running.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield running.servers[0].sockets[0].getsockname()
    finally:
        running.should_exit = True
        thread.join()


@pytest.fixture
def address(monkeypatch):
    """Of a server that waits a second for the head of a request."""
    monkeypatch.setattr(door, "HEAD_SECONDS", 1.0)
    with serving() as address:
        yield address


def has_closed(connection):
    """Whether the other side closes it within 20 seconds."""
    connection.settimeout(20)
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_a_connection_that_sends_no_request_is_closed_and_others_are_answered_meanwhile(address):
    silent = [socket.create_connection(address) for _ in range(20)]
    silent[0].sendall(b"POST / HTTP/1.1\r\nx-slow: ")
    with socket.create_connection(address) as good:
        good.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert good.recv(100).startswith(b"HTTP/1.1 204")
    started = time.monotonic()
    for each in silent:
        assert has_closed(each)
        each.close()
    assert time.monotonic() - started < 10


def test_a_connection_that_was_answered_and_does_not_end_its_next_request_is_closed(address):
    with socket.create_connection(address) as slow:
        slow.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert slow.recv(100).startswith(b"HTTP/1.1 204")
        slow.sendall(b"POST / HTTP/1.1\r\nx-slow: ")
        assert has_closed(slow)


def test_a_sender_whose_body_is_refused_is_cut_off(monkeypatch):
    monkeypatch.setattr(door, "CLOSE_SECONDS", 0.2)

    async def app(scope, receive, send):
        await refusal("no", 401)(scope, receive, send)

    with serving(app) as address, socket.create_connection(address) as sender:
        sender.settimeout(20)
        sender.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 16000000000\r\n\r\n")
        assert sender.recv(1000).startswith(b"HTTP/1.1 401")
        started = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() < started + 20:
                sender.sendall(b"0" * 2**16)


def test_an_address_of_another_machine_has_so_many_connections_and_no_more(address, monkeypatch):
    monkeypatch.setattr(door, "is_loopback_address", lambda text: False)
    monkeypatch.setattr(door, "MOST_CONNECTIONS", 3)
    monkeypatch.setattr(door, "HEAD_SECONDS", 60.0)
    kept = [socket.create_connection(address) for _ in range(3)]
    time.sleep(0.2)
    with socket.create_connection(address) as fourth:
        assert has_closed(fourth)
    kept[0].sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    assert kept[0].recv(100).startswith(b"HTTP/1.1 204")
    for each in kept:
        each.close()


def test_connections_of_registered_nodes_do_not_count_among_the_unknown_ones(registered, keys, monkeypatch):
    monkeypatch.setattr(door, "is_loopback_address", lambda text: False)
    monkeypatch.setattr(door, "MOST_UNKNOWN", 2)
    head = "".join(f"{name}: {value}\r\n" for name, value in signed_headers(keys / "north").items())
    request = f"GET {PATH} HTTP/1.1\r\nhost: x\r\n{head}\r\n".encode()
    with ExitStack() as stack:
        address = stack.enter_context(serving(LimitedAccess(empty, "0.0.0.0", registered)))
        known = []
        for _ in range(5):
            known.append(stack.enter_context(socket.create_connection(address)))
            known[-1].sendall(request)
            assert known[-1].recv(100).startswith(b"HTTP/1.1 204")
        for _ in range(2):
            stack.enter_context(socket.create_connection(address)).sendall(b"GET /v1/fleet/ HTTP/1.1\r\nhost: x\r\n\r\n")
        time.sleep(0.2)
        assert has_closed(stack.enter_context(socket.create_connection(address)))
        known[0].sendall(request)
        assert known[0].recv(100).startswith(b"HTTP/1.1 204")


def test_a_connection_that_does_not_shake_hands_is_closed(keys, monkeypatch):
    monkeypatch.setattr(door, "HEAD_SECONDS", 1.0)
    files = {"ssl_certfile": keys / "server" / "server.pem", "ssl_keyfile": keys / "server" / "server.key"}
    with serving(**files) as address, socket.create_connection(address) as silent:
        started = time.monotonic()
        assert has_closed(silent)
        assert time.monotonic() - started < 15
