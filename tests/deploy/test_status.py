"""/health, /status and /metrics: what they say, and to whom."""

import json
import socket
import ssl
import time
import urllib.error
import urllib.request
from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest

from fedexperts.core.ledger import Entry
from fedexperts.deploy import status as page
from fedexperts.deploy.keys import make_keys
from fedexperts.deploy.processes import free_port
from fedexperts.deploy.run_log import RunLog
from fedexperts.deploy.status import Status, StatusPage, token_in
from fedexperts.errors import BadRun, BadValue

ANSWER = Entry(1, "north", "train", 4, bytes_down=300, bytes_up=200, seconds=1.25, tokens=100, loss=0.5)
TOKEN = "0123456789abcdef"


def get(url, token=None, context=None):
    """The status code and the body."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=20, context=context) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def well():
    return None


@pytest.fixture
def status():
    """After a round of two clients, of which one failed."""
    log = RunLog(Status(run="out"))
    log.start("fedavg", 7, 0, 3)
    assert log.status.state == "waiting for clients"
    log.connected()
    log.answered(ANSWER)
    log.answered(replace(ANSWER, client='so"uth', loss=None, bytes_up=0, failed="its disk is full"))
    log.round(SimpleNamespace(round=1, task="train"))
    log.scored(SimpleNamespace(round=1), SimpleNamespace(tasks=["double"], main=lambda task: 0.25))
    return log.status


@pytest.fixture
def url(status):
    with StatusPage(f"127.0.0.1:{free_port()}").serving(status, well, {"server.pem": datetime(2030, 1, 1, tzinfo=UTC)}) as at:
        yield f"http://{at[0]}:{at[1]}"


def test_the_status_has_the_round_the_loss_and_each_client(url):
    code, body = get(f"{url}/status")
    tree = json.loads(body)
    assert code == 200
    assert (tree["state"], tree["run"], tree["method"], tree["seed"]) == ("running", "out", "fedavg", 7)
    assert (tree["round"], tree["steps_done"], tree["steps"], tree["loss"], tree["scores"]) == (1, 1, 3, 0.5, {"double": 0.25})
    north, south = tree["clients"]["north"], tree["clients"]['so"uth']
    assert (north["answers"], north["failures"], north["bytes_down"], north["bytes_up"], north["loss"]) == (1, 0, 300, 200, 0.5)
    assert (south["answers"], south["failures"], south["last_failure"]) == (0, 1, "round 1, train: its disk is full")


def test_metrics_are_lines_of_the_format_of_prometheus(url):
    code, body = get(f"{url}/metrics")
    lines = body.splitlines()
    assert code == 200
    assert "fedexperts_round 1" in lines and "fedexperts_loss 0.5" in lines
    assert 'fedexperts_client_failures_total{client="so\\"uth"} 1' in lines
    assert 'fedexperts_client_bytes_up_total{client="north"} 200' in lines
    assert 'fedexperts_score{task="double"} 0.25' in lines
    assert 'fedexperts_certificate_expires_seconds{file="server.pem"} 1893456000.0' in lines
    names = {line.split("{")[0].split(" ")[0] for line in lines if not line.startswith("#")}
    assert names == {line.split(" ")[2] for line in lines if line.startswith("# TYPE")}
    assert {line.split(" ")[3] for line in lines if line.startswith("# TYPE")} == {"gauge", "counter"}


def test_health_is_200_as_long_as_the_superlink_runs_and_503_with_the_reason_after_that(status):
    def ill():
        raise BadRun("Flower's SuperLink has stopped")

    for check, code, body in ((well, 200, {"ok": True}), (ill, 503, {"ok": False, "reason": "Flower's SuperLink has stopped"})):
        with StatusPage(f"127.0.0.1:{free_port()}").serving(status, check, {}) as (host, port):
            answer = get(f"http://{host}:{port}/health")
            assert (answer[0], json.loads(answer[1])) == (code, body)


def test_other_paths_are_404(url):
    assert get(f"{url}/etc/passwd")[0] == 404


def test_elsewhere_than_on_loopback_it_needs_a_token_and_speaks_tls(status, tmp_path):
    make_keys(tmp_path, ["localhost"], ["north"])
    with pytest.raises(BadValue, match=r"can be reached from other machines, which needs --keys and --status-token"):
        StatusPage("0.0.0.0:1")
    with pytest.raises(BadValue, match="needs --keys and --status-token"):
        StatusPage("0.0.0.0:1", TOKEN)
    page = StatusPage(f"0.0.0.0:{free_port()}", TOKEN, tmp_path / "server")
    context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    with page.serving(status, well, {}) as (_, port):
        url = f"https://localhost:{port}/status"
        assert [get(url, token, context)[0] for token in (None, "wrong", TOKEN)] == [401, 401, 200]
        with pytest.raises(OSError):
            get(f"http://localhost:{port}/status", TOKEN)


def test_a_token_that_others_can_read_or_that_is_short_is_refused(tmp_path):
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    path.chmod(0o644)
    with pytest.raises(BadValue, match="chmod 600"):
        token_in(path)
    path.chmod(0o600)
    assert token_in(path) == TOKEN
    path.write_text("short")
    with pytest.raises(BadValue, match="has 5 characters; give 16 at least"):
        token_in(path)


def test_an_address_that_is_taken_is_named(status, url):
    page = StatusPage(url.removeprefix("http://"))
    with pytest.raises(BadRun, match=r"cannot be served at .*give another --status"), page.serving(status, well, {}):
        pass


def test_requests_that_end_badly_say_nothing_and_no_more_than_a_few_are_answered_at_a_time(status, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(page, "MOST_REQUESTS", 2)
    make_keys(tmp_path, ["localhost"], ["north"])
    with StatusPage(f"0.0.0.0:{free_port()}", TOKEN, tmp_path / "server").serving(status, well, {}) as at:
        address = ("127.0.0.1", at[1])
        with socket.create_connection(address) as plain:
            plain.sendall(b"GET /health HTTP/1.1\r\n\r\n")
            plain.settimeout(20)
            while plain.recv(1000):
                pass
        silent = [socket.create_connection(address) for _ in range(2)]
        time.sleep(0.3)
        with socket.create_connection(address) as third:
            third.settimeout(20)
            assert third.recv(1) == b""
        for each in silent:
            each.close()
    assert "Traceback" not in capfd.readouterr().err


def test_a_request_that_comes_in_drops_is_cut_off(status, monkeypatch):
    monkeypatch.setattr(page, "SECONDS", 1.0)
    with (
        StatusPage(f"127.0.0.1:{free_port()}").serving(status, well, {}) as at,
        socket.create_connection(at) as slow,
        pytest.raises(OSError),
    ):
        for _ in range(100):
            slow.sendall(b"G")
            time.sleep(0.2)
