"""How many bytes of tensors are alive while code runs, and at most were."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import TracebackType
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

Held = nn.Module | Optimizer | Iterable[Tensor]


class MemoryMeter(TorchDispatchMode):
    """While it is on, `peak_bytes` is the largest sum of the bytes of all tensors alive at once.

    Counted are what `held` holds when it is entered (weights, gradients, optimiser state; whole storages, each once) and every
    tensor made since. Not seen: scratch space inside one kernel. On cuda the allocator itself is asked.
    """

    def __init__(self, *held: Held):
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.held = held
        self.bytes = 0  # alive now
        self.peak_bytes = 0
        self.known: dict[int, ref[torch.UntypedStorage]] = {}
        self.on_cuda = False

    def __enter__(self) -> "MemoryMeter":
        before = [tensor for each in self.held for tensor in tensors_of(each)]
        self.on_cuda = any(tensor.is_cuda for tensor in before)
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats()
        for tensor in before:
            self.see(tensor)
        super().__enter__()  # type: ignore[no-untyped-call]  # torch's
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]  # torch's
        if self.on_cuda:
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated())
        self.known.clear()
        self.held = ()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.on_cuda:
            for each in tree_iter(out):
                if isinstance(each, Tensor):
                    self.see(each)
        return out

    def see(self, tensor: Tensor) -> None:
        """Counts the storage of `tensor`, if it is new, until it dies."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known[key] = ref(storage, partial(self.died, key, size))
            self.bytes += size
            self.peak_bytes = max(self.peak_bytes, self.bytes)

    def died(self, key: int, size: int, _: object) -> None:
        """No longer counts a storage."""
        if self.known.pop(key, None) is not None:
            self.bytes -= size


def tensors_of(held: Held) -> Iterable[Tensor]:
    """Weights, buffers and gradients of a model, the state of an optimiser, or the tensors themselves."""
    if isinstance(held, nn.Module):
        yield from held.buffers()
        for parameter in held.parameters():
            yield parameter
            if parameter.grad is not None:
                yield parameter.grad
    elif isinstance(held, Optimizer):
        yield from (each for state in held.state.values() for each in state.values() if isinstance(each, Tensor))
    else:
        yield from held
