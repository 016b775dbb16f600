"""What an answer must be like to be merged, whichever engine brings it."""

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch

from fedexperts.core.ledger import Ledger
from fedexperts.engines import base
from fedexperts.engines.base import MOST_JSON, Report, expectation, reorder_and_validate, validate_update
from fedexperts.engines.serialization import pack_answer
from fedexperts.federation import no_reports
from fedexperts.methods.base import by_examples, mean_rows
from fedexperts.methods.contract import Declaration, ExtraTensor, ExtraTensors, Method, Metric
from fedexperts.moe.anatomy import BlockShape
from fedexperts.testing import bare_server
from fedexperts.types import Client, Cost, Failure, Job, Patch, Update

IDS = torch.tensor([1, 3])
A, B = "q.lora_A.weight", "q.lora_B.weight"
JOB = Job("c01", 1, "train", "0", {"m": (1, 3)}, Patch({"e": torch.ones(2, 3), "d": torch.zeros(1, 4)}, {"e": IDS}))
ADAPTERS = replace(JOB, patch=Patch({A: torch.ones(1, 4, 3), B: torch.ones(1, 3, 4)}), extra={"rank": torch.tensor(4)})


def update(tensors, rows=None, job=JOB, **more):
    return Update(job.client, job.round, job.task, Patch(tensors, rows or {}), 5, **more)


@dataclass(frozen=True)
class Plain(Method):
    """Sends all that came and nothing else."""


@dataclass(frozen=True)
class Declares(Method):
    """May send fewer experts, adapters of a lower rank, a vector, a rank, and a number."""

    def declare(self):
        return Declaration(
            extra={
                "p": ExtraTensor(lambda server, job: (2,), low=0.0, high=1.0),
                "rank": ExtraTensor(lambda server, job: (), torch.int64, low=1, required=False),
                "control/": ExtraTensors(lambda server, job: {"d": torch.zeros(1, 4)}, required=False),
            },
            metrics={"sent": Metric(low=0, whole=True), "each": Metric(length=lambda server, job: 1, low=0)},
            selects_experts=True,
            lowers_rank=True,
        )


P = {"p": torch.tensor([0.25, 1.0])}
SERVER = bare_server([BlockShape(4, 1)], [Client("c01", 5)])


def reason(answer, job=JOB, method=Plain()):
    """Why `answer` to `job` is none, by the method's declaration; None where it is one."""
    found = validate_update(expectation(SERVER, method, no_reports, job), answer)
    assert found is answer or isinstance(found, Failure)
    return found.reason if isinstance(found, Failure) else None


def test_all_that_came_passes_and_of_a_method_that_selects_experts_fewer_rows():
    assert reason(update(JOB.patch.tensors, {"e": IDS})) is None
    for rows in (IDS[1:], IDS[:0]):
        fewer = update({"e": torch.ones(len(rows), 3), "d": torch.ones(1, 4)}, {"e": rows}, extra=P)
        assert reason(fewer, method=Declares()) is None
        assert reason(replace(fewer, extra={})) == f"its update has {len(rows)} of the 2 rows of e, and its method sends all"


