"""Checkpoints that are stored in FP8 (blocks with scales) and MXFP4 load, in the dtype that was asked for, as their values."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedexperts.config import RunConfig
from fedexperts.errors import BadValue
from fedexperts.experiment import runner
from fedexperts.export import export
from fedexperts.export import load as exported_load
from fedexperts.models.load import load
from fedexperts.models.tokenizer import make_tokenizer
from fedexperts.moe.packed import Packed, plain
from fedexperts.testing import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft 0.21 asks by that name
BLOCK = 16  # rows and columns that share a scale in FP8
MX = 32  # values that share an exponent in MXFP4
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def fp8(weight):
    """`weight` in e4m3, and the factor of each block of it: the largest magnitude of a block becomes 448."""
    rows, columns = weight.shape
    blocks = weight.float().reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scales = blocks.abs().amax(dim=(1, 3)) / 448
    return (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn).reshape(rows, columns), scales


def from_fp8(weight, scales, dtype):
    return (weight.float() * scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)).to(dtype)


def mxfp4(stack):
    """The stack [experts, in, out] in MXFP4 as gpt-oss stores it: blocks [experts, out, in / 32, 16] and exponents."""
    rows = stack.float().transpose(1, 2)
    groups = rows.reshape(*rows.shape[:2], -1, MX)
    exponents = torch.floor(torch.log2(groups.abs().amax(dim=-1))) - 2
    shares = groups / torch.exp2(exponents)[..., None]
    codes = (shares[..., None] - E2M1).abs().argmin(dim=-1).to(torch.uint8)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), (exponents + 127).to(torch.uint8)


def from_mxfp4(blocks, scales, dtype):
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).long()
    rows = (E2M1[codes] * torch.exp2(scales.float() - 127)[..., None]).flatten(-2)
    return rows.transpose(1, 2).to(dtype)


def stored(folder, family, **options):
    """A folder with a tiny bfloat16 model, the tensors in its file, and the values that a checkpoint of it stands for."""
    tokenizer = make_tokenizer(128)
    ids = {f"{each}_token_id": getattr(tokenizer, f"{each}_token_id") for each in ("pad", "bos", "eos")}
    tiny_model(family, vocab_size=len(tokenizer), **ids, **options).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def rewritten(folder, tensors, quantization):
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": quantization}))
    return str(folder)


def fp8_folder(folder, family="olmoe", dtype=torch.bfloat16, **options):
    """A folder in FP8, and one with the values that it stands for."""
    tensors = stored(folder, family, **options)
    stored(folder.with_name("values"), family, **options)
    quantized, values = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if name.endswith(("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")):
            quantized[name], quantized[f"{name}_scale_inv"] = fp8(weight)
            values[name] = from_fp8(quantized[name], quantized[f"{name}_scale_inv"], dtype)
    assert len(quantized) > len(tensors) + 30
    save_file(values, folder.with_name("values") / "model.safetensors", metadata={"format": "pt"})
    settings = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    return rewritten(folder, quantized, settings), str(folder.with_name("values"))


def mxfp4_folder(folder, dtype=torch.bfloat16):
    options = {"hidden_size": 64, "intermediate_size": 32}
    tensors = stored(folder, "gpt_oss", **options)
    stored(folder.with_name("values"), "gpt_oss", **options)
    quantized, values = {}, dict(tensors)
    for name, weight in tensors.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            quantized[f"{name}_blocks"], quantized[f"{name}_scales"] = mxfp4(weight)
            values[name] = from_mxfp4(quantized[f"{name}_blocks"], quantized[f"{name}_scales"], dtype).contiguous()
        else:
            quantized[name] = weight
    assert len(quantized) == len(tensors) + 6
    save_file(values, folder.with_name("values") / "model.safetensors", metadata={"format": "pt"})
    return rewritten(folder, quantized, {"quant_method": "mxfp4"}), str(folder.with_name("values"))


@pytest.fixture(params=["fp8 olmoe", "fp8 mixtral", "fp8 deepseek_v3", "mxfp4"])
def folders(request, tmp_path):
    def make(dtype):
        kind, _, family = request.param.partition(" ")
        options = {"intermediate_size": 32} if family == "mixtral" else {}
        return (
            (*fp8_folder(tmp_path / "stored", family, dtype, **options), "fp8")
            if kind == "fp8"
            else (*mxfp4_folder(tmp_path / "stored", dtype), "mxfp4")
        )

    return make


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_a_checkpoint_loads_as_the_values_that_it_stands_for(folders, dtype):
    folder, values, method = folders(torch.float32 if dtype == "float32" else torch.bfloat16)
    base, expected = load(folder, dtype=dtype), load(values, dtype=dtype)
    assert base.stored_as == method and expected.stored_as is None
    theirs = expected.model.state_dict()
    ours = base.model.state_dict()
    assert ours.keys() == theirs.keys() and len(ours) > 20
    assert [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])] == []
    assert [name for name, tensor in ours.items() if tensor.dtype != theirs[name].dtype] == []
    assert ours["lm_head.weight"].dtype == (torch.float32 if dtype == "float32" else torch.bfloat16)
    assert not hasattr(base.model.config, "quantization_config") and type(base.model) is type(expected.model)


def test_it_can_be_kept_in_4_bits(folders):
    pytest.importorskip("bitsandbytes")
    folder, values, _ = folders(torch.bfloat16)
    base, expected = load(folder, quantize="nf4"), load(values, quantize="nf4")
    theirs = expected.model.state_dict()
    assert sum(isinstance(each, Packed) for each in base.model.parameters()) > 5
    assert all(torch.equal(plain(tensor), plain(theirs[name])) for name, tensor in base.model.state_dict().items())


def test_other_formats_are_refused_in_one_sentence(tmp_path):
    tensors = stored(tmp_path / "base", "olmoe")
    folder = rewritten(tmp_path / "base", tensors, {"quant_method": "gptq", "bits": 4})
    with pytest.raises(BadValue, match=r"its weights are quantized \(gptq\)") as raised:
        load(folder)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("adapters", [True, False], ids=["lora", "full"])
def test_a_run_on_it_is_exported_as_values_and_its_card_says_so(folders, adapters, tmp_path):
    folder, values, method = folders(torch.bfloat16)
    out, settings = tmp_path / "run", {"train": "lora", "rank": 8} if adapters else {"train": "full", "parts": ["attention"]}
    tree = {
        "model": {"name": folder},
        "method": {"name": "fedavg"},
        "training": {**settings, "batch_size": 2, "local_steps": 1},
        "federation": {"rounds": 1},
        "evaluation": {"generate_tokens": 2},
        "data": {"sources": ["synthetic/double"], "clients": 2, "limit": 12, "test_examples": 2, "max_tokens": 24},
    }
    runner.run(RunConfig.model_validate(tree), out)
    for client in (None, "c01"):
        made = tmp_path / f"exported {client}"
        export(out, made, client)
        tensors = load_file(made / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} <= {torch.bfloat16, torch.float32}
        assert not any("scale" in name or "blocks" in name for name in tensors)
        assert "quantization_config" not in json.loads((made / "config.json").read_text())
        assert f"The base is stored in {method}" in (made / "README.md").read_text()
        frozen, same = exported_load(made).state_dict(), load(values).model.state_dict()
        norms = [name for name in same if "norm" in name and name in frozen]
        assert len(norms) > 3 and all(torch.equal(frozen[name].to(same[name].dtype), same[name]) for name in norms)
