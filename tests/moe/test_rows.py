"""The row-first view of trained parameters, and the mean of rows."""

import errno
import mmap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedexperts.errors import BadValue
from fedexperts.moe import rows
from fedexperts.moe.rows import RowMean
from fedexperts.moe.shrink import shrink
from fedexperts.moe.tuning import trainable
from fedexperts.testing import FAMILIES, tiny_experts, tiny_model


def test_an_expert_and_its_router_row_are_rows_of_their_block_and_the_rest_is_dense():
    layout = rows.layout(tiny_model("mixtral", num_hidden_layers=1))
    of_block = {name for name, block in layout.items() if block == "model.layers.0.mlp"}
    assert of_block == {
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj",
    }
    assert {block for name, block in layout.items() if name not in of_block} == {None}


def test_a_dense_parameter_is_the_only_row_of_its_tensor():
    model = tiny_model("mixtral")
    assert rows.read(model)["model.norm.weight"].shape == (1, 32)


def test_switch_experts_are_stacked_under_one_name():
    model = tiny_model("switch_transformers")
    layout, tensors = rows.layout(model), rows.read(model)
    name = "encoder.block.1.layer.1.mlp.experts.wi.weight"
    assert layout[name] == "encoder.block.1.layer.1.mlp"
    assert tensors[name].shape == (8, 24, 32)
    assert torch.equal(tensors[name][5], model.get_parameter("encoder.block.1.layer.1.mlp.experts.expert_5.wi.weight"))


def test_more_than_ten_switch_experts_keep_their_order():
    model = tiny_model("switch_transformers", num_experts=12)
    tensor = rows.read(model)["encoder.block.1.layer.1.mlp.experts.wo.weight"]
    assert torch.equal(tensor[10], model.get_parameter("encoder.block.1.layer.1.mlp.experts.expert_10.wo.weight"))


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_paired_with_views_of_what_rows_have_for_them(family):
    model = tiny_model(family)
    tensors = rows.read(model)
    pairs = rows.paired(model, tensors)
    assert {id(parameter) for parameter, _ in pairs} == {id(parameter) for parameter in trainable(model)}
    assert len(pairs) == len(trainable(model)) > 20
    assert all(torch.equal(parameter, view) for parameter, view in pairs)
    for _, view in pairs:
        view.zero_()
    assert not any(tensor.any() for tensor in tensors.values())


def test_only_trained_parameters_have_rows():
    model = tiny_model("qwen3_moe").requires_grad_(False)
    model.get_parameter("model.layers.1.mlp.gate.weight").requires_grad_(True)
    assert rows.layout(model) == {"model.layers.1.mlp.gate.weight": "model.layers.1.mlp"}


def test_a_tied_parameter_comes_once():
    model = tiny_model("mixtral", tie_word_embeddings=True)
    assert "model.embed_tokens.weight" in rows.layout(model)
    assert "lm_head.weight" not in rows.layout(model)


def test_a_bias_with_its_experts_on_the_second_axis_is_row_first_too():
    model = tiny_model("ernie4_5_moe")
    name = "model.layers.1.mlp.gate.moe_statics.e_score_correction_bias"
    bias = model.get_parameter(name).requires_grad_(True)
    assert bias.shape == (1, 8)
    assert torch.equal(rows.read(model)[name], bias.T)
    rows.write(model, {name: torch.tensor([[3.0]])}, {name: torch.tensor([6])})
    assert bias[0, 6] == 3.0
    assert (bias == 3.0).sum() == 1


def test_low_rank_parameters_of_experts_are_rows_and_those_of_attention_are_dense():
    model = tiny_model("mixtral", num_hidden_layers=1)
    block = model.get_submodule("model.layers.0.mlp.experts")
    block.lora = torch.nn.ModuleDict({"gate_up": torch.nn.ParameterDict({"A": torch.nn.Parameter(torch.zeros(8, 4, 32))})})
    query = model.get_submodule("model.layers.0.self_attn.q_proj")
    query.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(32, 8, bias=False)})
    layout = rows.layout(model)
    assert layout["model.layers.0.mlp.experts.lora.gate_up.A"] == "model.layers.0.mlp"
    assert layout["model.layers.0.self_attn.q_proj.lora_A.default.weight"] is None


