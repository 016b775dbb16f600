"""What reports say about clients, their experts and the analytic floor."""

from dataclasses import replace
from pathlib import Path

import pytest

from fedexperts.report import analytic_floors, expert_sets, measures, run_cost_tables, scores
from fedexperts.report.read import ClientPlan, Evaluation, LedgerRow, ModelPlan, Plan, Round, RunResults, Weighed

ALL = {"a": (0, 1), "b": (0, 1)}
HALF = {"a": (0,), "b": (1,)}
CLIENTS = tuple(ClientPlan(name, task) for name, task in (("x", "sort"), ("y", "copy"), ("z", "sort")))


def run(rounds=(), ledger=(), evaluations=(), **plan):
    settings = Plan("fedmoe", 0, ModelPlan("tiny"), CLIENTS, **plan)
    return RunResults(Path("r"), settings, tuple(rounds), tuple(ledger), tuple(evaluations))


def test_quartiles_lie_between_clients_and_the_worst_perplexity_is_the_highest():
    assert scores.spread([10.0, 20.0, 30.0, 40.0, 70.0], "%") == scores.Spread(10.0, 20.0, 30.0, 40.0, 70.0)
    assert scores.spread([1.0, 2.0], "%") == scores.Spread(1.0, 1.25, 1.5, 1.75, 2.0)
    assert scores.spread([1.0, 2.0], "") == scores.Spread(2.0, 1.75, 1.5, 1.25, 1.0)


def test_in_each_round_a_client_counts_as_the_mean_over_its_tasks():
    evaluations = [
        (1, "x", "sort", 0.2), (1, "x", "copy", 0.4), (1, "y", "copy", 0.5), (2, "x", "sort", 0.8), (2, None, "sort", 0.1),
    ]  # fmt: skip
    results = run(
        evaluations=[Evaluation(round, client, task, 1, "accuracy", value) for round, client, task, value in evaluations]
    )
    by_round = scores.quality_of_clients(results)
    assert {number: {client: round(value) for client, value in each.items()} for number, each in by_round.items()} == {
        1: {"x": 30, "y": 50},
        2: {"x": 80},
    }
    assert measures.spread_of([results], "worst").of(results) == pytest.approx(50.0)  # y; x ends with (80 + 40) / 2


def test_experts_are_alike_as_far_as_both_have_them():
    assert expert_sets.jaccard(ALL, ALL) == 1.0
    assert expert_sets.jaccard(ALL, HALF) == 0.5  # two of four
    assert expert_sets.jaccard({"a": (0, 1)}, {"a": (1, 2)}) == pytest.approx(1 / 3)
    assert expert_sets.jaccard({"a": (0,)}, {"b": (0,)}) == 0.0


def test_overlap_is_of_what_clients_sent_where_that_is_less_and_leaves_failures_out():
    rounds = [
        Round(1, holds={"x": ALL, "y": ALL, "z": ALL}),
        Round(2, holds={"x": ALL, "y": ALL, "z": ALL}, sends={"x": HALF, "y": {"a": (1,), "b": ()}}, failed={"z": "lost"}),
    ]
    results = run(rounds)
    assert expert_sets.overlap(results, 0) == expert_sets.Overlap(1.0, 1.0)
    assert list(expert_sets.trained_experts(results)) == ["x", "z", "y"]  # those of one task beside each other
    assert expert_sets.trained_by_client(results)["z"] == [(1, ALL)]
    assert expert_sets.overlap(results) == expert_sets.Overlap(0.5, pytest.approx((0.0 + 0.25) / 2))  # x and z; x and y, z and y


MB = 1_000_000
PATCH = Weighed(2 * MB, {"a": MB, "b": 3 * MB})
MEMORY = Weighed(8 * MB, {"a": 4 * MB, "b": 12 * MB}, activation_bytes=5 * MB)


def test_a_client_that_sent_no_expert_overlaps_with_nobody():
    nothing = {"a": (), "b": ()}
    results = run([Round(1, holds={"x": ALL, "y": ALL, "z": ALL}, sends={"x": nothing, "z": nothing})])
    assert list(expert_sets.trained_experts(results)) == ["y"]
    assert expert_sets.overlap(results) == expert_sets.Overlap(None, None)


def test_the_floor_is_made_of_what_each_client_held_and_sent():
    rounds = [Round(1, holds={"x": ALL, "y": HALF}, sends={"x": HALF}), Round(2, holds={"x": ALL}, failed={"x": "lost"})]
    ledger = [
        LedgerRow(1, "x", "train", bytes_down=11 * MB, bytes_up=7 * MB, peak_bytes=50 * MB),
        LedgerRow(1, "y", "train", bytes_down=9 * MB, bytes_up=7 * MB, peak_bytes=30 * MB),
        LedgerRow(2, "x", "train", bytes_down=99 * MB, failed="lost"),
    ]
    floors = {
        each.cost: (each.measured, each.analytic)
        for each in analytic_floors.floors(run(rounds, ledger, patch=PATCH, memory=MEMORY))
    }
    assert floors == {
        "down": (10.0, 8.0),  # (2 + 2 · 1 + 2 · 3) and (2 + 1 + 3), of which the mean
        "up": (7.0, 6.0),
        "peak memory": (40.0, 32.0),  # 40 and 24: activations are 5, gradients of x 10 and of y 6, and so the larger
    }


@pytest.mark.parametrize(("wire", "share"), [("bfloat16", 0.5), ("int8", 68 / 256)])
def test_the_floor_of_messages_is_in_the_dtype_that_weights_travel_in_and_that_of_memory_is_not(wire, share):
    ledger = [LedgerRow(1, "y", "train", bytes_down=9 * MB, bytes_up=7 * MB, peak_bytes=30 * MB)]
    results = run([Round(1, holds={"y": HALF})], ledger, patch=replace(PATCH, wire_dtype=wire), memory=MEMORY)
    floors = {each.cost: each.analytic for each in analytic_floors.floors(results)}
    assert floors == {"down": 6 * share, "up": 6 * share, "peak memory": 24.0}


def test_where_activations_are_larger_than_gradients_the_floor_has_these():
    ledger = [LedgerRow(1, "y", "train", peak_bytes=40 * MB)]
    large = Weighed(8 * MB, MEMORY.expert_bytes, activation_bytes=16 * MB)
    (*_, memory) = analytic_floors.floors(run([Round(1, holds={"y": HALF})], ledger, patch=PATCH, memory=large))
    assert (memory.cost, memory.analytic) == ("peak memory", 24.0 + 16 - 6)


def test_runs_whose_plan_says_nothing_of_weights_have_no_floor_and_flops_have_a_ceiling():
    ledger = [LedgerRow(1, "x", "train", bytes_down=MB, flops_estimated=2e9)]
    results = run([Round(1, holds={"x": ALL})], ledger, round_flops_estimated=8e9)
    assert analytic_floors.floors(results) == []
    assert run_cost_tables.floors(results).rows == (("FLOPs estimated (10^9)", "2.00", "8.00", "ceiling", "0.25"),)
    assert run_cost_tables.floors(run()).rows == ()
