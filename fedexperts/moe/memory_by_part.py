"""The memory of training a model or a sub-model, by what it holds, from shapes alone."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from fedexperts.moe import factors, graft
from fedexperts.moe.anatomy import Experts, anatomy
from fedexperts.moe.footprint import COPIES, Optimizer, as_trained
from fedexperts.moe.parameters import classified_parameters
from fedexperts.moe.tuning import Tuning

PARTS = ("weights", "adapters", "personal_experts", "gradients", "optimizer", "activations")
"""weights: of the model, trained or not. adapters, personal_experts: their own weights. optimizer: its state."""


@dataclass(frozen=True)
class MemoryByPart:
    """Bytes of training, by PARTS; with all experts their sum is that of the model's `Footprint`."""

    dense: Mapping[str, int]  # part → bytes of all but routed experts and router rows
    expert: Mapping[str, Mapping[str, int]]  # MoE block → part → one expert with its router row
    reached: Mapping[str, int] = field(default_factory=dict)  # part → what an expert takes that backward reaches (HFedMoE)

    def of(self, experts: Experts, budget: int | None = None) -> dict[str, int]:
        """Bytes of training the sub-model with `experts`. budget: of how many experts backward reaches at a time; None: all."""
        total = dict(self.dense)
        for block, ids in experts.items():
            for part, number in self.expert[block].items():
                total[part] += number * len(ids)
        if budget is not None:
            all_experts = sum(map(len, experts.values()))
            for part, number in self.reached.items():
                total[part] -= number * max(0, all_experts - budget)
        return total


def memory_by_part(
    model: nn.Module, tuning: Tuning, optimizer: Optimizer, activation_bytes: int, personal_experts: int = 0
) -> MemoryByPart:
    """The memory of training `model`, which may be on the meta device, as `tuning` says.

    activation_bytes: of the largest step, as `Footprint` has it. personal_experts: their number beside each MoE block (FLEx).
    """
    twin = as_trained(model, tuning, personal_experts)
    adapter_names = factors.rank_axes(dict(twin.named_parameters()))
    numbers = {name: shape.num_experts for name, shape in anatomy(model).blocks.items()}
    dense = dict.fromkeys(PARTS, 0) | {"activations": activation_bytes}
    expert = {block: dict.fromkeys(PARTS, 0) for block in numbers}
    update: dict[str, int] = dict.fromkeys(numbers, 0)
    for name, parameter, block, kind in classified_parameters(twin):
        held = "personal_experts" if graft.is_personal(name) else "adapters" if name in adapter_names else "weights"
        target, size = (dense, parameter.nbytes) if block is None else (expert[block], parameter.nbytes // numbers[block])
        target[held] += size
        if parameter.requires_grad:
            target["gradients"] += size
            target["optimizer"] += size * (COPIES[optimizer] - 2)
            if block is not None and kind == "expert":
                update[block] += size
    largest = max(update.values())
    return MemoryByPart(dense, expert, {"gradients": largest, "optimizer": largest * (COPIES[optimizer] - 2)})
