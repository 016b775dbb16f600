"""One worker or two, dying workers, and what workers share."""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch
from safetensors.torch import load_file

from fedexperts.config import EvaluationSettings, RunConfig
from fedexperts.core.ledger import Ledger
from fedexperts.engines import local
from fedexperts.engines.client_store import ClientStateStore
from fedexperts.engines.local import ClientRuntime, LocalEngine
from fedexperts.errors import BadValue, Undeclared
from fedexperts.experiment.client_task import ClientTask
from fedexperts.experiment.runner import engine_for
from fedexperts.experiment.setup import prepare_run
from fedexperts.federation import federate
from fedexperts.io.toml import checked, to_toml
from fedexperts.methods.base import all_experts, mean_rows
from fedexperts.methods.contract import Declaration, ExtraTensor, Method, Metric
from fedexperts.methods.fedavg import FedAvg
from fedexperts.moe import rows
from fedexperts.testing import tiny_batch, tiny_model
from fedexperts.types import Client, Example, Failure, Job, Patch, Split, Training, Update

SOME = "model.layers.0.mlp.gate.weight"
OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has a total capacity of 8.00 GiB of which 2.00 GiB is free."
)


@dataclass(frozen=True)
class Obeys(Method):
    """Does what the job's task says, whatever the client."""

    tasks: tuple[str, ...] = ()

    def declare(self):
        numbers = {name: Metric(tasks=("look",)) for name in ("pid", "shared", "seen", "threads")}
        much = ExtraTensor(lambda server, job: (200_000_000,), torch.uint8, tasks=("die of a long answer",))
        return Declaration(self.tasks, extra={"much": much}, metrics=numbers, keeps_weights=True)

    def assign(self, server, client):
        return all_experts(server)

    def train(self, job, context):
        if job.task == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if job.task == "die of a long answer":  # in the middle of sending it
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            return answer(job, extra={"much": torch.zeros(200_000_000, dtype=torch.uint8)})
        if job.task == "hang":
            time.sleep(600)
        if job.task == "raise":
            raise RuntimeError("two\nlines of trouble")
        if job.task == "run out of memory":
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        if job.task == "send its own":
            return replace(answer(job), patch=Patch({"own": torch.ones(1)}))
        if job.task == "keep nonsense":
            context.client_state["w"] = torch.tensor([float("nan")])
            return answer(job)
        if job.task == "report what it does not declare":
            return answer(job, {"mood": 3})
        if job.task == "keep what it does not declare":
            context.client_state["mood/x"] = torch.ones(1)
            return answer(job)
        if job.task == "look":
            shared = all(parameter.is_shared() for parameter in context.model.parameters())
            seen = float(context.model.get_parameter(SOME).detach()[0, 0])
            return answer(job, {"pid": os.getpid(), "shared": shared, "seen": seen, "threads": torch.get_num_threads()})
        update = FedAvg().train(job, context)
        if job.task == "keep":
            context.client_state.update(update.patch.tensors)
        return update

    def merge(self, server, updates):
        return mean_rows(server, updates, lambda update: 1.0)


def answer(job, metrics=None, extra=None):
    return Update(job.client, job.round, job.task, Patch({}), 1, metrics=metrics or {}, extra=extra or {})


def jobs(task, clients=("c01", "c02", "c03", "c04"), round=1):
    return [Job(client, round, task, f"0/{round}/{task}/{client}", {}, Patch({})) for client in clients]


@pytest.fixture(scope="module")
def prepared(tiny_tree):
    return replace(prepare_run(checked(RunConfig, {**tiny_tree, "federation": {"rounds": 2}})), method=Obeys())


def engine(prepared, folder, workers):
    federation = prepared.config.federation.model_copy(update={"workers": workers})
    return engine_for(replace(prepared, config=prepared.config.model_copy(update={"federation": federation})), folder)


@pytest.fixture
def one(prepared, tmp_path):
    with engine(prepared, tmp_path, workers=1) as running:
        yield running


@pytest.fixture(scope="module")
def two(prepared, tmp_path_factory):
    with engine(prepared, tmp_path_factory.mktemp("two"), workers=2) as running:
        yield running


def federated(prepared, running, task):
    """The last server and what stood in the ledger, seconds aside, of one stage of `task` and two rounds."""
    ledger, entries, servers = Ledger(), [], []
    for server in federate(prepared.server, Obeys(tasks=(task,)), running, ledger, rounds=2, clients_per_round=3):
        servers.append(server)
        entries += [replace(entry, seconds=0.0) for entry in ledger.entries]
        ledger.clear()
    return servers[-1], entries