def test_the_norms_of_the_servers_own_weights_are_computed_once_for_all_jobs(monkeypatch):
    computed = []
    monkeypatch.setattr(base, "norm_of", lambda tensor: [computed.append(tensor), float(tensor.norm())][1])
    whole, cut = torch.full((1, 4), 2.0), torch.ones(2, 3)
    server = replace(SERVER, weights={"d": whole, "e": torch.ones(4, 3)})
    jobs = [
        replace(JOB, client=name, patch=Patch({"d": whole, "e": cut * scale}, {"e": IDS})) for name, scale in (("a", 1), ("b", 3))
    ]
    known = {}
    norms = [expectation(server, Plain(), no_reports, job, known).norms for job in jobs]
    assert [each["d"] for each in norms] == [4.0, 4.0] and known == {"d": 4.0}
    assert [each["e"] for each in norms] == pytest.approx([6**0.5, 3 * 6**0.5])
    assert len(computed) == 3


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
        (update({"e": torch.ones(2, 3)}), "its update has e and does not say which of its rows"),
        (update({"e": torch.ones(2, 3)}, {"e": torch.tensor([1, 1])}), "its update has rows of e that do not ascend"),
        (update({"e": torch.ones(2, 3)}, {"e": torch.tensor([1, 2])}), "its update has rows of e that were not in its job"),
        (update({"e": torch.ones(2, 3)}, {"e": torch.tensor([-1, 1])}), "its update has rows of e that were not in its job"),
        (update({"d": torch.ones(1, 4)}, {"d": torch.tensor([1])}), "its update has rows of d, which its job brought whole"),
        (update({"e": torch.ones(2, 3)}, {"e": IDS.double()}), "its update has rows of e that are no list of whole numbers"),
        (update({"e": torch.ones(2, 3)}, {"e": IDS[None]}), "its update has rows of e that are no list of whole numbers"),
        (update({}, {"x": IDS}), "its update has rows of x, and not the weight itself"),
        (
            update({"d": torch.full((1, 4), 1e30)}),
            "its update has d with a norm of 2e+30, and at most 200 would",
        ),
        (update({"d": torch.tensor([[1.0, 2.0, 3.0, torch.nan]])}), "its update has NaN or infinity in d"),
        (update({"own": torch.ones(1)}), "its update has own, which was not in its job"),
        (update({}), "its update lacks d"),
    ],
)
def test_what_does_not_fit_is_a_failure_that_names_the_tensor(answer, said):
    whole = {"d": torch.zeros(1, 4), "e": torch.ones(2, 3)}
    rows = {"e": IDS, **answer.patch.rows} if "e" not in answer.patch.tensors else answer.patch.rows
    filled = {**whole, **answer.patch.tensors} if answer.patch.tensors or answer.patch.rows else {"e": torch.ones(2, 3)}
    assert (reason(replace(answer, patch=Patch(filled, rows))) or "").startswith(said)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({}, "its update lacks the extra tensor p"),
        ({"p": torch.ones(3)}, "its update has the extra tensor p as torch.float32 [3], and it should be torch.float32 [2]"),
        ({"p": torch.ones(2).double()}, "its update has the extra tensor p as torch.float64 [2], and it should be torch.float32"),
        ({"p": torch.tensor([0.5, 1.5])}, "its update has numbers in the extra tensor p beyond 0 to 1"),
        ({"p": torch.tensor([0.5, torch.inf])}, "its update has NaN or infinity in the extra tensor p"),
        ({**P, "rank": torch.tensor(0)}, "its update has numbers in the extra tensor rank beyond 1 to 1e+06"),
        ({**P, "q": torch.ones(1)}, "its update has an extra tensor q, which its method does not declare"),
        ({**P, "control/e": torch.ones(2, 3)}, "its update has an extra tensor control/e, which its method does not declare"),
        ({**P, "grafted/x": torch.ones(1)}, "its update has an extra tensor grafted/x, which its method does not declare"),
    ],
)
def test_extra_tensors_are_those_that_the_method_declares(extra, said):
    sent = update(JOB.patch.tensors, {"e": IDS}, extra=extra)
    assert (reason(sent, method=Declares()) or "").startswith(said)
    fits = {**P, "rank": torch.tensor(3), "control/d": torch.ones(1, 4)}
    assert reason(replace(sent, extra=fits), method=Declares()) is None


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({"qualified": 1}, "its update reports 'qualified', a metric that neither the run nor its method declares"),
        ({"sent": 1.5}, "its metric sent is 1.5, and should be a whole number"),
        ({"sent": True}, "its metric sent is True, and should be a whole number"),
        ({"sent": -1}, "its metric sent is -1, and should be from 0 to 1e+06"),
        ({"each": 3}, "its metric each is 3, and should be a list of 1 numbers"),
        ({"each": [float("nan")]}, "its metric each is nan, and should be from 0 to 1e+06"),
        ({"loss": 10**400}, "its metric loss is 1000"),
        ({"loss": "low"}, "its metric loss is 'low', and should be a number"),
        ({"routed": {"m": [1]}}, "its metric routed should hold 2 counts for m"),
        ({"routed": 3}, "its metric routed is 3, and should hold the blocks of its job"),
        ({"reached": "x"}, "its metric reached is 'x', and should be a number of experts for each of 1 blocks"),
        ({"scores": {}}, "its update reports 'scores', a metric that neither the run nor its method declares"),
    ],
)
def test_metrics_are_known_and_have_values_that_they_can_have(metrics, said):
    sent = update(JOB.patch.tensors, {"e": IDS}, extra=P, metrics=metrics)
    assert (reason(sent, method=Declares()) or "").startswith(said)
    sound = {"loss": 1.5, "sent": 2, "each": [0.5], "routed": {"m": [3, 4]}, "reached": [1.5]}
    assert reason(replace(sent, metrics=sound), method=Declares()) is None


