"""Your own method in one file, compared with FedMoE and FedAvg over the same clients and data.

    python examples/own_method.py

The method, `rotating`: in each round a client gets a new random subset of every layer's experts. It downloads, trains and sends
only that subset, and trains every expert over time. It takes half a minute; the report is results/own-method/report.html.
"""

from dataclasses import dataclass
from pathlib import Path
from random import Random

from rich import print

import fedexperts
from fedexperts import report
from fedexperts.methods.base import all_experts
from fedexperts.types import Assignment, Client, Server


@dataclass(frozen=True)
class Rotating(fedexperts.Method):
    """The fields are settings: method.share = 0.5 in a run file, rotating:share=0.5 in a comparison.

    It declares nothing, and trains and merges as federated averaging does: each expert becomes the mean over the clients that
    trained it, weighted by their examples.
    """

    share: float = 0.5  # of the experts of each layer

    def assign(self, server: Server, client: Client) -> Assignment:
        """Some experts of each layer to train with, all of them for evaluation."""
        if server.task == "evaluate":
            return all_experts(server)
        rng = Random(f"{server.seed}/{server.round}/{client.name}")  # every draw has its own seed: reproducible
        chosen = {}
        for name, layer in server.anatomy.blocks.items():
            number = max(layer.fewest, round(self.share * layer.num_experts))  # at least the router's top-k
            chosen[name] = tuple(sorted(rng.sample(range(layer.num_experts), number)))
        return Assignment(chosen)


RUN = {
    "model": {"name": "tiny"},
    "training": {"lr": 3e-3, "batch_size": 8, "local_steps": 4},
    "federation": {"rounds": 4},
    "devices": {"memory_share": {"uniform": [0.7, 1.3]}, "out_of_memory": "train anyway"},
    "evaluation": {"every": 2, "generate_tokens": 8},
    "data": {
        "sources": ["synthetic/room", "synthetic/feeling"],
        "clients": 4,
        "limit": 60,
        "test_examples": 20,
        "max_tokens": 32,
    },
}

METHODS = ["rotating", "rotating:share=0.25", "fedmoe:profile_rounds=1", "fedavg"]

if __name__ == "__main__":
    fedexperts.METHODS["rotating"] = Rotating  # now `rotating` works like any other method name
    out = Path("results/own-method")
    compared = fedexperts.compare(RUN, METHODS, out=out)
    report.write([out], html=out / "report.html")
    print(report.table(compared.folders))
