"""Each dense family becomes an MoE that transformers and fedexperts load, with the dense model's logits where that is claimed."""

import json
import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fedexperts.errors import BadValue
from fedexperts.models.load import load
from fedexperts.models.upcycle import texts
from fedexperts.models.upcycle.families import FAMILIES, NO_CLASS, target_for
from fedexperts.models.upcycle.recipes import Copy, Split
from fedexperts.models.upcycle.run import Sources, upcycle
from fedexperts.moe.anatomy import anatomy
from fedexperts.moe.parameters import parameters

LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0] * 4}
CASES = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 16, "head_dim": 16},
    "qwen2": {},
    "qwen3": {"head_dim": 16, "attention_bias": True},
    "phi3": {},
    "gemma": {"head_dim": 16},
}
CLASSES = {"qwen2": "Qwen2MoeForCausalLM", "qwen3": "Qwen3MoeForCausalLM"}


def test_every_family_has_a_case_here():
    assert set(CASES) == set(FAMILIES)
    assert not set(FAMILIES) & set(NO_CLASS)


@pytest.mark.parametrize("family", CASES)
def test_copies_have_exactly_the_dense_models_logits(family, saved, text, tmp_path, logits):
    model, folder = saved(family, **CASES[family])
    report = upcycle(Sources(str(folder), texts=[text()], tokens=512), Copy(4), tmp_path / "moe")
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "moe").eval()
    assert type(new).__name__ == report["class"] == CLASSES.get(family, "MixtralForCausalLM")
    torch.testing.assert_close(logits(new), logits(model), atol=1e-5, rtol=1e-5)
    assert report["kl"] < 1e-6
    assert report["bits_per_byte"] == pytest.approx(report["dense_bits_per_byte"], abs=1e-5)
    base = load(str(tmp_path / "moe"))
    assert {(block.num_experts, block.top_k) for block in anatomy(base.model).blocks.values()} == {(4, 2)}
    assert report["parameters"] == {"total": parameters(base.model).total, "active": parameters(base.model).active}


@pytest.mark.parametrize("family", CASES)
def test_a_split_with_all_experts_active_is_the_dense_model(family, saved, text, tmp_path, logits):
    model, folder = saved(family, **CASES[family])
    report = upcycle(Sources(str(folder), texts=[text()], tokens=1024), Split(4, 4), tmp_path / "moe")
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "moe").eval()
    torch.testing.assert_close(logits(new), logits(model), atol=1e-4, rtol=1e-4)
    assert report["kl"] < 1e-5
    assert report["mean_of_layers"]["error_routed"] == 0


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_a_split_with_shared_neurons_and_all_experts_active_is_the_dense_model_as_qwen2_moe(
    family, saved, text, tmp_path, logits
):
    model, folder = saved(family)
    report = upcycle(Sources(str(folder), texts=[text()], tokens=1024), Split(2, 2, 32), tmp_path / "moe")
    assert report["class"] == "Qwen2MoeForCausalLM"
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "moe").eval()
    torch.testing.assert_close(logits(new), logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma"])
@torch.no_grad()
def test_the_reported_numbers_are_those_of_the_written_folder(family, saved, text, tmp_path):
    model, folder = saved(family, **CASES[family])
    file = text()
    report = upcycle(Sources(str(folder), texts=[file], tokens=1024, dtype="bfloat16"), Split(4, 2), tmp_path / "moe")
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32).eval()
    tokenizer = load(str(tmp_path / "moe")).tokenizer
    windows = [each for each in texts.windows(tokenizer, [file.read_text()], 1024, 128) if each.held_out]
    kl, nats = 0.0, 0.0
    for window in windows:
        ids = torch.tensor([window.ids])
        dense, moe = (each(input_ids=ids).logits[0].log_softmax(-1) for each in (model, new))
        kl += float((dense.exp() * (dense - moe)).sum())
        nats -= float(moe[:-1].gather(1, ids[0, 1:, None]).sum())
    assert report["tokens"] == sum(len(window.ids) for window in windows) == 256
    assert report["kl"] == pytest.approx(kl / 256, rel=1e-3)
    assert report["bits_per_byte"] == pytest.approx(nats / math.log(2) / sum(window.bytes for window in windows), rel=1e-4)


def test_scaled_rotary_positions_of_phi_are_kept(saved, text, tmp_path, logits):
    model, folder = saved("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=16)
    upcycle(Sources(str(folder), texts=[text()], tokens=512), Copy(2), tmp_path / "moe")
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "moe").eval()
    torch.testing.assert_close(logits(new), logits(model), atol=1e-5, rtol=1e-5)


def test_tokenizer_chat_template_and_generation_settings_are_copied_and_the_card_and_report_written(saved, text, tmp_path):
    _, folder = saved("llama", dtype=torch.bfloat16)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    upcycle(Sources(str(folder), texts=[text()], tokens=512), Copy(2, 1), tmp_path / "moe")
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "moe" / name).read_bytes() == (folder / name).read_bytes()
    index = json.loads((tmp_path / "moe" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 3  # the ends, and two layers
    report = json.loads((tmp_path / "moe" / "upcycle.json").read_text())
    assert (report["how"], report["num_experts"], report["top_k"], len(report["layers"])) == ("copy", 2, 1, 2)
    assert "KL to the dense model" in (tmp_path / "moe" / "README.md").read_text()


@pytest.mark.parametrize(
    ("family", "settings", "part"),
    [
        ("gemma2", {}, "norms behind attention"),
        ("phi", {}, "in parallel"),
        ("olmo2", {}, "norms behind"),
        ("smollm3", {}, "without positions"),
        ("gpt2", {}, "learned positions"),
        ("bloom", {}, "do not know"),
        ("mixtral", {}, "already"),
        ("llama", {"attention_bias": True}, "biases in its attention"),
        ("llama", {"mlp_bias": True}, "biases in its FFN"),
        ("qwen2", {"use_sliding_window": True}, "sliding window"),
        (
            "phi3",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "part of each head",
        ),
    ],
)
def test_a_model_that_no_class_fits_is_refused_with_what_does_not_fit(family, settings, part):
    with pytest.raises(BadValue, match=part) as refusal:
        target_for("a/model", AutoConfig.for_model(family, **settings), Copy(4))
    assert str(refusal.value).startswith(f"a/model ({family})")
    assert len(str(refusal.value)) <= 300


@pytest.mark.parametrize(
    ("family", "settings", "part"),
    [
        ("qwen3", {}, "no shared expert"),
        ("mistral", {"sliding_window": 4096}, "a sliding window of 4096"),
        ("llama", {"head_dim": 96}, "heads of 96"),
    ],
)
def test_shared_neurons_are_refused_where_no_class_with_a_shared_expert_fits(family, settings, part):
    with pytest.raises(BadValue, match=part):
        target_for("a/model", AutoConfig.for_model(family, intermediate_size=64, **settings), Split(2, 1, 32))


@pytest.mark.parametrize(
    ("experts", "shared", "advice"), [(3, 0, "--shared 16"), (4, 20, "--shared 32"), (16, 0, "number of experts$")]
)
def test_neurons_that_cannot_be_divided_are_refused_with_a_number_that_can(experts, shared, advice):
    with pytest.raises(BadValue, match=advice):
        Split(experts, 1, shared).width(64)
