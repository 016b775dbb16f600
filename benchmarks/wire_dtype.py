"""What weights in bfloat16 and int8 on their way cost and save: `federation.wire_dtype` of three methods on the shipped `small`.

    FEDEXPERTS_DATA=… python benchmarks/wire_dtype.py OUT.csv [--seeds 3] [method …]
    python benchmarks/wire_dtype.py --table OUT.csv
    python benchmarks/wire_dtype.py --blocks

Each line is a run; those that OUT.csv has already are not repeated. Four clients of AG News, a Dirichlet split, all of them in
each of six rounds of eight steps; one process, one thread. FedAvg and FedMoE train whole weights, FLEx adapters of attention.

bytes           down and up, of all tasks but evaluations, as the ledger counts them
seconds         of all rounds, evaluations left out
change_error    after round 1: norm of the difference to the merged weights in float32, over the norm of their change in it
weight_error    the same over the norm of the merged weights
quality         overall, of all clients' test examples after the last round (accuracy, and perplexity of the reference answers)

"int8, decoded" is what the server does not do: it adds a client's change to what the client decoded.
--table: means over the seeds that OUT.csv has, and differences to float32 of the same seed with their 95 % intervals (t).
--blocks: the error of int8 by its blocks and the dtype of their scales, on the weights of `small` and on random changes,
and the CPU seconds of the real ones.
"""

import argparse
import csv
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from time import process_time
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from fedexperts import federation
from fedexperts.config import RunConfig
from fedexperts.core.ledger import Ledger
from fedexperts.engines.base import Expectation, expectation
from fedexperts.engines.local import LocalEngine
from fedexperts.engines.wire import decode, encode
from fedexperts.experiment import runner
from fedexperts.experiment.runtime import runtime_for
from fedexperts.experiment.setup import Parts, prepare_run
from fedexperts.io.toml import checked
from fedexperts.models.load import load
from fedexperts.moe import rows
from fedexperts.types import BLOCK, Patch