@pytest.mark.parametrize("examples", [4, 6, 9_999_998, -1, 5.0, "5", None])
def test_a_client_has_as_many_examples_as_it_came_with(examples):
    assert "training examples, and" in reason(replace(update(JOB.patch.tensors, {"e": IDS}), examples=examples))


@pytest.mark.parametrize(
    "cost", [Cost(seconds=-1.0), Cost(tokens=float("nan")), Cost(peak_bytes=10**400), Cost(flops_estimated="x")]
)
def test_costs_are_numbers_that_can_be_added_up(cost):
    assert reason(replace(update(JOB.patch.tensors, {"e": IDS}), cost=cost)).startswith("its cost has ")


def test_an_answer_to_another_job_is_none():
    sent = update(JOB.patch.tensors, {"e": IDS})
    assert reason(replace(sent, round=2)) == "it answered for 'c01' in round 2, 'train', which is not the job it was sent"


def test_a_client_may_lower_the_rank_of_its_adapters_where_its_method_says_so():
    lower = update({A: torch.ones(1, 2, 3), B: torch.ones(1, 3, 2)}, job=ADAPTERS, extra=P)
    assert reason(lower, ADAPTERS, Declares()) is None
    assert reason(lower, ADAPTERS) == f"its update has {A} of shape [1, 2, 3], and [1, 4, 3] would fit its job"


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
    assert reason(update(tensors, job=ADAPTERS, extra=P), ADAPTERS, Declares()) == said


def test_a_failure_passes_with_its_reason_as_one_line_that_can_be_shown():
    failed = Failure("c01", 1, "train", "no\n\x1b[31m power" + 9999 * "!", bytes_up=10**9)
    (found,) = [validate_update(expectation(SERVER, Plain(), no_reports, JOB), failed)]
    assert (found.client, found.round, found.task, found.bytes_up) == ("c01", 1, "train", 0)
    assert found.reason.startswith("no [31m power!!!") and len(found.reason) == 500


def test_an_answer_may_take_about_the_bytes_that_are_expected_and_no_more():
    plain, declares = (expectation(SERVER, method, no_reports, JOB).most_bytes for method in (Plain(), Declares()))
    sent = update(JOB.patch.tensors, {"e": IDS}, extra=P).nbytes
    assert sent < plain < declares < plain + 2000 < 3 * 2**20


@dataclass(frozen=True)
class SendsLarge(Method):
    """Sends a vector that is larger than its job and all that an answer may take beside tensors."""

    def declare(self):
        return Declaration(extra={"v": ExtraTensor(lambda server, job: (10**6,))})


def test_an_answer_has_room_for_the_extra_tensors_that_its_method_declares():
    sent = update(JOB.patch.tensors, {"e": IDS}, extra={"v": torch.zeros(10**6)})
    plain, large = (expectation(SERVER, method, no_reports, JOB).most_bytes for method in (Plain(), SendsLarge()))
    assert reason(sent, method=SendsLarge()) is None
    assert plain < len(pack_answer(sent)) <= large < plain + sent.nbytes + 1000


def test_the_bytes_of_an_answer_that_does_not_fit_are_counted():
    sent = update({"e": torch.ones(2, 3), "d": torch.zeros(1, 1000)}, {"e": IDS})
    refused = validate_update(expectation(SERVER, Plain(), no_reports, JOB), sent)
    assert isinstance(refused, Failure) and refused.bytes_up == sent.nbytes > 4000


def test_the_server_goes_on_without_an_update_that_does_not_fit_whichever_engine_brought_it():
    clients = [Client(name, 10) for name in ("good", "broken")]
    server = replace(bare_server([], clients), weights={"d": torch.zeros(1, 2)}, layout={"d": None}, round=1, task="train")
    sent = {"good": torch.full((1, 2), 3.0), "broken": torch.full((2, 2), 9.0)}
    jobs = [Job(name, 1, "train", "0", {}, Patch(server.weights)) for name in sent]

    def engine(asked):
        for job in asked:
            yield Update(job.client, 1, "train", Patch({"d": sent[job.client]}), 10)

    ledger = Ledger()
    expect = partial(expectation, server, Plain(), no_reports)
    merged = mean_rows(server, reorder_and_validate(engine, jobs, expect, ledger), by_examples)
    assert merged.weights["d"].tolist() == [[3.0, 3.0]]
    assert [entry.failed for entry in ledger.entries] == [
        None,
        "its update has d of shape [2, 2], and [1, 2] would fit its job",
    ]


