import pytest
import torch

from fedexperts.core.devices import Profile
from fedexperts.core.ledger import Clock, Ledger
from fedexperts.types import Cost, Failure, Job, Patch, Update

IDS = torch.tensor([0, 2])  # 16 bytes
PATCH = Patch({"up": torch.ones(2, 3), "down": torch.ones(2, 5, dtype=torch.bfloat16)}, {"up": IDS, "down": IDS})
PATCH_BYTES = 2 * 3 * 4 + 2 * 5 * 2 + 16
NO_CLOCK = Clock()


def job(client="c01", **fields):
    given = {"round": 1, "task": "train", "seed": "0", "experts": {"a": (0, 2), "b": (1,)}, "patch": PATCH}
    return Job(client, **{**given, **fields})


def update(client="c01", **fields):
    return Update(client, **{"round": 1, "task": "train", "patch": PATCH, "examples": 3, **fields})


def entered(jobs, answers, clock=NO_CLOCK):
    ledger = Ledger(clock)
    for each in jobs:
        ledger.sent(each)
    assert len(ledger.entries) == len(jobs)
    return ledger, [update for answer in answers for update in ledger.received(answer)]


def test_bytes_are_those_of_the_very_tensors_and_shared_row_ids_count_once():
    extra = {"p": torch.zeros(4, dtype=torch.float64)}
    ledger, _ = entered([job(extra=extra)], [update(extra=extra, metrics={"loss": 1.5})])
    (entry,) = ledger.entries
    assert entry.bytes_down == PATCH_BYTES + 4 * 8
    assert entry.bytes_up == PATCH_BYTES + 4 * 8 + len('{"loss": 1.5}')
    assert entry.experts == 3
    assert entry.loss == 1.5


def test_an_entry_has_the_costs_beside_the_bytes():
    cost = Cost(seconds=2.0, tokens=30, peak_bytes=400, flops_estimated=5e9)
    ledger, _ = entered([job()], [update(cost=cost)])
    (entry,) = ledger.entries
    assert (entry.seconds, entry.tokens, entry.peak_bytes, entry.flops_estimated) == (2.0, 30, 400, 5e9)


def test_an_entry_has_the_methods_metrics_but_not_those_of_evaluations():
    metrics = {"loss": 1.5, "sent": 3, "reached": [2.0, 1.0]}
    answers = [
        update(metrics=metrics),
        update(task="evaluate", metrics={"tasks": {"x": [1]}}),
        update("c02", metrics={"loss": 0.5}),
    ]
    ledger, _ = entered([job(), job(task="evaluate"), job("c02")], answers)
    assert [entry.metrics for entry in ledger.entries] == [{"sent": 3, "reached": [2.0, 1.0]}, {}, {}]
    assert [entry.loss for entry in ledger.entries] == [1.5, None, 0.5]
    assert ledger.entries[0].as_json()["metrics"] == {"sent": 3, "reached": [2.0, 1.0]}


def test_the_metrics_of_an_unusable_update_are_not_recorded():
    broken = Failure("c01", 1, "train", "its update has NaN or infinity in up")
    late = update("c02", cost=WORK, metrics={"loss": 1.0, "sent": 3})
    ledger, usable = entered([job("c01"), job("c02")], [broken, late], Clock(BOTH.profiles, deadline_seconds=20.0))
    assert usable == []
    assert [(entry.loss, entry.metrics) for entry in ledger.entries] == [(None, {}), (None, {})]


def test_a_failure_is_recorded_with_its_reason_and_not_merged():
    ledger, usable = entered([job("c01"), job("c02")], [Failure("c01", 1, "train", "no power"), update("c02")])
    assert [answer.client for answer in usable] == ["c02"]
    assert [entry.failed for entry in ledger.entries] == ["no power", None]
    assert ledger.entries[0].bytes_up == 0
    assert ledger.entries[0].bytes_down == PATCH_BYTES


def test_the_bytes_of_a_refused_answer_are_counted():
    ledger, usable = entered([job()], [Failure("c01", 1, "train", "its update has NaN or infinity in down", bytes_up=60)])
    assert usable == []
    assert (ledger.entries[0].bytes_up, ledger.entries[0].loss) == (60, None)


def test_it_records_each_clients_experts_until_it_is_cleared():
    ledger, _ = entered([job()], [update()])
    assert ledger.holds == {"c01": {"a": (0, 2), "b": (1,)}}
    ledger.clear()
    assert (ledger.entries, ledger.holds) == ([], {})


