"""One dense fine-tune an expert, GGUF files, half-written folders, and the memory that a conversion takes."""

import json
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fedexperts.errors import BadValue
from fedexperts.models.load import load
from fedexperts.models.tokenizer import make_tokenizer
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


def written_gguf(path, layers=2, hidden=32, neurons=64, heads=4):
    """A random Llama in a GGUF file, in float32, with a tokenizer of bytes."""
    gguf = pytest.importorskip("gguf")
    writer, chance = gguf.GGUFWriter(path, "llama"), torch.Generator().manual_seed(0)
    vocabulary = sorted(
        json.loads(make_tokenizer(128).backend_tokenizer.to_str())["model"]["vocab"].items(), key=lambda each: each[1]
    )
    tokens = [*(token for token, _ in vocabulary), "ab"]
    writer.add_block_count(layers)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(neurons)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    layer = {f"attn_{part}": (hidden, hidden) for part in ("q", "k", "v", "output")}
    layer |= {"ffn_gate": (neurons, hidden), "ffn_up": (neurons, hidden), "ffn_down": (hidden, neurons)}
    layer |= {"attn_norm": (hidden,), "ffn_norm": (hidden,)}
    shapes = {f"blk.{number}.{name}": shape for number in range(layers) for name, shape in layer.items()}
    shapes |= {"token_embd": (len(tokens), hidden), "output": (len(tokens), hidden), "output_norm": (hidden,)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", (0.3 * torch.randn(shape, generator=chance)).bfloat16().float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_the_copies_of_the_model_that_transformers_reads_in_it(text, tmp_path):
    (tmp_path / "gguf").mkdir()
    written_gguf(tmp_path / "gguf" / "model.gguf")
    report = upcycle(Sources(str(tmp_path / "gguf"), texts=[text()], tokens=512), Copy(2), tmp_path / "moe")
    assert report["kl"] < 1e-6
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "gguf", gguf_file="model.gguf", dtype=torch.float32).eval()
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32).eval()
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(new(input_ids=ids).logits, dense(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


def test_of_several_gguf_files_one_must_be_named(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(BadValue, match="2 GGUF files"):
        checkpoint.gguf_file(tmp_path)
