"""Whatever one client of three answers: it fails alone, with a reason that can be read, or what it sent does no harm."""

import json
import re
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tampered_examples import examples
from tampered_kinds import Absent, generated, paths, with_extra, with_metric, with_weight
from tampering import played, tree_of

from fedexperts.engines.base import LARGEST_NORM, norm_of
from fedexperts.methods import METHODS
from fedexperts.moe import factors

OPTIMIZED, BEFORE = "fedavg with fedadam", "fedavg scored before aggregation"
SUBJECTS = (*METHODS, OPTIMIZED, BEFORE)
EXAMPLES = tuple(examples())
GENERATED = 500
"""Kinds that are made at least of each answer."""

HARMLESS = (
    r"patch\.scales is None",  # as it is where weights travel in float32
    r"round is True",  # which equals 1
    r"(extra|metrics|patch\.tensors|patch\.rows) is empty object",  # where no more has to be there
    r"metrics lack (loss|routed|reached|qualified|sent|validation_loss)",
    r"metric loss is -1",
    r"metrics lack predictions(/0)?|metric predictions is empty list",  # which a client may keep to itself
    r"metrics have 'qualified'",  # from the method that declares it
    r".* cut to rows (none|one less)",  # from a method whose clients choose what they send
    r".*rows of .* are (descending|one twice)|.* cut to rows (descending|one twice)",  # of a single row
    r".* is axes swapped",  # of a weight whose shape is the same from behind
)
"""Generated kinds that some methods may take, since what comes is as good as another honest answer."""


@pytest.fixture(scope="session")
def tasks_of(method_trees, tmp_path_factory):
    """Subject → all tasks of its run, played once by honest clients."""

    @cache
    def made(subject):
        tree = method_trees["fedavg" if subject in (OPTIMIZED, BEFORE) else subject]
        optimizer = {"server_optimizer": {"name": "fedadam"}} if subject == OPTIMIZED else {}
        tree = {**tree, "federation": {**tree["federation"], **optimizer}}
        score = {"score": "before_aggregation"} if subject == BEFORE else {}
        return played(tree_of(tree, **score), tmp_path_factory.mktemp("played"))

    return made


def outcome(task, answer):
    """Why the boundary refuses `answer`; None where it takes it. Whatever it does, the run goes on, and logs can be written."""
    entry = task.received(answer)
    json.dumps(entry.as_json(), allow_nan=False)
    if entry.failed is not None:
        assert 0 < len(entry.failed) <= 500 and entry.failed.isprintable()
        return entry.failed
    merged = task.merged(answer).weights
    adapters = factors.pairs(merged)
    for name, tensor in merged.items():
        ones = tensor.numel() ** 0.5
        if name in adapters:  # FlexLoRA puts all of the product into B
            ones *= merged[adapters[name]].numel() ** 0.5
            assert norm_of(tensor) * norm_of(merged[adapters[name]]) <= 1000 * ones, name
        elif name not in adapters.values():
            assert norm_of(tensor) <= max(LARGEST_NORM * ones, norm_of(task.server.weights[name]) + 2 * ones), name
    return None


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of torch, when a test makes a sparse tensor
@pytest.mark.parametrize("subject", SUBJECTS)
def test_whatever_one_client_answers_it_fails_with_a_reason_or_does_no_harm(tasks_of, subject):
    for task in tasks_of(subject):
        seen = set()
        for kind in EXAMPLES:
            try:
                changed = kind.change(task.answer)
            except Absent:
                continue
            reason = outcome(task, changed)
            assert reason is not None or kind.harmless, f"{task.task}: {kind.name} is accepted"
            seen.add(kind.name)
        for kind in generated(task.answer):
            reason = outcome(task, kind.change(task.answer))
            allowed = any(re.fullmatch(pattern, kind.name) for pattern in HARMLESS)
            assert reason is not None or allowed, f"{task.task}: {kind.name} is accepted"
            seen.add(kind.name)
        assert len(seen) >= GENERATED


CODES = (
    *HARMLESS,
    r"(model|lm_head)\.\S+ is (NaN|infinity|-infinity|1e30|-1e30|all 3e38|all 1e30)",  # of codes: the largest or the smallest
    r"patch\.scales is None|scales are (None|no rows)",  # where no weight is sent
)
"""Generated kinds that a run in int8 may take."""


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_whatever_one_client_sends_in_int8_it_fails_with_a_reason_or_does_no_harm(method_trees, tmp_path):
    tree = tree_of(method_trees["fedmoe"])
    coded = played({**tree, "federation": {**tree["federation"], "wire_dtype": "int8"}}, tmp_path)
    seen = set()
    for task in coded:
        for kind in generated(task.answer):
            reason = outcome(task, kind.change(task.answer))
            allowed = any(re.fullmatch(pattern, kind.name) for pattern in CODES)
            assert reason is not None or allowed, f"{task.task}: {kind.name} is accepted"
            seen.add(kind.name)
    assert len([name for name in seen if name.startswith("scales are")]) > 20


def test_the_kinds_that_there_are(tasks_of):
    train = tasks_of("fedavg")[0]
    assert len({kind.name for kind in EXAMPLES}) == len(EXAMPLES) == 417
    assert len({kind.name for kind in generated(train.answer)}) >= GENERATED


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3),
    max_leaves=6,
)
SHAPES = st.lists(st.integers(0, 9), max_size=4)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64])


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_json_anywhere_in_the_metrics_is_a_failure_or_does_no_harm(tasks_of, data):
    subject = data.draw(st.sampled_from(["fedmoe", "hfedmoe", BEFORE]))
    task = data.draw(st.sampled_from(tasks_of(subject)))
    places = list(paths(task.answer.metrics, every=True))
    assume(places)
    outcome(task, with_metric(task.answer, data.draw(st.sampled_from(places)), data.draw(JSON)))


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_tensor_in_place_of_a_weight_or_an_extra_tensor_is_a_failure_or_does_no_harm(tasks_of, data):
    subject = data.draw(st.sampled_from(["fedmoe", "hfedmoe", "scaffold", "flora", "hetlora"]))
    answer = (task := data.draw(st.sampled_from(tasks_of(subject)))).answer
    places = [(with_weight, name) for name in answer.patch.tensors] + [(with_extra, name) for name in answer.extra]
    assume(places)
    put, name = data.draw(st.sampled_from(places))
    value = data.draw(st.sampled_from([0.0, 1.0, -1.0, 3e4, 99.0, float("nan"), float("inf"), float("-inf")]))
    shape = data.draw(st.just((answer.patch.tensors | answer.extra)[name].shape) | SHAPES)
    outcome(task, put(answer, name, torch.full(shape, value).to(data.draw(DTYPES))))
