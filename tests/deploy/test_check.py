"""What a site finds out before it takes part, with real rows and keys."""

import csv
import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedexperts.config import RunConfig
from fedexperts.deploy import check as checks
from fedexperts.deploy.check import Site, check
from fedexperts.deploy.keys import make_keys
from fedexperts.deploy.site import ServerInfo
from fedexperts.engines.message import PROTOCOL, VERSION
from fedexperts.experiment import plan as planning
from fedexperts.experiment.setup import Parts
from fedexperts.io.toml import checked, to_toml

NAMES = ["north", "east"]


@pytest.fixture
def tree(tiny_tree):
    source = {"name": "theirs", "prompt": "Double: {number}", "response": "twice", "task": "double"}
    data = {"names": NAMES, "own": True, "test_examples": 2, "max_tokens": 24, "sources": [source]}
    return {**tiny_tree, "federation": {"rounds": 2}, "data": data}


@pytest.fixture
def run_file(tree, tmp_path):
    (tmp_path / "run.toml").write_text(to_toml(tree))
    return tmp_path / "run.toml"


@pytest.fixture
def rows(tmp_path):
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("number", "twice"), *((str(i), str(2 * i)) for i in range(20))])
    return tmp_path / "rows.csv"


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    make_keys(folder, ["localhost"], NAMES)
    return folder


def lines(out):
    """What was looked at → ok or to do, and what was found."""
    split = [line.split(maxsplit=1) if line.startswith("ok") else ["to do", line[6:]] for line in out.splitlines()[:-1]]
    return {rest.partition(": ")[0]: (state, rest.partition(": ")[2]) for state, rest in split}


def test_a_site_whose_rows_machine_and_keys_fit_is_told_so_line_by_line(fedexperts, run_file, rows, keys):
    code, out, err = fedexperts("check", run_file, "--data", rows, "--keys", keys / "north")
    assert (code, out.splitlines()[-1]) == (0, "all is in order"), out + err
    found = lines(out)
    assert {state for state, _ in found.values()} == {"ok"}
    assert found["name"][1] == "north is a client of the run"
    assert found["examples"][1].endswith("to train, 3 to validate, 2 to test")
    assert found["cuts"][1] == "nothing is cut at data.max_tokens = 24"
    assert found["keys"][1] == "of north, private"
    assert {"memory", "bytes a round", "time of a round", "base model", "told to the server", "authority"} <= found.keys()
    assert "GFLOP/s measured on cpu" in found["time of a round"][1]


def test_what_is_not_in_order_says_what_to_do_and_the_exit_code_is_2(fedexperts, run_file, rows, keys):
    options = ("--data", rows, "--keys", keys / "north", "--memory-gb", "0.000001", "--set", "data.max_tokens=5")
    code, out, _ = fedexperts("check", run_file, *options)
    found = lines(out)
    assert (code, out.splitlines()[-1]) == (2, "2 to do")
    assert found["cuts"][0] == "to do" and "data.max_tokens = 5 cuts" in found["cuts"][1]
    assert found["memory"][0] == "to do" and "lower training.batch_size" in found["memory"][1]


def test_a_site_whose_processor_is_slow_in_half_precision_is_told(run_file, rows, monkeypatch):
    monkeypatch.setattr(planning, "has_half_kernels", lambda: False)
    found = [*check(Site(run_file, (str(rows),), "north", settings=["model.dtype=bfloat16"]))]
    [slow] = [each for each in found if each.about == "products"]
    assert not slow.is_ok and 'set model.dtype = "float32"' in slow.found


@pytest.mark.parametrize(
    ("change", "about", "sentence"),
    [
        ({"name": "east"}, "keys", "holds the keys of north, and --name is east"),
        ({"name": "west", "keys": None}, "name", "the run has no client west; its clients are north, east"),
        ({"name": None, "keys": None}, "name", "which client is this? give --name, one of north, east"),
        ({"data": ()}, "rows", "and no --data was given"),
        ({"data": ("nowhere.csv",)}, "rows", "nowhere.csv"),
        ({"settings": ("data.limits=3",)}, "run file", "did you mean"),
    ],
)
def test_a_mistake_is_named(run_file, rows, keys, change, about, sentence):
    site = {"run_file": run_file, "data": (str(rows),), "name": "north", "keys": keys / "north", **change}
    *_, last = [finding for finding in check(Site(**site)) if not finding.is_ok]
    assert last.about == about and sentence in last.found


