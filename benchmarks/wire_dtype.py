"""What weights in bfloat16 and int8 on their way cost and save: `federation.wire_dtype` of three methods on the shipped `small`.

    FEDEXPERTS_DATA=… python benchmarks/wire_dtype.py OUT.csv [--seeds 3] [method …]

Each line is a run; those that OUT.csv has already are not repeated. Four clients of AG News, a Dirichlet split, all of them in
each of six rounds of eight steps; one process, one thread. FedAvg and FedMoE train whole weights, FLEx adapters of attention.

bytes           down and up, of all tasks but evaluations, as the ledger counts them
seconds         of all rounds, evaluations left out
change_error    after round 1: norm of the difference to the merged weights in float32, over the norm of their change in it
weight_error    the same over the norm of the merged weights
quality         overall, of all clients' test examples after the last round (accuracy, and perplexity of the reference answers)

"int8, decoded" is what the server does not do: it adds a client's change to what the client decoded.
"""

import argparse
import csv
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("methods", nargs="*", default=[*METHODS])
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
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