ADAPTERS = {"train": "lora", "parts": ["attention"], "rank": 32, "alpha": 64, "lr": 3e-3}
METHODS: Mapping[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {  # method, training, devices
    "fedavg": ({"name": "fedavg"}, {"lr": 1e-3}, {}),
    "fedmoe": ({"name": "fedmoe"}, {"lr": 1e-3}, {"memory_share": 0.7, "out_of_memory": "train anyway"}),
    "flex": ({"name": "flex", "calibration_examples": 16}, ADAPTERS, {}),
}
DECODED = "int8, decoded"
WIRES = ("float32", "bfloat16", "int8", DECODED)
COLUMNS = (
    "method",
    "wire_dtype",
    "seed",
    "bytes_down",
    "bytes_up",
    "seconds",
    "change_error",
    "weight_error",
    "accuracy",
    "perplexity",
)


def config(method: str, wire: str, seed: int, rounds: int = 6) -> RunConfig:
    named, training, devices = METHODS[method]
    tree = {
        "seed": seed,
        "model": {"name": "small"},
        "method": named,
        "training": {"batch_size": 8, "local_steps": 8, "validation_examples": 16, **training},
        "federation": {"rounds": rounds, "wire_dtype": wire.split(",")[0]},
        "devices": devices,
        "evaluation": {"every": rounds, "generate_tokens": 6},
        "data": {
            "sources": ["ag_news"],
            "clients": 4,
            "limit": 600,
            "partition": {"by": "dirichlet", "alpha": 0.5},
            "test_examples": 40,
            "max_tokens": 64,
        },
    }
    return checked(RunConfig, tree)


@contextmanager
def adding_to(wire: str) -> Iterator[None]:
    """The boundary, which for DECODED adds changes to the weights as the clients decoded them."""

    def decoded(*given: Any) -> Expectation:
        expected = expectation(*given)
        start = expected.start and decode(encode(expected.start, "int8"), "int8")
        return replace(expected, start=start)

    with patch.object(federation, "expectation", decoded if wire == DECODED else expectation):
        yield


def after_first(method: str, wire: str, seed: int, parts: Parts) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights before round 1, and after it."""
    prepared = prepare_run(config(method, wire, seed), parts=parts)
    before = dict(prepared.server.weights)
    with tempfile.TemporaryDirectory() as folder, LocalEngine(runtime_for(prepared, Path(folder))) as engine:
        for server in federation.federate(prepared.server, prepared.method, engine, Ledger(), rounds=6, clients_per_round=4):
            if server.round == 1:
                return before, dict(server.weights)
    raise AssertionError("a run has a first round")


def norm(tensors: Mapping[str, Tensor], less: Mapping[str, Tensor] | None = None) -> float:
    """The 2-norm of all `tensors` together, or of their difference to `less`."""
    squares = (torch.linalg.vector_norm(t.double() - (less[name].double() if less else 0)) ** 2 for name, t in tensors.items())
    return float(sum(squares)) ** 0.5


def measured(method: str, wire: str, seed: int, parts: Parts, reference: dict[str, Tensor] | None) -> tuple[dict[str, Any], Any]:
    """A line of the table, and the weights after round 1."""
    with adding_to(wire):
        before, first = after_first(method, wire, seed, parts)
        exact = first if reference is None else reference
        with tempfile.TemporaryDirectory() as folder:
            out = runner.run(config(method, wire, seed), Path(folder) / "run", parts=parts)
            ledger, rounds, evals = (
                [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
                for name in ("ledger", "rounds", "evals")
            )
    work = [row for row in ledger if row["task"] != "evaluate"]
    assert not any(row["failed"] for row in ledger)
    last = [row for row in evals if row["round"] == rounds[-1]["round"] and row.get("client") is None]
    tasks = [row for row in last if row["task"] is not None]
    (overall,) = (row["value"] for row in last if row["metric"] == "overall")
    examples = sum(row["examples"] for row in tasks)
    line = {
        "method": method,
        "wire_dtype": wire,
        "seed": seed,
        "bytes_down": sum(row["bytes_down"] for row in work),
        "bytes_up": sum(row["bytes_up"] for row in work),
        "seconds": round(sum(row["seconds"] for row in rounds), 1),
        "change_error": f"{norm(first, exact) / norm(exact, before):.3e}",
        "weight_error": f"{norm(first, exact) / norm(exact):.3e}",
        "accuracy": round(overall, 4),
        "perplexity": round(sum(row["metrics"]["perplexity"] * row["examples"] for row in tasks) / examples, 4),
    }
    return line, first


T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}
"""Runs → the quantile of t for a 95 % interval of their mean."""


def difference(pairs: Sequence[tuple[float, float]]) -> str:
    """The mean of second less first, and half of its interval."""
    each = [second - first for first, second in pairs]
    half = T95[len(each)] * stdev(each) / len(each) ** 0.5 if len(each) in T95 else float("nan")
    return f"{fmean(each):+.3f} ± {half:.3f}"


def table(path: Path) -> None:
    """Prints a row for each method and dtype."""
    lines = [*csv.DictReader(path.open())]
    print("| method | dtype | runs | MB down | MB up | of float32 | s | error of change | of weights | perplexity | accuracy |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    exact = {(line["method"], line["seed"]): line for line in lines if line["wire_dtype"] == "float32"}
    for method, wire in dict.fromkeys((line["method"], line["wire_dtype"]) for line in lines):
        some = [line for line in lines if (line["method"], line["wire_dtype"]) == (method, wire)]
        pairs = [(exact[method, line["seed"]], line) for line in some]
        down, up, seconds, change, weight, perplexity, accuracy = (
            fmean(float(line[name]) for line in some)
            for name in ("bytes_down", "bytes_up", "seconds", "change_error", "weight_error", "perplexity", "accuracy")
        )
        share = fmean(
            (int(line["bytes_down"]) + int(line["bytes_up"])) / (int(whole["bytes_down"]) + int(whole["bytes_up"]))
            for whole, line in pairs
        )
        quality = [f"{perplexity:.3f}", f"{accuracy:.3f}"]
        if wire != "float32":
            quality = [difference([(float(a[name]), float(b[name])) for a, b in pairs]) for name in ("perplexity", "accuracy")]
        errors = [f"{100 * change:.2g} %", f"{100 * weight:.2g} %"] if wire != "float32" else ["-", "-"]
        sizes = [f"{down / 1e6:.1f}", f"{up / 1e6:.1f}", f"{100 * share:.1f} %", f"{seconds:.0f}"]
        print("|", " | ".join([method, wire, str(len(some)), *sizes, *errors, *quality]), "|")


def blocks() -> None:
    """Prints the error of int8 by its blocks and scales."""
    weights = {name: t for name, t in rows.take(load("small").model).items() if t.numel() > len(t) * BLOCK}
    chance, number = torch.Generator().manual_seed(0), sum(t.numel() for t in weights.values())
    changes = {
        size: {name: size * torch.randn(t.shape, generator=chance) for name, t in weights.items()} for size in (1e-4, 1e-6)
    }
    for label, some in (("weights", weights), *((f"N(0, {size:g})", drawn) for size, drawn in changes.items())):
        for block, dtype in (
            (32, "float32"),
            (64, "float32"),
            (64, "float16"),
            (64, "bfloat16"),
            (128, "float32"),
            (None, "float32"),
        ):
            off, sent = 0.0, 0
            for t in some.values():
                size = block or t[0].numel()
                filled = torch.nn.functional.pad(t.reshape(len(t), -1), (0, -t[0].numel() % size)).view(len(t), -1, size)
                scales = (filled.abs().amax(-1, keepdim=True) / 127).to(getattr(torch, dtype))
                codes = (filled / scales.float()).nan_to_num(0.0).clamp(-127, 127).round()
                off += float((codes * scales.float() - filled).square().sum())
                sent += t.numel() + scales.nbytes
            error = (off / sum(float(t.square().sum()) for t in some.values())) ** 0.5
            share = sent / (4 * number)
            print(
                f"{label:12} block {block or 'row':>3} scale {dtype:8} error {100 * error:.2f} %, {100 * share:.2f} % of float32"
            )
    for wire in ("bfloat16", "int8"):
        times = []
        for _ in range(5):
            started = process_time()
            coded = encode(Patch(weights), wire)
            between = process_time()
            decode(coded, wire)
            times.append((between - started, process_time() - between))
        print(f"{wire}: {number:,} numbers encoded in {min(times)[0]:.3f} s, decoded in {min(t for _, t in times):.3f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("wire_dtype.csv"))
    parser.add_argument("methods", nargs="*", default=[*METHODS])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--blocks", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.table or options.blocks:  # of what there is
        table(options.out) if options.table else blocks()
        return
    parts = Parts()
    lines = [*csv.DictReader(options.out.open())] if options.out.exists() else []
    done = {(line["method"], line["wire_dtype"], int(line["seed"])) for line in lines}
    for seed in range(options.seeds):
        for method in options.methods:
            reference: dict[str, Tensor] | None = None
            for wire in WIRES if method == "fedavg" else WIRES[:3]:
                if (method, wire, seed) in done:
                    continue
                if reference is None and wire != "float32":
                    _, reference = after_first(method, "float32", seed, parts)
                line, first = measured(method, wire, seed, parts, reference)
                reference = reference or first
                lines.append(line)
                print(line, flush=True)
                with options.out.open("w", newline="") as file:
                    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                    writer.writeheader()
                    writer.writerows(lines)


if __name__ == "__main__":
    main()