def test_a_weight_may_grow_to_a_hundred_times_ones_and_from_there_by_one_times_in_each_round():
    for start, most in ((0.0, 100.0), (100.0, 101.0), (1e6, 1e6 + 1.0)):
        job = replace(JOB, patch=Patch({"d": torch.full((1, 4), start)}))
        assert reason(update({"d": torch.full((1, 4), most)}, job=job), job) is None
        grown = reason(update({"d": torch.full((1, 4), most + 0.5)}, job=job), job)
        assert grown.startswith("its update has d with a norm of ")


def test_of_an_adapter_the_product_of_its_factors_may_grow_as_a_weight():
    factors = {A: torch.full((1, 4, 3), 10.0), B: torch.full((1, 3, 4), 9.9)}
    assert reason(update(factors, job=ADAPTERS), ADAPTERS) is None
    larger = {**factors, B: torch.full((1, 3, 4), 10.1)}
    assert reason(update(larger, job=ADAPTERS), ADAPTERS).startswith(f"its update has {A} and {B} with norms of product 1.21e+03")


def test_adapters_of_experts_have_a_rank_that_they_can_be_trained_with():
    a, b = "m.experts.lora.up.a", "m.experts.lora.up.b"
    job = replace(JOB, patch=Patch({a: torch.ones(2, 8, 4), b: torch.ones(2, 4, 8)}, {a: IDS, b: IDS}))
    lower = {
        rank: update({a: torch.ones(2, rank, 4), b: torch.ones(2, 4, rank)}, {a: IDS, b: IDS}, job, extra=P) for rank in (4, 6)
    }
    assert reason(lower[4], job, Declares()) is None
    assert reason(lower[6], job, Declares()) == "its update has adapters of rank 6, and a multiple of 4 would fit its job"


def test_what_the_run_asks_for_must_be_in_the_answer():
    expected = expectation(SERVER, Plain(), lambda job: {"scores": Report(lambda value: None)}, JOB)
    without = validate_update(expected, update(JOB.patch.tensors, {"e": IDS}))
    assert without.reason == "its update does not report scores, which the run asks for"
    assert isinstance(validate_update(expected, update(JOB.patch.tensors, {"e": IDS}, metrics={"scores": 1})), Update)


def test_what_a_client_may_keep_to_itself_need_not_be_in_the_answer_and_has_room_of_its_own():
    report = Report(lambda value: None if isinstance(value, str) else "is no text", required=False, characters=MOST_JSON)
    expected = expectation(SERVER, Plain(), lambda job: {"shown": report}, JOB)
    assert expected.most_bytes - expectation(SERVER, Plain(), no_reports, JOB).most_bytes == MOST_JSON

    def answer(**metrics):
        return validate_update(expected, update(JOB.patch.tensors, {"e": IDS}, metrics=metrics))

    assert isinstance(answer(), Update) and isinstance(answer(shown="x" * MOST_JSON), Update)
    assert answer(shown=5).reason == "its metric shown is no text"
    assert "may take 2,097,152" in answer(shown="x" * 2 * MOST_JSON).reason


@pytest.mark.parametrize("reason", ["", " \n", "\0", None, 10**5000], ids=["empty", "blank", "zero", "None", "5,001 digits"])
def test_a_failure_without_a_reason_is_one_all_the_same(reason):
    ledger, job = Ledger(), replace(JOB, client="c01")
    failed = Failure("c01", 1, "train", reason)
    expect = partial(expectation, SERVER, Plain(), no_reports)
    assert not list(reorder_and_validate(lambda jobs: (failed for _ in jobs), [job], expect, ledger))
    assert ledger.lost and ledger.entries[0].failed == "it failed and gave no reason"


@pytest.mark.parametrize("stray", [None, "no", replace(update({}), client="c09"), replace(update({}), client=["c01"])])
def test_answers_that_name_no_client_under_way_are_dropped_and_who_has_not_answered_fails(stray):
    clients = [Client(name, 5) for name in ("c01", "c02", "c03")]
    server, jobs = bare_server([], clients), [replace(JOB, client=client.name) for client in clients]

    def run(asked):
        for job in asked:
            answer = update(JOB.patch.tensors, {"e": IDS}, job)
            yield stray if job.client == "c02" else answer
            yield answer if job.client == "c01" else stray

    ledger, expect = Ledger(), partial(expectation, server, Plain(), no_reports)
    assert [used.client for used in reorder_and_validate(run, jobs, expect, ledger)] == ["c01", "c03"]
    assert [entry.failed for entry in ledger.entries] == [None, "no answer that names it came", None]
