"""Whole runs with weights in 4 bits: workers share them, and a resumed run gives the same bits."""

import json

import pytest
import torch
from safetensors.torch import load_file

from fedexperts.config import RunConfig
from fedexperts.experiment import checkpoint, runner
from fedexperts.models.tokenizer import make_tokenizer
from fedexperts.moe.packed import Packed
from fedexperts.testing import tiny_model

pytest.importorskip("bitsandbytes")


@pytest.fixture
def base(tmp_path):
    folder, tokenizer = tmp_path / "base", make_tokenizer(max_tokens=48)
    ids = {f"{each}_token_id": getattr(tokenizer, f"{each}_token_id") for each in ("pad", "bos", "eos")}
    tiny_model("olmoe", vocab_size=len(tokenizer), **ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def settings(base, workers=1):
    return RunConfig.model_validate(
        {
            "model": {"name": str(base), "dtype": "bfloat16", "quantize": "nf4"},
            "method": {"name": "fedit"},
            "training": {"train": "lora", "rank": 8, "batch_size": 4, "local_steps": 2},
            "federation": {"rounds": 2, "workers": workers},
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


def outcome(folder):
    """The weights, and the evaluations and rounds without seconds."""
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    weights = load_file(checkpoint.latest(folder) / "weights.safetensors")
    return weights, (folder / "evals.jsonl").read_text(), [{**line, "seconds": None} for line in rounds]


def test_workers_share_packed_weights_and_a_killed_run_resumes_to_the_same_bits(base, tmp_path, monkeypatch):
    runner.run(settings(base), tmp_path / "one")
    weights, evals, rounds = outcome(tmp_path / "one")
    assert not any(isinstance(tensor, Packed) for tensor in weights.values())

    finish = runner.finish_round

    def killed(prepared, server, *others):
        finish(prepared, server, *others)
        if server.round == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runner, "finish_round", killed)
        runner.run(settings(base), tmp_path / "resumed")
    runner.run(settings(base), tmp_path / "resumed", resume=True)
    runner.run(settings(base, workers=2), tmp_path / "two")
    for other in ("resumed", "two"):
        again, other_evals, other_rounds = outcome(tmp_path / other)
        assert all(torch.equal(again[name], weights[name]) for name in weights)
        assert (other_evals, other_rounds) == (evals, rounds)
