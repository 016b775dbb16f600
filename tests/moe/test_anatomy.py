"""Finding MoE blocks by structure."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from fedexperts.errors import NoExperts
from fedexperts.moe.anatomy import BlockShape, anatomy, blocks
from fedexperts.testing import FAMILIES, tiny_config, tiny_model

DENSE_FIRST = ("deepseek_v2", "deepseek_v3", "ernie4_5_moe", "glm4_moe")
BLOCKS = {
    **{family: ["model.layers.0.mlp", "model.layers.1.mlp", "model.layers.2.mlp"] for family in FAMILIES},
    **{family: ["model.layers.1.mlp", "model.layers.2.mlp"] for family in DENSE_FIRST},
    "granitemoe": [f"model.layers.{layer}.block_sparse_moe" for layer in range(3)],
    "switch_transformers": ["encoder.block.1.layer.1.mlp", "decoder.block.1.layer.2.mlp"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_is_found_with_its_numbers_in_the_order_of_layers(family):
    top_k = 1 if family == "switch_transformers" else 2
    shapes = anatomy(tiny_model(family, num_experts=6)).blocks
    assert list(shapes) == BLOCKS[family]
    assert all((shape.num_experts, shape.top_k, shape.groups) == (6, top_k, 1) for shape in shapes.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_anatomy_needs_no_weights(family):
    config = tiny_config(family)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        assert anatomy(kind.from_config(config)) == anatomy(tiny_model(family))


def test_all_experts_and_their_number_are_those_of_all_blocks():
    model_anatomy = anatomy(tiny_model("mixtral", num_experts=4))
    assert model_anatomy.num_experts == 3 * 4
    assert model_anatomy.all_experts == dict.fromkeys(BLOCKS["mixtral"], (0, 1, 2, 3))


def test_phimoe_picks_two_whatever_its_config_says():
    assert {shape.top_k for shape in anatomy(tiny_model("phimoe", top_k=1)).blocks.values()} == {2}


@pytest.mark.parametrize("kind", ["llama", "nllb-moe"])
def test_a_model_without_known_experts_is_refused_in_one_sentence(kind):
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    if kind == "nllb-moe":
        sides = ("encoder", "decoder")
        sizes = {f"{side}_{key}": value for side in sides for key, value in (("layers", 2), ("ffn_dim", 48), ("sparse_step", 2))}
        sizes |= {f"{side}_attention_heads": 4 for side in sides} | {"vocab_size": 64, "d_model": 32, "num_experts": 4}
    config = AutoConfig.for_model(kind, **sizes)
    with torch.device("meta"):
        model = (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_config(config)
    with pytest.raises(NoExperts, match="has no Mixture-of-Experts layers that we can find; give a model with stacked experts"):
        blocks(model)


def test_deepseek_v3_groups_are_seen_and_deepseek_v2_groups_only_where_they_are_used():
    v3 = anatomy(tiny_model("deepseek_v3", n_group=4, topk_group=2))
    greedy = anatomy(tiny_model("deepseek_v2", n_group=4, topk_group=2))
    limited = anatomy(tiny_model("deepseek_v2", n_group=4, topk_group=2, topk_method="group_limited_greedy"))
    assert [{shape.groups for shape in model_anatomy.blocks.values()} for model_anatomy in (v3, greedy, limited)] == [
        {4},
        {1},
        {4},
    ]


@pytest.mark.parametrize(
    ("shape", "fewest"),
    [
        (BlockShape(8, 2), 2),
        (BlockShape(8, 1, least=2), 2),
        (BlockShape(8, 3, groups=4), 4),
        (BlockShape(8, 2, groups=2), 4),
        (BlockShape(8, 8), 8),
    ],
)
def test_the_fewest_experts_are_what_the_router_picks_in_whole_groups(shape, fewest):
    assert shape.fewest == fewest


def test_a_router_whose_number_of_groups_is_not_set_has_one_group():
    model = tiny_model("deepseek_v3", n_group=4, topk_group=2)
    for block in blocks(model).values():
        block.router.num_group = None
    assert {shape.groups for shape in anatomy(model).blocks.values()} == {1}