def test_two_workers_give_the_same_bits_the_same_ledger_and_the_same_kept_state_as_one(prepared, one, two):
    (alone, entries), (beside, entries_beside) = (federated(prepared, running, "keep") for running in (one, two))
    assert alone.weights.keys() == beside.weights.keys()
    assert all(torch.equal(alone.weights[name], beside.weights[name]) for name in alone.weights)
    assert not torch.equal(alone.weights[SOME], prepared.server.weights[SOME])
    assert entries == entries_beside
    assert len(entries) == 4 + 3 + 3
    assert all(entry.failed is None and entry.bytes_up > 0 and entry.tokens > 0 for entry in entries)
    for client in prepared.server.clients:
        (job,) = jobs("train", [client], round=3)
        job = replace(job, accepted=alone.accepted[client])
        held, held_beside = (running.runtime.client_store.load(job) for running in (one, two))
        assert held.keys() == held_beside.keys() == prepared.server.weights.keys()
        assert all(torch.equal(held[name], held_beside[name]) for name in held)


def job_of(prepared, client, task, round):
    return Job(client, round, task, f"0/{round}/{client}", prepared.server.anatomy.all_experts, Patch({}))


def test_workers_look_at_one_base_in_shared_memory(two):
    base = two.runtime.model.get_parameter(SOME)
    before = base.detach().clone()
    try:
        base.detach()[0, 0] = 42.0
        looks = [update.metrics for update in two.run(jobs("look"))]
    finally:
        base.detach().copy_(before)
    assert len(looks) == 4
    assert all(look["shared"] and look["seen"] == 42.0 and look["threads"] == 1 for look in looks)
    assert {look["pid"] for look in looks} <= {worker.process.pid for worker in two.workers}


def test_one_worker_is_this_process(one):
    assert [update.metrics["pid"] for update in one.run(jobs("look"))] == [os.getpid()] * 4


def test_a_worker_that_is_killed_is_its_clients_failure_and_another_takes_its_place(two):
    before = {worker.process.pid for worker in two.workers}
    work = [*jobs("look", ["c01", "c02"]), *jobs("die", ["c03"]), *jobs("look", ["c04"])]
    answers = {found.client: found for found in two.run(work)}
    assert answers["c03"] == Failure("c03", 1, "die", "its worker process died (SIGKILL)")
    assert [type(answers[client]) for client in ("c01", "c02", "c04")] == [Update] * 3
    after = {worker.process.pid for worker in two.workers}
    assert len(after) == 2
    assert len(after - before) == 1
    assert {found.metrics["pid"] for found in two.run(jobs("look"))} <= after


def test_a_worker_that_is_killed_in_the_middle_of_its_answer_is_a_failure_too(two):
    (found,) = two.run(jobs("die of a long answer", ["c01"]))
    assert found == Failure("c01", 1, "die of a long answer", "its worker process died (SIGALRM)")


LATE = "it did not answer within federation.round_seconds = 6, and its worker process was killed"


@pytest.fixture(scope="module")
def with_deadline(prepared, tmp_path_factory):
    config, out = prepared.config, tmp_path_factory.mktemp("deadline")
    federation = config.federation.model_copy(update={"workers": 2, "round_seconds": 6})
    with engine_for(replace(prepared, config=config.model_copy(update={"federation": federation})), out) as running:
        yield running


@pytest.fixture
def patient(with_deadline):
    """Two workers that have started, with six seconds for a job."""
    assert [type(answer) for answer in with_deadline.run(jobs("look"))] == [Update] * 4
    return with_deadline


def test_a_worker_that_is_stopped_is_killed_at_its_deadline_named_and_replaced(patient):
    victim = patient.workers[0].process
    os.kill(victim.pid, signal.SIGSTOP)
    started, much = time.monotonic(), {"much": torch.zeros(2_000_000, dtype=torch.uint8)}
    work = [replace(job, extra=much) for job in jobs("look")]  # more than a pipe holds: nobody reads it
    answers = {found.client: found for found in patient.run(work)}
    assert 6 <= time.monotonic() - started < 60
    assert answers.pop("c01") == Failure("c01", 1, "look", LATE)
    assert [type(answer) for answer in answers.values()] == [Update] * 3
    assert not victim.is_alive()
    assert patient.workers[0].process.pid != victim.pid


def test_a_job_that_hangs_is_its_clients_failure_and_the_next_job_of_that_worker_is_not(patient):
    answers = {found.client: found for found in patient.run([*jobs("hang", ["c01"]), *jobs("look", ["c02", "c03"])])}
    assert answers.pop("c01") == Failure("c01", 1, "hang", LATE)
    assert [type(answer) for answer in answers.values()] == [Update] * 2
    assert [type(answer) for answer in patient.run(jobs("look"))] == [Update] * 4  # also of the process that has just started


