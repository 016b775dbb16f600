"""What a server may decide for a client, and how a client notices that its client state was lost or is another's."""

import json
from types import SimpleNamespace

import pytest
import torch

from fedexperts.config import RunConfig
from fedexperts.deploy import client
from fedexperts.deploy.client import ClientWorker, exclusive
from fedexperts.engines.client_store import ClientStateStore
from fedexperts.engines.message import Message
from fedexperts.engines.remote import job_request
from fedexperts.engines.serialization import answer_message, read_answer, read_job
from fedexperts.errors import BadMessage, Busy
from fedexperts.io.files import locked
from fedexperts.io.toml import checked
from fedexperts.methods.contract import Declaration
from fedexperts.types import Failure, Job, Patch, Update


class Machine(ClientWorker):
    """A client that counts its jobs; `stateful`: in its client state."""

    stateful = True

    def runtime(self, run):
        method = SimpleNamespace(declare=lambda: Declaration(client_state=("jobs",) if Machine.stateful else ()))
        return SimpleNamespace(
            client_store=ClientStateStore(self.folder / "1" / "clients"), task=SimpleNamespace(method=method)
        ), None


@pytest.fixture
def machine(tiny_tree, tmp_path, monkeypatch):
    """Machines by the name of their folder, all for the client c01."""

    def answer(runtime, name, message, counts):
        job = read_job(message)
        before = runtime.client_store.load(job).get("jobs", torch.tensor(0))
        if Machine.stateful and job.task != "evaluate":
            runtime.client_store.save(job, {"jobs": before + 1})
        return answer_message(Update(name, job.round, job.task, Patch({}), 1, metrics={"before": int(before)}))

    monkeypatch.setattr(client.remote, "answer", answer)
    monkeypatch.setattr(Machine, "stateful", True)
    config = checked(RunConfig, tiny_tree)
    return lambda folder: Machine("c01", config, tmp_path / folder)


def before(machine, round, accepted="", task="train"):
    """The number of jobs in the client state that it went on from; or its failure."""
    job = Job("c01", round, task, "0", {}, Patch({}), accepted=accepted)
    answer = read_answer(machine.answer(job_request(job, "{}")))
    return answer if isinstance(answer, Failure) else answer.metrics["before"]


def test_a_client_goes_on_from_its_client_state_also_when_the_server_did_not_accept_its_last_answer(machine):
    assert before(machine("a"), 1) == 0
    assert before(machine("a"), 2, "000001-train") == 1
    assert before(machine("a"), 3, "000001-train") == 1
    assert before(machine("a"), 3, "000003-train", "evaluate") == 2


def test_a_second_machine_under_the_same_name_fails_and_so_does_the_first_when_that_was_accepted(machine):
    assert before(machine("a"), 1) == 0
    other = before(machine("b"), 2, "000001-train")
    assert other.reason.startswith("it has no record of the answer that the server accepted last (000001-train)")
    assert before(machine("a"), 3, "000001-train") == 1
    assert before(machine("b"), 4, "000003-train").reason.startswith("it has no record")


def test_a_client_that_lost_its_client_state_fails_once_and_then_goes_on_without(machine):
    assert before(machine("a"), 1) == 0
    for _ in range(2):  # a server that was restarted repeats the round
        assert isinstance(before(machine("anew"), 2, "000001-train"), Failure)
    assert before(machine("anew"), 3, "000001-train") == 0
    assert before(machine("anew"), 4, "000003-train") == 1


def test_a_client_that_lost_its_disk_is_not_scored_without_its_client_state(machine):
    assert before(machine("a"), 1) == 0
    assert before(machine("anew"), 1, "000001-train", "evaluate").reason.startswith("it has no record")
    assert before(machine("anew"), 2, "000001-train") == 0


@pytest.mark.parametrize("task", ["train", "evaluate"])
def test_a_client_whose_record_stayed_and_whose_client_state_is_gone_says_so_once(machine, tmp_path, task):
    assert before(machine("a"), 1) == 0
    assert before(machine("a"), 2, "000001-train") == 1
    (tmp_path / "a/1/clients/c01/000002-train.safetensors").unlink()
    for _ in range(2):  # a server that was restarted repeats the job
        reason = before(machine("a"), 3, "000002-train", task).reason
        assert reason.startswith("it has lost the client state of the answer that the server accepted last (000002-train)")
    assert before(machine("a"), 4, "000002-train") == 1
    assert before(machine("a"), 5, "000004-train") == 2


def test_a_client_that_is_killed_while_it_writes_a_loss_down_fails_again(machine, monkeypatch):
    assert before(machine("a"), 1) == 0
    write = client.record_answered
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(client, "record_answered", lambda record, *jobs: (write(record, jobs[0]), interrupt()))
        before(machine("anew"), 2, "000001-train")
    assert isinstance(before(machine("anew"), 2, "000001-train"), Failure)
    assert before(machine("anew"), 3, "000001-train") == 0


def interrupt():
    raise KeyboardInterrupt


def test_a_client_without_client_state_has_nothing_to_lose(machine):
    Machine.stateful = False
    assert before(machine("a"), 1) == 0
    assert before(machine("anew"), 2, "000001-train") == 0


@pytest.mark.parametrize("id", ["../../home", "/etc", "a/b", "..", "", {}])
def test_a_run_whose_name_would_lead_elsewhere_is_refused(tiny_tree, tmp_path, id):
    client = ClientWorker("c01", checked(RunConfig, tiny_tree), tmp_path)
    with pytest.raises(BadMessage, match="a run cannot be called"):
        client.answer(Message({"run": json.dumps({"id": id})}, {}))


def test_the_server_does_not_decide_which_file_a_client_reads(tiny_tree, tmp_path):
    def shared(path):
        method = {"name": "flex", "select": "shared", "public_text": path}
        return checked(RunConfig, {**tiny_tree, "method": method})

    client = ClientWorker("c01", shared("mine.txt"), tmp_path)
    assert client.agreed(shared("/etc/passwd").resolved())["method"]["public_text"] == "mine.txt"
    without = ClientWorker("c01", checked(RunConfig, tiny_tree), tmp_path)
    assert without.agreed(shared("/etc/passwd").resolved())["method"]["public_text"] is None


def test_two_workers_over_one_folder_are_one_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "LOCK_SECONDS", 0.0)
    with locked(tmp_path), pytest.raises(Busy, match="another process is running"), exclusive(tmp_path):
        pass
    with exclusive(tmp_path):
        pass
