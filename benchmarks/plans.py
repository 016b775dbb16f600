"""What it takes to know the cost of a published model before it is there: seconds and memory of `plan` and `inspect --memory`.

    python benchmarks/plans.py [--models olmoe-1b-7b,granite-3.0-1b-a400m] [--csv FILE]

Each line is one command in a process of its own: of `plan` for a run of FedIT (LoRA on attention, batches of 1 x 512 tokens, two
clients) in the dtype of the configuration and in 4 bits, with and without checkpointing; of `inspect --memory`, which shows these
four ways in one table. memory: the peak of the process. planned: to train the whole model.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

from fedexperts.models.files import config_names

RUN = """
training = { train = "lora", parts = ["attention"], batch_size = 1, local_steps = 2, validation_examples = 2 }
method = { name = "fedit" }
[data]
sources = ["synthetic/double", "synthetic/first"]
clients = 2
limit = 60
test_examples = 1
max_tokens = 512
"""
COLUMNS = ("model", "command", "quantize", "checkpointing", "seconds", "memory_mb", "planned_gb", "held_by")


def measured(command: Sequence[str]) -> tuple[str, float, float]:
    """What a command printed, its seconds, and the peak of its memory in bytes."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "fedexperts", *command], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} failed")
    return printed, time.perf_counter() - started, usage.ru_maxrss * 1024


def lines(model: str, run_file: Path) -> Iterator[dict[str, object]]:
    """The lines of one model."""
    for quantize, checkpointing in product(("", "nf4"), ("false", "true")):
        settings = [f"model.name={model}", f"training.gradient_checkpointing={checkpointing}"]
        settings += [f"model.quantize={quantize}"] if quantize else []
        given = [part for setting in settings for part in ("--set", setting)]
        printed, seconds, memory = measured(["plan", str(run_file), "--json", *given])
        planned = json.loads(printed)
        yield {
            "model": model,
            "command": "plan",
            "quantize": quantize,
            "checkpointing": checkpointing,
            "seconds": round(seconds, 1),
            "memory_mb": round(memory / 1e6),
            "planned_gb": round(sum(planned["memory"]["parts"].values()) / 1e9, 2),
            "held_by": (planned["held_by"] or ["none"])[0],
        }
    _, seconds, memory = measured(["inspect", model, "--memory", "--lora", "attention", "--json"])
    yield {"model": model, "command": "inspect --memory", "seconds": round(seconds, 1), "memory_mb": round(memory / 1e6)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(config_names()))
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        run_file = Path(temporary) / "run.toml"
        run_file.write_text(RUN)
        for model in options.models.split(","):
            for row in lines(model, run_file):
                print("| " + " | ".join(str(row.get(column, "")) for column in COLUMNS) + " |", flush=True)
                rows.append(row)
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
