"""The experts and routers of a model, found by their structure and not by a table of class names."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

from torch import Tensor, nn

from fedexperts.errors import NoExperts

Experts = Mapping[str, tuple[int, ...]]
"""MoE block → ids of some of its experts, ascending."""


@dataclass(frozen=True)
class BlockShape:
    """The numbers of one MoE block."""

    num_experts: int
    top_k: int
    groups: int = 1  # of experts, among which the router first picks (DeepSeek's group-limited routing)
    least: int = 1  # experts that the router needs, whatever its top_k (DeepSeek-V3 scores a group by its best two)
    stacked: bool = True  # one tensor has a matrix of all experts; else each expert is a module (Switch)

    @property
    def group_size(self) -> int:
        return self.num_experts // self.groups

    @property
    def unit(self) -> int:
        """Number of neighboring experts that a sub-model keeps or drops together: those of a group, or 1."""
        return self.group_size if self.groups > 1 else 1

    @property
    def fewest(self) -> int:
        """Number of experts that a sub-model must keep here: enough for the router, in whole groups."""
        return -(-max(self.top_k, self.least) // self.unit) * self.unit


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
    def is_switch(self) -> bool:
        """Whether each expert is a module and the router gives a one-hot mask, as in Switch Transformers."""
        return isinstance(self.experts, nn.ModuleDict)

    @property
    def sigmoid(self) -> bool:
        """Whether the router scores each expert by a sigmoid (DeepSeek-V3, GLM4) and not all by one softmax."""
        return "e_score_correction_bias" in dict(self.router.named_buffers(recurse=False))

    @property
    def shape(self) -> BlockShape:
        router = vars(self.router)
        num_experts = len(self.experts) if isinstance(self.experts, nn.ModuleDict) else cast("Any", self.experts).num_experts
        # PhiMoE's router, the only one that is a Linear itself, is written for two experts per token, whatever top_k says.
        top_k = 1 if self.is_switch else 2 if isinstance(self.router, nn.Linear) else int(router["top_k"])
        grouped = "num_group" in router and router.get("topk_method") != "greedy"  # DeepSeek-V2-Lite has groups, unused
        return BlockShape(
            num_experts=int(num_experts),
            top_k=top_k,
            groups=int(router["num_group"] or 1) if grouped else 1,
            least=2 if self.sigmoid and grouped else 1,
            stacked=not self.is_switch,
        )

    def expert_axes(self) -> dict[str, int]:
        """Path (below this block) of each tensor with one part per expert → the axis of the experts.

        These are stacked expert weights, and the rows and biases of the router; of Switch, whose experts are modules, only the
        latter. Rows of an adapter of stacked experts count too, even if it adapts only some experts.
        """
        number = self.shape.num_experts
        axes = {path: 0 if path.startswith("experts.lora.") else _axis(tensor, number) for path, tensor in self._tensors()}
        return {path: axis for path, axis in axes.items() if axis is not None}

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The block's own tensors and those of its router and stacked experts, with their paths below the block."""
        names = {id(child): name for name, child in self.module.named_children()}
        yield from _own_tensors(self.module, recurse=False)
        for part in (self.router,) if self.is_switch else (self.router, self.experts):
            yield from ((f"{names[id(part)]}.{path}", tensor) for path, tensor in _own_tensors(part, recurse=True))


def blocks(model: nn.Module) -> dict[str, Block]:
    """The MoE blocks of `model` by name, in the order of its layers.

    A block is a module with stacked `experts` (of a class with transformers' experts interface) and a `gate` or `router`
    beside them; or one of Switch, with a dict of experts and a router that has a `classifier`.

    Raises:
        NoExperts: there is none.
    """
    named_blocks = {name: block for name, module in model.named_modules() if (block := _block(name, module))}
    if not named_blocks:
        raise NoExperts(
            f"{type(model).__name__} has no Mixture-of-Experts layers that we can find; give a model with stacked experts "
            "(Mixtral, Qwen-MoE, OLMoE, DeepSeek, …) or Switch Transformers"
        )
    return named_blocks


def anatomy(model: nn.Module) -> Anatomy:
    """The numbers of all MoE blocks of `model`; `model` may be on the meta device."""
    return Anatomy({name: block.shape for name, block in blocks(model).items()})


def _block(name: str, module: nn.Module) -> Block | None:
    children = module._modules
    experts, router = children.get("experts"), children.get("gate", children.get("router"))
    if experts is None or router is None:
        return None
    stacked = {"is_transposed", "num_experts"} <= vars(experts).keys()
    # NLLB's router has a classifier too, but picks two experts and has other outputs.
    switch = isinstance(experts, nn.ModuleDict) and "classifier" in dict(router.named_children())
    nllb = "second_expert_policy" in vars(router)
    return Block(name, module, router, experts) if stacked or (switch and not nllb) else None


def _own_tensors(module: nn.Module, recurse: bool) -> Iterator[tuple[str, Tensor]]:
    return chain(module.named_parameters(recurse=recurse), module.named_buffers(recurse=recurse))


def _axis(tensor: Tensor, num_experts: int) -> int | None:
    """The axis of the experts: the first, or the second of ERNIE's bias [1, experts]; None if the tensor has no such axis."""
    if tensor.ndim and tensor.shape[0] == num_experts:
        return 0
    return 1 if tuple(tensor.shape) == (1, num_experts) else None
