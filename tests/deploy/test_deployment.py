"""A real deployment on loopback, with TLS and node keys: three clients, one federation, and in it, in turn, runs of methods whose
messages differ, each of which ends with the same bits and the same ledger as on the local engine.

Every method goes over Flower in test_engines_agree.py.
"""

import json
import shutil
import tempfile
from pathlib import Path
from threading import Thread

import httpx
import pytest
import tomli_w
from deployed import gone, processes, running, send_signal, until
from safetensors.torch import load_file

from fedexperts.config import RunConfig
from fedexperts.deploy import server
from fedexperts.deploy.deployment import Federation
from fedexperts.deploy.keys import make_keys
from fedexperts.deploy.processes import free_port
from fedexperts.deploy.sent import audit
from fedexperts.deploy.supervisor import SuperNodeSupervisor
from fedexperts.errors import BadRun
from fedexperts.experiment import checkpoint
from fedexperts.experiment import runner as runs
from fedexperts.experiment.setup import Parts
from fedexperts.io.toml import checked

NAMES = ("north", "east", "west")
DEPLOYED = ("fedavg", "fedmoe", "hfedmoe", "flex", "scaffold", "flora", "ditto", "local")
ROUNDED = "fedmoe in int8"
ROUNDS = 2
MORE = 3  # where something is killed after the first, and comes back


class Deployment:
    """The federation, its processes, and runs in it beside the same on the local engine."""

    def __init__(self, folder, trees, started):
        self.folder, self.trees, self.started = folder, trees, started
        self.parts, self.announced = Parts(), []
        self.port = free_port()
        self.keys = folder / "keys"

    def run(self, method, name=None, rounds=ROUNDS):
        """Both results folders."""
        tree = self.trees[method]
        timed = {"federation": {**tree["federation"], "rounds": rounds}, "evaluation": {**tree["evaluation"], "every": rounds}}
        config = checked(RunConfig, {**tree, **timed})
        out, local = self.folder / "out" / (name or method), self.folder / "local" / f"{method}-{rounds}"
        if not local.exists():
            runs.run(config, local, parts=self.parts)
        server.serve(config, out, self.federation, announce=self.announced.append, parts=self.parts)
        return out, local

    def join(self, name, keys=None):
        self.started.start(
            *(name, "client", "--name", name, "--server", f"localhost:{self.port}", "--run", self.folder / "run.toml"),
            *("--keys", keys or self.keys / name, "--out", self.folder / name),
        )

    def loads(self, name):
        return self.started.log(name).count("loaded the base model")


@pytest.fixture(scope="module")
def deployment(method_trees, tiny_tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("deployment")
    data = {**{key: value for key, value in tiny_tree["data"].items() if key != "clients"}, "names": NAMES}
    ours = {"federation": {}, "evaluation": {"generate_tokens": 2}, "data": data}
    trees = {name: {**tree, **ours} for name, tree in method_trees.items()}
    trees[ROUNDED] = {**trees["fedmoe"], "federation": {"wire_dtype": "int8"}}
    (folder / "run.toml").write_text(tomli_w.dumps(trees["fedavg"]))  # a client trains as the server says
    make_keys(folder / "keys", ["localhost"], NAMES)
    with processes(folder) as started:
        made = Deployment(folder, trees, started)
        for name in NAMES:
            made.join(name)
        with Federation(folder / "federation", port=made.port, keys=made.keys / "server") as made.federation:
            yield made


def lines(path):
    """Without what was measured in seconds."""
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in path.read_text().splitlines()]


def tensors(path):
    return {name: (tensor.dtype, tensor.shape, tensor.numpy().tobytes()) for name, tensor in load_file(path).items()}


def client_states(folder, client):
    return {path.name: tensors(path) for path in sorted(folder.glob(f"clients/{client}/*"))}


def require_same(deployment, out, local, rounds=ROUNDS):
    newest = checkpoint.latest(local).relative_to(local)
    assert newest == checkpoint.latest(out).relative_to(out) == Path(f"checkpoint/{rounds:06d}-train")
    for name in ("weights", "method_state"):
        assert tensors(out / newest / f"{name}.safetensors") == tensors(local / newest / f"{name}.safetensors")
    for name in ("ledger.jsonl", "rounds.jsonl", "evals.jsonl", "predictions.jsonl"):
        assert lines(out / name) == lines(local / name)
    for client in NAMES:  # each on its own disk, and nothing of it on the server's
        own = deployment.folder / client / (out / "id").read_text()
        assert client_states(own, client) == client_states(local, client)
        assert [path.name for path in own.glob("clients/*")] in ([client], [])
    assert not (out / "clients").exists()


@pytest.mark.parametrize("method", [*DEPLOYED, ROUNDED])
def test_a_run_ends_with_the_same_bits_and_the_same_ledger_as_on_the_local_engine(deployment, method):
    require_same(deployment, *deployment.run(method))
    assert [deployment.loads(name) for name in NAMES] == [1, 1, 1]  # for the first message, and never again


def killing(deployment, out, word, round):
    """Kills what of north has `word` in its command as soon as `round` rounds are recorded in `out`."""

    def watch():
        logged = out / "rounds.jsonl"
        until(lambda: logged.exists() and len(logged.read_text().splitlines()) >= round, "a round")
        for pid in running(deployment.folder / "north", word):
            killed.append(pid)
            send_signal(pid)

    killed = []
    thread = Thread(target=watch)
    thread.start()
    return thread, killed


