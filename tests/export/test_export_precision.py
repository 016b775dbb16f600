"""Exports of runs in bfloat16, float16 and 4 bits: exact with a modeling file, or merged with the measured difference."""

import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from fedexperts.config import RunConfig
from fedexperts.experiment import runner
from fedexperts.experiment.client_task import ClientTask
from fedexperts.export import export, load, write_changed
from fedexperts.export.card import difference
from fedexperts.export.models import Exported
from fedexperts.models.load import Base
from fedexperts.models.tokenizer import make_tokenizer
from fedexperts.moe import graft
from fedexperts.moe.anatomy import anatomy
from fedexperts.moe.packed import Packed, unpack_weights
from fedexperts.moe.shrink import shrink
from fedexperts.moe.tuning import Tuning, prepare
from fedexperts.testing import FAMILIES, tiny_batch, tiny_experts, tiny_model, tiny_tokenizer
from tests.models.test_nf4 import packed_model, with_dtype

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft 0.21 asks by that name
LORA = {"train": "lora", "rank": 8, "alpha": 16.0}
CASES = {
    "lora": {"method": {"name": "fedit"}, "training": LORA},
    "grafted": {"method": {"name": "flex"}, "training": {**LORA, "parts": ["attention"]}},
    "router": {"method": {"name": "fedavg"}, "training": {"train": "full", "parts": ["router"]}},
    "full": {"method": {"name": "fedavg"}, "training": {"train": "full"}},
    "random": {"method": {"name": "random_moe"}, "training": LORA},
}
STORED = {"bfloat16": {"dtype": "bfloat16"}, "float16": {"dtype": "float16"}, "nf4": {"dtype": "bfloat16", "quantize": "nf4"}}


def logits(model, family):
    with torch.no_grad():
        return model.eval()(**tiny_batch(family)).logits


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory):
    """Where transformers puts the code that travels with a model, instead of the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Runs a case on a family with weights stored in a way, once: two clients, one round; folder, logits by client, base."""
    done = {}

    def run(family, case, stored):
        if (family, case, stored) in done:
            return done[family, case, stored]
        tokenizer, base = make_tokenizer(max_tokens=48), tmp_path_factory.mktemp("base")
        ids = {f"{each}_token_id": getattr(tokenizer, f"{each}_token_id") for each in ("pad", "bos", "eos")}
        tiny_model(family, vocab_size=len(tokenizer), **ids).save_pretrained(base)
        tokenizer.save_pretrained(base)
        seen, scores = {}, ClientTask.scores

        def watched(self, model, examples, context):
            seen[context.client.name] = logits(model, family)
            return scores(self, model, examples, context)

        tree = {
            "model": {"name": str(base), **STORED[stored]},
            "federation": {"rounds": 1},
            "evaluation": {"generate_tokens": 2},
            "data": {
                "sources": ["synthetic/double", "synthetic/first"],
                "clients": 2,
                "limit": 12,
                "test_examples": 2,
                "max_tokens": 24,
            },
            **CASES[case],
        }
        tree["training"] = {**tree["training"], "batch_size": 2, "local_steps": 2, "lr": 0.01}
        folder = tmp_path_factory.mktemp("run") / "out"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ClientTask, "scores", watched)
            runner.run(RunConfig.model_validate(tree), folder)
        done[family, case, stored] = folder, seen, base
        return done[family, case, stored]

    return run


def by_transformers(folder, family, **options):
    kind = AutoModelForSeq2SeqLM if family == "switch_transformers" else AutoModelForCausalLM
    return kind.from_pretrained(folder, **options)


