"""Runs that start from an adapter: of a former run, or of peft."""

import json
import shutil

import pytest

from fedexperts.config import RunConfig
from fedexperts.errors import BadRun, BadValue
from fedexperts.experiment import runner
from fedexperts.export import export
from fedexperts.models.tokenizer import make_tokenizer
from fedexperts.testing import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft 0.21 asks by that name


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("base"), make_tokenizer(max_tokens=48)
    ids = {f"{each}_token_id": getattr(tokenizer, f"{each}_token_id") for each in ("pad", "bos", "eos")}
    tiny_model("olmoe", vocab_size=len(tokenizer), **ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def settings(base, method="fedit", adapter=None, **model):
    return RunConfig.model_validate(
        {
            "model": {"name": str(base), **({"adapter": str(adapter)} if adapter else {}), **model},
            "method": {"name": method},
            "training": {"train": "lora", "rank": 8, "batch_size": 4, "local_steps": 3, "lr": 0.02},
            "federation": {"rounds": 1},
            "evaluation": {"generate_tokens": 2},
            "data": {
                "sources": ["synthetic/double", "synthetic/first"],
                "clients": 2,
                "limit": 24,
                "test_examples": 4,
                "max_tokens": 24,
            },
        }
    )


def evaluations(folder):
    lines = [json.loads(line) for line in (folder / "evals.jsonl").read_text().splitlines()]
    return {
        round: [{**line, "round": None} for line in lines if line["round"] == round]
        for round in {line["round"] for line in lines}
    }


@pytest.mark.parametrize(
    "model", [{}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "quantize": "nf4"}], ids=["fp32", "bf16", "nf4"]
)
def test_a_run_starts_where_the_run_that_exported_its_adapter_ended(base, model, tmp_path):
    if "quantize" in model:
        pytest.importorskip("bitsandbytes")
    runner.run(settings(base, **model), tmp_path / "first")
    export(tmp_path / "first", tmp_path / "adapter", adapter=True)
    runner.run(settings(base, adapter=tmp_path / "adapter", **model), tmp_path / "second")
    first, second = evaluations(tmp_path / "first"), evaluations(tmp_path / "second")
    assert second[0] == first[1] != first[0]
    assert len(second[0]) > 3
    assert json.loads((tmp_path / "second" / "versions.json").read_text())["adapter_hash"]

    export(tmp_path / "second", tmp_path / "out", adapter=True)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(BadRun, match="the adapter that the run started from changed"):
        export(tmp_path / "second", tmp_path / "other")
    with pytest.raises(BadRun, match="the adapter that the run started from changed"):
        export(tmp_path / "second", tmp_path / "other", "c01")
    with pytest.raises(BadRun, match="the adapter that the run started from changed"):
        runner.run(settings(base, adapter=tmp_path / "adapter", **model), tmp_path / "second", resume=True)


def test_a_method_that_does_not_send_the_adapters_is_refused_and_a_missing_folder_too(base, tmp_path):
    runner.run(settings(base), tmp_path / "first")
    export(tmp_path / "first", tmp_path / "adapter", adapter=True)
    for method in ("ffa_lora", "fedsa_lora", "flora", "random_expert", "local"):
        with pytest.raises(BadValue, match="start from adapters of their own"):
            runner.run(settings(base, method, tmp_path / "adapter"), tmp_path / method)
    runner.run(settings(base, "fedmoe", tmp_path / "adapter"), tmp_path / "fedmoe")
    shutil.rmtree(tmp_path / "adapter")
    with pytest.raises(BadValue, match="is no adapter"):
        runner.run(settings(base, adapter=tmp_path / "adapter"), tmp_path / "missing")