def test_a_worker_that_is_killed_is_replaced_and_the_next_run_too_ends_with_the_same_bits(deployment):
    thread, killed = killing(deployment, deployment.folder / "out" / "worker", "fedexperts.deploy.client", 1)
    require_same(deployment, *deployment.run("fedmoe", "worker", MORE), MORE)
    thread.join()
    assert len(killed) == 1 and gone(killed[0])
    assert [deployment.loads(name) for name in NAMES] == [2, 1, 1]


def test_the_runs_do_train_and_save_client_state(deployment):
    local = deployment.folder / "local"
    assert all(client_states(local / f"ditto-{ROUNDS}", name) for name in NAMES)
    latest = [checkpoint.latest(local / f"{name}-{ROUNDS}") for name in ("local", "ditto", "fedmoe")]
    ends = [tensors(folder / "weights.safetensors") for folder in latest]
    assert ends[0] != ends[1] != ends[2]


def test_a_client_whose_superexec_is_killed_misses_a_round_and_comes_back_under_its_name_with_its_client_state(deployment):
    """Its SuperNode ends with it, and the supervisor starts both."""
    thread, killed = killing(deployment, deployment.folder / "out" / "superexec", "deploy.superexec", 1)
    out, _ = deployment.run("ditto", "superexec", MORE)
    thread.join()
    assert killed and all(map(gone, killed))
    assert deployment.started.log("north").count("joining") == 2
    ledger = lines(out / "ledger.jsonl")
    assert {line["client"] for line in ledger if line["failed"]} <= {"north"}
    assert {line["client"] for line in ledger if line["round"] == MORE and line["task"] == "evaluate" and not line["failed"]} == {
        *NAMES
    }
    accepted = checkpoint.accepted_in(checkpoint.latest(out))
    for name in NAMES:
        own = client_states(deployment.folder / name / (out / "id").read_text(), name)
        assert f"{accepted[name]}.safetensors" in own


def test_a_client_whose_key_the_server_has_not_never_gets_in(deployment):
    make_keys(deployment.keys, ["localhost"], ["stranger"])
    shutil.copytree(deployment.keys / "stranger", deployment.folder / "false-key")
    (deployment.folder / "false-key" / "node.pub").unlink()  # else they say whose they are, and it does not start
    before = {node.node_id for node in deployment.federation.grid.get_nodes()}
    home = deployment.folder / "impostor"
    deployment.started.start(
        *("impostor", "client", "--name", "north", "--server", f"localhost:{deployment.port}"),
        *("--run", deployment.folder / "run.toml", "--keys", deployment.folder / "false-key", "--out", home),
    )
    until(
        lambda: "does not know its key" in deployment.started.log("impostor"),
        "a refusal",
        lambda: deployment.started.log("impostor"),
    )
    deployment.started.kill("impostor")
    assert {node.node_id for node in deployment.federation.grid.get_nodes()} <= before


def test_a_client_with_another_authority_does_not_join(deployment, tmp_path):
    make_keys(tmp_path, ["localhost"], ["north"])
    supervisor = SuperNodeSupervisor("north", f"localhost:{deployment.port}", tmp_path / "home", tmp_path / "north", [])
    with pytest.raises(BadRun, match="does not vouch for"):
        supervisor.obstacle()
    assert not SuperNodeSupervisor("north", f"localhost:{deployment.port}", tmp_path, deployment.keys / "north", []).obstacle()


def test_plaintext_is_refused(deployment):
    with pytest.raises(httpx.TransportError):
        httpx.post(f"http://127.0.0.1:{deployment.port}/v1/fleet/activate-node", content=b"")


def test_a_socket_and_its_folder_are_their_owners_only(deployment):
    folders = [Path(path) for path in Path(tempfile.gettempdir()).parent.glob("fedexperts-*")]
    sockets = [path for folder in folders for path in folder.iterdir() if path.is_socket()]
    assert len(sockets) >= len(NAMES)
    assert {path.stat().st_mode & 0o777 for path in sockets} == {0o600}
    assert {path.stat().st_mode & 0o777 for path in folders} == {0o700}


def test_what_a_client_writes_is_its_owners_only(deployment):
    written = [path for name in NAMES for path in [deployment.folder / name, *(deployment.folder / name).rglob("*")]]
    names = {path.name for path in written}
    assert {"sent.jsonl", "log.jsonl", "supernode.log", "answered"} <= names and any(
        name.endswith(".safetensors") for name in names
    )
    assert [path for path in written if path.stat().st_mode & 0o077] == []


def test_the_record_of_a_client_has_every_answer_that_the_server_counted(deployment):
    """At least once: an answer whose worker was killed while it left is there twice."""
    for name in NAMES:
        records = audit(deployment.folder / name).records
        sent = {(line["run"], line["round"], line["task"]): line for line in records if line["what"] == "update"}
        counted = 0
        for out in (deployment.folder / "out").iterdir():
            for entry in lines(out / "ledger.jsonl"):
                if entry["client"] == name and not entry["failed"]:
                    line = sent[(out / "id").read_text(), entry["round"], entry["task"]]
                    assert line["bytes"] > entry["bytes_up"] or entry["task"] == "evaluate"
                    counted += 1
        assert counted and any(line["what"] == "greeting" for line in records)


def test_when_the_superlink_dies_the_run_stops_with_a_sentence(deployment):
    """Last: nothing runs in this federation after it."""
    out = deployment.folder / "out" / "stopped"

    def kill():
        until(lambda: (out / "evals.jsonl").exists(), "an evaluation")
        send_signal(deployment.federation.superlink.pid)

    thread = Thread(target=kill)
    thread.start()
    with pytest.raises(BadRun, match=r"SuperLink has stopped.*--resume"):
        deployment.run("ditto", "stopped", MORE)
    thread.join()
