"""SCAFFOLD: federated averaging whose clients correct their gradients by how theirs differ from everybody's.

Karimireddy, Kale, Mohri, Reddi, Stich, Suresh, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020,
https://arxiv.org/abs/1910.06378, Algorithm 1. Line numbers are the paper's; what it leaves open is marked (ours).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedexperts.core.training import fit
from fedexperts.methods.base import Count, add_gradient, answer, by_examples, mean_rows, of
from fedexperts.methods.contract import Declaration, ExtraTensors, Method
from fedexperts.methods.submodel import same_for_all
from fedexperts.moe import rows
from fedexperts.types import Assignment, Client, ClientContext, Job, Server, Tensors, Update


@dataclass(frozen=True)
class Scaffold(Method):
    """A step goes along g + c − c_k: c_k is the client's own mean gradient of the last time, c the mean of all clients' c_k.

    The server remembers c and a client keeps c_k, each as `control/<name of a weight>`; what is not there yet is zero.

    experts_per_layer: of random experts, the same in every client; None: all experts, whatever the client's memory.
    """

    experts_per_layer: Count | None = None

    def declare(self) -> Declaration:
        controls = ExtraTensors(lambda server, job: job.patch.tensors, low=-1e3, high=1e3)
        return Declaration(extra={"control/": controls}, job_extra=("control/",), client_state=("control/",))

    def assign(self, server: Server, client: Client) -> Assignment:
        """The experts, and the rows of c that go with them (line 5)."""
        experts = same_for_all(server, client, self.experts_per_layer)
        control, _ = rows.cut(of("control", server.method_state), server.layout, experts)
        return Assignment(experts, extra=controls(control))

    def train(self, job: Job, context: ClientContext) -> Update:
        """The local steps (lines 7 to 11), then c_k⁺ (line 12), which it keeps (line 14), and Δc_k, which it sends (line 13).

        c_k⁺ is the mean over the steps of g as it was before the correction. For plain SGD this is the paper's option II,
        (x − y_k) / (K·η) − c + c_k; unlike that formula it holds for any optimiser (ours). Clipping comes after the correction.
        """
        model = self.build_model(job, context)
        zeros = {name: torch.zeros_like(tensor) for name, tensor in job.patch.tensors.items()}
        shared, own = zeros | of("control", job.extra), zeros | of("control", context.client_state)  # c, c_k
        correction = {name: shared[name] - own[name] for name in zeros}
        total = {name: tensor.clone() for name, tensor in zeros.items()}
        summing, correcting = rows.paired(model, total), rows.paired(model, correction)

        def correct(model: nn.Module) -> None:
            for (parameter, summed), (_, added) in zip(summing, correcting, strict=True):
                if parameter.grad is not None:
                    summed += parameter.grad
                add_gradient(parameter, added)

        fitted = fit(model, context, seed=job.seed, after_backward=correct, beside=[*total.values(), *correction.values()])

        moved = {name: total[name] / context.training.local_steps - own[name] for name in zeros}  # Δc_k
        context.client_state.update(
            controls({name: own[name] + moved[name] for name in zeros})
        )  # as the server will add it, to the bit
        return answer(job, context, model, fitted, extra=controls(moved))

    def merge(self, server: Server, updates: Iterable[Update]) -> Server:
        """x: the mean by examples, as in FedAvg (ours; line 16 weighs clients alike). c moves by (1/N) Σ Δc_k (line 17)."""
        sums: dict[str, Tensor] = {}
        merged = mean_rows(server, adding_up(updates, server.weights, sums), by_examples)
        before = {name: torch.zeros_like(server.weights[name]) for name in sums} | of("control", server.method_state)
        control = {name: (before[name] + sums[name] / len(server.clients)).to(before[name].dtype) for name in sums}
        return replace(merged, method_state={**server.method_state, **controls(control)})


def controls(tensors: Tensors) -> dict[str, Tensor]:
    """`tensors` as the control variates of the weights so called."""
    return {f"control/{name}": tensor for name, tensor in tensors.items()}


def adding_up(updates: Iterable[Update], weights: Tensors, sums: dict[str, Tensor]) -> Iterator[Update]:
    """`updates`, adding the Δc_k of each to `sums`, in float64, as it passes."""

    def add(update: Update) -> Update:
        for name, moved in of("control", update.extra).items():
            total = sums.setdefault(name, torch.zeros(weights[name].shape, dtype=torch.float64))
            ids = update.patch.rows.get(name, torch.arange(len(total)))
            total.index_add_(0, ids, moved.double())
        return update

    return map(add, updates)
