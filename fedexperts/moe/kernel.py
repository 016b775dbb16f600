"""Which of transformers' ways through stacked experts their shapes allow."""

from typing import Any, cast

from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from fedexperts.moe.anatomy import blocks

ROW_BYTES = 16  # torch's grouped product takes only rows that are a multiple of this long


def choose_kernel(model: nn.Module) -> None:
    """Sets `model` to grouped_mm, the fastest way through the experts, or to eager where their shapes do not allow it.

    Experts that are no stack (Switch) have only a way of their own.

    Raises:
        NoExperts: there are none.
    """
    stacks = [block.experts for block in blocks(model).values() if not block.is_switch]
    if stacks:
        whole = all(fits(weight) for experts in stacks for weight in experts.parameters() if weight.ndim == 3)
        cast("Any", model).set_experts_implementation("grouped_mm" if whole else "eager")


def fits(weight: Tensor) -> bool:
    """Whether torch has a grouped product for matrices of this shape; one without data takes any."""
    return is_fake(weight) or all(size * weight.element_size() % ROW_BYTES == 0 for size in weight.shape[1:])
