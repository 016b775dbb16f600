import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from fedexperts.engines.serialization import DTYPES, pack_answer, pack_job, read_tensor, tensor_part, unpack_answer, unpack_job
from fedexperts.errors import BadMessage
from fedexperts.types import Cost, Failure, Job, Patch, Update

IDS, OTHER = torch.tensor([1, 3]), torch.tensor([0])
PATCH = Patch(
    {
        "layers.0.experts.up": torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
        "layers.0.experts.down": torch.arange(8.0).reshape(4, 2).T,  # not contiguous
        "layers.1.experts.up": torch.ones(1, 2, dtype=torch.float64),
        "dense": torch.zeros(1, 0),
    },
    {"layers.0.experts.up": IDS, "layers.0.experts.down": IDS, "layers.1.experts.up": OTHER},
)
EXTRA = {"p/c01": torch.tensor([0.5]), "mask": torch.tensor([True, False]), "score": torch.tensor(1.0, dtype=torch.float64)}


def same(one, other):
    assert sorted(one) == sorted(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor, other[name])
    return True


def test_a_job_comes_out_as_it_went_in():
    job = Job("c01", 3, "train", "0/3/train/c01", {"layers.0": (1, 3), "layers.1": (0,)}, PATCH, EXTRA)
    read = unpack_job(pack_job(job))
    assert (read.client, read.round, read.task, read.seed, read.experts) == ("c01", 3, "train", job.seed, job.experts)
    assert same(read.patch.tensors, PATCH.tensors)
    assert same(read.patch.rows, PATCH.rows)
    assert same(read.extra, EXTRA)
    assert read.nbytes == job.nbytes


def test_an_update_comes_out_as_it_went_in():
    metrics = {"loss": 0.1, "tasks": {"é": [1, 2]}, "none": None}
    update = Update("c01", 3, "train", PATCH, 17, EXTRA, metrics, Cost(1.5, 20, 300, 4e9))
    read = unpack_answer(pack_answer(update))
    assert (read.client, read.round, read.task, read.examples) == ("c01", 3, "train", 17)
    assert (read.metrics, read.cost) == (metrics, update.cost)
    assert same(read.patch.tensors, PATCH.tensors)
    assert same(read.extra, EXTRA)
    assert read.nbytes == update.nbytes


def test_a_failure_comes_out_as_it_went_in():
    failure = Failure("c01", 3, "train", 'out of "memory"; é')
    assert unpack_answer(pack_answer(failure)) == failure


def test_an_empty_patch_travels():
    update = Update("c01", 1, "profile", Patch({}), 5)
    read = unpack_answer(pack_answer(update))
    assert (dict(read.patch.tensors), dict(read.patch.rows), dict(read.extra)) == ({}, {}, {})


def test_names_that_shared_their_row_ids_share_them_still():
    read = unpack_answer(pack_answer(Update("c01", 1, "train", PATCH, 5))).patch
    assert read.rows["layers.0.experts.up"] is read.rows["layers.0.experts.down"]
    assert read.rows["layers.1.experts.up"] is not read.rows["layers.0.experts.up"]
    assert read.rows["layers.0.experts.up"].dtype == torch.int64


def test_numbers_that_are_not_finite_travel_so_that_the_server_can_tell():
    broken = Update(
        "c01", 1, "train", Patch({"w": torch.tensor([float("nan"), float("inf")])}), 5, metrics={"loss": float("nan")}
    )
    read = unpack_answer(pack_answer(broken))
    assert torch.isnan(read.patch.tensors["w"][0])
    assert read.metrics["loss"] != read.metrics["loss"]


def test_one_tensor_under_two_names_travels_twice():
    one = torch.arange(3.0)
    read = unpack_answer(pack_answer(Update("c01", 1, "train", Patch({"a": one, "b": one}), 5, {"c": one[:2]})))
    assert same(read.patch.tensors, {"a": one, "b": one})
    assert same(read.extra, {"c": one[:2]})


def test_the_bytes_of_the_tensors_go_once_behind_a_short_manifest():
    update = Update("c01", 1, "train", Patch({"w": torch.zeros(1000)}), 5)
    data = pack_answer(update)
    assert 4000 < len(data) < 4000 + 1000
    manifest = json.loads(data[8 : 8 + int.from_bytes(data[:8], "big")])
    assert manifest["head"]["update"]["client"] == "c01"


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (1, 5, 3)])
def test_a_part_is_what_the_safetensors_library_writes_to_the_byte(dtype, shape):
    tensor = torch.arange(2 * max(1, math.prod(shape)) * dtype.itemsize, dtype=torch.uint8).remainder(2)
    tensor = tensor[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
    assert tensor_part(tensor) == save({"tensor": tensor})
    read = read_tensor(memoryview(tensor_part(tensor)))
    assert (read.dtype, read.shape) == (dtype, tensor.shape)
    assert torch.equal(read.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize(
    ("old", "new"),
    [(b"[2,3]", b"[9,3]"), (b'"F32"', b'"F33"'), (b"[0,24]", b"[8,24]"), (b'"F32"', b'"F16"'), (b"[2,3]", b"[-2,-3]")],
)
def test_a_part_whose_header_does_not_fit_its_bytes_is_refused(old, new):
    part = tensor_part(torch.ones(2, 3))
    assert old in part
    with pytest.raises((BadMessage, KeyError)):
        read_tensor(part.replace(old, new))
    with pytest.raises(BadMessage, match="does not fit the 20 bytes"):
        read_tensor(part[:-4])


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool, torch.uint8]
)
@given(shape=st.lists(st.integers(0, 3), max_size=3))
def test_every_dtype_and_shape_travels(dtype, shape):
    tensor = torch.ones(shape).to(dtype)
    assert same(unpack_job(pack_job(Job("c", 1, "t", "s", {}, Patch({}), {"x": tensor}))).extra, {"x": tensor})


def test_tensors_arrive_where_torch_would_put_them_so_that_products_have_the_same_bits():
    weights = {str(size): torch.ones(size) for size in range(1, 40)}
    read = unpack_answer(pack_answer(Update("c01", 1, "train", Patch(weights), 5)))
    assert len(read.patch.tensors) == 39
    assert all(tensor.data_ptr() % 64 == 0 for tensor in read.patch.tensors.values())
