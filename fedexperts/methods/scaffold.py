"""SCAFFOLD: federated averaging with control variates that correct client drift.

Karimireddy, Kale, Mohri, Reddi, Stich, Suresh, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020,
https://arxiv.org/abs/1910.06378, Algorithm 1. Line numbers are the paper's; what it leaves open is marked (ours).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedexperts.core.training import fit
from fedexperts.methods.base import Count, add_gradient, answer, by_examples, entries, mean_rows
from fedexperts.methods.contract import Declaration, ExtraTensors, Method
from fedexperts.methods.submodel import same_for_all
from fedexperts.moe import rows
from fedexperts.moe.device import device_of, to_device
from fedexperts.types import Assignment, Client, ClientContext, Job, Server, Tensors, Update


@dataclass(frozen=True)
class Scaffold(Method):
    """Local steps use g + c − c_k: c_k is the client's mean gradient in its last round, c the mean of all clients' c_k.

    c is in `method_state` and c_k in the client state, as `control/<name of a weight>`; missing entries are zero.

    experts_per_layer: number of random experts, the same on every client; None: all experts, regardless of the client's memory.
    """

    experts_per_layer: Count | None = None

    def declare(self) -> Declaration:
        controls = ExtraTensors(lambda server, job: job.patch.tensors, low=-1e3, high=1e3)
        return Declaration(extra={"control/": controls}, job_extra=("control/",), client_state=("control/",))

    def assign(self, server: Server, client: Client) -> Assignment:
        """The experts, and their rows of c (line 5)."""
        experts = same_for_all(server, client, self.experts_per_layer)
        control, _ = rows.cut(entries("control", server.method_state), server.layout, experts)
        return Assignment(experts, extra=controls(control))

    def train(self, job: Job, context: ClientContext) -> Update:
        """The local steps (lines 7 to 11), then c_k⁺ (line 12), which is kept (line 14), and Δc_k, which is sent (line 13).

        c_k⁺ is the mean over the steps of g before the correction. For plain SGD this is the paper's option II,
        (x − y_k) / (K·η) − c + c_k; unlike that formula it is valid for any optimizer (ours). Clipping follows the correction.
        """
        model = self.build_model(job, context)
        zeros = {name: torch.zeros_like(tensor) for name, tensor in job.patch.tensors.items()}
        shared, own = zeros | entries("control", job.extra), zeros | entries("control", context.client_state)  # c, c_k
        there = device_of(model)
        correction = to_device({name: shared[name] - own[name] for name in zeros}, there)
        total = {name: torch.zeros_like(tensor, device=there) for name, tensor in zeros.items()}
        summing, correcting = rows.paired(model, total), rows.paired(model, correction)

        def correct(model: nn.Module) -> None:
            for (parameter, summed), (_, added) in zip(summing, correcting, strict=True):
                if parameter.grad is not None:
                    summed += parameter.grad
                add_gradient(parameter, added)

        fitted = fit(model, context, seed=job.seed, after_backward=correct, beside=[*total.values(), *correction.values()])

        moved = {name: total[name].cpu() / context.training.local_steps - own[name] for name in zeros}  # Δc_k
        context.client_state.update(controls({name: own[name] + moved[name] for name in zeros}))  # bitwise as the server adds it
        return answer(job, context, model, fitted, extra=controls(moved))

    def merge(self, server: Server, updates: Iterable[Update]) -> Server:
        """x: the mean by examples, as in FedAvg (ours; line 16 is unweighted). c += (1/N) Σ Δc_k (line 17)."""
        sums: dict[str, Tensor] = {}
        merged = mean_rows(server, adding_up(updates, server.weights, sums), by_examples)
        before = {name: torch.zeros_like(server.weights[name]) for name in sums} | entries("control", server.method_state)
        control = {name: (before[name] + sums[name] / len(server.clients)).to(before[name].dtype) for name in sums}
        return replace(merged, method_state={**server.method_state, **controls(control)})


def controls(tensors: Tensors) -> dict[str, Tensor]:
    """`tensors` as control variates, named `control/<name of a weight>`."""
    return {f"control/{name}": tensor for name, tensor in tensors.items()}


def adding_up(updates: Iterable[Update], weights: Tensors, sums: dict[str, Tensor]) -> Iterator[Update]:
    """Yields `updates` and adds the Δc_k of each to `sums`, in float64."""

    def add(update: Update) -> Update:
        for name, moved in entries("control", update.extra).items():
            total = sums.setdefault(name, torch.zeros(weights[name].shape, dtype=torch.float64))
            ids = update.patch.rows.get(name, torch.arange(len(total)))
            total.index_add_(0, ids, moved.double())
        return update

    return map(add, updates)
