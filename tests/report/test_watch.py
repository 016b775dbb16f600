"""The page of runs under way, asked for as a browser would, and as others should not."""

import http.client
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest

from fedexperts import report
from fedexperts.errors import BadValue
from fedexperts.report import page
from fedexperts.report.watch import LOOPBACK, Server

from .fake import write_comparison, write_run


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Server]:
    """A server of the folder `runs` of tmp_path, where nothing is yet."""
    server = Server([tmp_path / "runs"], port=0, seconds=7)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def ask(server: Server, path: str = "/", method: str = "GET", host: str | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection(LOOPBACK, server.server_port, timeout=30)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", f"{LOOPBACK}:{server.server_port}" if host is None else host)
    connection.endheaders()
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def test_before_a_run_has_begun_the_page_says_so_and_reloads_itself(serving: Server, tmp_path: Path):
    status, text = ask(serving)
    assert status == 503 and "is not a folder" in text and '<meta http-equiv="refresh" content="7">' in text
    write_run(tmp_path / "runs", rounds=2, planned_rounds=10)
    status, text = ask(serving)
    assert status == 200 and "2 of 10 done so far" in text and '<meta http-equiv="refresh" content="7">' in text
    write_run(tmp_path / "runs", rounds=4, planned_rounds=10)
    assert "4 of 10 done so far" in ask(serving)[1]


def test_the_page_has_the_numbers_of_the_report_of_the_same_runs_and_unfinished_ones_beside_them(serving: Server, tmp_path: Path):
    runs = write_comparison(tmp_path / "runs", methods=("fedmoe", "fedavg"), seeds=2)
    report.write([runs], html=tmp_path / "r.html")
    assert ask(serving)[1].replace('<meta http-equiv="refresh" content="7">\n', "") == (tmp_path / "r.html").read_text()
    write_run(runs / "local" / "seed-0", "local", 0, rounds=2, planned_rounds=12)
    text = ask(serving)[1]
    assert "local, seed 0 (2 of 12 rounds)" in text and '<th scope="row">local</th>' in text


def test_only_the_page_and_the_code_that_draws_are_served(serving: Server, tmp_path: Path):
    write_run(tmp_path / "runs", rounds=2)
    status, text = ask(serving, f"/{page.LIBRARY}")
    assert status == 200 and text == page.library()
    others = (
        "/plan.json",
        "/runs/plan.json",
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/?x",
        "/index.html",
    )
    assert [ask(serving, path)[0] for path in others] == [404] * len(others)
    assert [ask(serving, method=method)[0] for method in ("POST", "PUT", "DELETE", "OPTIONS")] == [501] * 4
    assert ask(serving, method="HEAD") == (200, "")


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "127.0.0.1.evil.example:{port}", ""]
)
def test_a_name_that_a_foreign_page_lets_point_here_gets_nothing(serving: Server, tmp_path: Path, host: str):
    write_run(tmp_path / "runs", rounds=2)
    status, text = ask(serving, host=host.format(port=serving.server_port))
    assert status == 403 and "fedmoe" not in text
    assert ask(serving, host=f"localhost:{serving.server_port}")[0] == 200


def test_it_listens_on_the_loopback_interface_alone_and_a_taken_port_is_a_sentence(serving: Server):
    assert serving.server_address[0] == "127.0.0.1"
    with pytest.raises(BadValue, match=rf"port {serving.server_port} of this machine cannot be used .*--port"):
        Server([], port=serving.server_port, seconds=1)


def test_ctrl_c_ends_the_command_without_a_word(tmp_path: Path):
    write_run(tmp_path / "runs", rounds=2)
    command = [sys.executable, "-m", "fedexperts", "watch", str(tmp_path / "runs"), "--port", "0"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    signal.signal(signal.SIGINT, before)
    assert process.stdout is not None
    line = process.stdout.readline()
    port = int(re.fullmatch(r"open http://127\.0\.0\.1:(\d+)/ in a browser .*\n", line)[1])
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=60)
    connection.request("GET", "/")
    assert connection.getresponse().status == 200
    connection.close()
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=30)
    assert (process.returncode, out, error) == (0, "", "")
