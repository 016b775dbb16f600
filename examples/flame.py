"""A method with a model of its own: each client computes with a top-k of its own and learns a scale for each MoE block.

    python examples/flame.py

After FLAME (Le et al., "FLAME: Towards Federated Fine-Tuning Large Language Models Through Adaptive SMoE", 2025,
https://arxiv.org/abs/2506.16600): clients with few resources route each token to fewer experts, and a learnable scalar on the
output of each MoE block makes up for it. Adapters are averaged; the scales stay with their clients. What is trained is what is
scored, exported and asked, bit for bit. It takes half a minute; the models are results/flame/models/.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from rich import print

import fedexperts
from fedexperts import export, report
from fedexperts.export.generate import generate
from fedexperts.methods.contract import Declaration, Extension
from fedexperts.methods.personal import train_and_keep
from fedexperts.moe.anatomy import anatomy
from fedexperts.types import Assignment, Client, ClientContext, Job, Server, Update


def rescale(model, blocks: list[str], top_k: int) -> None:
    """Routes each token to `top_k` experts of each of `blocks`, and multiplies what the block gives by a learnable scale."""
    import torch

    def multiply(block, args, output):
        scaled = [output * block.scale] if isinstance(output, torch.Tensor) else [output[0] * block.scale, *output[1:]]
        return scaled[0] if isinstance(output, torch.Tensor) else tuple(scaled)

    for name in blocks:
        block = model.get_submodule(name)
        for router in (block, *block.children()):
            if "top_k" in vars(router):
                router.top_k = top_k
        block.scale = torch.nn.Parameter(torch.ones(1))
        block.register_forward_hook(multiply)


@dataclass(frozen=True)
class Flame(fedexperts.Method):
    """Clients take top-1 and the model's own top-k in turn, by name."""

    def declare(self) -> Declaration:
        return Declaration(job_extra=("top_k",), keeps_weights=True)

    def assign(self, server: Server, client: Client) -> Assignment:
        """The whole model, and the client's top-k."""
        most = min(block.top_k for block in server.anatomy.blocks.values())
        top_k = 1 if sorted(server.clients).index(client.name) % 2 else most
        return Assignment(server.anatomy.all_experts, extra={"top_k": torch.tensor(top_k)})

    def extension(self, job: Job) -> Extension:
        """The structure of the client's model: `build_model` makes it, and an export carries it along."""
        return Extension(rescale, {"blocks": list(job.experts), "top_k": int(job.extra["top_k"])})

    def train(self, job: Job, context: ClientContext) -> Update:
        """Adapters and scales are trained together; the scales did not come with the job, so they stay."""
        return train_and_keep(self, job, context)


RUN = {
    "model": {"name": "tiny"},
    "training": {"train": "lora", "rank": 8, "lr": 3e-3, "batch_size": 8, "local_steps": 4},
    "federation": {"rounds": 3},
    "evaluation": {"every": 3, "generate_tokens": 8},
    "data": {"sources": ["synthetic/room"], "clients": 4, "limit": 60, "test_examples": 10, "max_tokens": 32},
}

if __name__ == "__main__":
    fedexperts.METHODS["flame"] = Flame
    out = Path("results/flame")
    compared = fedexperts.compare(RUN, ["flame", "fedit"], out=out)
    report.write([out], html=out / "report.html")
    print(report.table(compared.folders))
    for client in ("c01", "c02"):
        folder = out / "models" / client
        export.export(compared.folders[0], folder, client=client)
        model = fedexperts.load(folder, trust_remote_code=True)
        scales = [round(model.get_submodule(name).scale.item(), 3) for name in anatomy(model).blocks]
        print(client, "scales", scales, "answers", generate(folder, "room: red", trust_remote_code=True))
