"""What robust merging costs a server: one merge of ten updates of `small` with every rule, each in a process of its own.

python benchmarks/robust_cost.py
"""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import process_time

import torch

from fedexperts.config import RunConfig
from fedexperts.experiment.setup import prepare_run
from fedexperts.io.toml import checked
from fedexperts.methods.robust import RULES
from fedexperts.types import Patch, Server, Update

CLIENTS = 10


def memory(what: str) -> float:
    """MiB of this process: now (VmRSS), or at its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(what))


def updates(server: Server) -> Iterator[Update]:
    for number in range(CLIENTS):
        generator = torch.Generator().manual_seed(number)
        weights = {name: each + 1e-3 * torch.randn(each.shape, generator=generator) for name, each in server.weights.items()}
        yield Update(f"c{number}", 1, "train", Patch(weights), 10)


def one(rule: str) -> None:
    torch.set_num_threads(1)
    data = {"sources": ["synthetic/room"], "clients": CLIENTS, "limit": 40}
    federation = {} if rule == "none" else {"robust": rule}
    tree = {"model": {"name": "small"}, "method": {"name": "fedavg"}, "data": data, "federation": federation}
    prepared = prepare_run(checked(RunConfig, tree))
    server = replace(prepared.server, task="train", round=1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, started = memory("VmRSS"), process_time()
    prepared.method.merge(server, updates(server))
    print(
        f"{rule:16} {memory('VmHWM') - before:5.0f} MiB at the peak, {process_time() - started:5.1f} CPU s, updates made as well"
    )


def main() -> None:
    if sys.argv[1:]:
        one(sys.argv[1])
        return
    for rule in ("none", "clip", *RULES):
        subprocess.run([sys.executable, __file__, rule], check=True)


if __name__ == "__main__":
    main()
