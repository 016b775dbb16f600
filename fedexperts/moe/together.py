"""Stacked experts computed together, as one network whose neurons are weighted by the expert that they belong to.

Every token then meets every expert, those that its router did not pick with weight zero: the same result from E / k times as
many products, but in two large matrix products without sorting. Of narrow experts that is faster (docs/log.md, "Upcycling").
"""

from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from fedexperts.moe.anatomy import Block, blocks

IMPLEMENTATION = "fedexperts_together"  # the name of the function in transformers' registry
NARROW = 128  # neurons of an expert, up to which this is faster,
SPREAD = 4  # if a token has one of so many experts, or more of them


def compute_together(model: nn.Module) -> bool:
    """Lets the experts of `model` be computed together if that is faster; returns whether it is.

    That is if all experts are narrow, gated and without bias, and each token has one of SPREAD or more.

    Raises:
        NoExperts: the model has no experts.
    """
    if not all(fits(block) for block in blocks(model).values()):
        return False
    cast("Any", model).set_experts_implementation(IMPLEMENTATION)
    return True


def fits(block: Block) -> bool:
    """Whether the experts of `block` are faster together."""
    if block.is_switch:
        return False
    stack, shape = cast("Any", block.experts), block.shape
    plain = {name for name, _ in stack.named_parameters()} == {"gate_up_proj", "down_proj"} and not stack.is_transposed
    return plain and stack.down_proj.shape[2] <= NARROW and shape.num_experts <= SPREAD * shape.top_k


def together(self: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward pass of stacked experts, which transformers calls as one of its implementations."""
    weights = top_k_weights.new_zeros(len(hidden), self.num_experts).scatter(1, top_k_index, top_k_weights)
    both = functional.linear(hidden, self.gate_up_proj.flatten(0, 1)).view(len(hidden), self.num_experts, -1)
    neurons = self._apply_gate(both) * weights[:, :, None].to(both.dtype)
    output: Tensor = neurons.flatten(1) @ self.down_proj.transpose(1, 2).flatten(0, 1)
    return output


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, together)
