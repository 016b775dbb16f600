"""The commands of a deployment, and how they refuse mistakes before anything listens."""

import shutil
import tempfile
from pathlib import Path

import pytest
import tomli_w
from deployed import below, gone, processes, until

from fedexperts.deploy import commands, deployment, server
from fedexperts.deploy.processes import free_port
from fedexperts.deploy.supervisor import exit_reason


@pytest.fixture
def run_file(tiny_tree, tmp_path):
    (tmp_path / "run.toml").write_text(tomli_w.dumps(tiny_tree))
    return tmp_path / "run.toml"


def test_keys_prints_what_it_wrote_and_the_second_time_that_nothing_was_missing(fedexperts, tmp_path):
    options = ("keys", tmp_path / "keys", "--host", "localhost,10.0.0.1", "--clients", "north,east")
    code, out, _ = fedexperts(*options)
    assert code == 0
    written = {line.removeprefix("written: ") for line in out.splitlines()}
    assert written == {str(path) for path in (tmp_path / "keys").rglob("*") if path.is_file()}
    assert fedexperts(*options)[:2] == (0, "all keys exist already\n")


def test_keys_or_no_security_must_be_given(fedexperts, run_file, tmp_path):
    client = ("client", "--name", "c01", "--server", "localhost:9092", "--run", run_file)
    for command in (("server", run_file, "--out", tmp_path / "out"), client):
        for more, given in (((), "neither"), (("--keys", tmp_path, "--insecure"), "both")):
            code, _, err = fedexperts(*command, *more)
            assert code == 2
            assert f"{given} of --keys and --insecure given; give --keys" in err


def test_without_security_nothing_but_this_machine_is_served_or_joined(fedexperts, run_file, tmp_path):
    code, _, err = fedexperts("server", run_file, "--out", tmp_path / "out", "--insecure", "--host", "0.0.0.0")
    assert (code, "can be reached from other machines" in err) == (2, True)
    client = ("client", "--name", "c01", "--server", "10.0.0.1:9092", "--run", run_file, "--insecure", "--out", tmp_path / "c01")
    code, _, err = fedexperts(*client)
    assert (code, "for a server on this machine" in err) == (2, True)


@pytest.mark.parametrize("address", ["localhost", "https://localhost:9092", "localhost:https"])
def test_what_is_no_address_is_refused(fedexperts, run_file, tmp_path, address):
    code, _, err = fedexperts("client", "--name", "c01", "--server", address, "--run", run_file, "--insecure", "--out", tmp_path)
    assert code == 2
    assert f"{address!r} is no address; give host:port" in err


def test_the_reason_of_a_supernodes_end_is_that_the_server_has_gone_and_else_its_last_line():
    gone = "\x1b[93mWARNING \x1b[0m:   Giving up reconnection after 30.00 seconds and 7 tries.\nERROR: Connection refused\n"
    assert exit_reason(f"INFO : joined\n{gone}") == "the server has gone"
    assert (
        exit_reason("\x1b[91mERROR \x1b[0m:     no space left\nINFO : bye\n") == "its SuperNode ended (ERROR :     no space left)"
    )
    assert exit_reason("") == "its SuperNode ended (without output)"


def test_a_centralized_method_is_refused_before_anything_starts(fedexperts, run_file, tmp_path):
    options = ("--out", tmp_path / "out", "--insecure", "--set", "method.name=centralized")
    code, _, err = fedexperts("server", run_file, *options)
    assert (code, "in one place" in err) == (2, True)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.flower").exists()


class NoFederation:
    """A federation without processes."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def check(self):
        pass

    def expiries(self):
        return {}


@pytest.mark.parametrize(("more", "is_warned_of"), [((), True), (("--set", "federation.round_seconds=60"), False)])
def test_a_run_in_which_a_silent_client_would_be_waited_for_for_ever_is_warned_of(
    fedexperts, run_file, tmp_path, monkeypatch, more, is_warned_of
):
    monkeypatch.setattr(deployment, "Federation", NoFederation)
    monkeypatch.setattr(server, "serve", lambda *_, **__: None)
    monkeypatch.setattr(commands, "finish", lambda *_: None)
    out = tmp_path / "out"
    code, _, err = fedexperts("server", run_file, "--out", out, "--insecure", "--port", free_port(), *more)
    assert code == 0, err
    assert ("round_seconds is not set, so a client that never answers" in err) == is_warned_of
    assert ("round_seconds is not set" in (tmp_path / "out.flower" / "log.jsonl").read_text()) == is_warned_of


def test_a_client_that_the_run_does_not_have_stops_with_the_reason(fedexperts, run_file, tmp_path):
    options = ("--run", run_file, "--set", 'data.names=["a","b","c","d"]', "--insecure", "--out", tmp_path / "x")
    code, _, err = fedexperts("client", "--name", "x", "--server", "127.0.0.1:1", *options)
    assert code == 2
    assert "x cannot take part" in err


def test_a_client_that_gets_sigterm_ends_its_worker_and_leaves_nothing_behind(run_file, tmp_path, monkeypatch):
    temporary = Path(tempfile.mkdtemp(prefix="t-"))  # a path that is long is none for a socket
    monkeypatch.setenv("TMPDIR", str(temporary))
    options = ("--name", "c01", "--server", "127.0.0.1:1", "--run", run_file, "--insecure", "--out", tmp_path / "c01")
    with processes(tmp_path) as started:
        started.start("client", "client", *options)
        until(
            lambda: "nobody answers" in started.log("client"),
            "the client announces that nobody answers",
            lambda: started.log("client"),
        )
        assert list(temporary.glob("fedexperts-*"))
        workers = below(tmp_path)
        client = started.running["client"]
        client.terminate()
        assert client.wait(60) == 130
        assert "interrupted" in started.log("client")
        until(lambda: all(map(gone, workers)), "its worker ends")
    assert not list(temporary.glob("fedexperts-*"))
    shutil.rmtree(temporary)


def test_a_folder_for_temporary_files_with_too_long_a_name_is_refused(fedexperts, run_file, tmp_path, monkeypatch):
    (tmp_path / ("a" * 100)).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("a" * 100)))
    options = ("--name", "c01", "--server", "127.0.0.1:1", "--run", run_file, "--insecure", "--out", tmp_path / "c01")
    code, _, err = fedexperts("client", *options)
    assert (code, "is too long a path for a socket; set TMPDIR to a shorter folder" in err) == (2, True)