def test_an_answer_that_came_in_time_counts_although_it_is_read_later(patient):
    answers = patient.run(jobs("look", ["c01", "c02"]))
    found = [next(answers)]
    time.sleep(7)  # as a server that merges the first
    found += answers
    assert [type(answer) for answer in found] == [Update] * 2
    assert [worker.timer for worker in patient.workers] == [None, None]


def test_a_run_whose_worker_is_stopped_names_its_client_and_goes_on(fedexperts, tiny_tree, tmp_path):
    out, federation = (
        tmp_path / "out",
        {"rounds": 4, "workers": 2, "round_seconds": 25},
    )  # a busy machine takes seconds for an honest job
    (tmp_path / "run.toml").write_text(to_toml({**tiny_tree, "federation": federation}))

    def stop_one():
        rounds = out / "rounds.jsonl"
        while not (rounds.exists() and rounds.read_text()):
            time.sleep(0.05)
        stopped.append((set(multiprocessing.active_children()) - others).pop())
        os.kill(stopped[0].pid, signal.SIGSTOP)

    stopped, others, thread = [], set(multiprocessing.active_children()), threading.Thread(target=stop_one)
    thread.start()
    code, _, err = fedexperts("run", tmp_path / "run.toml", "--out", out, "--quiet")
    thread.join()
    assert code == 0, err
    lines = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    failed = [line for line in lines if line["failed"]]
    assert [line["failed"] for line in failed] == [LATE.replace("= 6", "= 25")]
    assert {line["round"] for line in lines if line["task"] == "train"} == {1, 2, 3, 4}
    assert not stopped[0].is_alive()


def test_with_a_deadline_one_worker_is_a_process_of_its_own_and_gives_the_same_bits(prepared, one, tmp_path):
    with LocalEngine(replace(one.runtime, client_store=ClientStateStore(tmp_path)), 1, seconds=600) as running:
        (look,) = running.run(jobs("look", ["c01"]))
        assert look.metrics["pid"] == running.workers[0].process.pid != os.getpid()
        (alone, entries), (beside, entries_beside) = (federated(prepared, each, "keep") for each in (one, running))
    assert all(torch.equal(alone.weights[name], beside.weights[name]) for name in alone.weights)
    assert entries == entries_beside


def test_a_worker_that_died_while_it_had_nothing_to_do_is_the_next_clients_failure(two):
    victim = two.workers[0].process
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    kinds = Counter(type(found) for found in two.run(jobs("look")))
    assert kinds == {Failure: 1, Update: 3}


def test_an_error_is_the_clients_failure_in_one_line(one, two):
    for running in (one, two):
        (found,) = running.run(jobs("raise", ["c02"]))
        assert found == Failure("c02", 1, "raise", "RuntimeError: two lines of trouble")


def test_running_out_of_a_cards_memory_is_the_clients_failure_and_the_next_client_goes_on(one, two, monkeypatch):
    for running in (one, two):
        answers = running.run([*jobs("run out of memory", ["c01"]), *jobs("look", ["c02"])])
        short, fine = sorted(answers, key=lambda answer: answer.client)  # two workers answer in any order
        assert isinstance(short, Failure) and isinstance(fine, Update)
        assert short.reason.startswith("out of memory on cpu: it needed 3.00 GiB beyond what it had, and cpu has 8.00 GiB, ")
        assert all(name in short.reason for name in ("training.batch_size", "data.max_tokens", "federation.workers"))

    freed = []
    monkeypatch.setattr(local, "release", freed.append)
    list(one.run([*jobs("look", ["c02"]), *jobs("run out of memory", ["c01"])]))
    assert freed == [torch.device("cpu")]


def test_a_base_that_does_not_fit_a_card_is_a_sentence(one, monkeypatch):
    def short(model, device):
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    monkeypatch.setattr(local, "on_device", short)
    with pytest.raises(BadValue, match=r"^the base model does not fit the memory of cuda:0; "):
        LocalEngine(one.runtime, devices=["cuda:0"])


