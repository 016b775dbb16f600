"""One dense fine-tune an expert, GGUF files, half-written folders, and the memory that a conversion takes."""

import json
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fedexperts.errors import BadValue
from fedexperts.models.load import load
from fedexperts.models.upcycle import checkpoint, texts
from fedexperts.models.upcycle.recipes import Copy, Merge
from fedexperts.models.upcycle.run import Sources, upcycle
from fedexperts.moe.memory import MemoryMeter


@pytest.fixture
def two_texts(text):
    return [text("first.txt", "abcdefg"), text("second.txt", "tuvwxyz")]


def test_experts_that_are_all_the_base_model_are_the_base_model(saved, two_texts, tmp_path, logits):
    model, folder = saved("llama")
    sources = Sources(str(folder), [str(folder)] * 2, two_texts, tokens=1024)
    report = upcycle(sources, Merge(2, 2), tmp_path / "moe")
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "moe").eval()
    torch.testing.assert_close(logits(new), logits(model), atol=1e-5, rtol=1e-5)
    assert report["kl"] < 1e-6


def test_a_text_goes_to_its_expert_which_has_the_ffn_of_its_model(saved, two_texts, tmp_path):
    _, base = saved("llama")
    others = [saved("llama", name, seed) for name, seed in (("first", 1), ("second", 2))]
    sources = Sources(str(base), [str(folder) for _, folder in others], two_texts, tokens=4096)
    report = upcycle(sources, Merge(2, 1), tmp_path / "moe")
    assert all(layer["own_expert"] > 0.85 for layer in report["layers"])
    stored = checkpoint.open_dense(str(tmp_path / "moe"))
    for number, (model, _) in enumerate(others):
        w1 = stored.read(f"model.layers.1.block_sparse_moe.experts.{number}.w1.weight")
        assert torch.equal(w1, model.model.layers[1].mlp.gate_proj.weight)


def test_prompts_teach_the_router_too(saved, text, tmp_path, logits):
    model, folder = saved("llama")
    (tmp_path / "prompts.json").write_text(json.dumps([["abc def"] * 4, ["xyz tuv"] * 4]))
    sources = Sources(str(folder), [str(folder)] * 2, [text()], tmp_path / "prompts.json", tokens=512)
    upcycle(sources, Merge(2, 1), tmp_path / "moe")
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "moe").eval()
    assert all(layer.mlp.gate.weight.abs().sum() > 0 for layer in new.model.layers)
    torch.testing.assert_close(logits(new), logits(model), atol=1e-5, rtol=1e-5)


def test_models_that_are_not_alike_or_have_no_texts_are_refused(saved, two_texts, tmp_path):
    _, base = saved("llama")
    _, wider = saved("llama", "wider", intermediate_size=128)
    with pytest.raises(BadValue, match="intermediate_size = 128"):
        upcycle(Sources(str(base), [str(base), str(wider)], two_texts), Merge(2), tmp_path / "moe")
    with pytest.raises(BadValue, match="1 texts were given for 2 experts"):
        upcycle(Sources(str(base), [str(base)] * 2, two_texts[:1]), Merge(2), tmp_path / "moe")
    (tmp_path / "prompts.json").write_text('[["one"]]')
    with pytest.raises(BadValue, match="1 lists of prompts for 2 experts"):
        texts.read_prompts(tmp_path / "prompts.json", 2)


def test_a_conversion_has_few_layers_in_memory_at_a_time(saved, text, tmp_path):
    model, folder = saved("llama", num_hidden_layers=12, hidden_size=128, intermediate_size=512)
    layer = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    with MemoryMeter() as meter:
        upcycle(Sources(str(folder), texts=[text()], tokens=512), Copy(2), tmp_path / "moe")
    new = load(str(tmp_path / "moe")).model
    shapes = sum(
        parameter.nbytes for each in (model, new) for parameter in each.parameters()
    )  # on the meta device, which has no bytes
    peak = meter.peak_bytes - shapes
    assert layer < peak < 9 * layer  # dense, read and in float32; of two experts, written and in float32; activations
    assert shapes > 30 * layer


def test_a_conversion_that_fails_leaves_no_folder_behind(saved, text, tmp_path):
    _, folder = saved("llama")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors")
    before = set(tmp_path.iterdir())
    with pytest.raises(BadValue, match=r"lacks the weight model\.layers\.1\.mlp\.up_proj"):
        upcycle(Sources(str(folder), texts=[text()], tokens=512), Copy(2), tmp_path / "moe")
    assert {path.name for path in set(tmp_path.iterdir()) - before} == {"text.txt"}


def test_the_reference_text_ships_with_python_where_there_is_no_data_pack(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDEXPERTS_DATA", str(tmp_path))
    name, found = texts.default_texts()
    assert "Python manual" in name
    assert len(found[0]) > 100_000


@pytest.mark.skipif(find_spec("gguf") is not None, reason="gguf is installed")
def test_a_gguf_file_needs_the_package_gguf(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(BadValue, match="pip install gguf"):
        checkpoint.open_dense(str(tmp_path))


def test_of_several_gguf_files_one_must_be_named(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(BadValue, match="2 GGUF files"):
        checkpoint.gguf_file(tmp_path)
