import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedexperts.core import evaluation
from fedexperts.data.encode import Encoder
from fedexperts.data.synthetic import BASE_TASKS, NEW_TASKS, examples
from fedexperts.errors import BadValue, NoExperts
from fedexperts.experiment.client_task import bits
from fedexperts.models import summary
from fedexperts.models.files import BASES, BUNDLED
from fedexperts.models.load import align_parameters, load, load_or_explain
from fedexperts.models.tokenizer import make_tokenizer
from fedexperts.moe.anatomy import anatomy, blocks
from fedexperts.moe.shrink import kept_experts, shrink
from fedexperts.testing import FAMILIES, tiny_batch
from fedexperts.testing import tiny_model as model_without_tokenizer


def tiny_model(family: str, **options: object) -> object:
    """A tiny model with an embedding for each token of the tokenizer that `saved` gives it."""
    return model_without_tokenizer(family, **{"vocab_size": 320, **options})


def saved(folder: Path, model: object) -> str:
    model.save_pretrained(folder)
    make_tokenizer(128).save_pretrained(folder)
    return str(folder)


def test_the_shipped_base_is_a_small_moe_in_fp32_and_eval_mode():
    base = load("tiny")
    shapes = anatomy(base.model).blocks.values()
    assert [(shape.num_experts, shape.top_k) for shape in shapes] == [(16, 2)] * 4
    assert 3_000_000 < sum(parameter.numel() for parameter in base.model.parameters()) < 5_000_000
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.float32}
    assert not base.model.training and not base.encoder_decoder
    assert base.model.config._experts_implementation == "grouped_mm"


def test_the_shipped_base_knows_its_tasks_and_has_new_ones_to_learn():
    base = load("tiny")
    encoder = Encoder(base.tokenizer, 128)
    prompts = [example for task in (*BASE_TASKS, *NEW_TASKS) for example in examples(task, 20, "shipped", "test")]
    scores = evaluation.score(base.model, prompts, encoder, generate_tokens=16, batch_size=60).by_task()
    assert len(scores) == len(BASE_TASKS) + len(NEW_TASKS)
    assert mean(scores[task]["verbatim"] for task in BASE_TASKS) > 0.85
    assert mean(scores[task]["verbatim"] for task in NEW_TASKS) < 0.35


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def test_the_base_of_the_reported_runs_is_in_the_checkout_and_its_error_says_how_to_make_it(tmp_path, monkeypatch):
    assert BUNDLED["small"] == Path(__file__).parents[2] / "assets" / "small"
    monkeypatch.setitem(BUNDLED, "small", tmp_path / "small")
    for read in (load, summary.read_config):
        with pytest.raises(BadValue, match=r"fedexperts pretrain runs/pretrain-small\.toml") as raised:
            read("small")
        assert "\n" not in str(raised.value) and str(tmp_path / "small") in str(raised.value)
    saved(tmp_path / "small", tiny_model("olmoe", tie_word_embeddings=True))
    base = load("small")
    assert base.name == "small" and base.model.lm_head.weight is base.model.model.embed_tokens.weight
    assert summary.read_config("small").tie_word_embeddings


def test_the_base_that_is_built_is_found_by_its_name_and_its_error_says_how_to_build_it(tmp_path, monkeypatch):
    assert BUNDLED["smol"].name == "smol" and BUNDLED["smol"].parent == BASES
    monkeypatch.setitem(BUNDLED, "smol", tmp_path / "smol")
    for read in (load, summary.read_config):
        with pytest.raises(
            BadValue, match=r"build it in a checkout of the repository with make smol, set FEDEXPERTS_BASES"
        ) as raised:
            read("smol")
        assert "\n" not in str(raised.value) and str(tmp_path / "smol") in str(raised.value)
    saved(tmp_path / "smol", tiny_model("qwen2_moe").to(torch.bfloat16))
    base = load("smol")
    assert base.name == "smol" and {parameter.dtype for parameter in base.model.parameters()} == {torch.float32}


def test_the_folder_of_built_bases_is_a_setting(tmp_path):
    program = "from fedexperts.models.files import BASES, BUNDLED; print(BUNDLED['smol'])"
    found = [
        subprocess.run([sys.executable, "-c", program], env={**os.environ, **setting}, capture_output=True, text=True, check=True)
        for setting in ({"FEDEXPERTS_BASES": str(tmp_path)}, {"FEDEXPERTS_BASES": "", "HOME": "/home/someone"})
    ]
    assert [each.stdout.strip() for each in found] == [f"{tmp_path}/smol", "/home/someone/.cache/fedexperts/bases/smol"]


def test_the_hash_is_that_of_the_weights(tmp_path):
    one = load(saved(tmp_path / "one", tiny_model("olmoe", seed=0))).hash
    same = load(saved(tmp_path / "same", tiny_model("olmoe", seed=0))).hash
    other = load(saved(tmp_path / "other", tiny_model("olmoe", seed=1))).hash
    assert one == same != other


def test_another_top_k_or_tokenizer_is_another_base(tmp_path):
    folder = Path(saved(tmp_path / "one", tiny_model("olmoe", seed=0)))
    first = load(str(folder))
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_experts_per_tok": 3}))
    second = load(str(folder))
    assert (second.hash, second.config_hash == first.config_hash) == (first.hash, False)
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text() + "\n")
    assert len({each.identity for each in (first, second, load(str(folder)))}) == 3


