"""The ways from dense feed-forward networks to a Mixture of Experts: copies, a split, or one fine-tuned model an expert."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fedexperts.errors import BadValue
from fedexperts.models.upcycle.parts import FFN, MoE, States
from fedexperts.models.upcycle.split import ridge, split

ROUTER_STD = 0.02  # of the weights of a random router: transformers' initializer_range
TEXT_LOGIT_STD = 1.0  # of the logits of a router between experts for different texts

UNIT = 8  # neurons; torch's grouped product takes rows of a multiple of 16 bytes, so transformers fails with other experts

Facts = dict[str, float]
"""What is known of a converted layer, by name."""


@runtime_checkable
class Recipe(Protocol):
    """How an FFN becomes a Mixture of Experts."""

    @property
    def num_experts(self) -> int:
        """Number of routed experts."""

    @property
    def top_k(self) -> int:
        """Number of them active for each token."""

    @property
    def name(self) -> str:
        """What the report calls it."""

    @property
    def shared(self) -> int:
        """Number of shared neurons."""

    def width(self, dense: int) -> int:
        """Number of neurons of an expert, where the dense network has `dense`."""

    def convert(self, ffns: Sequence[FFN], states: States, rng: Random) -> tuple[MoE, Facts]:
        """The Mixture of Experts made of a layer's networks: that of the model, or those of the expert models."""


@dataclass(frozen=True)
class Copy:
    """Sparse upcycling: each expert is the dense FFN.

    Komatsuzaki et al., "Sparse Upcycling", ICLR 2023, https://arxiv.org/abs/2212.05055. reinit: the share of neurons that each
    expert draws anew, with the mean and standard deviation of the weights they had (Nakamura et al., "Drop-Upcycling", ICLR 2025,
    https://arxiv.org/abs/2502.19261). noise (ours): standard deviation of the noise that each weight matrix gets, in
    parts of its own.
    """

    num_experts: int
    top_k: int = 2
    noise: float = 0.0
    reinit: float = 0.0
    name = "copy"
    shared = 0

    def width(self, dense: int) -> int:
        return dense

    def convert(self, ffns: Sequence[FFN], states: States, rng: Random) -> tuple[MoE, Facts]:
        chance = torch.Generator().manual_seed(rng.getrandbits(63))
        router = ROUTER_STD * torch.randn(self.num_experts, ffns[0].gate.shape[1], generator=chance)
        return MoE(router, [self.expert(ffns[0], chance) for _ in range(self.num_experts)]), {}

    def expert(self, ffn: FFN, chance: torch.Generator) -> FFN:
        """A copy of `ffn`, which shares its tensors if nothing is changed."""
        if self.reinit:
            neurons = torch.randperm(ffn.width, generator=chance)[: round(self.reinit * ffn.width)]
            down = redrawn(ffn.down.T, neurons, chance).T
            ffn = FFN(redrawn(ffn.gate, neurons, chance), redrawn(ffn.up, neurons, chance), down)
        if self.noise:
            gate, up, down = (noisy(weight, self.noise, chance) for weight in (ffn.gate, ffn.up, ffn.down))
            ffn = FFN(gate, up, down)
        return ffn


@dataclass(frozen=True)
class Split:
    """Each expert is a part of the dense FFN's neurons; `shared` neurons are always active. See `split.split`."""

    num_experts: int
    top_k: int
    shared: int = 0
    name = "split"

    def width(self, dense: int) -> int:
        """Raises BadValue if the neurons that are not shared cannot be divided equally, in multiples of UNIT."""
        step = UNIT * self.num_experts
        routed = dense - self.shared
        if routed < step or routed % step:
            fit = range(dense % step, dense, step)
            advice = f", or --shared {min(fit, key=lambda shared: abs(shared - self.shared))}" if fit else ""
            raise BadValue(
                f"{routed} of {dense} neurons are not shared, and these cannot be divided among {self.num_experts} experts, "
                f"each with a multiple of {UNIT}; give another number of experts{advice}"
            )
        return routed // self.num_experts

    def convert(self, ffns: Sequence[FFN], states: States, rng: Random) -> tuple[MoE, Facts]:
        return split(ffns[0], states, self.num_experts, self.shared, self.top_k, rng)


@dataclass(frozen=True)
class Merge:
    """Each expert is the FFN of a fine-tuned model; attention, norms and embeddings are the base model's.

    As mergekit-moe and Branch-Train-MiX (Sukhbaatar et al., 2024, https://arxiv.org/abs/2403.07816) do before training. The
    router is a linear classifier of hidden states by the expert whose text they belong to (ours: ridge regression, so that
    directions in which all hidden states differ do not count; mergekit takes the mean hidden state of an expert's prompts).
    """

    num_experts: int
    top_k: int = 2
    name = "experts"
    shared = 0

    def width(self, dense: int) -> int:
        return dense

    def convert(self, ffns: Sequence[FFN], states: States, rng: Random) -> tuple[MoE, Facts]:
        inputs, owner = states.owners()
        targets = one_hot(owner, self.num_experts).float()
        weights = 1 / targets.sum(0)[owner]  # each expert's text counts alike
        return MoE(ridge(inputs, targets - 1 / self.num_experts, TEXT_LOGIT_STD, weights), ffns), {}


def redrawn(weight: Tensor, rows: Tensor, chance: torch.Generator) -> Tensor:
    """A copy of `weight` with `rows` from a normal distribution with the mean and standard deviation that they had."""
    old = weight[rows].float()
    fresh = weight.clone()
    fresh[rows] = (old.mean() + old.std() * torch.randn(old.shape, generator=chance)).to(weight.dtype)
    return fresh


def noisy(weight: Tensor, noise: float, chance: torch.Generator) -> Tensor:
    """`weight` with normal noise, whose standard deviation is `noise` times that of `weight`."""
    added = noise * weight.float().std() * torch.randn(weight.shape, generator=chance)
    return (weight.float() + added).to(weight.dtype)
