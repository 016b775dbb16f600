"""The numbers of parameters of a model by kind: dense, of an expert, of a router row."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import nn

from fedexperts.moe.anatomy import BlockShape, Experts, anatomy, blocks


@dataclass(frozen=True)
class Parameters:
    """The numbers of parameters of a model, by kind; tied ones count once."""

    dense: int  # all but routed experts and router rows
    expert: Mapping[str, int]  # MoE block → one expert
    router_row: Mapping[str, int]  # MoE block → parameters of the router for one expert
    blocks: Mapping[str, BlockShape]

    @property
    def total(self) -> int:
        """Of the whole model."""
        return self.of({name: tuple(range(shape.num_experts)) for name, shape in self.blocks.items()})

    @property
    def active(self) -> int:
        """Those used for one token: its top-k experts, and the whole router."""
        routed = sum(shape.top_k * self.expert[name] for name, shape in self.blocks.items())
        routers = sum(shape.num_experts * self.router_row[name] for name, shape in self.blocks.items())
        return self.dense + routed + routers

    def of(self, experts: Experts) -> int:
        """Those of the sub-model with `experts`, router rows included."""
        return self.dense + sum(len(ids) * (self.expert[name] + self.router_row[name]) for name, ids in experts.items())


class ClassifiedParameter(NamedTuple):
    """A parameter, and the kind to which it belongs."""

    name: str
    parameter: nn.Parameter
    block: str | None  # the MoE block whose experts have equal shares of it; None: dense
    kind: Literal["expert", "router", "dense"]


def classified_parameters(model: nn.Module) -> Iterator[ClassifiedParameter]:
    """Each parameter of `model` once, with its kind."""
    model_blocks = blocks(model)
    rows = {f"{name}.{path}" for name, block in model_blocks.items() for path in block.expert_axes()}
    for name, parameter in model.named_parameters():
        block = next((block for block in model_blocks if name.startswith(f"{block}.")), None)
        if block and name.startswith(f"{block}.experts."):
            yield ClassifiedParameter(name, parameter, block, "expert")
        elif block and name in rows:
            yield ClassifiedParameter(name, parameter, block, "router")
        else:
            yield ClassifiedParameter(name, parameter, None, "dense")


def parameters(model: nn.Module) -> Parameters:
    """The numbers of parameters of `model`, which may be on the meta device."""
    dense, expert, row = sum_by_kind(model, lambda parameter: parameter.numel())
    return Parameters(dense, expert, row, anatomy(model).blocks)


def sum_by_kind(model: nn.Module, weight: Callable[[nn.Parameter], int]) -> tuple[int, dict[str, int], dict[str, int]]:
    """Sum of `weight` over the dense parameters, and by MoE block over one expert and over one router row."""
    shapes = anatomy(model).blocks
    dense, sums = 0, {"expert": dict.fromkeys(shapes, 0), "router": dict.fromkeys(shapes, 0)}
    for _, parameter, block, kind in classified_parameters(model):
        if block is None:
            dense += weight(parameter)
        else:
            sums[kind][block] += weight(parameter)
    expert, row = (
        {block: amount // shapes[block].num_experts for block, amount in sums[kind].items()} for kind in ("expert", "router")
    )
    return dense, expert, row


def expert_sides(model: nn.Module) -> int:
    """The sum of rows plus columns over every matrix of every expert of `model`."""
    experts = (each.parameter for each in classified_parameters(model) if each.kind == "expert" and "bias" not in each.name)
    matrices = [parameter.shape for parameter in experts if parameter.ndim >= 2]
    return sum((shape[0] if len(shape) == 3 else 1) * sum(shape[-2:]) for shape in matrices)