@pytest.mark.parametrize(
    ("family", "case", "stored"),
    [
        ("olmoe", "lora", "bfloat16"),
        ("olmoe", "lora", "nf4"),
        ("olmoe", "lora", "float16"),
        ("olmoe", "grafted", "nf4"),
        ("olmoe", "router", "nf4"),
        ("olmoe", "full", "bfloat16"),
        ("olmoe", "random", "nf4"),
        ("switch_transformers", "lora", "bfloat16"),
        ("switch_transformers", "grafted", "nf4"),
    ],
)
def test_a_client_s_folder_computes_what_the_scored_model_does_bit_for_bit(ended, family, case, stored, tmp_path):
    folder, seen, _ = ended(family, case, stored)
    assert export(folder, tmp_path / "out", "c02").needs_code
    for model in (load(tmp_path / "out"), by_transformers(tmp_path / "out", family, trust_remote_code=True)):
        assert torch.equal(logits(model, family), seen["c02"])
        assert not any(isinstance(each, Packed) for each in model.parameters())
    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()}
    half = torch.float16 if stored == "float16" else torch.bfloat16
    assert dtypes == ({torch.float32} if case == "full" else {torch.float32, half})
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("stored in 4 bits (nf4)" in card) == (stored == "nf4") and "KL divergence" not in card
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again"), family), seen["c02"])


@pytest.mark.parametrize("stored", ["bfloat16", "nf4"])
@pytest.mark.parametrize(("case", "client"), [("lora", None), ("lora", "c01"), ("full", None), ("router", None)])
def test_a_merged_model_is_a_plain_folder_in_the_base_s_dtypes_with_the_measured_difference_on_its_card(
    ended, case, client, stored, tmp_path
):
    if (case, stored) == ("full", "nf4"):
        pytest.skip("a run that trains packed weights whole is refused")
    folder, seen, base = ended("olmoe", case, stored)
    assert not export(folder, tmp_path / "out", client, merge=client is not None).needs_code
    model = by_transformers(tmp_path / "out", "olmoe")
    assert {each.dtype for each in model.parameters()} == {torch.bfloat16}
    off = (logits(model, "olmoe") - seen["c01"]).float().abs().max()
    assert 0 < off < 0.2
    if case != "router":  # which alone changes little
        assert (logits(by_transformers(base, "olmoe", dtype=torch.bfloat16), "olmoe") - seen["c01"]).abs().max() > 2 * off
    card = (tmp_path / "out" / "README.md").read_text()
    largest, divergence = map(float, re.search(r"differ by at most (\S+) from .* divergence is (\S+) nats", card).groups())
    assert 0 < largest < 0.2 and 0 < divergence < 0.01


def test_the_difference_between_logits_is_the_largest_and_the_divergence_of_their_distributions():
    scored, exported = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
    measured = difference(scored, exported)
    assert measured.largest == 1
    share = torch.sigmoid(torch.tensor(1.0))
    by_hand = 0.5 * torch.log(0.5 / share) + 0.5 * torch.log(0.5 / (1 - share))
    assert measured.divergence == pytest.approx(float(by_hand))


@pytest.mark.parametrize("stored", ["bfloat16", "nf4"])
def test_an_adapter_s_card_says_in_which_dtype_its_base_computes(ended, stored, tmp_path):
    folder, _, _ = ended("olmoe", "lora", stored)
    export(folder, tmp_path / "out", adapter=True)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "the base of the run, in bfloat16" in card
    assert ("the adapters compute other logits" in card) == (stored == "nf4")
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back_to_the_bit_in_bfloat16_and_nf4(family, quantized, tmp_path):
    base = packed_model(family) if quantized else with_dtype(tiny_model(family), torch.bfloat16)
    switch = family == "switch_transformers"
    tuning = Tuning(**LORA, parts=("attention", "router") if switch else None)
    model = prepare(shrink(base, tiny_experts(base)), tuning, seed="0")
    graft.attach(model, dict.fromkeys(anatomy(model).blocks, (0,) if switch else (1, 0)), tuning, "0")
    chance = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=chance) / 4)
    exported = Exported(model.eval(), Base(base, tiny_tokenizer(), switch, family, ""))
    expected = logits(model, family)
    unpack_weights(model)
    write_changed(exported, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert torch.equal(logits(load(tmp_path / "out"), family), expected)
