"""A frozen weight that is stored in fewer bits, and looks to the rest of the code as the tensor that it stands for.

It has the shape and the dtype of its values, so whoever counts, cuts or adapts weights reads these without unpacking. A product
unpacks it for as long as it runs: autograd saves the packed weight and unpacks it again in backward.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_any, tree_map

from fedexperts.io.allocator import return_freed

aten: Any = torch.ops.aten


@runtime_checkable
class Codec(Protocol):
    """How values are packed; an object of a module, so that a worker process finds the same one."""

    def unpack(self, codes: Tensor, scales: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The tensor of `shape` with these codes and scales, in `dtype`."""
        ...


class Packed(Tensor):
    """A tensor of the shape [*rows, *unit], each unit of which is packed by itself: rows can be taken without unpacking.

    A stack of matrices has one axis of rows, the experts; a single matrix has none. In-place operations raise TypeError.
    """

    codes: Tensor  # [*rows, bytes]
    scales: Tensor  # [*rows, scales]
    codec: Codec
    unit: tuple[int, ...]  # the shape of a unit
    value_dtype: torch.dtype  # that of the values when they were packed; they are rounded to it, then to `dtype`
    transposed: bool  # whether the last two axes are swapped

    @staticmethod
    def __new__(
        cls: type["Packed"],
        codes: Tensor,
        scales: Tensor,
        codec: Codec,
        unit: tuple[int, ...],
        dtype: torch.dtype,
        value_dtype: torch.dtype | None = None,
        transposed: bool = False,
    ) -> "Packed":
        shape = (*codes.shape[:-1], *unit)
        shape = (*shape[:-2], shape[-1], shape[-2]) if transposed else shape
        with torch.inference_mode(False):  # a view of a weight in inference mode is no inference tensor
            packed: Packed = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=codes.device, requires_grad=False)
        packed.codes, packed.scales, packed.codec, packed.unit = codes, scales, codec, unit
        packed.value_dtype, packed.transposed = value_dtype or dtype, transposed
        return packed

    def __init__(self, *_: Any, **__: Any) -> None:
        """Nothing: `__new__` has set the attributes."""

    def unpacked(self) -> Tensor:
        """The values as an ordinary tensor."""
        shape = (*self.codes.shape[:-1], *self.unit)
        whole = self.codec.unpack(self.codes, self.scales, shape, self.value_dtype).to(self.dtype)
        return whole.transpose(-2, -1) if self.transposed else whole

    def like(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None, swap: bool = False) -> "Packed":
        """The same with `change` of its stored tensors, which may take rows, another dtype, and the last axes swapped."""
        transposed = self.transposed != swap
        return Packed(
            change(self.codes), change(self.scales), self.codec, self.unit, dtype or self.dtype, self.value_dtype, transposed
        )

    @property
    def rows(self) -> int:
        """Number of axes before those of a unit."""
        return self.codes.ndim - 1

    @property
    def nbytes(self) -> int:  # type: ignore[override]  # torch types its property as an attribute
        """The bytes of the stored tensors."""
        return self.codes.nbytes + self.scales.nbytes

    def share_memory_(self) -> "Packed":
        self.codes.share_memory_()
        self.scales.share_memory_()
        return self

    def is_shared(self) -> bool:
        return bool(self.codes.is_shared())

    def data_ptr(self) -> int:
        return self.codes.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Packed":
        copied = self.like(Tensor.clone)
        memo[id(self)] = as_parameter(copied) if isinstance(self, nn.Parameter) else copied
        return cast("Packed", memo[id(self)])

    def __reduce_ex__(self, protocol: Any) -> Any:
        stored = self.codes, self.scales, self.codec, self.unit, self.dtype, self.value_dtype, self.transposed
        return rebuilt, (stored, isinstance(self, nn.Parameter))

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "scales"], (self.codec, self.unit, self.dtype, self.value_dtype, self.transposed)

    @staticmethod
    def __tensor_unflatten__(stored: Mapping[str, Tensor], about: Any, size: Any, stride: Any) -> "Packed":
        return Packed(stored["codes"], stored["scales"], *about)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch's is untyped
        return f"Packed({list(self.shape)}, {self.dtype}, {type(self.codec).__name__}, {self.nbytes:,} bytes)"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's is a placeholder
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func in WITHOUT_UNPACKING and isinstance(args[0], Packed):
            kept = WITHOUT_UNPACKING[func](*args, **named)
            if kept is not None:
                return kept
        if func is aten._grouped_mm.default and isinstance(args[1], Packed) and not unpacks_stack(args[1]):
            return _grouped_product(*args, **named)
        if func._can_decompose():  # in inference mode torch has not done it
            return func.decompose(*args, **named)
        if func._schema.is_mutable and any(is_written(func, args, named)):
            raise TypeError(f"{func} would write into a weight that is packed and therefore frozen")
        return func(*tree_map(plain, args), **tree_map(plain, named))


def plain(tensor: Any) -> Any:
    """`tensor` as an ordinary tensor: unpacked if it is packed; anything else as it is."""
    return tensor.unpacked() if isinstance(tensor, Packed) else tensor


def stored(tensor: Tensor) -> tuple[Tensor, ...]:
    """The tensors that hold the bits of `tensor`: itself, or codes and scales."""
    return (tensor.codes, tensor.scales) if isinstance(tensor, Packed) else (tensor,)


def has_packed(types: Iterable[type]) -> bool:
    """Whether one of `types`, those of the arguments of an operation, is packed."""
    return any(issubclass(each, Packed) for each in types)


def unpacks_stack(weight: Tensor) -> bool:
    """Whether a grouped product with `weight` unpacks the whole stack: on cards, where memory is fast and loops are slow."""
    return isinstance(weight, Packed) and weight.device.type != "cpu"


