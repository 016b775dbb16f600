"""What a client finds out before it joins: the server's clock and version, whose keys it has, and when certificates expire."""

import json
import logging
import shutil
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from fedexperts.deploy.keys import make_keys
from fedexperts.deploy.site import ask, clock_error, expiry_in, expiry_warnings, identity, info_in, require_same_protocol
from fedexperts.deploy.supervisor import SuperNodeSupervisor
from fedexperts.engines.message import PROTOCOL, VERSION
from fedexperts.errors import BadRun, BadValue

NOW = datetime(2030, 1, 1, tzinfo=UTC)


@contextmanager
def answering(**changes):
    """The address of a server that says who it is, with `changes`; None: nothing."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            said = {"time": time.time() - changes.get("ahead", 0), "protocol": PROTOCOL, "version": VERSION, **changes}
            self.send_response(404 if changes.get("is_old") else 200)
            self.end_headers()
            self.wfile.write(b"not found" if changes.get("is_old") else json.dumps(said).encode())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    make_keys(folder, ["localhost"], ["north", "east"])
    return folder


def obstacle(server, tmp_path):
    return SuperNodeSupervisor("north", server, tmp_path, None, []).obstacle()


@pytest.mark.parametrize(
    ("ahead", "said"),
    [
        (60, "its clock is 60 s ahead of the server's, which refuses more than 5 s; set the clock right, for example with "),
        (-600, "its clock is 600 s behind the server's, which refuses more than 300 s"),
        (3, ""),
        (-60, ""),
    ],
)
def test_a_client_whose_clock_the_server_would_refuse_says_so_and_by_how_much(tmp_path, ahead, said):
    with answering(ahead=ahead) as server:
        assert obstacle(server, tmp_path).startswith(said) and bool(obstacle(server, tmp_path)) == bool(said)


def test_a_server_of_another_protocol_stops_the_client_and_one_of_another_version_is_warned_of_once(tmp_path, caplog):
    with answering(protocol=PROTOCOL + 1, version="9.9") as server, pytest.raises(BadRun) as stopped:
        obstacle(server, tmp_path)
    assert f"runs FedExperts 9.9 (protocol {PROTOCOL + 1}), and this machine has {VERSION} (protocol {PROTOCOL})" in str(
        stopped.value
    )
    with answering(version="9.9") as server, caplog.at_level(logging.WARNING, "fedexperts"):
        supervisor = SuperNodeSupervisor("north", server, tmp_path, None, [])
        assert [supervisor.obstacle(), supervisor.obstacle()] == ["", ""]
    assert [record.getMessage() for record in caplog.records] == [
        f"north: the server has FedExperts 9.9, and this is {VERSION}; they can work together"
    ]


def test_a_server_that_does_not_say_who_it_is_is_joined_as_before(tmp_path):
    with answering(is_old=True) as server:
        info = ask(server, None)
        assert (info.protocol, info.ahead_seconds, clock_error(info)) == (None, None, None)
        require_same_protocol(info, server)
        assert obstacle(server, tmp_path) == ""


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"time": "noon"}', b'{"time": 1, "protocol": "six", "version": 1}'])
def test_what_a_server_says_may_be_nonsense(body):
    assert info_in(body, 0.0, None).protocol is None


def test_keys_say_whose_they_are_and_a_client_does_not_start_with_anothers(keys, tmp_path):
    assert [identity(keys / name) for name in ("north", "east")] == ["north", "east"]
    with pytest.raises(BadValue, match=r"holds the keys of east, and --name is north: .* give north the folder north"):
        SuperNodeSupervisor("north", "localhost:1", tmp_path, keys / "east", [])
    SuperNodeSupervisor("north", "localhost:1", tmp_path, keys / "north", [])


def test_keys_that_do_not_belong_together_are_refused_and_older_ones_name_nobody(keys, tmp_path):
    mixed = shutil.copytree(keys / "north", tmp_path / "mixed")
    shutil.copy(keys / "east" / "node.pub", mixed)
    with pytest.raises(BadValue, match=r"is not the public key of node\.key beside it"):
        identity(mixed)
    (mixed / "node.pub").write_bytes(b" ".join((keys / "north" / "node.pub").read_bytes().split()[:2]))
    assert identity(mixed) is None
    (mixed / "node.pub").unlink()
    assert identity(mixed) is None
    (mixed / "node.key").write_bytes(b"nonsense")
    with pytest.raises(BadValue, match="is no key that"):
        identity(mixed)


@pytest.mark.parametrize(
    ("days", "said"), [(400, []), (31, []), (29, ["expires on 2030-01-30"]), (-1, ["expired on 2029-12-31"])]
)
def test_certificates_are_warned_of_a_month_before_they_expire(days, said):
    warnings = [*expiry_warnings({"ca.pem": NOW + timedelta(days=days), "none": None}, NOW)]
    assert [warning.split(";")[0] for warning in warnings] == [f"ca.pem {each}" for each in said]


def test_the_servers_certificate_is_valid_for_a_year_and_the_authoritys_for_five(keys):
    days = [(expiry_in(keys / name) - datetime.now(UTC)).days for name in ("server/server.pem", "ca.pem")]
    assert days == [364, 1824]
