"""What the rounds of a run weigh on the wire, against what the ledger counts.

    python benchmarks/wire.py [--rounds 2]

Every job and every answer of a run of the shipped `small` is packed and unpacked as for a worker process.
tensors     bytes of tensors in the messages, both ways; the ledger's are to be the same
messages    all bytes of the messages, manifests and tensors' names included, over the ledger's
"""

import argparse
import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fedexperts.config import RunConfig
from fedexperts.core.ledger import Ledger
from fedexperts.engines.local import ClientRuntime
from fedexperts.engines.message import from_bytes
from fedexperts.engines.serialization import pack_answer, pack_job, unpack_answer, unpack_job
from fedexperts.experiment.runtime import clock_for, runtime_for
from fedexperts.experiment.setup import Parts, prepare_run
from fedexperts.federation import federate
from fedexperts.io.toml import checked
from fedexperts.types import Failure, Job, Update

ATTENTION = {
    "train": "lora",
    "parts": ["attention"],
    "attention_modules": ["q_proj", "k_proj", "v_proj"],
    "rank": 32,
    "alpha": 64,
}
RUNS = {
    "FLEx": ({"name": "flex", "calibration_examples": 16}, ATTENTION),
    "FedIT, attention": ({"name": "fedit"}, ATTENTION),
    "FFA-LoRA, attention": ({"name": "ffa_lora"}, ATTENTION),
    "FedIT, attention and experts": ({"name": "fedit"}, {**ATTENTION, "parts": ["attention", "experts"]}),
    "FedAvg, all weights": ({"name": "fedavg"}, {"train": "full"}),
    "FedMoE, all weights": ({"name": "fedmoe"}, {"train": "full"}),
    "HFedMoE, all weights": ({"name": "hfedmoe"}, {"train": "full"}),
}


@dataclass
class Weighed:
    """Packs whatever goes either way, and keeps count."""

    runtime: ClientRuntime
    messages: int = 0
    tensors: int = 0
    metrics: int = 0  # of an answer: the ledger counts their JSON, which stands in the manifest

    def run(self, jobs: Iterable[Job]) -> Iterator[Update | Failure]:
        for job in jobs:
            answer = self.runtime.answer(unpack_job(self.weigh(pack_job(job))))
            if isinstance(answer, Failure):
                raise RuntimeError(f"{answer.client} failed: {answer.reason}")
            self.metrics += len(json.dumps(dict(answer.metrics)))
            yield unpack_answer(self.weigh(pack_answer(answer)))

    def weigh(self, message: bytes) -> bytes:
        parts = from_bytes(message).parts.values()  # of safetensors each: its header's length, its header, a tensor
        self.messages += len(message)
        self.tensors += sum(len(part) - 8 - int.from_bytes(part[:8], "little") for part in parts)
        return message


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    table = Table("method", "ledger MB", "tensors MB", "tensors / ledger", "messages / ledger")
    parts = Parts()
    for label, (method, training) in RUNS.items():
        config = settings(method, training, rounds)
        prepared = prepare_run(config, label, parts=parts)
        with tempfile.TemporaryDirectory() as folder:
            weighed = Weighed(runtime_for(prepared, Path(folder)))
            ledger = Ledger(clock_for(prepared))
            counted = 0
            for _ in federate(prepared.server, prepared.method, weighed, ledger, rounds=rounds, clients_per_round=2):
                counted += sum(entry.bytes_down + entry.bytes_up for entry in ledger.entries)
                ledger.clear()
        sent = counted - weighed.metrics
        table.add_row(
            label,
            f"{sent / 1e6:.6f}",
            f"{weighed.tensors / 1e6:.6f}",
            f"{weighed.tensors / sent:.4f}",
            f"{weighed.messages / counted:.4f}",
        )
    Console(width=120).print(table)


def settings(method: dict, training: dict, rounds: int) -> RunConfig:
    return checked(
        RunConfig,
        {
            "model": {"name": "small"},
            "method": method,
            "training": {"batch_size": 2, "local_steps": 1, **training},
            "federation": {"rounds": rounds},
            "data": {
                "sources": ["synthetic/double", "synthetic/first"],
                "clients": 2,
                "limit": 60,
                "test_examples": 4,
                "max_tokens": 64,
            },
        },
    )


if __name__ == "__main__":
    main()
