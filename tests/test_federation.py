"""The loop, with doubles: no model, weights of one number."""

from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedexperts.core.ledger import Ledger
from fedexperts.engines.base import expectation, reorder_and_validate
from fedexperts.errors import BadRun
from fedexperts.federation import choose, done, federate, jobs_for, no_reports, steps
from fedexperts.methods.base import mean_rows
from fedexperts.methods.contract import Declaration, Method
from fedexperts.moe.anatomy import Anatomy, BlockShape
from fedexperts.moe.footprint import Footprint
from fedexperts.types import Assignment, Client, Failure, Job, Patch, Server, Update

ANATOMY = Anatomy({"mlp": BlockShape(num_experts=3, top_k=1)})
TASKS = ("sort", "add", "copy")


def clients(number):
    return {f"c{i:02}": Client(f"c{i:02}", examples=i + 1, task=TASKS[i % 3]) for i in range(number)}


def first_server(number=6):
    weights = {"expert": torch.zeros(3, 1), "dense": torch.zeros(1, 2)}
    layout = {"expert": "mlp", "dense": None}
    return Server(weights, layout, ANATOMY, Footprint(0, {"mlp": 1}, 0), clients(number), seed="5")


@dataclass(frozen=True)
class AddsOne(Method):
    """Each client sends what it got plus one, weighed alike."""

    tasks: tuple[str, ...] = ()
    sits_out: tuple[str, ...] = ()

    def declare(self):
        return Declaration(setup_tasks=self.tasks)

    def assign(self, server, client):
        return None if client.name in self.sits_out else Assignment({"mlp": (0, 2)})

    def train(self, job, context):
        patch = Patch({name: tensor + 1 for name, tensor in job.patch.tensors.items()}, job.patch.rows)
        return Update(job.client, job.round, job.task, patch, examples=int(job.client[1:]) + 1)

    def merge(self, server, updates):
        return mean_rows(server, updates, lambda update: 1.0)


class Notes:
    """An engine that answers in this process, notes its jobs, and fails for some clients."""

    def __init__(self, method, failing=(), backwards=False):
        self.method, self.failing, self.backwards = method, failing, backwards
        self.jobs = []

    def run(self, jobs):
        answers = [self.answer(job) for job in jobs]
        yield from reversed(answers) if self.backwards else answers

    def answer(self, job):
        self.jobs.append(job)
        if job.client in self.failing:
            return Failure(job.client, job.round, job.task, "tired")
        return self.method.train(job, None)


def received(engine, jobs, server=None, ledger=None):
    """The updates that pass the boundary, of a method that declares nothing."""
    expect = partial(expectation, server or first_server(), AddsOne(), no_reports)
    return reorder_and_validate(engine, jobs, expect, ledger or Ledger())


def run(method, engine=None, server=None, rounds=2, clients_per_round=2, **settings):
    engine = engine or Notes(method)
    servers = federate(
        server or first_server(), method, engine, Ledger(), rounds=rounds, clients_per_round=clients_per_round, **settings
    )
    return engine, list(servers)


def test_every_client_executes_each_setup_task_once_before_the_first_round():
    engine, servers = run(AddsOne(tasks=("profile", "vote")))
    assert [(server.round, server.task) for server in servers] == [(0, "profile"), (0, "vote"), (1, "train"), (2, "train")]
    steps_of_jobs = [(job.round, job.task) for job in engine.jobs]
    assert steps_of_jobs == [(0, "profile")] * 6 + [(0, "vote")] * 6 + [(1, "train")] * 2 + [(2, "train")] * 2
    assert [job.client for job in engine.jobs[:6]] == list(clients(6))


def test_every_job_has_its_own_seed_made_of_round_task_and_client():
    engine, _ = run(AddsOne(tasks=("profile",)), rounds=4)
    seeds = [job.seed for job in engine.jobs]
    assert len(set(seeds)) == len(seeds) == 6 + 4 * 2
    assert seeds[0] == "5/0/profile/c00"


def test_a_job_has_the_rows_of_its_experts_and_whole_dense_weights():
    engine, _ = run(AddsOne(), rounds=1, clients_per_round=1)
    (job,) = engine.jobs
    assert job.patch.tensors["expert"].shape == (2, 1)
    assert job.patch.rows["expert"].tolist() == [0, 2]
    assert job.patch.tensors["dense"].shape == (1, 2)
    assert "dense" not in job.patch.rows


def test_only_rows_that_were_sent_change_and_the_first_server_stays_as_it_was():
    start = first_server()
    _, servers = run(AddsOne(), server=start)
    assert servers[-1].weights["expert"].flatten().tolist() == [2.0, 0.0, 2.0]
    assert servers[-1].weights["dense"].tolist() == [[2.0, 2.0]]
    assert start.weights["expert"].flatten().tolist() == [0.0, 0.0, 0.0]


def test_client_sampling_depends_only_on_seed_and_round():
    def sampled(seed):
        engine, _ = run(AddsOne(), server=replace(first_server(), seed=seed), rounds=5)
        return [job.client for job in engine.jobs]

    assert sampled("5") == sampled("5")
    assert sampled("5") != sampled("6")
    assert len({tuple(sorted(sampled("5")[i : i + 2])) for i in range(0, 10, 2)}) > 1


def test_a_resumed_run_gives_the_results_of_an_uninterrupted_one():
    method = AddsOne(tasks=("profile", "vote"))
    whole_engine, whole = run(method, rounds=3)
    for stopped in range(len(whole)):
        engine, rest = run(method, server=whole[stopped], rounds=3)
        assert [(server.round, server.task) for server in rest] == [(s.round, s.task) for s in whole[stopped + 1 :]]
        left = len(engine.jobs)
        assert [job.seed for job in engine.jobs] == [job.seed for job in whole_engine.jobs[len(whole_engine.jobs) - left :]]
        last = (rest or whole)[-1]
        assert torch.equal(last.weights["expert"], whole[-1].weights["expert"])
    assert len(whole) == 5


