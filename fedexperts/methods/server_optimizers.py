"""Server optimizers: treat the change of a merge as a pseudo-gradient and apply an optimizer step on the server.

FedAvgM: Hsu, Qi, Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification", 2019,
https://arxiv.org/abs/1909.06335. FedAdagrad, FedYogi, FedAdam: Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan,
"Adaptive Federated Optimization", ICLR 2021, https://arxiv.org/abs/2003.00295, Algorithm 2. Deviations are marked (ours).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Protocol

import torch
from pydantic import Field
from torch import Tensor

from fedexperts.methods.base import Positive, entries
from fedexperts.methods.contract import Wrapper
from fedexperts.types import Assignment, Client, Server, Tensors, Update

Decay = Annotated[float, Field(ge=0, lt=1)]
"""A decay rate of a moment, from 0 and below 1."""

PREFIX = "server_optimizer"
"""Prefix in `method_state`: m and v of a weight are `server_optimizer/m/<name>` and `server_optimizer/v/<name>`."""


class ServerOptimizer(Protocol):
    """The interface of a server optimizer: hyperparameters, without state."""

    @property
    def start(self) -> Mapping[str, float]:
        """Name of each state tensor → its initial value."""
        ...

    def step(self, delta: Tensor, state: Tensors) -> tuple[Tensor, Tensors]:
        """The step of the weights and the new state; `delta` is Δ, the change of the weights in the merge."""
        ...


@dataclass(frozen=True)
class FedAvgM:
    """m ← β m + Δ; x ← x + η m (Hsu et al., section 4.3). With β = 0 and η = 1 it equals the merge."""

    lr: Positive = 1.0  # η
    beta1: Decay = 0.9  # β

    @property
    def start(self) -> Mapping[str, float]:
        return {"m": 0.0}

    def step(self, delta: Tensor, state: Tensors) -> tuple[Tensor, Tensors]:
        m = self.beta1 * state["m"] + delta
        return self.lr * m, {"m": m}


@dataclass(frozen=True)
class FedAdagrad:
    """v ← v + Δ². No momentum by default, as in the paper's experiments."""

    lr: Positive = 1e-3  # η
    beta1: Decay = 0.0
    tau: Positive = 1e-3

    @property
    def start(self) -> Mapping[str, float]:
        return {"m": 0.0, "v": self.tau**2}

    def step(self, delta: Tensor, state: Tensors) -> tuple[Tensor, Tensors]:
        v = state["v"] + delta.square()
        return adapted(self, delta, state["m"], v)


@dataclass(frozen=True)
class FedYogi:
    """v ← v − (1 − β₂) Δ² sign(v − Δ²)."""

    lr: Positive = 1e-3  # η
    beta1: Decay = 0.9
    beta2: Decay = 0.99
    tau: Positive = 1e-3

    @property
    def start(self) -> Mapping[str, float]:
        return {"m": 0.0, "v": self.tau**2}

    def step(self, delta: Tensor, state: Tensors) -> tuple[Tensor, Tensors]:
        squared = delta.square()
        v = state["v"] - (1 - self.beta2) * squared * (state["v"] - squared).sign()
        return adapted(self, delta, state["m"], v)


@dataclass(frozen=True)
class FedAdam:
    """v ← β₂ v + (1 − β₂) Δ²."""

    lr: Positive = 1e-3  # η
    beta1: Decay = 0.9
    beta2: Decay = 0.99
    tau: Positive = 1e-3

    @property
    def start(self) -> Mapping[str, float]:
        return {"m": 0.0, "v": self.tau**2}

    def step(self, delta: Tensor, state: Tensors) -> tuple[Tensor, Tensors]:
        v = self.beta2 * state["v"] + (1 - self.beta2) * delta.square()
        return adapted(self, delta, state["m"], v)


def adapted(optimizer: FedAdagrad | FedYogi | FedAdam, delta: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensors]:
    """m ← β₁ m + (1 − β₁) Δ; x ← x + η m / (√v + τ): for all three. v starts at τ², the lowest value that the paper allows."""
    m = optimizer.beta1 * m + (1 - optimizer.beta1) * delta
    return optimizer.lr * m / (v.sqrt() + optimizer.tau), {"m": m, "v": v}


SERVER_OPTIMIZERS: dict[str, type[ServerOptimizer]] = {
    "fedavgm": FedAvgM,
    "fedadagrad": FedAdagrad,
    "fedyogi": FedYogi,
    "fedadam": FedAdam,
}


@dataclass(frozen=True)
class WithServerOptimizer(Wrapper):
    """`method` with a step of `optimizer` in place of the merge of each round; setup tasks are unchanged.

    Δ is the difference between the merged weights and those before, for any weighting of the method. A row that the merge left
    unchanged, because no client sent it, keeps its value, and so do its m and v (ours).
    """

    optimizer: ServerOptimizer

    def assign(self, server: Server, client: Client) -> Assignment | None:
        return self.method.assign(without_optimizer_state(server), client)

    def merge(self, server: Server, updates: Iterable[Update]) -> Server:
        merged = self.method.merge(without_optimizer_state(server), updates)
        if server.task != "train":
            return merged
        weights, method_state = (
            dict(merged.weights),
            {key: t for key, t in server.method_state.items() if is_optimizer_state(key)},
        )
        for name, after in merged.weights.items():
            moved = rows_that_differ(server.weights[name], after)
            if moved.any():
                state = self.state_of(server, name)
                weights[name], state = self.stepped(server.weights[name], after, moved, state)
                method_state |= {f"{PREFIX}/{kind}/{name}": tensor for kind, tensor in state.items()}
        return replace(merged, weights=weights, method_state={**merged.method_state, **method_state})

    def state_of(self, server: Server, name: str) -> dict[str, Tensor]:
        """m and v of the weight `name`, in float32, or their initial values."""
        shape = server.weights[name].shape
        start = {kind: torch.full(shape, value, dtype=torch.float32) for kind, value in self.optimizer.start.items()}
        return {kind: entries(f"{PREFIX}/{kind}", server.method_state).get(name, fresh) for kind, fresh in start.items()}

    def stepped(self, before: Tensor, merged: Tensor, moved: Tensor, state: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        """The weights and the state after a step on the rows `moved`, computed in float64."""
        old = before[moved].double()
        step, new_state = self.optimizer.step(
            merged[moved].double() - old, {kind: tensor[moved].double() for kind, tensor in state.items()}
        )
        return put(before, moved, old + step), {kind: put(tensor, moved, new_state[kind]) for kind, tensor in state.items()}


def without_optimizer_state(server: Server) -> Server:
    """`server` with only the wrapped method's `method_state`."""
    return replace(
        server, method_state={key: tensor for key, tensor in server.method_state.items() if not is_optimizer_state(key)}
    )


def is_optimizer_state(key: str) -> bool:
    return key.startswith(f"{PREFIX}/")


def rows_that_differ(before: Tensor, after: Tensor) -> Tensor:
    """A mask of the rows that differ."""
    return (before != after).reshape(len(before), -1).any(1)


def put(tensor: Tensor, where: Tensor, rows: Tensor) -> Tensor:
    """A copy of `tensor` with `rows`, cast to its dtype, in the rows of the mask `where`."""
    copy = tensor.clone()
    copy[where] = rows.to(tensor.dtype)
    return copy