FAST = Profile(flops_per_second=100.0, down_bytes_per_second=30.0, up_bytes_per_second=15.0)
SLOW = Profile(flops_per_second=10.0, down_bytes_per_second=6.0, up_bytes_per_second=3.0)
BOTH = Clock({"c01": FAST, "c02": SLOW})
WORK = Cost(flops_estimated=200.0)


def test_a_round_lasts_as_long_as_its_slowest_client():
    assert PATCH_BYTES == 60
    ledger, usable = entered([job("c01"), job("c02")], [update("c01", cost=WORK), update("c02", cost=WORK)], BOTH)
    # with no metrics an update is 60 bytes of tensors and the 2 of {}
    assert [entry.bytes_up for entry in ledger.entries] == [62, 62]
    assert [entry.clock_seconds for entry in ledger.entries] == [60 / 30 + 200 / 100 + 62 / 15, 60 / 6 + 200 / 10 + 62 / 3]
    assert ledger.clock_seconds == 10 + 20 + 62 / 3
    assert len(usable) == 2


def test_a_client_past_the_deadline_is_left_out_and_the_round_lasts_until_the_deadline():
    clock = Clock(BOTH.profiles, deadline_seconds=20.0)
    answers = [update("c01", cost=WORK, metrics={"loss": 1.0}), update("c02", cost=WORK, metrics={"loss": 1.0})]
    ledger, usable = entered([job("c01"), job("c02")], answers, clock)
    assert [answer.client for answer in usable] == ["c01"]
    assert ledger.clock_seconds == 20.0
    in_time, late = ledger.entries
    assert (in_time.failed, in_time.loss) == (None, 1.0)
    assert late.failed == "it would have answered after 54.3 s, later than the deadline of 20 s"  # 10 + 20 + 73 / 3
    assert (late.bytes_down, late.bytes_up, late.loss) == (60, 0, None)


def test_an_answer_at_the_deadline_is_in_time():
    _, usable = entered([job("c02")], [update("c02")], Clock({"c02": SLOW}, deadline_seconds=60 / 6 + 62 / 3))
    assert len(usable) == 1


def test_the_virtual_time_of_a_failed_client_is_that_of_receiving_its_job():
    ledger, _ = entered([job("c02")], [Failure("c02", 1, "train", "no power")], BOTH)
    (entry,) = ledger.entries
    assert (entry.clock_seconds, entry.failed) == (60 / 6, "no power")


def test_an_evaluation_takes_no_virtual_time_and_is_never_late():
    clock = Clock(BOTH.profiles, deadline_seconds=1e-9)
    ledger, usable = entered([job("c01", task="evaluate")], [update("c01", task="evaluate")], clock)
    assert len(usable) == 1
    assert (ledger.clock_seconds, ledger.entries[0].clock_seconds) == (None, None)


def test_without_profiles_there_is_no_clock():
    ledger, _ = entered([job()], [update(cost=WORK)])
    assert (ledger.clock_seconds, ledger.entries[0].clock_seconds) == (None, None)


def test_experts_that_differ_from_the_jobs_are_recorded_as_sent():
    few = Patch(
        {"a.up": torch.ones(1, 3), "b.up": torch.ones(0, 3)}, {"a.up": torch.tensor([2]), "b.up": torch.tensor([]).long()}
    )
    all_held = Patch({"a.up": torch.ones(2, 3), "b.up": torch.ones(1, 3)}, {"a.up": IDS, "b.up": torch.tensor([1])})
    answers = [update("c01", patch=few), update("c02", patch=all_held), update("c03", patch=Patch({"head": torch.ones(1, 3)}))]
    ledger, _ = entered([job("c01"), job("c02"), job("c03")], answers)
    assert ledger.sends == {"c01": {"a": (2,), "b": ()}}
    ledger.clear()
    assert ledger.sends == {}


@pytest.mark.parametrize("names", [("a.router", "a.up"), ("a.up", "a.router")])
def test_a_router_with_all_its_rows_hides_no_selection_of_experts_whatever_comes_first(names):
    rows = {"a.router": IDS, "a.up": torch.tensor([2])}
    patch = Patch({name: torch.ones(len(rows[name]), 3) for name in names}, {name: rows[name] for name in names})
    ledger, _ = entered([job("c01")], [update("c01", patch=patch)])
    assert ledger.sends == {"c01": {"a": (2,)}}


def test_the_tokens_per_expert_are_recorded_beside_the_assigned_experts():
    token_counts = {"a": [3, 4], "b": [7]}
    ledger, _ = entered([job()], [update(metrics={"loss": 1.0, "routed": token_counts})])
    assert ledger.uses == {"c01": token_counts}
    assert ledger.entries[0].metrics == {}
    ledger.clear()
    assert ledger.uses == {}
