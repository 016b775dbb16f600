"""Checkpoint folders of which only some experts are read."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, apply_renamings, rename_source_key

from fedexperts.errors import BadValue
from fedexperts.moe.anatomy import Experts, blocks


@dataclass(frozen=True)
class Lazy:
    """A tensor on disk, or some of its rows; nothing is read before `[...]`, which is how transformers asks for it."""

    disk: Any  # safetensors' slice
    axis: int = 0
    ids: tuple[int, ...] | None = None  # on that axis; None: all

    def __getitem__(self, index: EllipsisType) -> Tensor:
        if self.ids is None:
            tensor: Tensor = self.disk[:] if self.disk.get_shape() else self.disk[...]
            return tensor
        before = (slice(None),) * self.axis
        return torch.cat([self.disk[(*before, slice(first, last + 1))] for first, last in _runs(self.ids)], dim=self.axis)


def lazy_tensors(folder: Path, model: PreTrainedModel, experts: Experts) -> dict[str, Lazy]:
    """The tensors of the checkpoint in `folder` that a model with only `experts` needs, under their names on disk.

    Args:
        folder: with one or several safetensors files, in which experts stand stacked or each by itself.
        model: of the checkpoint's shapes, as large as it is, on the meta device.
        experts: MoE block → positions in the checkpoint; a block that is absent keeps all.

    Raises:
        BadValue: no safetensors, or experts stored in a way of which no part can be read.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise BadValue(f"{folder} has no safetensors files; give a model folder as transformers' save_pretrained writes it")
    wanted = _Wanted(model, experts)
    tensors = {}
    for file in files:
        # Through a memory map the kernel reads ahead, up to the whole file; pread reads what is asked for.
        checkpoint: Any = safe_open(file, framework="pt", backend="pread")
        for key in checkpoint.keys():  # noqa: SIM118  (safetensors' object is no dict)
            if (found := wanted.find(key)) is not None:
                name, axis, ids = found
                tensors[name] = Lazy(checkpoint.get_slice(key), axis, ids)
    return tensors


class _Wanted:
    """Tells what to read of each tensor of a checkpoint, by transformers' own rules of conversion."""

    def __init__(self, model: PreTrainedModel, experts: Experts) -> None:
        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._names = model.state_dict()
        self._experts = experts
        found = {name: block for name, block in blocks(model).items() if name in experts}
        self._axes = {f"{name}.{path}": (name, axis) for name, b in found.items() for path, axis in b.expert_axes().items()}
        self._apart = [f"{name}.experts.expert_" for name, block in found.items() if block.is_switch]

    def find(self, key: str) -> tuple[str, int, tuple[int, ...] | None] | None:
        """The name to give, the axis and the rows to read of the tensor `key`; None when it is not needed."""
        name, pattern = rename_source_key(key, self._renamings, self._converters, self._prefix, self._names)
        for prefix in self._apart:
            if name.startswith(prefix):
                return self._expert_module(name, prefix)
        if name not in self._axes:
            return key, 0, None
        block, axis = self._axes[name]
        if pattern is None:
            return key, axis, self._experts[block]
        return (key, 0, None) if self._number(key, pattern) in self._experts[block] else None

    def _expert_module(self, name: str, prefix: str) -> tuple[str, int, None] | None:
        """Switch: the kept experts move together, so expert 5 may become expert_1."""
        kept = self._experts[prefix.removesuffix(".experts.expert_")]
        number, _, rest = name.removeprefix(prefix).partition(".")
        return (f"{prefix}{kept.index(int(number))}.{rest}", 0, None) if int(number) in kept else None

    def _number(self, key: str, pattern: str) -> int:
        """The expert in a name such as "model.layers.0.mlp.experts.7.up_proj.weight"."""
        match = re.search(pattern.replace("*.", r"(\d+)\."), apply_renamings(key, self._renamings))
        if match is None or "*." not in pattern:
            raise BadValue(f"{key} holds experts in a form that cannot be read in part; load the whole model and shrink it")
        return int(match.group(1))


def _runs(ids: Iterable[int]) -> list[tuple[int, int]]:
    """First and last of each run of neighbours."""
    runs = [[number for _, number in group] for _, group in groupby(enumerate(ids), lambda pair: pair[1] - pair[0])]
    return [(run[0], run[-1]) for run in runs]