def test_done_counts_the_steps_behind_a_server():
    method = AddsOne(tasks=("profile",))
    start = first_server()
    assert done(start, method, 2) == 0
    places = [done(replace(start, round=round, task=task), method, 2) for round, task in steps(method, 2)]
    assert places == [1, 2, 3]


def test_sampling_by_task_selects_different_tasks_as_far_as_possible():
    everyone = list(clients(9).values())  # three of each task
    for seed in range(20):
        three = choose(everyone, 3, Random(seed), by_task=True)
        assert {client.task for client in three} == set(TASKS)
        five = Counter(client.task for client in choose(everyone, 5, Random(seed), by_task=True))
        assert sorted(five.values()) == [1, 2, 2]
    assert len({choose(everyone, 3, Random(seed), by_task=True)[0].name for seed in range(20)}) > 1


def test_sampling_by_task_gives_each_client_of_a_task_its_chance():
    everyone = list(clients(9).values())
    chosen = Counter(client.name for seed in range(60) for client in choose(everyone, 3, Random(seed), by_task=True))
    assert chosen.keys() == clients(9).keys() and min(chosen.values()) > 10  # 20 of 60 rounds on average


def test_no_client_is_sampled_twice_and_never_more_than_there_are():
    everyone = list(clients(4).values())
    for by_task in (False, True):
        chosen = choose(everyone, 10, Random(0), by_task)
        assert sorted(client.name for client in chosen) == sorted(clients(4))


def test_a_client_without_an_assignment_sits_out():
    engine, servers = run(AddsOne(sits_out=("c01", "c02")), rounds=1, clients_per_round=6)
    assert {job.client for job in engine.jobs} == {"c00", "c03", "c04", "c05"}
    assert servers[-1].weights["dense"].tolist() == [[1.0, 1.0]]


def test_a_round_without_assignments_changes_nothing():
    _, servers = run(AddsOne(sits_out=tuple(clients(6))), rounds=1)
    assert torch.equal(servers[-1].weights["expert"], first_server().weights["expert"])


def test_a_client_that_fails_is_left_out_of_the_mean():
    method = AddsOne()
    engine = Notes(method, failing=("c00",))
    _, servers = run(method, engine, rounds=1, clients_per_round=6)
    assert len(engine.jobs) == 6
    assert servers[-1].weights["dense"].tolist() == [[1.0, 1.0]]


def test_jobs_are_generated_lazily():
    jobs = jobs_for(replace(first_server(), round=1, task="train"), AddsOne(), iter([first_server().clients["c00"], None]))
    assert next(jobs).client == "c00"


@given(st.permutations(range(6)), st.integers(1, 6))
def test_answers_come_in_the_order_of_their_jobs_however_the_engine_shuffles_them(order, window):
    """The engine takes jobs as far as `window` ahead of its oldest unanswered one, and answers in any order it can."""
    method = AddsOne()
    jobs = list(jobs_for(replace(first_server(), round=1, task="train"), method, first_server().clients.values()))

    def engine(jobs):
        taken = []
        for job in jobs:
            taken.append(job)
            if len(taken) == window:
                taken.sort(key=lambda job: order[int(job.client[1:])])
                yield method.train(taken.pop(0), None)
        yield from (method.train(job, None) for job in sorted(taken, key=lambda job: order[int(job.client[1:])]))

    assert [answer.client for answer in received(engine, jobs)] == [job.client for job in jobs]


def test_an_answer_is_yielded_as_soon_as_all_before_it_have_arrived():
    jobs = [Job(name, 1, "train", "0", {}, Patch({})) for name in ("a", "b", "c")]
    happened = []
    a_b_c = replace(first_server(), clients={name: Client(name, 1) for name in "abc"})

    def engine(jobs):
        a, b, c = jobs
        for job in (b, a, c):
            happened.append(f"answered {job.client}")
            yield Update(job.client, 1, "train", Patch({}), 1)

    for answer in received(engine, jobs, a_b_c):
        happened.append(f"got {answer.client}")
    assert happened == ["answered b", "answered a", "got a", "got b", "answered c", "got c"]


def test_the_order_of_arrival_does_not_affect_the_weights():
    method = AddsOne()
    _, forwards = run(method, Notes(method))
    _, backwards = run(method, Notes(method, backwards=True))
    assert torch.equal(forwards[-1].weights["expert"], backwards[-1].weights["expert"])


def test_an_answer_with_a_weight_the_server_never_sent_is_its_clients_failure():
    job = Job("c00", 1, "train", "0", {}, Patch({"shared": torch.zeros(1)}))
    update = Update("c00", 1, "train", Patch({"shared": torch.zeros(1), "own": torch.zeros(1)}), 1)
    ledger = Ledger()
    assert list(received(lambda jobs: [update for _ in jobs], [job], ledger=ledger)) == []
    assert [entry.failed for entry in ledger.entries] == ["its update has own, which was not in its job"]


def test_merged_weights_that_are_not_finite_are_refused():
    @dataclass(frozen=True)
    class Explodes(AddsOne):
        def merge(self, server, updates):
            merged = super().merge(server, updates)
            return replace(merged, weights={**merged.weights, "dense": torch.full((1, 2), torch.inf)})

    with pytest.raises(BadRun, match="round 1: the merged weights hold NaN or infinity in dense"):
        run(Explodes())
