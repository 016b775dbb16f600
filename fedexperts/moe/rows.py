"""Trained parameters row-first: axis 0 has rows that can be sent alone, either experts or the whole parameter as its only row."""

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
"""From this size on the sums of a tensor are stored in a file."""
AT_ONCE = 2**20
"""Number of elements that are added at a time; each takes one or two temporary float64."""

_EXPERT_MODULE = re.compile(r"\.expert_(\d+)\.")


@dataclass(frozen=True)
class _Source:
    """The parameters of the model that have the rows of one row-first tensor."""

    block: str | None
    parameters: tuple[nn.Parameter, ...]  # one for each row, or one with all rows
    axis: int | None  # of the rows in the one parameter; None: one for each row

    def read(self) -> Tensor:
        """The rows, copied, on the CPU."""
        rows = self.take()
        own = self.axis is None or rows.device != self.parameters[0].device
        return rows.contiguous() if own else rows.clone(memory_format=torch.contiguous_format)

    def take(self) -> Tensor:
        """The rows, on the CPU: a view of one parameter there, a copy of several."""
        if self.axis is None:
            return _on_cpu(torch.stack([parameter.detach() for parameter in self.parameters]))
        return _on_cpu(self.parameters[0].detach().movedim(self.axis, 0))

    def write(self, rows: Tensor, ids: list[int]) -> None:
        """Copies `rows` into the rows `ids`; they are moved to the device of the parameters at once."""
        if self.axis is not None and ids == list(range(self.shape[0])):
            self.parameters[0].detach().movedim(self.axis, 0).copy_(rows)
            return
        rows = rows.to(self.parameters[0].device)
        for row, index in zip(rows, ids, strict=True):
            self._row(index).copy_(row)

    def split(self, rows: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter with the view of `rows`, which are all rows, that belongs to it; of a copy on its device."""
        rows = rows.to(self.parameters[0].device)
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


def _on_cpu(rows: Tensor) -> Tensor:
    """`rows` on the CPU; on the meta device they stay there."""
    return rows if rows.is_meta else rows.cpu()


def layout(model: nn.Module) -> dict[str, str | None]:
    """Row-first names of the trainable parameters of `model`, and the MoE block whose experts are their rows."""
    return {name: source.block for name, source in _sources(model).items()}


def read(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the trainable parameters of `model` on the CPU, row-first; a tied parameter is there once."""
    return {name: source.read() for name, source in _sources(model).items()}


def take(model: nn.Module) -> dict[str, Tensor]:
    """As `read`, but parameters that are row-first on the CPU are not copied: for a model that is not used afterwards."""
    return {name: source.take().contiguous() for name, source in _sources(model).items()}


@torch.no_grad()
def write(model: nn.Module, tensors: Tensors, rows: Mapping[str, Tensor] | None = None) -> None:
    """Copies `tensors` into the trainable parameters of `model`, in place: all rows, or those whose ids are in `rows`.

    Raises:
        BadValue: a name that is no trainable parameter, or a tensor of another shape.
    """
    sources = _sources(model)
    for name, tensor in tensors.items():
        if name not in sources:
            raise BadValue(f"{name} is no trained parameter of this model; give the name of one{nearest(name, sources)}")
        shape = sources[name].shape
        ids = rows[name].tolist() if rows and name in rows else list(range(shape[0]))
        if tuple(tensor.shape) != (len(ids), *shape[1:]):
            raise BadValue(f"{name} has shape {list(tensor.shape)}; give {[len(ids), *shape[1:]]}, rows first")
        sources[name].write(tensor, ids)


def paired(model: nn.Module, tensors: Tensors) -> list[tuple[nn.Parameter, Tensor]]:
    """Each trainable parameter of `model` that `tensors`, which have all rows, names; with the view of a tensor that is its.

    Tensors on another device than the model are copied there, so that the views are not theirs.
    """
    return [pair for name, source in _sources(model).items() if name in tensors for pair in source.split(tensors[name])]


def parameters(model: nn.Module, names: Collection[str]) -> list[nn.Parameter]:
    """The trainable parameters of `model` whose row-first names are in `names`."""
    return [parameter for name, source in _sources(model).items() if name in names for parameter in source.parameters]


def cut(tensors: Tensors, layout: Layout, experts: Experts) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The rows of `tensors` that belong to `experts`, and the ids of these rows by name.

    Dense parameters and blocks absent from `experts` are given whole, without ids. Names of one block share one id tensor.
    Tensors that are given whole are not copied.
    """
    ids = {block: torch.tensor(block_ids, dtype=torch.int64) for block, block_ids in experts.items()}
    rows = {name: ids[block] for name in tensors if (block := layout[name]) in ids}
    return {name: _select_rows(t, rows[name]) if name in rows else t for name, t in tensors.items()}, rows


def _select_rows(tensor: Tensor, ids: Tensor) -> Tensor:
    """The rows `ids` of `tensor`; `tensor` itself if these are all."""
    return tensor if torch.equal(ids, torch.arange(len(tensor))) else tensor[ids.to(tensor.device)]


def router_of(name: str, layout: Layout) -> str | None:
    """The MoE block whose router has the tensor `name`; None if it belongs to experts or is dense."""
    block = layout[name]
    return None if block is None or name.startswith(f"{block}.experts.") else block


class RowMean:
    """Weighted mean of tensors that may each have only some rows; a row that no client sent keeps its value in `start`.

    Tensors are added one at a time in float64, so their order does not change the mean. The sums of a large tensor are on disk.
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
        """Adds `rows`, which are the rows `ids` (None: all) of the mean, with one weight for all or one for each."""
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
        """The sum of the weights of each row so far; 0 for a row that no client sent."""
        return self._weight.clone()

    def result(self) -> Tensor:
        """The mean so far, in the dtype and on the device of `start`."""
        sent = self._weight > 0
        result = self._start.to("cpu", copy=True, memory_format=torch.contiguous_format)
        sums, flat = (tensor.view(len(sent), self._width) for tensor in (self._sum, result))
        for part in _columns(flat):
            flat[sent, part] = (sums[sent, part] / self._weight[sent, None]).to(result.dtype)
        self._release()
        return result.to(self._start.device)


def _columns(flat: Tensor) -> Iterator[slice]:
    """Slices of the columns of `flat` with at most AT_ONCE elements, or of one column."""
    rows, columns = flat.shape
    width = max(1, AT_ONCE // max(rows, 1))
    return (slice(first, first + width) for first in range(0, columns, width))


def _sums(number: int) -> tuple[Tensor, Callable[[], None]]:
    """`number` zeros in float64, and a function that lets the system write them to disk until they are used again.

    From ON_DISK_BYTES on they are in an unlinked file in the folder for temporary files (TMPDIR), so that a merge needs memory
    for one update beside the model. Fewer, or without room on the disk, or on a system without such files, they are in memory.
    """
    size = 8 * number
    if size >= ON_DISK_BYTES:
        with suppress(OSError, AttributeError, RuntimeError), tempfile.NamedTemporaryFile() as file:
            os.posix_fallocate(file.fileno(), 0, size)  # else a full disk would end the process at a later write
            sums = torch.from_file(file.name, shared=True, size=number, dtype=torch.float64)
            madvise, address = ctypes.CDLL(None).madvise, ctypes.c_void_p(sums.data_ptr())
            return sums, lambda: madvise(address, ctypes.c_size_t(size), mmap.MADV_DONTNEED)
    return torch.zeros(number, dtype=torch.float64), lambda: None


def _sources(model: nn.Module) -> dict[str, _Source]:
    """Row-first name → its parameters, in the order of the model's parameters, which is the same in every process."""
    model_blocks = blocks(model)
    axes = {f"{name}.{path}": (name, axis) for name, block in model_blocks.items() for path, axis in block.expert_axes().items()}
    switch_blocks = [block for block in model_blocks.values() if block.is_switch]
    sources: dict[str, _Source] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if block := _block_of(name, switch_blocks):
            row_first_name = _EXPERT_MODULE.sub(".", name, count=1)
            earlier = sources[row_first_name].parameters if row_first_name in sources else ()
            sources[row_first_name] = _Source(block.name, (*earlier, parameter), None)
        elif name in axes:
            sources[name] = _Source(axes[name][0], (parameter,), axes[name][1])
        else:
            sources[name] = _Source(None, (parameter,), None)
    return sources


def _block_of(name: str, switch_blocks: list[Block]) -> Block | None:
    """The block with the parameter `name` in one of its expert modules."""
    return next((block for block in switch_blocks if name.startswith(f"{block.name}.experts.expert_")), None)
