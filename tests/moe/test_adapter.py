"""Adapters of peft as a start: read back from what save_adapter writes, and refused where they do not fit."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from fedexperts.errors import BadValue
from fedexperts.moe import lora
from fedexperts.moe.adapter import read_adapter, start_from
from fedexperts.moe.shrink import shrink
from fedexperts.moe.tuning import Tuning, prepare
from fedexperts.testing import FAMILIES, tiny_batch, tiny_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated", "ignore:The PEFT config's `base_model_name_or_path`"
)
TUNING = Tuning(train="lora", rank=4, alpha=8.0)


def adapted(base, tuning=TUNING, seed="0"):
    """`base` with adapters and routers whose weights are all different."""
    model = prepare(shrink(base, {}), tuning, seed)
    chance = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=chance) / 8
    return model.eval()


def written(base, folder, tuning=TUNING):
    model = adapted(base, tuning)
    lora.save_adapter(model, shrink(base, {}), folder, "base")
    return model


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_starts_from_an_adapter_with_its_weights_bit_for_bit(family, tmp_path):
    base = tiny_model(family)
    model = written(base, tmp_path)
    again = prepare(shrink(base, {}), TUNING, "another seed").eval()
    assert not torch.equal(again(**tiny_batch(family)).logits, model(**tiny_batch(family)).logits)
    start_from(again, read_adapter(tmp_path), TUNING)
    ours, theirs = trained(again), trained(model)
    assert ours.keys() == theirs.keys() and len(ours) > 20
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(parameter.is_leaf for parameter in ours.values())


def test_an_adapter_that_peft_made_is_a_start_too(tmp_path):
    base = tiny_model("olmoe")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        theirs = peft.get_peft_model(shrink(base, {}), config)
    theirs.save_pretrained(tmp_path)
    tuning = Tuning(train="lora", rank=4, alpha=8.0, parts=("attention",), attention_modules=("q_proj", "v_proj"))
    model = prepare(shrink(base, {}), tuning, "0").eval()
    start_from(model, read_adapter(tmp_path), tuning)
    assert torch.equal(model(**tiny_batch("olmoe")).logits, theirs.eval()(**tiny_batch("olmoe")).logits)


@pytest.mark.parametrize(
    ("tuning", "fitting"),
    [
        (Tuning(train="lora", rank=8, alpha=8.0), "rank = 4, alpha = 8"),
        (Tuning(train="lora", rank=4, alpha=4.0), "rank = 4, alpha = 8"),
        (Tuning(train="lora", rank=4, alpha=8.0, parts=("attention",)), r'parts = \["attention", "experts", "router"\]'),
        (
            Tuning(train="lora", rank=4, alpha=8.0, attention_modules=("q_proj",)),
            r'attention_modules = \["k_proj", "o_proj", "q_proj", "v_proj"\]',
        ),
        (Tuning(train="full"), 'train = "lora"'),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_with_the_settings_that_would(tuning, fitting, tmp_path):
    base = tiny_model("olmoe")
    written(base, tmp_path / "a")
    with pytest.raises(BadValue, match=fitting) as raised:
        start_from(prepare(shrink(base, {}), tuning, "0"), read_adapter(tmp_path / "a"), tuning)
    assert "\n" not in str(raised.value)


def test_an_adapter_of_another_base_is_refused(tmp_path):
    written(tiny_model("olmoe"), tmp_path)
    other = prepare(tiny_model("olmoe", hidden_size=64), TUNING, "0")
    with pytest.raises(BadValue, match="give the base that the adapter was trained on"):
        start_from(other, read_adapter(tmp_path), TUNING)


def test_a_folder_without_a_plain_adapter_is_refused(tmp_path):
    with pytest.raises(BadValue, match=r"is no adapter: it lacks adapter_config\.json"):
        read_adapter(tmp_path)
    written(tiny_model("olmoe"), tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    for change, said in (({"use_dora": True}, "use_dora"), ({"bias": "all"}, "bias"), ({"peft_type": "IA3"}, "of the kind IA3")):
        path.write_text(json.dumps({**config, **change}))
        with pytest.raises(BadValue, match=said):
            read_adapter(tmp_path)
    path.write_text(json.dumps(config))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "gate" not in name}, tmp_path / "adapter_model.safetensors")
    model = prepare(tiny_model("olmoe"), TUNING, "0")
    with pytest.raises(BadValue, match=r'gate\.weight is in only one of the two.*parts = \["attention", "experts"\]'):
        start_from(model, read_adapter(tmp_path), TUNING)
