"""Weights in bfloat16 and int8 on their way: by hand, the bounds of the error, what the boundary takes, what is counted."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedexperts.core.ledger import Ledger
from fedexperts.engines.base import expectation, reorder_and_validate, validate_update
from fedexperts.engines.message import from_bytes
from fedexperts.engines.serialization import pack_answer, pack_job, read_tensor, unpack_answer, unpack_job
from fedexperts.engines.wire import brought, decode, encode, from_int8, to_int8
from fedexperts.errors import BadMessage, BadValue
from fedexperts.federation import no_reports
from fedexperts.methods.contract import Declaration, ExtraTensor, Method
from fedexperts.moe.anatomy import BlockShape
from fedexperts.testing import bare_server
from fedexperts.types import BLOCK, Client, Failure, Job, Patch, Update, blocks_of

IDS = torch.tensor([1, 3])
SERVER = bare_server([BlockShape(4, 1)], [Client("c01", 5)])
WIRES = ("bfloat16", "int8")
both = pytest.mark.parametrize("wire", WIRES)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def job_of(wire):
    """Two experts with rows of 100 elements, and a dense weight."""
    patch = Patch({"e": drawn(2, 10, 10), "d": drawn(1, 70, seed=1)}, {"e": IDS}, wire)
    return Job("c01", 1, "train", "0", {"m": (1, 3)}, patch, {"x": drawn(3)})


def sent(job):
    """`job` as it travels."""
    return replace(job, patch=encode(job.patch, job.patch.wire_dtype))


def started(job):
    """`job` as its client sees it."""
    return replace(job, patch=decode(sent(job).patch, job.patch.wire_dtype))


def answered(job, tensors, rows=None):
    """The update of a client that ends with `tensors`, as it travels."""
    patch = encode(Patch(tensors, job.patch.rows if rows is None else rows), job.patch.wire_dtype, started(job).patch)
    return Update("c01", 1, "train", patch, 5)


class Plain(Method):
    pass


class Selects(Method):
    def declare(self):
        return Declaration(selects_experts=True, lowers_rank=True, extra={"n": ExtraTensor(lambda server, job: (), torch.int64)})


PLAIN = Plain()


def received(job, update, method=PLAIN):
    return validate_update(expectation(SERVER, method, no_reports, job), update)


# By hand


def test_int8_by_hand():
    row = torch.zeros(1, 70)
    row[0, :6] = torch.tensor([127.0, 0.5, 1.5, -2.5, 0.49, -127.0])  # scale 1: halves go to the even neighbor
    row[0, 64:] = torch.tensor([0.0, 0.0, 63.5, 32.0, -0.2, 0.3])  # the rest of the row; scale 0.5
    codes, scales = to_int8(row)
    assert (codes.dtype, scales.dtype, codes.shape) == (torch.int8, torch.float32, row.shape)
    assert scales.tolist() == [1.0, 0.5]
    assert codes[0, :6].tolist() == [127, 0, 2, -2, 0, -127]
    assert codes[0, 64:].tolist() == [0, 0, 127, 64, 0, 1]
    assert codes[0, 6:64].count_nonzero() == 0
    assert from_int8(codes, scales)[0, 64:].tolist() == [0.0, 0.0, 63.5, 32.0, 0.0, 0.5]


def test_a_block_of_zeros_has_scale_0_and_comes_back_as_zeros():
    codes, scales = to_int8(torch.zeros(2, 65))
    assert scales.tolist() == [0.0] * 4
    assert torch.equal(from_int8(codes, scales), torch.zeros(2, 65))


def test_one_huge_number_takes_the_rest_of_its_block_and_no_other():
    rows = torch.ones(1, 2 * BLOCK)
    rows[0, 0] = 3e38
    back = from_int8(*to_int8(rows))
    assert back[0, 1:BLOCK].count_nonzero() == 0
    assert torch.allclose(back[0, BLOCK:], torch.ones(BLOCK), rtol=1e-6)
    assert torch.isclose(back[0, 0], torch.tensor(3e38))


def test_a_number_that_is_not_finite_makes_its_block_nan_and_no_other():
    for value in (torch.nan, torch.inf, -torch.inf):
        rows = torch.ones(1, 2 * BLOCK)
        rows[0, 3] = value
        back = from_int8(*to_int8(rows))
        assert bool(back[0, :BLOCK].isnan().all()) and bool(back[0, BLOCK:].isfinite().all())


def test_bfloat16_by_hand():
    patch = encode(Patch({"d": torch.tensor([[1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-7, 0.0, -1e-30]])}), "bfloat16")
    assert patch.tensors["d"].dtype == torch.bfloat16
    back = decode(patch, "bfloat16").tensors["d"]
    assert back[0, :4].tolist() == [1.0, 1 + 2**-6, 1 + 2**-7, 0.0]  # ties go to the even neighbor
    assert back[0, 4].item() == pytest.approx(-1e-30, rel=2**-8)


# Properties

NUMBERS = st.floats(-1e6, 1e6, width=32).map(lambda x: x if abs(x) > 1e-30 else 0.0)
ROWS = st.integers(1, 150).flatmap(lambda size: st.lists(st.lists(NUMBERS, min_size=size, max_size=size), min_size=1, max_size=3))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(ROWS)
def test_int8_errs_by_half_a_scale_at_most(rows):
    tensor = torch.tensor(rows)
    codes, scales = to_int8(tensor)
    assert len(scales) == blocks_of(tensor) == len(rows) * -(-len(rows[0]) // BLOCK)
    each = torch.stack([s.repeat_interleave(BLOCK)[: len(rows[0])] for s in scales.view(len(rows), -1)])
    assert bool(((from_int8(codes, scales) - tensor).abs() <= each * 0.50001).all())


@settings(max_examples=100, deadline=None, derandomize=True)
@given(ROWS)
def test_what_was_rounded_once_has_the_same_codes_again(rows):
    """bfloat16 also has the same bits; the scales of int8 may differ in their last bit."""
    codes, scales = to_int8(torch.tensor(rows))
    again, scales_again = to_int8(from_int8(codes, scales))
    assert torch.equal(codes, again) and torch.allclose(scales, scales_again, rtol=2e-7, atol=0)
    once = decode(encode(Patch({"d": torch.tensor(rows)}), "bfloat16"), "bfloat16")
    assert torch.equal(decode(encode(once, "bfloat16"), "bfloat16").tensors["d"], once.tensors["d"])


@settings(max_examples=50, deadline=None, derandomize=True)
@given(ROWS, st.data())
def test_a_row_has_the_same_bits_whichever_rows_travel_with_it(rows, data):
    tensor = torch.tensor(rows)
    row = data.draw(st.integers(0, len(rows) - 1))
    alone, together = from_int8(*to_int8(tensor[row : row + 1])), from_int8(*to_int8(tensor))
    assert torch.equal(alone[0], together[row])


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 70), max_size=3))
def test_every_shape_comes_back(shape):
    tensor = torch.ones(shape) if shape else torch.tensor(1.0)
    patch = encode(Patch({"d": tensor}), "int8")
    assert torch.equal(decode(patch, "int8").tensors["d"], tensor)


# What travels


@both
def test_integers_bools_row_ids_and_extra_tensors_travel_as_they_are(wire):
    whole = {"n": torch.tensor([[2**62, -1]]), "b": torch.tensor([[True, False]])}
    job = job_of(wire)
    job = replace(job, patch=replace(job.patch, tensors={**job.patch.tensors, **whole}))
    read = unpack_job(pack_job(sent(job)))
    seen = decode(read.patch, wire)
    assert all(
        torch.equal(seen.tensors[name], tensor) and seen.tensors[name].dtype == tensor.dtype for name, tensor in whole.items()
    )
    assert torch.equal(read.patch.rows["e"], IDS)
    assert torch.equal(read.extra["x"], job.extra["x"])


@both
def test_a_message_carries_codes_and_scales_exactly(wire):
    job = job_of(wire)
    read = unpack_job(pack_job(sent(job)))
    assert read.patch.wire_dtype == wire and {t.dtype for t in read.patch.tensors.values()} == {getattr(torch, wire)}
    for name, tensor in started(job).patch.tensors.items():
        assert torch.equal(decode(read.patch, wire).tensors[name], tensor)
    update = answered(job, {name: t + 0.01 for name, t in job.patch.tensors.items()})
    here, there = (received(job, each) for each in (update, unpack_answer(pack_answer(update))))
    assert all(torch.equal(here.patch.tensors[name], there.patch.tensors[name]) for name in job.patch.tensors)


def test_float32_travels_as_ever():
    patch = job_of("float32").patch
    assert encode(patch, "float32") is patch is decode(patch, "float32")
    update = Update("c01", 1, "train", patch, 5)
    assert received(job_of("float32"), update) is update


def part_bytes(message):
    """Bytes of the tensors in a packed message."""
    return sum(read_tensor(part).nbytes for part in from_bytes(message).parts.values())


@both
def test_the_ledger_counts_the_bytes_of_the_parts_of_messages(wire):
    job, ledger, seen = job_of(wire), Ledger(), []

    def engine(jobs):
        for each in jobs:
            update = answered(job, {name: t + 0.01 for name, t in job.patch.tensors.items()})
            seen.extend([pack_job(each), pack_answer(update)])
            yield unpack_answer(seen[1])

    expect = lambda each: expectation(SERVER, Plain(), no_reports, each)  # noqa: E731
    (used,) = reorder_and_validate(engine, [job], expect, ledger)
    (entry,) = ledger.entries
    assert entry.failed is None and used.patch.tensors["e"].dtype == torch.float32
    assert entry.bytes_down == part_bytes(seen[0]) == job.nbytes == {"bfloat16": 540 + 28, "int8": 270 + 4 * 6 + 28}[wire]
    assert entry.bytes_up == part_bytes(seen[1]) + len("{}") == used.nbytes
    assert len(seen[1]) <= expect(job).most_bytes < expectation(SERVER, Plain(), no_reports, job_of("float32")).most_bytes


def test_int8_is_a_quarter_and_a_scale_for_each_block():
    patch = Patch({"e": torch.zeros(4, 2, BLOCK)}, {}, "int8")
    assert patch.nbytes == encode(patch, "int8").nbytes == 4 * 2 * (BLOCK + 4)
    assert Patch(patch.tensors, {}, "bfloat16").nbytes == 4 * 2 * BLOCK * 2


# The change


@both
def test_a_client_that_changes_nothing_changes_nothing(wire):
    job = job_of(wire)
    update = received(job, answered(job, started(job).patch.tensors))
    assert not torch.equal(started(job).patch.tensors["e"], job.patch.tensors["e"])
    assert all(torch.equal(update.patch.tensors[name], tensor) for name, tensor in job.patch.tensors.items())


@both
def test_the_server_adds_the_change_to_the_weights_that_it_has(wire):
    """So that changes smaller than what rounding the weights would leave add up over rounds."""
    weights = job_of(wire).patch.tensors
    for _ in range(10):
        job = replace(job_of(wire), patch=Patch(weights, {"e": IDS}, wire))
        weights = received(job, answered(job, {name: t + 1e-4 for name, t in started(job).patch.tensors.items()})).patch.tensors
    first = job_of(wire)
    for name, tensor in weights.items():
        assert torch.allclose(tensor - first.patch.tensors[name], torch.tensor(1e-3), rtol=0.02)
        step = (started(first).patch.tensors[name] - first.patch.tensors[name]).abs().max()
        assert step > 1e-3


@both
def test_of_fewer_rows_the_change_of_these_travels(wire):
    job = job_of(wire)
    trained = {"e": started(job).patch.tensors["e"][1:] + 1e-3, "d": started(job).patch.tensors["d"]}
    update = replace(answered(job, trained, {"e": IDS[1:]}), extra={"n": torch.tensor(1)})
    back = received(job, update, Selects())
    assert torch.allclose(back.patch.tensors["e"] - job.patch.tensors["e"][1:], torch.tensor(1e-3), rtol=0.02)


@both
def test_weights_of_another_shape_travel_themselves(wire):
    a, b = "q.lora_A.weight", "q.lora_B.weight"
    job = replace(job_of(wire), patch=Patch({a: drawn(1, 4, 80), b: drawn(1, 80, 4)}, {}, wire))
    lower = {a: drawn(1, 2, 80, seed=5), b: drawn(1, 80, 2, seed=6)}
    update = replace(answered(job, lower), extra={"n": torch.tensor(1)})
    back = received(job, update, Selects())
    for name, tensor in lower.items():
        assert torch.equal(back.patch.tensors[name], decode(encode(Patch({name: tensor}), wire), wire).tensors[name])
        assert torch.allclose(back.patch.tensors[name], tensor, atol=0.02)


def test_rows_that_the_job_did_not_bring_have_no_start():
    start = Patch({"e": drawn(2, 3)}, {"e": IDS})
    assert brought("e", Patch({"e": drawn(1, 3)}, {"e": torch.tensor([2])}), start) is None
    assert brought("f", Patch({"f": drawn(1, 3)}), start) is None
    assert torch.equal(brought("e", Patch({"e": drawn(1, 3)}, {"e": torch.tensor([3])}), start), start.tensors["e"][1:])


# What the boundary refuses


def with_scales(made):
    return lambda patch: replace(patch, scales=made(patch.scales))


def with_first(value):
    return with_scales(lambda scales: torch.cat([torch.tensor([value]), scales[1:]]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_first(float("nan")), "its update has NaN or infinity in e"),
        (with_first(float("inf")), "its update has NaN or infinity in e"),
        (with_first(1e30), "its update has e with a norm of "),
        (with_scales(lambda s: s[:-1]), "its message has scales as torch.float32 [5], and its weights have 6 blocks"),
        (with_scales(lambda s: torch.cat([s, s])), "its message has scales as torch.float32 [12], and its weights have 6 blocks"),
        (with_scales(lambda s: s.double()), "its message has scales as torch.float64 [6], and its weights have 6 blocks"),
        (with_scales(lambda s: s.view(2, 3)), "its message has scales as torch.float32 [2, 3], and its weights have 6 blocks"),
        (with_scales(lambda s: None), "its message has scales as torch.float32 [0], and its weights have 6 blocks"),
        (with_scales(lambda s: [1.0]), "its update has [1.0] in place of a tensor"),
        (
            lambda patch: replace(patch, tensors={**patch.tensors, "d": torch.zeros(1, 70)}),
            "its message has d as float32, and federation.wire_dtype is 'int8'",
        ),
        (
            lambda patch: replace(patch, tensors={**patch.tensors, "d": torch.zeros(1, 70, dtype=torch.bfloat16)}),
            "its message has scales as torch.float32 [6], and its weights have 4 blocks",
        ),
        (
            lambda patch: replace(patch, tensors={**patch.tensors, "d": patch.tensors["d"].view(1, 7, 10)}),
            "its update has d of shape [1, 7, 10], and [1, 70] would fit its job",
        ),
    ],
)
def test_codes_and_scales_that_do_not_fit_are_a_failure_of_their_client(change, said):
    job = job_of("int8")
    update = answered(job, {name: t + 0.01 for name, t in job.patch.tensors.items()})
    refused = received(job, replace(update, patch=change(update.patch)))
    assert isinstance(refused, Failure) and refused.reason.startswith(said)
    assert isinstance(received(job, update), Update)


def test_scales_where_there_are_none_and_codes_in_place_of_float32_are_refused():
    job = job_of("float32")
    coded = encode(job.patch, "int8")
    plain = Update("c01", 1, "train", replace(job.patch, scales=torch.ones(3)), 5)
    assert received(job, plain).reason == "its message has scales as torch.float32 [3], and its weights have 0 blocks"
    of_codes = Update("c01", 1, "train", replace(coded, scales=None), 5)
    assert received(job, of_codes).reason == "its update has e as torch.int8, and its job had it as torch.float32"


def test_what_a_client_says_that_it_sends_does_not_change_what_is_counted():
    job = job_of("float32")
    update = Update("c01", 1, "train", replace(job.patch, wire_dtype="int8"), 5)
    assert received(job, update).nbytes == job.patch.nbytes + len("{}") > update.nbytes


def test_a_job_that_is_not_encoded_is_refused_by_its_client():
    with pytest.raises(BadMessage, match=r"has e as float32, and federation\.wire_dtype is 'int8'"):
        decode(job_of("int8").patch, "int8")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int8])
def test_weights_that_could_be_taken_for_codes_are_refused_before_they_are_sent(dtype):
    with pytest.raises(BadValue, match=rf"'int8' sends weights of float32, and d is {dtype}; leave it out"):
        encode(Patch({"d": torch.ones(1, 4).to(dtype)}), "int8")
