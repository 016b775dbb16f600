"""Sub-models as plain models of the base's class: if every MoE layer keeps the same number of experts, a config can say so."""

from typing import Any, cast

from fedexperts.export.models import Exported
from fedexperts.moe.anatomy import blocks

NUMBER_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Where the configs of transformers' families have the number of experts."""

NOT_CHANGES = {"cut", "experts"}
"""Differences from the base's class that a plain folder has: fewer experts, and the implementation of their products."""


def is_plain(exported: Exported) -> bool:
    """Whether transformers can load the model as one of the base's class, with a smaller number of experts at most.

    A model that computes in half precision with weights in float32 can be loaded so only once its adapters are merged: then its
    weights are rounded to the base's dtypes.
    """
    changes = exported.changes
    rounding = {"precision"} if exported.merged else set()
    if not changes or {name for name, value in changes.items() if value} - NOT_CHANGES - rounding:
        return not changes
    numbers = {block.shape.num_experts for block in blocks(exported.model).values()}
    grouped = any(block.shape.groups > 1 for block in blocks(exported.model).values())
    return len(numbers) == 1 and not grouped and number_key(exported) is not None


def as_plain(exported: Exported) -> None:
    """Gives the config of a plain model the number of experts that its layers have, in place."""
    config = cast("Any", exported.model).config
    if exported.changes.get("cut"):
        key = number_key(exported)
        assert key is not None  # is_plain
        setattr(config, key, next(iter(blocks(exported.model).values())).shape.num_experts)
    del config.kept_experts


def number_key(exported: Exported) -> str | None:
    """The key of the base's config that has its number of experts; None if no known key has it."""
    config = cast("Any", exported.base.model).config.to_dict()
    numbers = {block.shape.num_experts for block in blocks(exported.base.model).values()}
    return next((key for key in NUMBER_KEYS if {config.get(key)} == numbers), None)