def test_an_encoder_decoder_loads_as_one(tmp_path):
    base = load(saved(tmp_path, tiny_model("switch_transformers")))
    assert base.encoder_decoder and type(base.model).__name__ == "SwitchTransformersForConditionalGeneration"


def test_experts_of_odd_width_fall_back_to_the_kernel_that_can(tmp_path):
    base = load(saved(tmp_path, tiny_model("olmoe", intermediate_size=10)))
    assert base.model.config._experts_implementation == "eager"
    assert base.model(torch.tensor([[3, 4, 5]])).logits.isfinite().all()


def test_a_model_without_experts_is_refused_for_that_whatever_else_it_lacks(tmp_path):
    config = LlamaConfig(vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    dense = LlamaForCausalLM(config)
    dense.save_pretrained(tmp_path / "bare")
    for folder in (saved(tmp_path / "whole", dense), str(tmp_path / "bare")):
        with pytest.raises(NoExperts, match="no Mixture-of-Experts layers"):
            load(folder)


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_a_model_with_experts_but_no_tokenizer_is_refused(tmp_path, family):
    tiny_model(family).save_pretrained(tmp_path)
    with pytest.raises(BadValue, match="tokenizer"):
        load(str(tmp_path))


def test_a_missing_folder_is_named():
    with pytest.raises(BadValue, match=r"'\./nowhere' is a folder that does not exist"):
        load("./nowhere")
    with pytest.raises(BadValue, match=r"'\./small' is a folder that does not exist.*; did you mean small\?$"):
        load("./small")


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(BadValue, match="cannot be loaded"):
        load(str(tmp_path))


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BadValue, match="'nobody/no-such-model' cannot be loaded") as raised:
        load("nobody/no-such-model")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("read", [load, summary.read_config])
@pytest.mark.parametrize(("name", "nearest"), [("smal", "small"), ("tinny", "tiny")])
def test_a_misspelled_bundled_base_is_refused_with_the_nearest_one(monkeypatch, read, name, nearest):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BadValue, match=rf"'{name}' .*give tiny, small, .*; did you mean {nearest}\?$") as raised:
        read(name)
    assert "\n" not in str(raised.value)


def test_a_model_with_code_of_its_own_runs_only_on_trust(tmp_path):
    own = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": own}))
    with pytest.raises(BadValue, match=r"set model\.trust_remote_code = true if you trust its authors"):
        load(str(tmp_path))


def test_parameters_that_start_anywhere_are_moved_to_multiples_of_64_bytes_and_others_stay():
    model = torch.nn.Linear(8, 8, bias=False)
    memory = torch.arange(100.0)
    shifted = next(start for start in range(17) if memory[start:].data_ptr() % 64 == 4)
    values = memory[shifted : shifted + 64].view(8, 8)
    model.weight = torch.nn.Parameter(values)
    align_parameters(model)
    assert model.weight.data_ptr() % 64 == 0 and torch.equal(model.weight, values)
    address = model.weight.data_ptr()
    align_parameters(model)
    assert model.weight.data_ptr() == address


def test_error_sentences_about_a_model_stay_short(tmp_path, monkeypatch):
    def fail():
        raise OSError("reason " * 200)

    with pytest.raises(BadValue) as refused:
        load_or_explain("someone/model", fail)
    assert len(str(refused.value)) <= 300 and "\n" not in str(refused.value)


def test_no_forward_pass_changes_the_weights_of_a_base(tmp_path):
    for family in FAMILIES:
        base = load(saved(tmp_path / family, tiny_model(family)), dtype="bfloat16").model
        before = bits(base)
        for _ in range(2):
            with torch.no_grad():
                base(**tiny_batch(family))
            assert bits(base) == before


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "gpt_oss", "switch_transformers"])
def test_a_base_that_is_read_on_demand_has_the_experts_of_a_job_and_computes_the_same(tmp_path, family):
    folder = saved(tmp_path / family, tiny_model(family))
    whole, base = load(folder), load(folder, on_demand=True)
    assert (base.hash, base.config_hash) == (whole.hash, whole.config_hash)
    assert all(parameter.is_meta for parameter in base.model.parameters()) and anatomy(base.model) == anatomy(whole.model)
    experts = dict.fromkeys(list(blocks(whole.model))[1:], (1, 2, 6))
    part = base.reader(experts)
    assert [block.shape.num_experts for block in blocks(part).values()][1:] == [3] * len(experts)
    assert base.reader(experts) is part  # read once
    cut, same = shrink(whole.model, experts), shrink(part, experts)
    batch = tiny_batch(family)
    with torch.no_grad():
        assert torch.equal(cut(**batch).logits, same(**batch).logits)
        fewer = dict.fromkeys(experts, (2, 6))
        assert torch.equal(shrink(whole.model, fewer)(**batch).logits, shrink(part, fewer)(**batch).logits)
        assert torch.equal(shrink(base.reader({}), {})(**batch).logits, whole.model(**batch).logits)
    assert kept_experts(same) == kept_experts(cut)
    with pytest.raises(BadValue, match="needs expert 5, and only 1, 2, 6 were read"):
        shrink(part, {next(iter(experts)): (1, 5)})
