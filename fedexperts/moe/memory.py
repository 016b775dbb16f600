"""The bytes of tensors that are alive while code runs, and their peak."""

from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fedexperts.moe.packed import Packed, has_packed, stored

Owner = nn.Module | Optimizer | Iterable[Tensor]
"""Has tensors that exist before the measurement."""


class MemoryMeter(TorchDispatchMode):
    """Within its `with` block, `peak_bytes` is the largest sum of the bytes of all tensors alive at the same time.

    It counts the tensors that `owners` have at the start (weights, gradients, optimizer state; whole storages, each once) and
    every tensor made since, but not scratch space inside a kernel. If a tensor of `owners` is on a graphics card, what is made
    since is measured by the allocator of that card, scratch space included.
    """

    def __init__(self, *owners: Owner):
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.owners = owners
        self.bytes = 0  # alive now
        self.peak_bytes = 0
        self.storages: dict[int, ref[torch.UntypedStorage]] = {}
        self.card: torch.device | None = None  # of the owners
        self.allocated = 0  # there at the start

    def __enter__(self) -> "MemoryMeter":
        before = [part for owner in self.owners for tensor in tensors_of(owner) for part in stored(tensor)]
        self.card = next((tensor.device for tensor in before if tensor.is_cuda), None)
        if self.card is not None:
            torch.cuda.reset_peak_memory_stats(self.card)
            self.allocated = torch.cuda.memory_allocated(self.card)
        shared = {key: number for owner in self.owners if isinstance(owner, nn.Module) for key, number in used_bytes(owner)}
        for tensor in before:
            self.see(tensor, shared.get(tensor.untyped_storage()._cdata))
        super().__enter__()  # type: ignore[no-untyped-call]  # torch's
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]  # torch's
        if self.card is not None:  # a base that another process shares is the owners', and not of this allocator
            self.peak_bytes += torch.cuda.max_memory_allocated(self.card) - self.allocated
        self.storages.clear()
        self.owners = ()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if has_packed(types):  # it unpacks its values first, which count too
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        if self.card is not None:
            return out
        if isinstance(out, Tensor):  # of most operations, and a step has thousands
            self.see(out)
        else:
            for leaf in tree_iter(out):
                if isinstance(leaf, Tensor):
                    self.see(leaf)
        return out

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: torch's guard against compilation takes time at each of thousands of operations, and nothing compiles this."""
        return False

    def see(self, tensor: Tensor, size: int | None = None) -> None:
        """Counts the storage of `tensor`, if it is new, until it is freed. size: bytes to count; None: all of them."""
        if isinstance(tensor, Packed):
            self.see(tensor.codes)
            self.see(tensor.scales)
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.storages:
            self.storages[key] = alive = _Alive(storage, self.forget)
            alive.key, alive.size = key, storage.nbytes() if size is None else size
            self.bytes += alive.size
            self.peak_bytes = max(self.peak_bytes, self.bytes)

    def forget(self, freed: ref[torch.UntypedStorage]) -> None:
        """No longer counts a storage, which was freed."""
        assert isinstance(freed, _Alive)
        if self.storages.pop(freed.key, None) is not None:
            self.bytes -= freed.size


class _Alive(ref[torch.UntypedStorage]):
    """A storage that is alive, and what is known of it when it is freed."""

    __slots__ = ("key", "size")
    key: int
    size: int


def used_bytes(model: nn.Module) -> Iterable[tuple[int, int]]:
    """The storage of each stack that a sub-model shares with a larger model (moe/shrink.py), and the bytes of its own rows.

    A client has a stack of these rows alone.
    """
    for module in model.modules():
        if (ids := module._buffers.get("stack_ids")) is not None:
            for stack in (part for parameter in module.parameters(recurse=False) for part in stored(parameter)):
                yield stack.untyped_storage()._cdata, stack.nbytes // len(stack) * len(ids)


def tensors_of(owner: Owner) -> Iterable[Tensor]:
    """Weights, buffers and gradients of a model, the state of an optimizer, or the tensors themselves."""
    if isinstance(owner, nn.Module):
        yield from owner.buffers()
        for parameter in owner.parameters():
            yield parameter
            if parameter.grad is not None:
                yield parameter.grad
    elif isinstance(owner, Optimizer):
        yield from (value for state in owner.state.values() for value in state.values() if isinstance(value, Tensor))
    else:
        yield from owner