def test_low_rank_layers_of_switch_experts_are_stacked_too():
    model = tiny_model("switch_transformers", num_experts=3)
    experts = model.get_submodule("decoder.block.1.layer.2.mlp.experts")
    for expert in experts.values():
        expert.wi.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(32, 4, bias=False)})
    name = "decoder.block.1.layer.2.mlp.experts.wi.lora_A.default.weight"
    assert rows.layout(model)[name] == "decoder.block.1.layer.2.mlp"
    assert rows.read(model)[name].shape == (3, 4, 32)


def test_what_is_read_is_a_copy():
    model = tiny_model("mixtral")
    before = rows.read(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert before["model.layers.0.mlp.experts.down_proj"].any()
    assert before["model.embed_tokens.weight"].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_cut_from_a_model_are_those_of_the_shrunk_model(family):
    model = tiny_model(family)
    experts = tiny_experts(model)
    tensors, ids = rows.cut(rows.read(model), rows.layout(model), experts)
    small = rows.read(shrink(model, experts))
    assert tensors.keys() == small.keys()
    assert all(torch.equal(tensor, small[name]) for name, tensor in tensors.items())
    assert all(tuple(row_ids.tolist()) == experts[rows.layout(model)[name]] for name, row_ids in ids.items())
    assert len({id(row_ids) for row_ids in ids.values()}) == len(experts), "one tensor of ids for each block"


def test_a_block_that_is_not_named_is_cut_whole_and_without_ids():
    model = tiny_model("mixtral")
    tensors, ids = rows.cut(rows.read(model), rows.layout(model), {"model.layers.0.mlp": (1, 4)})
    assert tensors["model.layers.0.mlp.experts.down_proj"].shape[0] == 2
    assert tensors["model.layers.1.mlp.experts.down_proj"].shape[0] == 8
    assert all(name.startswith("model.layers.0.mlp.") for name in ids)


def test_an_unknown_name_is_refused_with_the_nearest_one():
    with pytest.raises(BadValue, match=r"norm.wieght is no trained parameter of this model; give the name of one; did you mean"):
        rows.write(tiny_model("mixtral"), {"model.norm.wieght": torch.zeros(1, 32)})


def test_rows_of_another_shape_are_refused():
    with pytest.raises(BadValue, match=r"model.norm.weight has shape \[32\]; give \[1, 32\]"):
        rows.write(tiny_model("mixtral"), {"model.norm.weight": torch.zeros(32)})


def test_a_row_nobody_sent_keeps_its_old_value():
    mean = RowMean(torch.tensor([[10.0], [20.0], [30.0]]))
    mean.add(torch.tensor([[1.0], [2.0]]), ids=torch.tensor([0, 1]), weight=torch.tensor([1.0, 1.0]))
    mean.add(torch.tensor([[4.0]]), ids=torch.tensor([1]), weight=torch.tensor([3.0]))
    assert mean.result().flatten().tolist() == [1.0, 3.5, 30.0]
    assert mean.weights.tolist() == [1.0, 4.0, 0.0]


def test_a_row_of_weight_zero_keeps_its_old_value():
    mean = RowMean(torch.tensor([[10.0]]))
    mean.add(torch.tensor([[1.0]]), weight=0.0)
    assert mean.result().item() == 10.0


def test_the_mean_has_the_type_of_what_it_started_from():
    mean = RowMean(torch.zeros(2, 3, dtype=torch.bfloat16))
    mean.add(torch.ones(2, 3, dtype=torch.bfloat16))
    assert mean.result().dtype == torch.bfloat16
    assert mean.result().eq(1).all()


def test_sums_on_disk_are_those_in_memory(monkeypatch):
    start, sent = torch.randn(5, 7, 3), torch.randn(2, 7, 3)

    def merged():
        mean = RowMean(start)
        mean.add(sent, ids=torch.tensor([1, 4]), weight=torch.tensor([2.0, 3.0]))
        mean.add(start + 1, weight=0.7)
        mean.add(sent[:0], ids=torch.tensor([], dtype=torch.int64))
        return mean.result()

    whole = merged()
    monkeypatch.setattr(rows, "ON_DISK_BYTES", 8)
    monkeypatch.setattr(rows, "AT_ONCE", 6)  # and a few columns at a time
    assert torch.equal(merged(), whole)
    monkeypatch.setattr(rows.os, "posix_fallocate", no_room)
    assert torch.equal(merged(), whole), "where the disk is full, in memory"


def no_room(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_large_sums_are_not_in_memory(monkeypatch):
    monkeypatch.setattr(rows, "AT_ONCE", 2**16)
    sent = torch.randn(4, 2**21)
    before = resident_bytes()
    mean = RowMean(sent)
    for _ in range(2):
        mean.add(sent)
        assert resident_bytes() - before < 2**24, "of 64 MiB of sums"
    assert torch.equal(mean.result(), sent)


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


floats = st.floats(-100, 100, width=32)
senders = st.lists(
    st.tuples(st.lists(floats, min_size=3, max_size=3), st.sets(st.integers(0, 2), min_size=1), st.integers(1, 1000)),
    min_size=1,
    max_size=5,
)


def mean_of(clients):
    mean = RowMean(torch.tensor([[7.0], [8.0], [9.0]]))
    for values, sent_ids, weight in clients:
        ids = torch.tensor(sorted(sent_ids))
        mean.add(torch.tensor(values)[ids][:, None], ids=ids, weight=float(weight))
    return mean.result()


@settings(deadline=None)
@given(senders, st.randoms())
def test_the_order_of_arrival_does_not_show(clients, chance):
    shuffled = chance.sample(clients, len(clients))
    assert torch.allclose(mean_of(clients), mean_of(shuffled), rtol=1e-6, atol=1e-12)


@settings(deadline=None)
@given(st.lists(floats, min_size=3, max_size=3), st.integers(1, 1000))
def test_one_client_is_taken_at_its_word(values, weight):
    assert mean_of([(values, {0, 1, 2}, weight)]).flatten().tolist() == values


def test_rows_that_are_whole_are_not_copied_when_they_are_cut():
    model = tiny_model("mixtral")
    tensors, layout = rows.read(model), rows.layout(model)
    cut, ids = rows.cut(tensors, layout, {"model.layers.0.mlp": tuple(range(8)), "model.layers.1.mlp": (0, 1)})
    for name, tensor in cut.items():
        assert (tensor is tensors[name]) == (layout[name] != "model.layers.1.mlp"), name
    assert len({name.split(".")[2] for name in ids}) == 2


@pytest.mark.parametrize("family", ["ernie4_5_moe", "switch_transformers", "gpt_oss"])
def test_rows_that_are_taken_are_those_that_are_read_and_share_memory_where_they_can(family):
    model = tiny_model(family)
    taken, read = rows.take(model), rows.read(model)
    assert taken.keys() == read.keys()
    assert all(torch.equal(tensor, read[name]) and tensor.is_contiguous() for name, tensor in taken.items())
    stacked = [name for name in taken if ".experts." in name and family != "switch_transformers"]
    assert all(taken[name].data_ptr() == model.get_parameter(name).data_ptr() for name in stacked)


def test_only_the_named_rows_are_written():
    model = tiny_model("switch_transformers")
    name = "encoder.block.1.layer.1.mlp.experts.wi.weight"
    before = rows.read(model)[name]
    rows.write(model, {name: torch.zeros(2, 24, 32)}, {name: torch.tensor([6, 1])})
    after = rows.read(model)[name]
    assert [index for index in range(8) if not torch.equal(before[index], after[index])] == [1, 6]
    assert not after[[1, 6]].any()


def test_a_mean_of_no_client_is_what_it_started_from():
    start = torch.randn(3, 2).T  # not contiguous
    assert torch.equal(RowMean(start).result(), start) and RowMean(start).result().is_contiguous()


def test_columns_are_taken_in_slices_of_bounded_size(monkeypatch):
    monkeypatch.setattr(rows, "AT_ONCE", 12)
    assert list(rows._columns(torch.zeros(5, 7))) == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]
    assert len(list(rows._columns(torch.zeros(50, 3)))) == 3
    assert list(rows._columns(torch.zeros(0, 3))) == [slice(0, 12)]
