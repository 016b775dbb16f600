"""Clients that bring their own data: what the server learns of them, and what each side refuses."""

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fakegrid import FakeGrid, identity  # noqa: F401  # the second is a fixture
from safetensors.torch import load_file

from fedexperts.config import RunConfig
from fedexperts.data.own import Counts
from fedexperts.deploy import server
from fedexperts.deploy.client import ClientWorker
from fedexperts.engines.client_store import ClientStateStore
from fedexperts.engines.flower.engine import FlowerEngine
from fedexperts.engines.remote import Greeting
from fedexperts.errors import BadRun, BadValue
from fedexperts.experiment import runner
from fedexperts.experiment.reported import parts_from_greetings, validated_counts
from fedexperts.experiment.setup import Parts
from fedexperts.export import export, load
from fedexperts.io.toml import checked
from fedexperts.types import Client

SECRET = "471108150042"  # so long that no time, size or hash holds it by chance
ROWS = {"north": 16, "east": 28}


@pytest.fixture
def tree(tiny_tree):
    own = {"names": list(ROWS), "own": True, "test_examples": 2, "max_tokens": 24}
    source = {"name": "theirs", "prompt": "Double: {number}", "response": "twice", "task": "double"}
    return {
        **tiny_tree,
        "federation": {"rounds": 2},
        "evaluation": {"every": 2, "generate_tokens": 2},
        "data": {**own, "sources": [source]},
    }