def test_workers_are_spread_over_the_devices_and_those_of_one_card_share_its_base(one, monkeypatch):
    moved, started = [], []

    class Started:
        def __init__(self, handle, daemon, seconds):
            started.append(handle.args[0])

        def stop(self):
            pass

    monkeypatch.setattr(local, "on_device", lambda model, device: moved.append(device) or tiny_model("olmoe"))
    monkeypatch.setattr(local, "WorkerProcess", Started)
    with LocalEngine(one.runtime, 5, ["cuda:0", "cuda:1"]):
        pass
    assert [runtime.device for runtime in started] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:0"]
    assert moved == ["cuda:0", "cuda:1"] and len({id(runtime.model) for runtime in started}) == 2
    started.clear()
    with LocalEngine(one.runtime, 2, ["mps"]):
        pass
    assert [(runtime.device, runtime.model is one.runtime.model) for runtime in started] == [("mps", True)] * 2
    assert len(moved) == 2, "each process moves it for itself"


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("send its own", "client c02 would send own, which is not among the weights that it got"),
        ("report what it does not declare", "Obeys reports a metric mood for task report what it does not declare, which"),
        ("keep what it does not declare", "Obeys keeps mood/x at a client, which it does not declare"),
    ],
)
def test_a_method_that_sends_or_keeps_what_it_does_not_declare_ends_the_run(one, two, task, said):
    for running in (one, two):
        with pytest.raises(Undeclared, match=said):
            list(running.run(jobs(task, ["c02"])))
        assert len(list(running.run(jobs("look")))) == 4, "the engine is as it was"


def test_a_client_whose_own_state_cannot_be_read_fails_alone(one):
    folder = one.runtime.client_store.folder / "c01"
    folder.mkdir(parents=True)
    (folder / "000000-train.safetensors").write_bytes(b"nonsense")
    broken, sound = one.run([replace(job, accepted="000000-train") for job in jobs("look", ["c01", "c02"])])
    assert isinstance(broken, Failure)
    assert isinstance(sound, Update)


def test_a_client_never_keeps_a_number_that_is_not_finite(one):
    (found,) = one.run(jobs("keep nonsense", ["c01"]))
    assert isinstance(found, Failure)
    assert found.reason == "what it keeps to itself holds NaN or infinity in w"
    assert one.runtime.client_store.versions("c01") == []


def test_what_a_client_keeps_of_an_answer_that_did_not_count_is_not_gone_on_from(prepared, one):
    weights = Patch(rows.read(one.runtime.model))
    first, second, again = (replace(job_of(prepared, "c01", "keep", round), patch=weights) for round in (1, 2, 3))
    for job in (first, replace(second, accepted=first.key)):  # the second answer is never merged
        assert isinstance(next(iter(one.run([job]))), Update)
    store = one.runtime.client_store
    assert [path.stem for path in store.versions("c01")] == [first.key, second.key]
    assert torch.equal(store.load(replace(again, accepted=first.key))[SOME], load_file(store.versions("c01")[0])[SOME])
    assert store.load(replace(again, accepted="")) == {}
    assert isinstance(next(iter(one.run([replace(again, accepted=first.key)]))), Update)
    assert [path.stem for path in store.versions("c01")] == [first.key, again.key]


def test_no_job_starts_far_ahead_of_the_oldest_that_is_not_answered(two):
    taken = []

    def counted():
        for job in jobs("look", ["c01"] * 20):
            taken.append(job)
            yield job

    answered = 0
    for _ in two.run(counted()):
        assert len(taken) - answered <= 2 * len(two.workers)
        answered += 1
    assert answered == 20


def phimoe_site(tmp_path):
    class Encodes:
        def batch(self, examples):
            return tiny_batch("phimoe", len(examples))

    split = Split([Example("a", "b", "t")] * 4, [], [])
    model = tiny_model("phimoe", router_jitter_noise=0.1)
    client = Client("c01", 4)
    task = ClientTask(FedAvg(), EvaluationSettings(), 1)
    data, clients = {"c01": split}, {"c01": client}
    return ClientRuntime(model, Encodes(), Training(local_steps=2), clients, data, task, ClientStateStore(tmp_path))


def test_a_router_that_draws_random_numbers_draws_the_same_for_the_same_job(tmp_path):
    """PhiMoE's, in training."""
    runtime = phimoe_site(tmp_path)
    weights = Patch(rows.read(runtime.model))
    with LocalEngine(runtime) as running:
        experts = {f"model.layers.{layer}.mlp": tuple(range(8)) for layer in range(3)}
        found = []
        for state, seed in ((1, "a"), (2, "a"), (1, "b")):
            torch.manual_seed(state)
            before = torch.random.get_rng_state()
            found += running.run([Job("c01", 1, "train", seed, experts, weights)])
            assert torch.equal(torch.random.get_rng_state(), before)
    first, again, other = (update.patch.tensors for update in found)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_training_leaves_the_base_as_it_was(prepared, one):
    base = {name: parameter.detach().clone() for name, parameter in prepared.base.model.named_parameters()}
    (update,) = one.run([replace(job_of(prepared, "c01", "train", 1), patch=Patch(rows.read(one.runtime.model)))])
    assert isinstance(update, Update)
    assert not torch.equal(update.patch.tensors[SOME], base[SOME])
    assert all(torch.equal(parameter, base[name]) for name, parameter in prepared.base.model.named_parameters())
    assert not any(parameter.requires_grad is False for parameter in prepared.base.model.parameters())
