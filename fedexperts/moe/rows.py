"""Trained parameters row-first: axis 0 is a row one can send alone, an expert or the whole as its only row."""

import ctypes
import mmap
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedexperts.errors import BadValue, nearest
from fedexperts.moe.anatomy import Block, Experts, blocks

Tensors = Mapping[str, Tensor]
Layout = Mapping[str, str | None]
"""Row-first name → the MoE block whose experts are its rows, or None: a dense parameter, one row."""

ON_DISK_BYTES = 2**24
"""From which on the sums of a tensor lie on disk."""
AT_ONCE = 2**20
"""Elements that are taken in at a time: each is a float64 or two on the way."""

_EXPERT_MODULE = re.compile(r"\.expert_(\d+)\.")


@dataclass(frozen=True)
class _Source:
    """Where the rows of one row-first tensor are in the model."""

    block: str | None
    parameters: tuple[nn.Parameter, ...]  # one for each row, or one that holds them all
    axis: int | None  # of the rows in that one

    def read(self) -> Tensor:
        """A copy."""
        rows = self.take()
        return rows if self.axis is None else rows.clone(memory_format=torch.contiguous_format)

    def take(self) -> Tensor:
        """Of one parameter a view, of several a copy."""
        if self.axis is None:
            return torch.stack([parameter.detach() for parameter in self.parameters])
        return self.parameters[0].detach().movedim(self.axis, 0)

    def write(self, rows: Tensor, ids: list[int]) -> None:
        for row, index in zip(rows, ids, strict=True):
            self._row(index).copy_(row)

    def split(self, rows: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        if self.axis is None:
            yield from zip(self.parameters, rows, strict=True)
        else:
            yield self.parameters[0], rows.movedim(0, self.axis)

    def _row(self, index: int) -> Tensor:
        if self.axis is None:
            return self.parameters[index].detach()
        return self.parameters[0].detach().select(self.axis, index)

    @property
    def shape(self) -> tuple[int, ...]:
        if self.axis is None:
            return (len(self.parameters), *self.parameters[0].shape)
        return tuple(self.parameters[0].movedim(self.axis, 0).shape)


def layout(model: nn.Module) -> dict[str, str | None]:
    """Row-first names of the trainable parameters of `model`, and the MoE block whose experts are their rows."""
    return {name: source.block for name, source in _sources(model).items()}


def read(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the trainable parameters of `model`, row-first. A tied parameter comes once."""
    return {name: source.read() for name, source in _sources(model).items()}


def take(model: nn.Module) -> dict[str, Tensor]:
    """As `read`, but not copied where rows lie first already: for a model that nobody else needs."""
    return {name: source.take().contiguous() for name, source in _sources(model).items()}


@torch.no_grad()
def write(model: nn.Module, tensors: Tensors, rows: Mapping[str, Tensor] | None = None) -> None:
    """Copy `tensors` into the trainable parameters of `model`, in place: all rows, or those whose ids stand in `rows`.

    Raises:
        BadValue: a name that `model` does not train, or rows of another shape.
    """
    sources = _sources(model)
    for name, tensor in tensors.items():
        if name not in sources:
            raise BadValue(f"{name} is no trained parameter of this model{nearest(name, sources)}")
        shape = sources[name].shape
        ids = rows[name].tolist() if rows and name in rows else list(range(shape[0]))
        if tuple(tensor.shape) != (len(ids), *shape[1:]):
            raise BadValue(f"{name} is {list(tensor.shape)}, but the model takes {[len(ids), *shape[1:]]}: rows first")
        sources[name].write(tensor, ids)


def paired(model: nn.Module, tensors: Tensors) -> list[tuple[nn.Parameter, Tensor]]:
    """Each trainable parameter of `model` that `tensors` names with what they, all its rows, have for it: a view."""
    return [pair for name, source in _sources(model).items() if name in tensors for pair in source.split(tensors[name])]


def parameters(model: nn.Module, names: Collection[str]) -> list[nn.Parameter]:
    """The trainable parameters of `model` that hold what is called `names`."""
    return [parameter for name, source in _sources(model).items() if name in names for parameter in source.parameters]


def cut(tensors: Tensors, layout: Layout, experts: Experts) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The rows of `tensors` that belong to `experts`, and the ids of these rows by name.

    Dense parameters and blocks absent from `experts` come whole, without ids. Names of one block share one id tensor. What
    comes whole is not copied.
    """
    ids = {block: torch.tensor(kept, dtype=torch.int64) for block, kept in experts.items()}
    rows = {name: ids[block] for name in tensors if (block := layout[name]) in ids}
    return {name: _chosen(t, rows[name]) if name in rows else t for name, t in tensors.items()}, rows


def _chosen(tensor: Tensor, ids: Tensor) -> Tensor:
    """Its rows `ids`; itself where these are all."""
    return tensor if torch.equal(ids, torch.arange(len(tensor))) else tensor[ids.to(tensor.device)]


def router_of(name: str, layout: Layout) -> str | None:
    """The MoE block whose router has the tensor `name`; None for an expert's own tensors and for dense ones."""
    block = layout[name]
    return None if block is None or name.startswith(f"{block}.experts.") else block


class RowMean:
    """Weighted mean of tensors that may each hold only some rows; a row nobody sent keeps its old value.

    Sums in float64, one tensor at a time, so the order in which they come does not show. The sums of a large tensor lie on disk.
    """

    def __init__(self, start: Tensor) -> None:
        self._start, self._width = start, prod(start.shape[1:])
        self._sum, self._release = _sums(start.numel())
        self._weight = torch.zeros(start.shape[0], dtype=torch.float64)

    def add(
        self,
        rows: Float[Tensor, "rows ..."],
        ids: Int[Tensor, " rows"] | None = None,
        weight: float | Float[Tensor, " rows"] = 1.0,
    ) -> None:
        """Take `rows` in, the rows `ids` of the whole (None: all), each with its weight or all with one."""
        if ids is None:
            ids = torch.arange(len(self._weight))
        weights = torch.as_tensor(weight, dtype=torch.float64).expand(len(ids))
        sums = self._sum.view(len(self._weight), self._width)
        flat = rows.to("cpu").reshape(len(ids), self._width)
        for part in _columns(flat):
            sums[:, part].index_add_(0, ids, flat[:, part].double() * weights[:, None])
        self._weight.index_add_(0, ids, weights)
        self._release()

    @property
    def weights(self) -> Float[Tensor, " rows"]:
        """What each row has weighed so far; 0 for a row that nobody sent."""
        return self._weight.clone()

    def result(self) -> Tensor:
        """The mean so far, as `start` is: its dtype and device."""
        sent = self._weight > 0
        result = self._start.to("cpu", copy=True, memory_format=torch.contiguous_format)
        sums, flat = (each.view(len(sent), self._width) for each in (self._sum, result))
        for part in _columns(flat):
            flat[sent, part] = (sums[sent, part] / self._weight[sent, None]).to(result.dtype)
        self._release()
        return result.to(self._start.device)


def _columns(flat: Tensor) -> Iterator[slice]:
    """Slices of the columns of `flat`, so narrow that no part of all rows has more elements than AT_ONCE."""
    rows, columns = flat.shape
    width = max(1, AT_ONCE // max(rows, 1))
    return (slice(first, first + width) for first in range(0, columns, width))


def _sums(number: int) -> tuple[Tensor, Callable[[], None]]:
    """So many zeros in float64, and what has the system take them out of this process's memory until they are used again.

    Many lie in a file, soon without a name, in the folder for temporary files (TMPDIR), so a merge holds one update beside the
    model; few, or where a disk has no room, or a system no such files, in memory.
    """
    size = 8 * number
    if size >= ON_DISK_BYTES:
        with suppress(OSError, AttributeError, RuntimeError), tempfile.NamedTemporaryFile() as file:
            os.posix_fallocate(file.fileno(), 0, size)  # or a full disk would end the process at some later write
            sums = torch.from_file(file.name, shared=True, size=number, dtype=torch.float64)
            madvise, place = ctypes.CDLL(None).madvise, ctypes.c_void_p(sums.data_ptr())
            return sums, lambda: madvise(place, ctypes.c_size_t(size), mmap.MADV_DONTNEED)
    return torch.zeros(number, dtype=torch.float64), lambda: None


def _sources(model: nn.Module) -> dict[str, _Source]:
    """Row-first name → its parameters in the model. Sorted as the model holds them, so the same in every process."""
    found = blocks(model)
    axes = {f"{name}.{path}": (name, axis) for name, block in found.items() for path, axis in block.expert_axes().items()}
    apart = [block for block in found.values() if block.is_switch]
    sources: dict[str, _Source] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if switch := _block_of(name, apart):
            joint = _EXPERT_MODULE.sub(".", name, count=1)
            before = sources[joint].parameters if joint in sources else ()
            sources[joint] = _Source(switch.name, (*before, parameter), None)
        elif name in axes:
            sources[name] = _Source(axes[name][0], (parameter,), axes[name][1])
        else:
            sources[name] = _Source(None, (parameter,), None)
    return sources


def _block_of(name: str, apart: list[Block]) -> Block | None:
    """The block that holds the parameter `name` in one of its expert modules."""
    return next((block for block in apart if name.startswith(f"{block.name}.experts.expert_")), None)
