"""Server optimisers: what a merge gives is a direction to go, and the optimiser decides how far.

FedAvgM: Hsu, Qi, Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification", 2019,
https://arxiv.org/abs/1909.06335. FedAdagrad, FedYogi, FedAdam: Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan,
"Adaptive Federated Optimization", ICLR 2021, https://arxiv.org/abs/2003.00295, Algorithm 2. What is not theirs is marked (ours).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Protocol

import torch
from pydantic import Field
from torch import Tensor

from fedexperts.methods.base import Positive, of
from fedexperts.methods.contract import Wrapper
from fedexperts.types import Assignment, Client, Server, Tensors, Update

Decay = Annotated[float, Field(ge=0, lt=1)]
"""How much of what was there before a new value leaves."""

OURS = "server_optimizer"
"""The server remembers m and v of a weight as `server_optimizer/m/<name>` and `server_optimizer/v/<name>`."""


class ServerOptimizer(Protocol):
    """One of those below: hyperparameters and no state."""

    @property
    def start(self) -> Mapping[str, float]:
        """What it remembers of each number, and the value that this begins with."""
        ...

    def step(self, delta: Tensor, state: Tensors) -> tuple[Tensor, Tensors]:
        """How far the weights move, and what it remembers then; `delta` is Δ, where the merge would have them go."""
        ...


@dataclass(frozen=True)
class FedAvgM:
    """m ← β m + Δ; x ← x + η m (Hsu et al., section 4.3). β = 0 and η = 1 are the merge itself."""

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
    """v ← v + Δ². No momentum unless asked for, as in the paper's experiments."""

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
    """m ← β₁ m + (1 − β₁) Δ; x ← x + η m / (√v + τ): common to the three. v starts at τ², the least that the paper allows."""
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
    """`method`, whose merge in each round becomes a step of `optimizer`. Setup tasks stay as they are.

    Δ is the merged weights minus those before, whatever weighing the method merges with. A row that the merge left as it was,
    since nobody sent it, stays where it is, and so do its m and v: its next step follows on its last one (ours).
    """

    optimizer: ServerOptimizer

    def assign(self, server: Server, client: Client) -> Assignment | None:
        return self.method.assign(without_ours(server), client)

    def merge(self, server: Server, updates: Iterable[Update]) -> Server:
        merged = self.method.merge(without_ours(server), updates)
        if server.task != "train":
            return merged
        weights, method_state = dict(merged.weights), {key: t for key, t in server.method_state.items() if is_ours(key)}
        for name, after in merged.weights.items():
            moved = rows_that_differ(server.weights[name], after)
            if moved.any():
                state = self.remembered(server, name)
                weights[name], state = self.stepped(server.weights[name], after, moved, state)
                method_state |= {f"{OURS}/{kind}/{name}": tensor for kind, tensor in state.items()}
        return replace(merged, weights=weights, method_state={**merged.method_state, **method_state})

    def remembered(self, server: Server, name: str) -> dict[str, Tensor]:
        """m and v of the weight `name`, in float32, or what they start with."""
        shape = server.weights[name].shape
        start = {kind: torch.full(shape, value, dtype=torch.float32) for kind, value in self.optimizer.start.items()}
        return {kind: of(f"{OURS}/{kind}", server.method_state).get(name, fresh) for kind, fresh in start.items()}

    def stepped(self, before: Tensor, merged: Tensor, moved: Tensor, state: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        """The weights and the state after a step of the rows `moved`; in float64 in between."""
        old = before[moved].double()
        way, remembered = self.optimizer.step(
            merged[moved].double() - old, {kind: tensor[moved].double() for kind, tensor in state.items()}
        )
        return put(before, moved, old + way), {kind: put(tensor, moved, remembered[kind]) for kind, tensor in state.items()}


def without_ours(server: Server) -> Server:
    """`server` with the state that is the method's own."""
    return replace(server, method_state={key: tensor for key, tensor in server.method_state.items() if not is_ours(key)})


def is_ours(key: str) -> bool:
    return key.startswith(f"{OURS}/")


def rows_that_differ(before: Tensor, after: Tensor) -> Tensor:
    """A mask of the rows that are not equal in both."""
    return (before != after).reshape(len(before), -1).any(1)


def put(tensor: Tensor, where: Tensor, rows: Tensor) -> Tensor:
    """A copy of `tensor` with `rows`, in its own type, `where` the mask is."""
    copy = tensor.clone()
    copy[where] = rows.to(tensor.dtype)
    return copy