def as_parameter(packed: Packed) -> nn.Parameter:
    """`packed` as a frozen parameter."""
    return nn.Parameter(packed, requires_grad=False)


def unpack_weights(model: nn.Module) -> nn.Module:
    """`model` with ordinary weights in place of packed ones, in place; weights that it shares are not written."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if isinstance(weight, Packed):
                module._parameters[name] = nn.Parameter(weight.unpacked(), requires_grad=False)
    return model


def rebuilt(stored: tuple[Any, ...], is_parameter: bool) -> Tensor:
    """The tensor that `Packed.__reduce_ex__` describes."""
    packed = Packed(*stored)
    return as_parameter(packed) if is_parameter else packed


def is_written(func: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> Iterable[bool]:
    """For each argument that `func` writes into, whether it is packed."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[index] if index < len(args) else named.get(argument.name)
            yield tree_any(lambda each: isinstance(each, Packed), given)


def _same(packed: Packed, *_: Any, **__: Any) -> Packed:
    return packed.like(lambda stored: stored)


def _clone(packed: Packed, **_: Any) -> Packed:
    return packed.like(Tensor.clone)


def _empty_like(packed: Packed, *, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Packed:
    return packed.like(lambda stored: torch.empty_like(stored, device=device), dtype)


def _to_copy(
    packed: Packed, *, dtype: torch.dtype | None = None, device: Any = None, non_blocking: bool = False, **_: Any
) -> Packed:
    return packed.like(lambda stored: stored.to(device, non_blocking=non_blocking, copy=True), dtype)


def _new_zeros(packed: Packed, size: Sequence[int], *, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    return packed.scales.new_zeros(size, dtype=dtype or packed.dtype, **options)


def _new_empty(packed: Packed, size: Sequence[int], *, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    return packed.scales.new_empty(size, dtype=dtype or packed.dtype, **options)


def _transpose(packed: Packed, first: int, second: int) -> Packed | None:
    last_two = {packed.ndim - 2, packed.ndim - 1}
    return packed.like(lambda stored: stored, swap=True) if {first % packed.ndim, second % packed.ndim} == last_two else None


def _t(packed: Packed) -> Packed | None:
    return _transpose(packed, 0, 1) if packed.ndim == 2 else None


def _index_select(packed: Packed, axis: int, ids: Tensor) -> Packed | None:
    return packed.like(lambda stored: stored.index_select(0, ids)) if axis % packed.ndim == 0 and packed.rows else None


def _index(packed: Packed, indices: Sequence[Tensor | None]) -> Packed | None:
    only_rows = packed.rows == 1 and len(indices) == 1 and indices[0] is not None and indices[0].ndim == 1
    return packed.like(lambda stored: stored[indices[0]]) if only_rows else None


def _select(packed: Packed, axis: int, index: int) -> Packed | None:
    return packed.like(lambda stored: stored[index]) if axis % packed.ndim == 0 and packed.rows else None


def _unbind(packed: Packed, axis: int = 0) -> list[Packed] | None:
    rows = [_select(packed, axis, index) for index in range(packed.shape[axis])]
    return cast("list[Packed]", rows) if None not in rows else None


def _slice(packed: Packed, axis: int = 0, *bounds: Any) -> Packed | None:
    return packed.like(lambda stored: aten.slice.Tensor(stored, 0, *bounds)) if axis % packed.ndim == 0 and packed.rows else None


def _equal(packed: Packed, other: Tensor) -> bool | None:
    """True if both are stored alike; None: their values must be compared."""
    if not isinstance(other, Packed) or (packed.codec, packed.unit, packed.dtype) != (other.codec, other.unit, other.dtype):
        return None
    alike = all(torch.equal(mine, theirs) for mine, theirs in zip(stored(packed), stored(other), strict=True))
    return True if alike and packed.transposed == other.transposed else None


def _grouped_product(rows: Tensor, packed: Packed, ends: Tensor, *_: Any, **__: Any) -> Tensor:
    """The rows of each expert times its matrix; bitwise that of the whole stack, 3 times as fast, and one matrix is unpacked."""
    out = rows.new_empty(len(rows), packed.shape[2])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            torch.mm(rows[start:end], in_fast_layout(plain(packed[expert])), out=out[start:end])
        start = end
    return_freed()  # unpacked matrices, between which oneDNN's products of each new number of rows keep something
    return out


def in_fast_layout(matrix: Tensor) -> Tensor:
    """`matrix`, with its columns contiguous where torch has a fast product for these only: 25 times as fast as by rows.

    So it is in bfloat16 and float16 on CPUs without AVX-512, for which oneDNN has no kernels.
    """
    slow = matrix.dtype in (torch.bfloat16, torch.float16) and matrix.device.type == "cpu" and not has_half_kernels()
    return matrix.t().contiguous().t() if slow and matrix.is_contiguous() else matrix


@cache
def has_half_kernels() -> bool:
    """Whether oneDNN has kernels for bfloat16 on this CPU."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


WITHOUT_UNPACKING: Mapping[Any, Callable[..., Any]] = {
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.clone.default: _clone,
    aten._to_copy.default: _to_copy,
    aten.empty_like.default: _empty_like,
    aten.t.default: _t,
    aten.transpose.int: _transpose,
    aten.index_select.default: _index_select,
    aten.index.Tensor: _index,
    aten.select.int: _select,
    aten.unbind.int: _unbind,
    aten.slice.Tensor: _slice,
    aten.equal.default: _equal,
    aten.new_zeros.default: _new_zeros,
    aten.new_empty.default: _new_empty,
}
"""Operations that do not unpack their first argument, unless they return None for these arguments; all others do."""
