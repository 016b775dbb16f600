"""Reading only some experts of a checkpoint folder."""

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
class LazyTensor:
    """A tensor on disk, or some of its rows; it is read by `[...]`, with which transformers loads a tensor."""

    disk: Any  # safetensors' slice
    axis: int = 0
    ids: tuple[int, ...] | None = None  # of the rows on that axis; None: all
    dtype: torch.dtype | None = None  # in which it is read; None: as stored

    def get_dtype(self) -> str:
        """safetensors' name of the dtype, which transformers asks for when it converts a quantized checkpoint."""
        name: str = self.disk.get_dtype()
        return name

    def __getitem__(self, index: EllipsisType) -> Tensor:
        tensor = self._read()
        return tensor if self.dtype is None else tensor.to(self.dtype)

    def _read(self) -> Tensor:
        if self.ids is None:
            tensor: Tensor = self.disk[:] if self.disk.get_shape() else self.disk[...]
            return tensor
        before = (slice(None),) * self.axis
        return torch.cat([self.disk[(*before, slice(first, last + 1))] for first, last in _runs(self.ids)], dim=self.axis)


def lazy_tensors(files: Iterable[Path], model: PreTrainedModel, experts: Experts) -> dict[str, LazyTensor]:
    """The tensors in `files` that a model with only `experts` needs, under their names on disk.

    Args:
        files: the safetensors files of the checkpoint, with experts stacked or each by itself.
        model: of the whole checkpoint, on the meta device.
        experts: MoE block → ids of experts in the checkpoint; a block that is absent keeps all.

    Raises:
        BadValue: experts stored in a form of which no part can be read.
    """
    selection = _Selection(model, experts)
    tensors = {}
    for file in files:
        # Through a memory map the kernel reads ahead, up to the whole file; pread reads only the requested bytes.
        checkpoint: Any = safe_open(file, framework="pt", backend="pread")
        for key in checkpoint.keys():  # noqa: SIM118  (safetensors' object is no dict)
            if (part := selection.part(key)) is not None:
                name, axis, ids = part
                tensors[name] = LazyTensor(checkpoint.get_slice(key), axis, ids)
    return tensors


class _Selection:
    """The part of each tensor of a checkpoint that is to be read, by the rules by which transformers converts checkpoints."""

    def __init__(self, model: PreTrainedModel, experts: Experts) -> None:
        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._names = model.state_dict()
        self._experts = experts
        cut = {name: block for name, block in blocks(model).items() if name in experts}
        self._axes = {f"{name}.{path}": (name, axis) for name, block in cut.items() for path, axis in block.expert_axes().items()}
        self._module_prefixes = [f"{name}.experts.expert_" for name, block in cut.items() if block.is_switch]

    def part(self, key: str) -> tuple[str, int, tuple[int, ...] | None] | None:
        """The new name of the tensor `key`, and the axis and ids of the rows to read; None if it is not needed."""
        name, pattern = rename_source_key(key, self._renamings, self._converters, self._prefix, self._names)
        for prefix in self._module_prefixes:
            if name.startswith(prefix):
                return self._expert_module(name, prefix)
        if name not in self._axes:
            return key, 0, None
        block, axis = self._axes[name]
        if pattern is None:
            return key, axis, self._experts[block]
        return (key, 0, None) if self._number(key, pattern) in self._experts[block] else None

    def _expert_module(self, name: str, prefix: str) -> tuple[str, int, None] | None:
        """The part of a tensor of Switch: the kept experts are numbered anew, so expert 5 may become expert_1."""
        kept_ids = self._experts[prefix.removesuffix(".experts.expert_")]
        number, _, rest = name.removeprefix(prefix).partition(".")
        return (f"{prefix}{kept_ids.index(int(number))}.{rest}", 0, None) if int(number) in kept_ids else None

    def _number(self, key: str, pattern: str) -> int:
        """The expert in a name such as "model.layers.0.mlp.experts.7.up_proj.weight"."""
        match = re.search(pattern.replace("*.", r"(\d+)\."), apply_renamings(key, self._renamings))
        if match is None or "*." not in pattern:
            raise BadValue(f"{key} stores experts in a form that cannot be read in part; load the whole model and shrink it")
        return int(match.group(1))


def _runs(ids: Iterable[int]) -> list[tuple[int, int]]:
    """First and last number of each run of consecutive `ids`."""
    runs = [[number for _, number in group] for _, group in groupby(enumerate(ids), lambda pair: pair[1] - pair[0])]
    return [(run[0], run[-1]) for run in runs]
