"""Base models without weights: what a plan reads of them is what the loaded model has."""

import json

import pytest
import torch

from fedexperts.errors import BadValue
from fedexperts.models.files import config_names
from fedexperts.models.load import load
from fedexperts.models.requirements import render, requirements, to_json
from fedexperts.models.shapes import load_shapes
from fedexperts.models.summary import inspect
from fedexperts.models.tokenizer import make_tokenizer
from fedexperts.moe.anatomy import anatomy
from fedexperts.moe.footprint import footprint
from fedexperts.moe.memory_by_part import PARTS, memory_by_part
from fedexperts.moe.packed import Packed
from fedexperts.moe.parameters import parameters
from fedexperts.moe.tuning import Tuning
from fedexperts.testing import FAMILIES, tiny_model

LORA = Tuning(train="lora", rank=8)
PUBLISHED = {
    "deepseek-v2-lite": 15.7e9,
    "gpt-oss-20b": 20.9e9,
    "granite-3.0-1b-a400m": 1.33e9,
    "mixtral-8x7b": 46.7e9,
    "olmoe-1b-7b": 6.92e9,
    "phi-3.5-moe": 41.9e9,
    "qwen1.5-moe-a2.7b": 14.3e9,
    "qwen3-30b-a3b": 30.5e9,
}
"""Parameters as the model cards have them (docs/one-gpu.md links to them)."""


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """The folder of a tiny model of a family in bfloat16."""
    made = {}

    def make(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            tokenizer = make_tokenizer(max_tokens=48)
            ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
            model = tiny_model(family, vocab_size=len(tokenizer), **ids)
            model.to(torch.bfloat16).save_pretrained(made[family])
            tokenizer.save_pretrained(made[family])
        return str(made[family])

    return make


def described(model):
    """Name of each weight → its kind, shape, dtype and bytes."""
    return {
        name: (
            type(tensor.data) if isinstance(tensor, Packed) else torch.Tensor,
            tuple(tensor.shape),
            tensor.dtype,
            tensor.nbytes,
        )
        for name, tensor in model.named_parameters()
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"dtype": "float32"}, {"quantize": "nf4"}], ids=["auto", "float32", "nf4"])
def test_shapes_are_those_of_the_loaded_model(folder_of, family, options):
    if "quantize" in options:
        pytest.importorskip("bitsandbytes")
    loaded, planned = load(folder_of(family), **options), load_shapes(folder_of(family), **options)
    assert all(tensor.is_meta for tensor in planned.model.parameters())
    assert described(planned.model) == described(loaded.model)
    assert planned.encoder_decoder == loaded.encoder_decoder
    if not options:
        cost = [footprint(base.model, LORA, (2, 16)) for base in (planned, loaded)]
        assert cost[0] == cost[1]


@pytest.mark.parametrize("tuning, optimizer", [(Tuning(), "sgd"), (LORA, "adamw")], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["olmoe", "switch_transformers"])
def test_the_parts_of_the_memory_add_up_to_the_footprint(family, tuning, optimizer):
    model = tiny_model(family)
    for grafts in (0, 2):
        cost = footprint(model, tuning, (2, 16), optimizer, grafts=grafts)
        parted = memory_by_part(model, tuning, optimizer, cost.activation_bytes, grafts)
        few = dict.fromkeys(anatomy(model).blocks, (0, 1, 2))
        for experts in (anatomy(model).all_experts, few):
            assert sum(parted.of(experts).values()) == cost.of(experts)
        for budget in (0, 3, 10**6):
            assert sum(parted.of(anatomy(model).all_experts, budget).values()) == cost.reaching(budget)


def test_each_byte_stands_at_its_part():
    model = tiny_model("olmoe")
    size = parameters(model).total * 4
    whole = memory_by_part(model, Tuning(), "adamw", 5).of(anatomy(model).all_experts)
    assert whole == dict(zip(PARTS, (size, 0, 0, size, 2 * size, 5), strict=True))
    adapted = memory_by_part(model, Tuning("lora", ("attention",), 8), "sgd", 5, 1).of(anatomy(model).all_experts)
    assert adapted["weights"] == size
    assert 0 < adapted["adapters"] < adapted["personal_experts"]
    assert adapted["optimizer"] == 0
    assert adapted["adapters"] < adapted["gradients"] < adapted["adapters"] + adapted["personal_experts"]


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_shipped_configurations_have_the_published_parameters(name):
    assert inspect(name).full.parameters == pytest.approx(PUBLISHED[name], rel=5e-3)


def test_every_shipped_configuration_is_held_to_published_parameters():
    assert {name for name in config_names() if not name.startswith("switch")} == set(PUBLISHED)


def test_a_configuration_has_no_weights_to_run_on(tmp_path):
    with pytest.raises(BadValue, match="configuration without weights"):
        load("olmoe-1b-7b")
    path = tmp_path / "other.json"
    path.write_text(json.dumps(tiny_model("olmoe").config.to_dict()))
    assert load_shapes(str(path)).hash == ""
    with pytest.raises(BadValue, match="configuration without weights"):
        load(str(path))


def test_requirements_of_a_published_model_are_known_without_it():
    rows = list(requirements("olmoe-1b-7b", Tuning("lora", ("attention",), 8), (1, 64)))
    assert [(row.stored_as, row.gradient_checkpointing) for row in rows] == [
        ("bfloat16", False),
        ("bfloat16", True),
        ("nf4", False),
        ("nf4", True),
    ]
    half, checkpointed, packed, _ = rows
    assert half.parts["weights"] == pytest.approx(2 * 6.92e9, rel=1e-3)
    assert packed.parts["weights"] < 0.31 * half.parts["weights"]
    assert checkpointed.parts["activations"] < half.parts["activations"]
    assert half.held_by == ("desktop_gpu", "jetson_agx_xavier", "jetson_agx_orin", "server_gpu")
    assert packed.held_by[0] == "laptop_gpu"
    assert json.loads(to_json(rows))[0]["total"] == half.total == sum(half.parts.values())
    assert render(rows, LORA, (1, 64)).row_count >= 6


def test_a_folder_with_the_name_of_a_shipped_configuration_is_the_folder(folder_of, tmp_path, monkeypatch):
    (tmp_path / "olmoe-1b-7b").symlink_to(folder_of("olmoe"))
    monkeypatch.chdir(tmp_path)
    assert parameters(load("olmoe-1b-7b").model).total == parameters(load_shapes("olmoe-1b-7b").model).total < 1e6


def test_requirements_of_a_sub_model_are_less(folder_of):
    all_experts, few = (next(iter(requirements(folder_of("olmoe"), LORA, (1, 16), keep=keep))) for keep in (None, 2))
    assert few.parts["weights"] < all_experts.parts["weights"]
    assert few.parts["adapters"] < all_experts.parts["adapters"]