@pytest.fixture
def files(tmp_path):
    """Each client's own file, of another kind."""
    rows = {name: [{"number": f"{SECRET}{i}", "twice": str(i)} for i in range(number)] for name, number in ROWS.items()}
    (tmp_path / "n.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows["north"]))
    with (tmp_path / "e.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["number", "twice"])
        writer.writeheader()
        writer.writerows(rows["east"])
    return {"north": (str(tmp_path / "n.jsonl"),), "east": (str(tmp_path / "e.csv"),)}


class Federation:
    """Nodes in this process, each with a client's worker; takes the place of `deployment.Federation`."""

    def __init__(self, workers, home, keys=tuple(ROWS)):
        self.workers, self.home = workers, home
        self.grid = FakeGrid(lambda message, name: workers[name].answer(message), tuple(workers))
        self.grid.fetch = lambda message_id, limit: self.grid.pull_messages([message_id])
        self.grid.get_nodes = lambda: [SimpleNamespace(node_id=node, last_activated_at="") for node in self.grid.get_node_ids()]
        self.names = dict(enumerate(keys, 1))

    def check(self):
        return None

    def tell(self, about):
        self.told = about


def federation(tree, files, folder, **settings):
    config = checked(RunConfig, tree)
    workers = {
        name: ClientWorker(name, config, folder / name, files[name], {"memory_gb": 2 if name == "north" else 1}) for name in ROWS
    }
    return Federation(workers, folder / "flower", **settings)


def serve(tree, folder, with_clients, **settings):
    return server.serve(checked(RunConfig, tree), folder / "out", with_clients, announce=lambda _: None, **settings)


def test_a_run_goes_with_data_that_only_the_clients_have(tree, files, tmp_path):
    begun = []
    ledger = tmp_path / "out" / "ledger.jsonl"
    out = serve(tree, tmp_path, federation(tree, files, tmp_path), connected=lambda: begun.append(ledger.exists()))
    assert begun == [False]  # once, before the first answer
    clients = {client["name"]: client for client in json.loads((out / "plan.json").read_text())["clients"]}
    for name, number in ROWS.items():
        client = clients[name]
        assert client["task"] == "double" and client["tasks"] == {"double": client["examples"]}
        assert 0 < client["examples"] < client["examples"] + client["validation"] < number  # and some are tests
        assert client["test"] == 2
        assert client["memory_bytes"] == (2 if name == "north" else 1) * 10**9
    ledger = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    trained = [line for line in ledger if line["task"] == "train"]
    assert len(trained) == 4 and not any(line["failed"] for line in ledger)
    assert all(line["tokens"] > 0 for line in trained)


def test_a_first_start_without_the_key_of_a_client_is_refused_at_once(tree, files, tmp_path):
    with pytest.raises(
        BadValue, match=r"data\.names has east, whose key the server does not have, .*leave it out of data\.names"
    ):
        serve(tree, tmp_path, federation(tree, files, tmp_path, keys=("north",)))


def test_nothing_that_the_server_writes_holds_an_example(tree, files, tmp_path):
    out = serve(tree, tmp_path, federation(tree, files, tmp_path))
    written = [path.read_bytes() for folder in (out, tmp_path / "flower") for path in folder.rglob("*") if path.is_file()]
    assert len(written) > 8
    assert not any(SECRET.encode() in data for data in written)
    assert all(SECRET in Path(file).read_text() for (file,) in files.values())


def test_examples_are_sent_only_if_the_run_files_of_server_and_client_both_say_so(tree, files, tmp_path):
    asks = {**tree, "evaluation": {**tree["evaluation"], "predictions": "all"}}
    shown = federation(asks, files, tmp_path / "shown")
    quiet = ClientWorker("east", checked(RunConfig, tree), tmp_path / "shown" / "east", files["east"], {"memory_gb": 1})
    shown.workers["east"] = quiet
    out = serve(asks, tmp_path / "shown", shown)
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [(row["client"], row["round"]) for row in rows] == [("north", 0)] * 2 + [("north", 2)] * 2
    assert all(SECRET in row["prompt"] and row["source"] == "theirs" for row in rows)
    evaluated = [line for line in map(json.loads, (out / "ledger.jsonl").read_text().splitlines()) if line["task"] == "evaluate"]
    assert {line["client"] for line in evaluated} == set(ROWS) and not any(line["failed"] for line in evaluated)
    assert any("prompts, references and answers" in each for each in json.loads((out / "plan.json").read_text())["warnings"])
    silent = serve(tree, tmp_path / "silent", federation(asks, files, tmp_path / "silent"))
    assert not (silent / "predictions.jsonl").exists()


def test_a_client_exports_its_own_model_where_its_data_and_its_client_state_are(tree, files, tmp_path):
    out = serve(
        {**tree, "method": {"name": "ditto"}}, tmp_path, federation({**tree, "method": {"name": "ditto"}}, files, tmp_path)
    )
    folder = Path(shutil.copytree(out, tmp_path / "copied"))
    export(folder, tmp_path / "model", "north", kept=tmp_path / "north")
    exported = load(tmp_path / "model").state_dict()
    own = ClientStateStore(tmp_path / "north" / (out / "id").read_text() / "clients")
    state = load_file(own.versions("north")[-1])
    same = [name for name, tensor in state.items() if name in exported and torch.equal(exported[name], tensor[0])]
    assert len(same) > 3
    with pytest.raises(BadRun, match="holds nothing of"):
        export(folder, tmp_path / "no", "north", kept=tmp_path / "elsewhere")
    newest = own.versions("north")[-1]
    for path in own.versions("north"):
        path.rename(newest.with_name("000009-train.safetensors"))
    with pytest.raises(
        BadRun, match=r"needs the state of north after 000002-train, but .* after 000009-train; copy the results folder again"
    ):
        export(folder, tmp_path / "no", "north", kept=tmp_path / "north")
    (own.folder / "north" / "000009-train.safetensors").rename(newest)
    (folder / "greetings.json").unlink()
    with pytest.raises(BadRun, match=r"has no greetings\.json"):
        export(folder, tmp_path / "no", "north", kept=tmp_path / "north")
    with pytest.raises(BadValue, match="say which one's with --client"):
        export(folder, tmp_path / "no", kept=tmp_path / "north")


def test_a_server_that_is_started_again_knows_their_greetings(tree, files, tmp_path):
    first = federation(tree, files, tmp_path)
    out = serve(tree, tmp_path, first)
    nobody = SimpleNamespace(home=first.home, grid=None, check=None)
    parts = parts_from_greetings(server.greetings_of(checked(RunConfig, tree), out, nobody, {}, Parts()), Parts())
    clients = {client["name"]: client["tasks"] for client in json.loads((out / "plan.json").read_text())["clients"]}
    assert {name: count.train for name, count in parts.counts.items()} == clients
    assert parts.memory == {"north": 2 * 10**9, "east": 10**9}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"train": {}}, "is inconsistent"),
        ({"train": {"double": 13}}, "is inconsistent"),  # it says it has 12
        ({"train": {"double": 13, "sort": -1}}, "is inconsistent"),
        ({"test": -1}, "is inconsistent"),
        ({"longest_response": 0}, "is inconsistent"),
        ({"metrics": {"double": "applause"}}, "is inconsistent"),
        ({"metrics": {"half a character \ud800": "verbatim"}}, "is inconsistent"),
        ({"train": ["double"]}, "cannot be read"),
        ({"validation": "few"}, "cannot be read"),
        ({"validation": 10**12}, "at most 10,000,000 are allowed"),
    ],
)
def test_counts_that_cannot_be_are_refused_with_the_clients_name(change, sentence):
    counts = {"train": {"double": 12}, "validation": 2, "test": 2, "longest_response": 3, "metrics": {"double": "verbatim"}}
    assert validated_counts(Greeting(Client("north", 12, "double"), None, {}, counts)) == Counts(**counts)
    with pytest.raises(BadValue, match=f"^north .*{sentence}"):
        validated_counts(Greeting(Client("north", 12, "double"), None, {}, {**counts, **change}))