@pytest.mark.parametrize(
    ("file", "about", "sentence"), [("node.key", "keys", "is no key that"), ("ca.pem", "authority", "holds no certificate")]
)
def test_a_damaged_key_or_certificate_is_named(run_file, rows, keys, tmp_path, file, about, sentence):
    damaged = shutil.copytree(keys / "north", tmp_path / "damaged")
    (damaged / file).write_text("garbage")
    found = [*check(Site(run_file, (str(rows),), keys=damaged, server="localhost:1"))]
    [named] = [finding for finding in found if not finding.is_ok and finding.about == about]
    assert f"{damaged / file} {sentence}" in named.found


def test_memory_that_the_page_cache_holds_is_free():
    available = int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]) * 1024
    assert abs(checks.free_bytes() - available) < 2**30


def server(**changes):
    said = {"registered": True, "model_hash": None, **changes.pop("said", {})}
    return ServerInfo(**{"ahead_seconds": 0.2, "protocol": PROTOCOL, "version": VERSION, "said": said, **changes})


@pytest.mark.parametrize(
    ("info", "about", "sentence"),
    [
        (None, "server", "nobody answers at localhost:1; start the server"),
        (server(protocol=PROTOCOL + 1), "server", f"protocol {PROTOCOL + 1}"),
        (server(ahead_seconds=60.0), "clock", "its clock is 60 s ahead of the server's, which refuses more than 5 s"),
        (server(ahead_seconds=-400.0), "clock", "its clock is 400 s behind the server's, which refuses more than 300 s"),
        (server(said={"registered": False}), "registration", "copy this client's .pub file to keys/server/clients"),
        (
            server(expires=datetime.now(UTC) + timedelta(days=3)),
            "certificate",
            "make another with `fedexperts keys FOLDER --rotate`",
        ),
        (server(said={"model_hash": "another"}), "base model", "their files differ; give both sides copies of one folder"),
    ],
)
def test_a_server_that_does_not_fit_is_named(run_file, rows, keys, monkeypatch, info, about, sentence):
    asked = []
    monkeypatch.setattr(checks, "ask", lambda address, folder, headers: asked.append(headers) or info)
    findings = [*check(Site(run_file, (str(rows),), "north", keys / "north", "localhost:1"))]
    (wrong,) = [finding for finding in findings if not finding.is_ok]
    assert wrong.about == about and sentence in wrong.found
    assert asked[0].keys() == {"flwr-public-key", "flwr-signature", "flwr-timestamp"}


def test_the_same_base_as_the_servers_is_in_order(run_file, rows, keys, monkeypatch, tree):
    own = Parts().base(checked(RunConfig, tree).model).identity
    monkeypatch.setattr(checks, "ask", lambda *_: server(said={"model_hash": own}))
    findings = {finding.about: finding for finding in check(Site(run_file, (str(rows),), "north", keys / "north", "localhost:1"))}
    assert findings["base model"].found.endswith("as the server's")
    assert all(finding.is_ok for finding in findings.values())


def test_a_run_with_own_data_is_planned_with_counts(fedexperts, run_file):
    code, out, err = fedexperts("plan", run_file, "--counts", "north=40:6:8,east=20", "--json")
    assert code == 0, err
    clients = {client["name"]: client for client in json.loads(out)["clients"]}
    assert [(clients[name]["examples"], clients[name]["validation"], clients[name]["test"]) for name in NAMES] == [
        (40, 6, 8),
        (20, 0, 0),
    ]
    assert all(
        client["first_bytes_down"] > 0 and client["tasks"] == {"double": client["examples"]} for client in clients.values()
    )
    assert fedexperts("plan", run_file, "--counts", "north=40,east=20")[0] == 0


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        (None, "give how many each has with --counts, such as north=1000,east=1000"),
        ("north=40", "--counts is for north, and the clients of the run are north, east"),
        ("north=40,east", "'east=' is no count"),
        ("north=40,east=1:2", "'east=1:2' is no count"),
        ("north=40,east=-3", "'east=-3' is no count"),
        ("north=40,east=0", "'east=0' is no count"),
        ("north=40,east=99999999999", "is no count"),
    ],
)
def test_counts_that_cannot_be_are_refused(fedexperts, run_file, counts, sentence):
    code, _, err = fedexperts("plan", run_file, *(() if counts is None else ("--counts", counts)))
    assert code == 2 and sentence in err


def test_counts_without_own_data_are_refused(fedexperts, tiny_tree, tmp_path):
    (tmp_path / "run.toml").write_text(to_toml(tiny_tree))
    code, _, err = fedexperts("plan", tmp_path / "run.toml", "--counts", "c01=4")
    assert code == 2 and "the clients of the run do not bring their own data" in err
