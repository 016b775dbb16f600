"""What an answer must be like to be merged, whichever engine brings it."""

from dataclasses import replace

import pytest
import torch

from fedexperts.core.ledger import Ledger
from fedexperts.engines.base import outline, reorder_and_validate, validate_update
from fedexperts.errors import Leak
from fedexperts.methods.base import by_examples, mean_rows
from fedexperts.testing import bare_server
from fedexperts.types import Client, Failure, Job, Patch, Update

IDS = torch.tensor([1, 3])
A, B = "q.lora_A.weight", "q.lora_B.weight"
JOB = Job("c01", 1, "train", "0", {"m": (1, 3)}, Patch({"e": torch.ones(2, 3), "d": torch.zeros(1, 4)}, {"e": IDS}))
ADAPTERS = replace(JOB, patch=Patch({A: torch.ones(1, 4, 3), B: torch.ones(1, 3, 4)}), extra={"rank": torch.tensor(4)})


def update(tensors, rows=None, job=JOB, **more):
    return Update(job.client, job.round, job.task, Patch(tensors, rows or {}), 5, **more)


def reason(answer, job=JOB):
    """Why `answer` is none, where all that is known of its job is the outline."""
    found = validate_update(outline(job), answer)
    return found.reason if isinstance(found, Failure) else None


@pytest.mark.parametrize(
    "answer",
    [
        update(JOB.patch.tensors, {"e": IDS}),
        update({"e": torch.ones(1, 3)}, {"e": torch.tensor([3])}),  # a row less
        update({"e": torch.ones(0, 3), "d": torch.ones(1, 4)}, {"e": torch.tensor([], dtype=torch.int64)}),
        update({"d": torch.ones(1, 4)}, {"e": IDS}),
        update({}),
        update({}, extra={"p": torch.ones(9), "rank": torch.tensor(3)}),
    ],
)
def test_what_fits_passes_as_it_is(answer):
    assert validate_update(outline(JOB), answer) is answer


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (update({"d": torch.ones(1, 5)}), "its update has d of shape [1, 5], and [1, 4] would fit its job"),
        (update({"d": torch.ones(4)}), "its update has d of shape [4], and [1, 4] would fit its job"),
        (update({"d": torch.ones(())}), "its update has d of shape [], and [1, 4] would fit its job"),
        (update({"e": torch.ones(3, 3)}, {"e": IDS}), "its update has e of shape [3, 3], and [2, 3] would fit its job"),
        (
            update({"d": torch.ones(1, 4, dtype=torch.bfloat16)}),
            "its update has d as torch.bfloat16, and its job had it as torch.float32",
        ),
        (update({"e": torch.ones(2, 3)}), "its update does not say which rows of e it has"),
        (update({"e": torch.ones(2, 3)}, {"e": torch.tensor([1, 1])}), "its update has rows of e that do not ascend"),
        (update({"e": torch.ones(2, 3)}, {"e": torch.tensor([1, 2])}), "its update has rows of e that were not in its job"),
        (update({"e": torch.ones(2, 3)}, {"e": torch.tensor([-1, 1])}), "its update has rows of e that were not in its job"),
        (update({"d": torch.ones(1, 4)}, {"d": torch.tensor([1])}), "its update has rows of d that were not in its job"),
        (update({"e": torch.ones(2, 3)}, {"e": IDS.double()}), "its update has rows of e that are no list of whole numbers"),
        (update({"e": torch.ones(2, 3)}, {"e": IDS[None]}), "its update has rows of e that are no list of whole numbers"),
        (update({}, {"x": IDS}), "its update has rows of x that was not in its job"),
        (
            update({}, extra={"p": torch.ones(2).to(torch.float8_e4m3fn)}),
            "its update has p as torch.float8_e4m3fn, which no method reads",
        ),
        (
            update({}, extra={"p": torch.ones(2).to(torch.complex64)}),
            "its update has p as torch.complex64, which no method reads",
        ),
    ],
)
def test_what_does_not_fit_is_a_failure_that_names_the_tensor(answer, said):
    assert reason(answer) == said


def test_a_client_may_lower_the_rank_of_its_adapters_where_its_job_gave_it_one_of_its_own():
    lower = update({A: torch.ones(1, 2, 3), B: torch.ones(1, 3, 2)}, job=ADAPTERS)
    assert reason(lower, ADAPTERS) is None
    assert reason(lower, replace(ADAPTERS, extra={})) == f"its update has {A} of shape [1, 2, 3], and [1, 4, 3] would fit its job"


def test_an_evaluation_sends_no_adapters_back():
    asked = replace(ADAPTERS, task="evaluate")
    assert reason(update({}, job=asked), asked) is None
    assert reason(update({}, job=ADAPTERS), ADAPTERS) == f"its update lacks {A}"


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (
            {A: torch.ones(1, 5, 3), B: torch.ones(1, 3, 5)},
            f"its update has {A} of shape [1, 5, 3], and [1, 4, 3] would fit its job",
        ),
        ({A: torch.ones(1, 2, 3), B: torch.ones(1, 3, 3)}, "its update has adapters of different ranks"),
        ({A: torch.ones(1, 2, 3)}, f"its update lacks {B}"),
        ({A: torch.ones(2), B: torch.ones(1, 3, 2)}, f"its update has {A} of shape [2], and [1, 4, 3] would fit its job"),
    ],
)
def test_adapters_of_a_rank_that_cannot_be_are_a_failure(tensors, said):
    assert reason(update(tensors, job=ADAPTERS), ADAPTERS) == said


def test_a_weight_that_was_not_in_the_job_is_no_mere_failure():
    with pytest.raises(Leak):
        validate_update(outline(JOB), update({"own": torch.ones(1)}))


def test_a_failure_passes():
    failed = Failure("c01", 1, "train", "no")
    assert validate_update(outline(JOB), failed) is failed


def test_the_server_goes_on_without_an_update_that_does_not_fit_whichever_engine_brought_it():
    clients = [Client(name, 10) for name in ("good", "broken")]
    server = replace(bare_server([], clients), weights={"d": torch.zeros(1, 2)}, layout={"d": None}, round=1, task="train")
    sent = {"good": torch.full((1, 2), 3.0), "broken": torch.full((2, 2), 9.0)}
    jobs = [Job(name, 1, "train", "0", {}, Patch(server.weights)) for name in sent]

    def engine(asked):
        for job in asked:
            yield Update(job.client, 1, "train", Patch({"d": sent[job.client]}), 10)

    ledger = Ledger()
    merged = mean_rows(server, ledger.received(reorder_and_validate(engine, ledger.sent(jobs))), by_examples)
    assert merged.weights["d"].tolist() == [[3.0, 3.0]]
    assert [entry.failed for entry in ledger.entries] == [
        None,
        "its update has d of shape [2, 2], and [1, 2] would fit its job",
    ]