def test_clients_that_judge_a_task_by_different_metrics_are_refused_before_the_run_starts():
    counts = {"train": {"double": 12}, "validation": 2, "test": 2, "longest_response": 3}
    metrics = {"north": {"double": "verbatim"}, "east": {"sort": "verbatim"}, "south": {"double": "accuracy"}}
    greetings = [Greeting(Client(name, 12), None, {}, {**counts, "metrics": each}) for name, each in metrics.items()]
    assert parts_from_greetings(greetings[:2], Parts()).counts.keys() == {"north", "east"}
    with pytest.raises(BadValue, match=r"task .double. is scored by verbatim at north and by accuracy at south; set .*metric"):
        parts_from_greetings(greetings, Parts())


def refusals(engine):
    with pytest.raises(BadRun) as stopped:
        engine.connect(seconds=0.5)
    return str(stopped.value)


def engine(tree, with_clients, model_hash=None):
    config = checked(RunConfig, tree)
    run_info = {"settings": config.resolved(), "id": "1", "model_hash": model_hash or Parts().base(config.model).identity}
    options = {"in_flight": 2, "names": with_clients.names, "poll_seconds": 0}
    return FlowerEngine(with_clients.grid, json.dumps(run_info), dict.fromkeys(ROWS), **options)


def test_a_node_with_the_key_of_one_client_cannot_be_another(tree, files, tmp_path):
    reason = refusals(engine(tree, federation(tree, files, tmp_path, keys=("east", "north"))))
    assert "a node with the key of east says it is north" in reason


def test_a_client_with_another_base_model_or_another_way_to_read_rows_is_refused(tree, files, tmp_path):
    clients = federation(tree, files, tmp_path)
    assert "its base model" in refusals(engine(tree, clients, model_hash="another"))
    other = {**tree, "data": {**tree["data"], "max_tokens": 32}}
    assert "another data.max_tokens than the server's" in refusals(engine(other, clients))


def test_the_clients_own_run_file_says_where_files_are_and_the_servers_how_to_train(tree, files, tmp_path):
    worker = federation(tree, files, tmp_path).workers["north"]
    server_settings = checked(
        RunConfig, {**tree, "model": {"name": "/elsewhere", "trust_remote_code": True}, "training": {"lr": 0.5}}
    )
    agreed = checked(RunConfig, worker.agreed(server_settings.resolved()))
    assert agreed.training.lr == 0.5
    assert agreed.model == checked(RunConfig, tree).model
    assert agreed.devices.memory_gb == 2


@pytest.mark.parametrize(
    ("change", "name", "data", "sentence"),
    [
        ({}, "south", ("x.jsonl",), "no client south; its clients are north, east"),
        ({}, "north", (), "each client brings its own data; give them with --data"),
        ({}, "north", ("nowhere.jsonl",), r"nowhere\.jsonl"),
        ({"own": False, "sources": ["synthetic/double"]}, "north", ("x.jsonl",), "set data.own = true"),
    ],
)
def test_a_client_that_cannot_take_part_is_refused_with_the_reason(tree, tmp_path, change, name, data, sentence):
    config = checked(RunConfig, {**tree, "data": {**tree["data"], **change}})
    with pytest.raises(BadValue, match=sentence):
        ClientWorker(name, config, tmp_path, data)


def test_a_run_file_whose_clients_bring_their_data_does_not_run_without_them(tree, tmp_path):
    with pytest.raises(BadValue, match="fedexperts server"):
        runner.run(checked(RunConfig, tree), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"names": []}, "set names too"),
        ({"names": ["a", "a"]}, "1 different names for 2 clients"),
        ({"names": ["a/b"]}, "data.names.0"),
        ({"sources": ["a", "b"]}, "needs exactly one source"),
        ({"sources": ["a.jsonl"]}, "with a task"),
    ],
)
def test_settings_of_own_data_that_cannot_be_are_refused(tree, change, sentence):
    with pytest.raises(BadValue, match=sentence):
        checked(RunConfig, {**tree, "data": {**tree["data"], **change}})


def test_a_centralized_method_is_refused(tree, files, tmp_path):
    with pytest.raises(BadValue, match="in one place"):
        serve({**tree, "method": {"name": "centralized"}}, tmp_path, federation(tree, files, tmp_path))
    assert not (tmp_path / "out").exists()
