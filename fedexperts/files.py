"""Files that are whole or not there: written under a temporary name, synced, renamed."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor


def write_bytes(path: Path, data: bytes) -> None:
    """`path` holding `data`; after a kill at any moment it holds all of it or what it held before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    write_bytes(path, encoded(tensors))


def encoded(tensors: Mapping[str, Tensor]) -> bytes:
    """`tensors` as safetensors, which takes no two that share memory: each of these comes whole."""
    apart: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, tensor in tensors.items():
        held = tensor.detach().contiguous()
        apart[name] = held.clone() if held.untyped_storage().data_ptr() in memory else held
        memory.add(held.untyped_storage().data_ptr())
    return save(apart)
