"""The implementation of stacked experts in transformers that their shapes allow."""

from typing import Any, cast

from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from fedexperts.moe.anatomy import blocks

IMPLEMENTATION = "fedexperts_lora"  # the name of our experts function (moe/lora.py) in transformers' registry
ROW_BYTES = 16  # torch's grouped product takes only rows of a multiple of this many bytes


def choose_kernel(model: nn.Module, wanted: str | None = None) -> None:
    """Sets the implementation of the experts of `model`: `wanted`, one of transformers', or else the fastest that always runs.

    That is grouped_mm, or eager if the shapes of the experts do not allow it. Experts that are modules (Switch) have a single
    implementation, so nothing is set.

    Raises:
        NoExperts: the model has no experts.
        ValueError: transformers has no implementation `wanted`, or not for this model.
    """
    stacks = [block.experts for block in blocks(model).values() if not block.is_switch]
    if stacks:
        all_fit = all(fits(weight) for experts in stacks for weight in experts.parameters() if weight.ndim == 3)
        cast("Any", model).set_experts_implementation(wanted or ("grouped_mm" if all_fit else "eager"))


def fits(weight: Tensor) -> bool:
    """Whether torch has a grouped product for matrices of this shape; of tensors without data it has one for any shape."""
    return is_fake(weight) or all(size * weight.element_size() % ROW_BYTES == 0 for size in weight.shape[1:])
