"""Evaluations of many clients with one test example each, over one pass over the examples of all of them.

    python benchmarks/many_clients.py [--clients 1000] [--repeats 3]

The base `tiny`, FedAvg, one thread. A repeat evaluates in turn: all examples as those of one client (the pass), the clients of a
run pooled, and one by one (only every tenth client, times ten: it takes minutes). Lines have CPU seconds and the ratio to the
pass, the largest difference of a client's loss and the number of answers that are scored differently between pooled and one by
one, the seconds that a run with so many clients takes before its first evaluation, and the memory of the process (VmHWM).
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from fedexperts.config import RunConfig
from fedexperts.core import evaluation
from fedexperts.core.ledger import Ledger
from fedexperts.engines.local import LocalEngine
from fedexperts.experiment.pooled import evaluate_clients
from fedexperts.experiment.progress import Quiet
from fedexperts.experiment.runtime import encoder_for, runtime_for
from fedexperts.experiment.setup import prepare_run
from fedexperts.io.toml import checked


def config(clients: int, pooled: bool, sample: int) -> RunConfig:
    data = {
        "sources": ["synthetic/double", "synthetic/first"],
        "partition": {"by": "dirichlet", "alpha": 100.0},
        "clients": clients,
        "limit": 3 * clients,
        "test_examples": 1,
        "minimum": 2,
    }
    evaluated = {"generate_tokens": 16, "pooled": pooled, "clients": sample}
    return checked(RunConfig, {"method": {"name": "fedavg"}, "data": data, "evaluation": evaluated})


def evaluated(settings: RunConfig, folder: Path) -> tuple[float, dict[str, evaluation.Scores]]:
    """CPU seconds of an evaluation as in a run, and its scores by client."""
    prepared = prepare_run(settings)
    server = replace(prepared.server, round=1, task="evaluate")
    with LocalEngine(runtime_for(prepared, folder)) as engine:
        started = time.process_time()
        metrics = evaluate_clients(prepared, server, engine, Ledger(), Quiet())
        seconds = time.process_time() - started
    return seconds, {client: evaluation.Scores.from_json(each["scores"]) for client, each in metrics.items()}


def one_pass(settings: RunConfig) -> float:
    """CPU seconds of scoring the base model on the examples of all clients."""
    prepared = prepare_run(settings)
    examples = [example for split in prepared.data.values() for example in split.test]
    started = time.process_time()
    evaluation.score(prepared.base.model, examples, encoder_for(prepared), 16, 32)
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    number, tenth = options.clients, max(options.clients // 10, 1)
    started = time.process_time()
    prepare_run(config(number, True, number))
    print(f"{number} clients: {time.process_time() - started:.1f} CPU s before the first evaluation")
    passes, pooled, alone = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.repeats):
            passes.append(one_pass(config(number, True, number)))
            seconds, together = evaluated(config(number, True, number), Path(folder))
            pooled.append(seconds)
            seconds, singly = evaluated(config(number, False, tenth), Path(folder))
            alone.append(seconds * number / tenth)
    middle = statistics.median(passes)
    for name, seconds in (("one pass", passes), ("pooled", pooled), ("one by one (every tenth, times 10)", alone)):
        print(f"{name:36} {statistics.median(seconds):7.2f} CPU s  {statistics.median(seconds) / middle:6.2f} of the pass")
    losses = {
        client: (sum(t.nll for t in together[client].tasks.values()), sum(t.nll for t in singly[client].tasks.values()))
        for client in singly
    }
    differ = sum(
        {task: each.sums for task, each in singly[client].tasks.items()}
        != {task: each.sums for task, each in together[client].tasks.items()}
        for client in singly
    )
    largest = max(abs(a - b) for a, b in losses.values())
    print(
        f"of {len(singly)} clients: largest difference of a loss {largest:.1e} nats, answers that are scored differently {differ}"
    )
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    print(f"peak of the process {peak:,.0f} MiB")


if __name__ == "__main__":
    main()
