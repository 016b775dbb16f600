"""Messages as Flower's records: whatever dtype and shape, and nothing that was changed on the way."""

import gc
import json
import subprocess
import sys
import tracemalloc
import weakref
import zlib
from math import prod

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from fedexperts.engines import serialization
from fedexperts.engines.flower import codec
from fedexperts.engines.flower.codec import ABOUT, PARTS, compressed, decompressed, from_records, to_records
from fedexperts.engines.message import PROTOCOL, Message, digest, from_bytes, to_bytes
from fedexperts.engines.serialization import answer_message, job_message, read_answer, read_job
from fedexperts.errors import BadMessage
from fedexperts.types import Cost, Failure, Job, Patch, Update

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
IDS = torch.tensor([1, 3])
JOB = Job(
    "c01", 3, "train", "0/3/train/c01", {"l.0": (1, 3)}, Patch({"w": torch.ones(2, 3), "v": torch.zeros(2)}, {"w": IDS, "v": IDS})
)
tensors = st.builds(
    lambda dtype, shape, data: (
        torch.frombuffer(bytearray(data), dtype=torch.uint8)[: prod(shape) * dtype.itemsize].view(dtype).view(shape)
        if prod(shape)
        else torch.zeros(shape, dtype=dtype)
    ),
    st.sampled_from([dtype for dtype in DTYPES if dtype != torch.bool]),
    st.lists(st.integers(0, 4), max_size=3),
    st.binary(min_size=512, max_size=512),
)


