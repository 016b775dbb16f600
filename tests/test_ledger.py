import pytest
import torch

from fedexperts.ledger import Ledger
from fedexperts.types import Cost, Failure, Job, Patch, Update

IDS = torch.tensor([0, 2])  # 16 bytes
PATCH = Patch({"up": torch.ones(2, 3), "down": torch.ones(2, 5, dtype=torch.bfloat16)}, {"up": IDS, "down": IDS})
PATCH_BYTES = 2 * 3 * 4 + 2 * 5 * 2 + 16


def job(client="c01", **fields):
    given = {"round": 1, "task": "train", "seed": "0", "experts": {"a": (0, 2), "b": (1,)}, "patch": PATCH}
    return Job(client, **{**given, **fields})


def update(client="c01", **fields):
    return Update(client, **{"round": 1, "task": "train", "patch": PATCH, "examples": 3, **fields})


def entered(jobs, answers):
    ledger = Ledger()
    assert len(list(ledger.sent(jobs))) == len(jobs)
    return ledger, list(ledger.received(answers))


def test_bytes_are_those_of_the_very_tensors_and_shared_row_ids_count_once():
    extra = {"p": torch.zeros(4, dtype=torch.float64)}
    ledger, _ = entered([job(extra=extra)], [update(extra=extra, metrics={"loss": 1.5})])
    (entry,) = ledger.entries
    assert entry.bytes_down == PATCH_BYTES + 4 * 8
    assert entry.bytes_up == PATCH_BYTES + 4 * 8 + len('{"loss": 1.5}')
    assert entry.experts == 3
    assert entry.loss == 1.5


def test_what_it_took_stands_beside_the_bytes():
    cost = Cost(seconds=2.0, tokens=30, peak_bytes=400, flops_estimated=5e9)
    ledger, _ = entered([job()], [update(cost=cost)])
    (entry,) = ledger.entries
    assert (entry.seconds, entry.tokens, entry.peak_bytes, entry.flops_estimated) == (2.0, 30, 400, 5e9)


def test_a_failure_is_entered_with_its_reason_and_goes_no_further():
    ledger, usable = entered([job("c01"), job("c02")], [Failure("c01", 1, "train", "no power"), update("c02")])
    assert [answer.client for answer in usable] == ["c02"]
    assert [entry.failed for entry in ledger.entries] == ["no power", None]
    assert ledger.entries[0].bytes_up == 0
    assert ledger.entries[0].bytes_down == PATCH_BYTES


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_update_with_a_number_that_is_not_finite_is_left_out_and_its_bytes_are_counted(number, dtype):
    broken = Patch({"up": torch.ones(2, 3), "down": torch.tensor([[1.0, number]], dtype=dtype)})
    ledger, usable = entered([job()], [update(patch=broken, metrics={"loss": 1.0})])
    assert usable == []
    (entry,) = ledger.entries
    assert entry.failed == "its update holds NaN or infinity in down"
    assert entry.bytes_up == broken.nbytes + len('{"loss": 1.0}')
    assert entry.loss is None


def test_what_a_method_sends_besides_weights_must_be_finite_too():
    ledger, usable = entered([job()], [update(extra={"score": torch.tensor(float("nan"))})])
    assert usable == []
    assert "score" in ledger.entries[0].failed


def test_whole_numbers_and_booleans_are_always_finite():
    _, usable = entered([job()], [update(extra={"held": torch.tensor([True]), "ids": torch.tensor([1])})])
    assert len(usable) == 1


def test_it_knows_who_held_what_and_forgets_it_when_cleared():
    ledger, _ = entered([job()], [update()])
    assert ledger.holds == {"c01": {"a": (0, 2), "b": (1,)}}
    ledger.clear()
    assert (ledger.entries, ledger.holds) == ([], {})
