"""Where the experts and routers of a model are, found by structure and not by a table of class names."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from fedexperts.errors import NoExperts

Experts = Mapping[str, tuple[int, ...]]
"""MoE block → ids of some of its experts, ascending."""


@dataclass(frozen=True)
class BlockShape:
    """The numbers of one MoE block."""

    num_experts: int
    top_k: int
    groups: int = 1  # of experts among which the router first picks (DeepSeek's group-limited routing)

    @property
    def fewest(self) -> int:
        """Experts that a sub-model must keep here."""
        return self.top_k


@dataclass(frozen=True)
class Anatomy:
    """The MoE blocks of a model, in the order of its layers."""

    blocks: Mapping[str, BlockShape]

    @property
    def all_experts(self) -> Experts:
        return {name: tuple(range(block.num_experts)) for name, block in self.blocks.items()}

    @property
    def num_experts(self) -> int:
        return sum(block.num_experts for block in self.blocks.values())


@dataclass(frozen=True, eq=False)
class Block:
    """One MoE block of a live model."""

    name: str  # its path in the model, "model.layers.3.mlp"
    module: nn.Module
    router: nn.Module
    experts: nn.Module  # stacked tensors, or (Switch) a ModuleDict of expert_0, expert_1, …

    @property
    def shape(self) -> BlockShape:
        router = cast("Any", self.router)
        num_experts = len(self.experts) if isinstance(self.experts, nn.ModuleDict) else cast("Any", self.experts).num_experts
        return BlockShape(int(num_experts), int(getattr(router, "top_k", 1)))