def bits(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def test_what_was_read_does_not_stay_in_memory_until_the_next_collection():
    gc.disable()
    try:
        records = to_records(job_message(JOB))
        arrays = weakref.ref(records[PARTS])
        assert from_records(records).parts
        del records
        assert arrays() is None
    finally:
        gc.enable()


def over_flower(message):
    """What arrives of it, through the bytes that Flower itself makes of a record."""
    records = to_records(message)
    arrays = ArrayRecord({name: Array(a.dtype, a.shape, a.stype, bytes(a.data)) for name, a in records[PARTS].items()})
    return from_records(RecordDict({ABOUT: ConfigRecord(dict(records[ABOUT])), PARTS: arrays}))


@given(
    weights=st.dictionaries(st.text(min_size=1, max_size=8), tensors, max_size=4),
    extra=st.dictionaries(st.text(max_size=4), tensors, max_size=2),
)
def test_tensors_of_any_dtype_shape_and_bits_arrive_as_they_were_and_in_their_order(weights, extra):
    read = read_answer(over_flower(answer_message(Update("c01", 1, "train", Patch(weights), 5, extra))))
    for received, sent in ((read.patch.tensors, weights), (read.extra, extra)):
        assert list(received) == list(sent)
        assert [bits(tensor) for tensor in received.values()] == [bits(tensor) for tensor in sent.values()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_safetensors_reads_what_lies_in_an_array(dtype):
    message = answer_message(Update("c01", 1, "train", Patch({"w": torch.ones(2, 3).to(dtype)}), 5))
    array = to_records(message)[PARTS]["0"]
    assert array.stype == "safetensors"
    assert bits(load(array.data)[serialization.TENSOR]) == bits(torch.ones(2, 3).to(dtype))
    assert bits(read_answer(over_flower(message)).patch.tensors["w"]) == bits(torch.ones(2, 3).to(dtype))


def test_a_job_its_shared_rows_and_its_size_arrive():
    read = read_job(over_flower(job_message(JOB)))
    assert (read.client, read.round, read.task, read.seed, read.experts) == ("c01", 3, "train", JOB.seed, {"l.0": (1, 3)})
    assert read.patch.rows["w"] is read.patch.rows["v"]
    assert read.nbytes == JOB.nbytes == 2 * 3 * 4 + 2 * 4 + 2 * 8


def test_an_update_with_its_cost_and_metrics_arrives_and_so_does_a_failure():
    update = Update("c01", 3, "train", Patch({}), 5, {}, {"loss": 0.1, "é": [None, {"a": 1}]}, Cost(1.5, 2, 3, 4e9))
    assert read_answer(over_flower(answer_message(update))) == update
    failure = Failure("c01", 3, "train", "no")
    assert read_answer(over_flower(answer_message(failure))) == failure


@pytest.mark.parametrize("most", [1, 4, 100, 1000])
def test_a_tensor_above_the_limit_goes_in_pieces_none_above_it_and_arrives_whole(monkeypatch, most):
    monkeypatch.setattr(serialization, "MAX_PART_BYTES", most)
    weights = {"dense": torch.arange(100.0).view(1, 10, 10), "few": torch.ones(1, dtype=torch.uint8), "rows": torch.randn(7, 5).T}
    message = answer_message(Update("c01", 1, "train", Patch(weights), 5))
    sizes = [len(part) - 8 - int.from_bytes(part[:8], "little") for part in message.parts.values()]
    assert sum(sizes) == 400 + 1 + 140
    assert max(sizes) <= max(most, 4), "an element is never split"
    read = read_answer(over_flower(message)).patch.tensors
    assert [bits(tensor) for tensor in read.values()] == [bits(tensor) for tensor in weights.values()]


@pytest.mark.parametrize("most", [1, 120, 240, 10**6])
def test_small_parts_go_together_up_to_a_limit_and_a_larger_one_alone(monkeypatch, most):
    monkeypatch.setattr(codec, "PACK_BYTES", most)
    weights = {name: torch.full((size,), float(size)) for name, size in {"a": 3, "b": 2, "large": 200, "c": 1, "d": 0}.items()}
    message = answer_message(Update("c01", 1, "train", Patch(weights), 5))
    arrays = to_records(message)[PARTS]
    assert b"".join(arrays[str(i)].data for i in range(len(arrays))) == b"".join(message.parts.values())
    largest = max(map(len, message.parts.values()))
    assert len(arrays) == {1: 5, 120: 5, 240: 3, 10**6: 1}[most]
    assert max(len(array.data) for array in arrays.values()) <= max(most, largest)
    read = read_answer(over_flower(message)).patch.tensors
    assert [bits(tensor) for tensor in read.values()] == [bits(tensor) for tensor in weights.values()]


def test_a_message_that_came_as_bytes_travels_on():
    message = answer_message(Update("c01", 1, "train", Patch({"w": torch.ones(3)}), 5))
    records = to_records(from_bytes(to_bytes(message)))
    assert [type(array.data) for array in records[PARTS].values()] == [bytes]
    assert from_records(records).parts == message.parts


def changed(place):
    records = to_records(job_message(JOB))
    about, parts = records[ABOUT], records[PARTS]
    data = parts["0"].data
    sizes = json.loads(decompressed(about["sizes"]))
    match place:
        case "cut off":
            parts["0"] = Array("uint8", (len(data) - 1,), "safetensors", data[:-1])
        case "a bit":
            parts["0"] = Array("uint8", (len(data),), "safetensors", data[:-1] + bytes([data[-1] ^ 1]))
        case "an array is missing":
            del parts["0"]
        case "an array too many":
            parts["1"] = parts["0"]
        case "an array of another name":
            parts["1"] = parts["0"]
            del parts["0"]
        case "two parts changed names":
            other = {"patch/w": "patch/v", "patch/v": "patch/w"}
            about["sizes"] = compressed(json.dumps([{other.get(name, name): size for name, size in sizes[0].items()}]))
        case "sizes of nothing":
            about["sizes"] = compressed(json.dumps([dict.fromkeys(sizes[0], 0)]))
        case "sizes that are none":
            about["sizes"] = compressed(json.dumps([dict.fromkeys(sizes[0], "all")]))
        case "sizes that are negative":
            both = {name: sign * len(data) for name, sign in (("a", 1), ("b", -1), ("c", 1))}
            about["sizes"] = compressed(json.dumps([both]))
        case "sizes that are no list":
            about["sizes"] = compressed("7")
        case "the head":
            about["head"] = compressed(decompressed(about["head"]).replace("c01", "c02"))
        case "the hash":
            about["sha256"] = "0" * 64
        case "no hash":
            del about["sha256"]
    return records


@pytest.mark.parametrize(
    "place",
    [
        *("cut off", "a bit", "an array is missing", "an array too many", "an array of another name", "two parts changed names"),
        *("sizes of nothing", "sizes that are none", "sizes that are negative", "sizes that are no list"),
        *("the head", "the hash", "no hash"),
    ],
)
def test_whatever_is_changed_on_the_way_is_refused(place):
    with pytest.raises(BadMessage, match="its sha256 is not that of what was sent"):
        from_records(changed(place))


def test_another_protocol_is_refused_before_anything_else_is_read():
    with pytest.raises(
        BadMessage, match=rf"protocol 99 \(FedExperts 9\.9\), and this side speaks {PROTOCOL}.*same version on both"
    ):
        from_records(RecordDict({ABOUT: ConfigRecord({"protocol": 99, "version": "9.9"}), PARTS: ArrayRecord({})}))


def test_a_message_of_someone_else_is_refused():
    with pytest.raises(BadMessage, match="holds no message of ours"):
        from_records(RecordDict({"config": ConfigRecord({"lr": 0.1})}))


@pytest.mark.parametrize("head", [{}, {"update": {}}, {"update": 3}, {"failure": {"client": "c01"}}])
def test_a_message_that_is_whole_but_holds_no_answer_is_refused(head):
    with pytest.raises(BadMessage, match="holds no answer that can be read"):
        read_answer(over_flower(Message(head, {})))


BROKEN_JSON = ["", "{", "nothing", "[" * 100_000, '{"a":' * 100_000]


@pytest.mark.parametrize("head", [*BROKEN_JSON, "[1]", "3"])
def test_a_head_that_is_no_json_object_is_refused_though_its_hash_is_right(head):
    about = ConfigRecord(
        {"protocol": PROTOCOL, "version": "1", "head": compressed(head), "sizes": compressed("[]"), "sha256": digest(head, {})}
    )
    with pytest.raises(BadMessage, match=r"its JSON cannot be read|its head is no JSON object"):
        from_records(RecordDict({ABOUT: about, PARTS: ArrayRecord({})}))


@pytest.mark.parametrize("sizes", BROKEN_JSON)
def test_sizes_that_are_no_json_are_refused(sizes):
    records = to_records(job_message(JOB))
    records[ABOUT]["sizes"] = compressed(sizes)
    with pytest.raises(BadMessage, match="its JSON cannot be read"):
        from_records(records)


def test_a_message_of_just_the_bytes_that_are_allowed_is_read_and_a_larger_one_is_refused_before_anything_is_copied():
    records = to_records(answer_message(Update("c01", 1, "train", Patch({"w": torch.zeros(2_500_000)}), 5)))
    size = len(records[PARTS]["0"].data) + len(records[ABOUT]["head"]) + len(records[ABOUT]["sizes"])
    assert from_records(records, size).parts
    tracemalloc.start()
    with pytest.raises(BadMessage, match=f"takes at least {size:,} bytes, and its job allows {size - 1:,}"):
        from_records(records, size - 1)
    assert tracemalloc.get_traced_memory()[1] < 100_000 < 10_000_000 < size
    tracemalloc.stop()


def test_one_array_under_many_names_counts_under_each():
    records = to_records(answer_message(Update("c01", 1, "train", Patch({"w": torch.zeros(1000)}), 5)))
    records[PARTS] = ArrayRecord(dict.fromkeys(map(str, range(100)), records[PARTS]["0"]))
    with pytest.raises(BadMessage, match="takes at least 4"):
        from_records(records, 100_000)


def test_a_part_with_a_header_for_many_tensors_is_refused():
    part = save({serialization.TENSOR: torch.ones(1), **{str(number): torch.ones(0) for number in range(100)}})
    message = answer_message(Update("c01", 1, "train", Patch({"w": torch.ones(1)}), 5))
    with pytest.raises(BadMessage, match=r"a tensor's header has [\d,]+ bytes, and 1,024 are allowed"):
        read_answer(Message(message.head, {"patch/w": part}))


@pytest.mark.parametrize(
    "data",
    [
        None,
        "text",
        7,
        b"",
        b"no zlib",
        compressed("a" * 99)[:-5],
        compressed("é")[:4],
        compressed("a") + b"b",
        zlib.compress(b"\xff"),
    ],
)
@pytest.mark.parametrize("name", ["head", "sizes"])
def test_what_does_not_unfold_is_refused(name, data):
    records = to_records(job_message(JOB))
    records[ABOUT] = ConfigRecord({key: value for key, value in {**records[ABOUT], name: data}.items() if value is not None})
    with pytest.raises(BadMessage, match="its head"):
        from_records(records)


def test_a_small_message_that_would_unfold_into_a_large_one_is_refused(monkeypatch):
    monkeypatch.setattr(codec, "MAX_TEXT_BYTES", 1000)
    assert decompressed(compressed("a" * 1000)) == "a" * 1000
    with pytest.raises(BadMessage, match="more than 1,000 bytes"):
        decompressed(zlib.compress(b"a" * 1001))
    with pytest.raises(BadMessage, match="head has 1,001 bytes, and 1,000 are allowed"):
        compressed("a" * 1001)


@pytest.mark.parametrize("name", ["head", "sizes"])
def test_no_text_of_a_message_unfolds_into_more_than_the_message_may_take(name):
    records = to_records(job_message(JOB))
    text = decompressed(records[ABOUT][name]).encode()
    records[ABOUT][name] = zlib.compress(text + b" " * 2_000_000)
    with pytest.raises(BadMessage, match="more than 1,000,000 bytes"):
        from_records(records, 1_000_000)


def test_names_take_few_bytes():
    names = [
        f"model.layers.{layer}.self_attn.{each}_proj.lora_{ab}.default.weight"
        for layer in range(4)
        for each in "qkv"
        for ab in "AB"
    ]
    message = answer_message(Update("c01", 1, "train", Patch({name: torch.ones(2) for name in names}), 5))
    assert sum(len(value) for value in to_records(message)[ABOUT].values() if isinstance(value, bytes)) < 900


@pytest.mark.parametrize(
    "change", [{"task": "../../x"}, {"task": ""}, {"round": "one"}, {"round": -1}, {"experts": {"m": "all"}}]
)
def test_a_job_with_a_task_that_is_no_file_name_or_with_other_useless_values_is_refused(change):
    message = job_message(JOB)
    with pytest.raises(BadMessage, match="holds no job that can be read"):
        read_job(Message({**message.head, "job": {**message.head["job"], **change}}, message.parts))


def test_a_message_that_lacks_a_tensor_of_its_head_is_refused():
    message = answer_message(Update("c01", 1, "train", Patch({"w": torch.ones(2)}), 5))
    with pytest.raises(BadMessage, match="KeyError"):
        read_answer(Message(message.head, {}))


def test_neither_the_codec_nor_the_client_needs_torch():
    code = (
        "import sys; import fedexperts.engines.flower.client_app, fedexperts.engines.flower.codec; "
        "sys.exit(bool({'torch', 'transformers', 'ray'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
