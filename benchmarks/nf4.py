"""What 4 bits cost in quality: the base `small` with its weights in float32, bfloat16 and nf4, before and after a federated run.

    python benchmarks/nf4.py [--texts 40] [--rounds 5]

MB          the bytes of the model's weights
bits        bits per byte of held-out text, the mean over the data pack's files that `small` was trained beside (FEDEXPERTS_DATA)
KL          mean divergence of the next token's distribution from that of the float32 model on the same text, in nats
before, after   accuracy on AG News before and after a run of FedIT: LoRA on attention and experts and whole routers, four
            clients, the same seed for all; loss: cross-entropy on the clients' training examples in the last round
seconds     of the run
"""

import argparse
import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fedexperts.config import RunConfig
from fedexperts.experiment import runner
from fedexperts.export.card import difference
from fedexperts.io.toml import checked, read_tree
from fedexperts.models.load import Base, load
from fedexperts.models.measure import held_out_file, held_out_texts, token_bytes
from fedexperts.models.settings import PretrainSettings
from fedexperts.models.stream import as_example, token_ids

WAYS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "nf4 of bfloat16": {"dtype": "bfloat16", "quantize": "nf4"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("weights", "MB", "bits", "KL", "before", "after", "loss", "seconds")
    texts = held_out(options.texts)
    reference: list[torch.Tensor] = []
    for name, model in WAYS.items():
        base = load("small", **model)
        windows = [windows_of(base, each) for each in texts]
        logits = [log_probabilities(base, each) for each in windows]
        reference = reference or logits
        bits = [bits_per_byte(base, *pair) for pair in zip(windows, logits, strict=True)]
        apart = [difference(*pair).divergence for pair in zip(reference, logits, strict=True)]
        size = sum(parameter.nbytes for parameter in base.model.parameters()) / 1e6
        row = (f"{size:.1f}", f"{sum(bits) / len(bits):.4f}", f"{sum(apart) / len(apart):.5f}")
        table.add_row(name, *row, *federated(model, options.rounds))
    Console().print(table)


def held_out(number: int) -> list[list[str]]:
    """For each file with held-out texts beside one that `small` was trained on, some of these texts."""
    recipe = checked(PretrainSettings, read_tree(Path("runs/pretrain-small.toml"), ""))
    assert recipe.stream is not None
    files = {file: texts for texts in recipe.stream.texts if (file := held_out_file(texts.name)) is not None}
    return [some for file, texts in files.items() if (some := held_out_texts(file, texts, number))]


def windows_of(base: Base, texts: list[str], window: int = 256, most: int = 24) -> torch.Tensor:
    """The tokens of `texts` in at most `most` windows: [windows, window]."""
    ids = torch.tensor(list(token_ids(base.tokenizer, [as_example(text) for text in texts])))
    return ids[: len(ids) // window * window].view(-1, window)[:most]


@torch.inference_mode()
def log_probabilities(base: Base, windows: torch.Tensor) -> torch.Tensor:
    """The logarithms of the next token's distribution at each place but the last: [windows, window - 1, vocabulary]."""
    return torch.cat([base.model(input_ids=part).logits[:, :-1].float().log_softmax(-1) for part in windows.split(4)])


def bits_per_byte(base: Base, windows: torch.Tensor, log_probabilities: torch.Tensor) -> float:
    """As models.measure defines it."""
    nats = -log_probabilities.gather(-1, windows[:, 1:, None]).sum()
    return float(nats) / math.log(2) / int(token_bytes(base.tokenizer)[windows[:, 1:]].sum())


def federated(model: dict[str, Any], rounds: int) -> tuple[str, ...]:
    """Accuracy before and after, the loss of the last round, and the seconds of a run."""
    tree = {
        "model": {"name": "small", **model},
        "method": {"name": "fedit"},
        "training": {"train": "lora", "rank": 8, "batch_size": 8, "local_steps": 10, "lr": 2e-3},
        "federation": {"rounds": rounds},
        "evaluation": {"every": rounds, "generate_tokens": 6},
        "data": {
            "sources": [{"name": "ag_news", "limit": 800}],
            "clients": 4,
            "test_examples": 50,
            "max_tokens": 96,
        },
    }
    with TemporaryDirectory() as folder:
        started = perf_counter()
        runner.run(RunConfig.model_validate(tree), Path(folder) / "run")
        seconds = perf_counter() - started
        lines = [json.loads(line) for line in (Path(folder) / "run" / "evals.jsonl").read_text().splitlines()]
        losses = [json.loads(line)["loss"] for line in (Path(folder) / "run" / "rounds.jsonl").read_text().splitlines()]
    overall = {line["round"]: line["value"] for line in lines if line["metric"] == "overall"}
    return f"{overall[0]:.3f}", f"{overall[rounds]:.3f}", f"{losses[-1]:.3f}", f"{seconds:.0f}"


if __name__ == "__main__":
    main()
