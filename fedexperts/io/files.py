"""Files and folders that are complete or absent (written under a temporary name, synced, renamed), and locks on folders."""

import fcntl
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError
from safetensors.torch import save, save_file
from torch import Tensor

from fedexperts.errors import BadValue, Busy

ALIGNMENT = 64  # bytes; tensors in memory start at multiples of it


def write_bytes(path: Path, data: bytes, mode: int | None = None) -> None:
    """Writes `data` to `path`; a crash at any moment leaves the old content or the new. `mode`: see `atomic_file`."""
    with atomic_file(path, mode) as scratch:
        scratch.write_bytes(data)


@contextmanager
def atomic_file(path: Path, mode: int | None = None) -> Iterator[Path]:
    """A temporary file to write into, which becomes `path`, synced, on leaving the block; after an exception it is deleted.

    mode: the file's permissions; None: those that the process gives to new files (its umask).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{uuid4().hex[:8]}")
    handle = os.open(scratch, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    usual = stat.S_IMODE(os.fstat(handle).st_mode)
    os.close(handle)
    try:
        yield scratch
        scratch.chmod(usual if mode is None else mode)  # safetensors lets only the owner read
        sync(scratch)
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of `text` in UTF-8."""
    write_bytes(path, text.encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file, with `metadata` in its head; a crash at any moment leaves the old file or the new.

    Raises:
        OSError: the disk refused, for example because it is full.
    """
    with atomic_file(path) as scratch, disk_errors(path):
        save_file(without_shared_memory(tensors), scratch, dict(metadata or {}) or None)  # without a copy in memory


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns errors of safetensors that come from the disk, such as a full one, into an OSError about `path`."""
    try:
        yield
    except SafetensorError as error:
        os_error = re.search(r"os error (\d+)", str(error))
        if os_error is None:
            raise
        number = int(os_error[1])
        raise OSError(number, os.strerror(number), str(path)) from error


def safetensors_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """`tensors` in the safetensors format."""
    return save(without_shared_memory(tensors))


def without_shared_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors`, contiguous, with a copy of each that shares its storage with an earlier one, which safetensors refuses."""
    separate: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        contiguous = tensor.detach().contiguous()
        separate[name] = contiguous.clone() if contiguous.untyped_storage().data_ptr() in storages else contiguous
        storages.add(contiguous.untyped_storage().data_ptr())
    return separate


def align_tensors(path: Path) -> None:
    """Pads the header of a safetensors file until its tensors begin at a multiple of 64 bytes.

    Readers map the file into memory, and matrix products of unaligned tensors differ in their last bits.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
        header += b" " * (-(8 + length) % ALIGNMENT)  # the format allows trailing spaces
        scratch = path.with_name(f".{path.name}")
        with scratch.open("wb") as aligned:
            aligned.write(len(header).to_bytes(8, "little") + header)
            shutil.copyfileobj(file, aligned)
    scratch.replace(path)


def run_id(folder: Path) -> str:
    """The id of the run in `folder`, by which others (clients on other machines, trackers) know it: drawn once, saved as `id`."""
    path = folder / "id"
    if not path.exists():
        write_text(path, uuid4().hex)
    return path.read_text()


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to write into, which becomes `folder`, synced, on leaving the block; after an exception it is deleted.

    Raises:
        BadValue: `folder` exists and is not empty.
    """
    require_empty(folder)
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = folder.with_name(f".{folder.name}.{uuid4().hex[:8]}")
    scratch.mkdir()
    try:
        yield scratch
        for path in (*scratch.rglob("*"), scratch):
            sync(path)
        require_empty(folder)
        scratch.replace(folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def require_empty(folder: Path) -> None:
    """Raises BadValue if `folder` exists, unless it is an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadValue(f"{folder} exists and is not empty; give a folder that does not exist yet, or an empty one")


def sync(path: Path) -> None:
    """Waits until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks `folder`, created if missing, for this process; the lock ends with the block or the process.

    Raises:
        BadValue: no folder can be made there, as in /proc.
        Busy: another process has locked it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError:
        raise BadValue(f"no folder can be made at {folder}; give another one with --out") from None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise Busy(f"another process is running in {folder}; wait for it, or give another folder with --out") from None
    finally:
        os.close(handle)
