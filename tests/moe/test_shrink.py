"""Smaller models: what is shared, what is refused, what a group is, what is on disk."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedexperts.errors import BadValue
from fedexperts.moe import shrink
from fedexperts.moe.anatomy import anatomy, blocks
from fedexperts.testing import FAMILIES, tiny_batch, tiny_experts, tiny_model

FIRST = "model.layers.0.mlp"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shrunk_model_shares_every_parameter_and_buffer_that_is_not_cut(family):
    model = tiny_model(family)
    experts = tiny_experts(model)
    small = shrink.shrink(model, experts)
    cut = {f"{name}.{path}" for name, block in blocks(model).items() for path in block.expert_axes()}
    theirs = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    seen = 0
    for name, tensor in (*small.named_parameters(), *small.named_buffers()):
        assert (id(tensor) in theirs) == (name not in cut), name
        seen += name in cut
    assert seen == len(cut)


def test_a_cut_tensor_is_a_copy():
    model = tiny_model("mixtral")
    small = shrink.shrink(model, {FIRST: (0, 3)})
    before = model.get_parameter(f"{FIRST}.experts.down_proj").clone()
    small.get_parameter(f"{FIRST}.experts.down_proj").data.zero_()
    assert torch.equal(model.get_parameter(f"{FIRST}.experts.down_proj"), before)


def test_the_model_that_is_cut_stays_as_it_was():
    model = tiny_model("switch_transformers")
    before, logits = anatomy(model), model(**tiny_batch("switch_transformers")).logits
    shrink.shrink(model, tiny_experts(model))
    assert anatomy(model) == before
    assert not hasattr(model.config, "kept_experts")
    assert torch.equal(model(**tiny_batch("switch_transformers")).logits, logits)


def test_a_block_that_is_not_named_keeps_all_its_experts_shared():
    model = tiny_model("mixtral")
    small = shrink.shrink(model, {FIRST: (1, 2)})
    assert [shape.num_experts for shape in anatomy(small).blocks.values()] == [2, 8, 8]
    other = "model.layers.1.mlp.experts.down_proj"
    assert small.get_parameter(other) is model.get_parameter(other)


def test_a_frozen_parameter_stays_frozen():
    model = tiny_model("mixtral").requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in shrink.shrink(model, tiny_experts(model)).parameters())


def test_experts_cut_twice_remember_what_they_were_called_first():
    twice = shrink.shrink(shrink.shrink(tiny_model("mixtral"), {FIRST: (1, 3, 5, 7)}), {FIRST: (0, 2)})
    assert shrink.kept_experts(twice)[FIRST] == (1, 5)
    once = shrink.shrink(tiny_model("mixtral"), {FIRST: (1, 5)})
    assert torch.equal(twice(**tiny_batch("mixtral")).logits, once(**tiny_batch("mixtral")).logits)


@pytest.mark.parametrize(
    ("experts", "reason"),
    [
        ({FIRST: (3,)}, "would keep 1 of its 8 experts, but its router needs 2 to pick 2 per token; keep at least 2"),
        ({FIRST: (0, 8)}, r"was given experts 0, 8; give ids from 0 to 7, ascending, each once"),
        ({FIRST: (3, 1)}, "ascending"),
        ({FIRST: (1, 1)}, "each once"),
        (
            {"model.layers.0.mpl": (0, 1)},
            "is no MoE block of this model; give names of its blocks; did you mean model.layers.0.mlp",
        ),
    ],
)
def test_an_illegal_choice_of_experts_is_refused_with_the_reason(experts, reason):
    model = tiny_model("mixtral")
    with pytest.raises(BadValue, match=reason):
        shrink.shrink(model, experts)


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_a_router_that_scores_by_the_best_two_keeps_two(family):
    model = tiny_model(family, top_k=1)
    with pytest.raises(BadValue, match="needs 2 to pick 1 per token"):
        shrink.shrink(model, {"model.layers.1.mlp": (0,)})


GROUPED = {
    "deepseek_v2": {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {"n_group": 4, "topk_group": 2},
    "glm4_moe": {"n_group": 4, "topk_group": 2},
}


@pytest.mark.parametrize("family", GROUPED)
@pytest.mark.parametrize("kept_ids", [(2, 3), (0, 1, 6, 7), (0, 1, 2, 3, 6, 7)])
def test_whole_groups_can_be_cut_and_part_of_a_group_cannot(family, kept_ids, masked):
    model, batch = tiny_model(family, **GROUPED[family]), tiny_batch(family)
    small = shrink.shrink(model, {"model.layers.1.mlp": kept_ids})
    assert anatomy(small).blocks["model.layers.1.mlp"].groups == len(kept_ids) // 2
    with masked(model, {"model.layers.1.mlp": kept_ids}):
        expected = model(**batch).logits
    assert torch.allclose(small(**batch).logits, expected, atol=1e-6)
    with pytest.raises(BadValue, match="compares whole groups; keep all or none of a group"):
        shrink.shrink(model, {"model.layers.1.mlp": (0, 1, 2, 5)})


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(BadValue, match=r"has no config.json"):
        shrink.load(tmp_path)
    shrink.save(tiny_model("mixtral"), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(BadValue, match="has no safetensors files"):
        shrink.load(tmp_path)


def test_a_checkpoint_that_lacks_a_tensor_is_refused_and_not_filled_with_chance(tmp_path):
    shrink.save(tiny_model("mixtral"), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(BadValue, match=r"lacks model.norm.weight"):
        shrink.load(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("quantization_config", {"quant_method": "mxfp4"}, "quantized weights, of which no part can be read"),
        ("architectures", ["MyOwnModel"], "has a MyOwnModel, which is no class of transformers"),
    ],
)
def test_a_model_that_cannot_be_read_in_part_is_refused_with_the_reason(tmp_path, key, value, reason):
    shrink.save(tiny_model("gpt_oss"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(BadValue, match=reason):
        shrink.load_part(tmp_path, {FIRST: (0, 1)})


def test_part_of_a_shrunk_model_can_be_read(tmp_path):
    small = shrink.shrink(tiny_model("mixtral"), {FIRST: (1, 3, 5, 7)})
    shrink.save(small, tmp_path)
    part = shrink.load_part(tmp_path, {FIRST: (0, 2)})
    assert shrink.kept_experts(part)[FIRST] == (1, 5)
    batch = tiny_batch("mixtral")
    assert torch.equal(part(**batch).logits, shrink.shrink(small, {FIRST: (0, 2)})(**batch).logits)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="only Linux counts what a process reads")
def test_the_operating_system_reads_no_more_than_the_kept_experts(tmp_path):
    model = tiny_model("qwen3_moe", num_experts=32, hidden_size=128, moe_intermediate_size=256, num_hidden_layers=2)
    experts = dict.fromkeys(blocks(model), (3, 4, 20))
    needed = sum(parameter.nbytes for parameter in shrink.shrink(model, experts).parameters())
    shrink.save(model, tmp_path)
    shrink.load_part(tmp_path, experts)  # the first time, transformers reads some of its own source
    before = bytes_read()
    shrink.load_part(tmp_path, experts)
    header_and_source = 2**20
    assert needed <= bytes_read() - before < needed + header_and_source
    assert needed + header_and_source < (tmp_path / "model.safetensors").stat().st_size / 4


def bytes_read():
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counters["rchar"])


def test_too_few_experts_are_refused_before_anything_is_read(tmp_path):
    shrink.save(tiny_model("mixtral"), tmp_path)
    with pytest.raises(BadValue, match="would keep 1 of its 8 experts"):
        shrink.load_part(tmp_path, {FIRST: (1,)})


def test_weights_keep_the_precision_they_were_saved_in(tmp_path):
    shrink.save(tiny_model("qwen3_moe").to(torch.bfloat16), tmp_path)
    assert {parameter.dtype for parameter in shrink.load(tmp_path).parameters()} == {torch.bfloat16}


def test_loading_leaves_the_random_generator_alone(tmp_path):
    shrink.save(tiny_model("switch_transformers"), tmp_path)
    before = torch.get_rng_state()
    shrink.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("number_of_groups", [1, 2])
def test_fewer_groups_than_the_router_would_pick_are_all_picked(number_of_groups):
    model = tiny_model("deepseek_v3", n_group=4, topk_group=2)
    small = shrink.shrink(model, {"model.layers.1.mlp": tuple(range(2 * number_of_groups))})
    router = blocks(small)["model.layers.1.mlp"].router
    assert (router.num_group, router.topk_group) == (number_of_groups, min(2, number_of_groups))
    assert blocks(model)["model.layers.1.mlp"].router.topk_group == 2


def test_the_generation_settings_of_a_folder_are_loaded(tmp_path):
    model = tiny_model("mixtral")
    model.generation_config.max_new_tokens = 7
    shrink.save(model, tmp_path)
    assert shrink.load(tmp_path).generation_config.max_new_tokens == 7


def test_error_sentences_name_few_of_many_experts():
    model = tiny_model("olmoe", num_experts=256)
    with pytest.raises(BadValue) as refused:
        shrink.shrink(model, {FIRST: tuple(range(300))})
    assert len(str(refused.value)) <= 300 and "(300 in all); give ids from 0 to 255" in str(refused.value)


def test_a_block_that_keeps_all_its_experts_is_shared():
    model = tiny_model("mixtral")
    small = shrink.shrink(model, {FIRST: tuple(range(8))})
    assert {id(tensor) for tensor in small.parameters()} == {id(tensor) for tensor in model.parameters()}
    assert shrink.kept_experts(small)[FIRST] == tuple(range(8))


@pytest.mark.parametrize("family", ["phimoe", "switch_transformers"])
def test_a_router_that_is_a_linear_layer_knows_its_new_size(family):
    small = shrink.shrink(tiny_model(family), {next(iter(blocks(tiny_model(family)))): (1, 4, 6)})
    router = next(iter(blocks(small).values())).router
    linear = router.classifier if family == "switch_transformers" else router
    assert (linear.out_features, len(linear.weight)) == (3, 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sub_model_that_shares_stacks_has_the_outputs_of_one_that_copies_them(family):
    model, batch = tiny_model(family), tiny_batch(family)
    kept = dict.fromkeys(blocks(model), (1, 2, 5, 7))
    sharing = shrink.shrink(model, kept, share_stacks=True)
    stacks = {id(parameter) for parameter in model.parameters() if parameter.ndim == 3}
    assert stacks <= {id(parameter) for parameter in sharing.parameters()}
    again = shrink.shrink(sharing, dict.fromkeys(blocks(model), (0, 2, 3)), share_stacks=True)
    with torch.no_grad():
        assert torch.equal(sharing(**batch).logits, shrink.shrink(model, kept)(**batch).logits)
        copying = shrink.shrink(model, dict.fromkeys(blocks(model), (1, 5, 7)))
        assert torch.equal(again(**batch).logits, copying(**batch).logits)
        assert shrink.kept_experts(again) == shrink.kept_experts(copying)
        assert shrink.own_stacks(again) is again and torch.equal(again(**batch).logits, copying(**batch).logits)
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in copying.named_parameters()}
