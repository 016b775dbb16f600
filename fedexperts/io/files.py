"""Files that are whole or not there (written under a temporary name, synced, renamed), and folders held for one process."""

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError
from safetensors.torch import save, save_file
from torch import Tensor

from fedexperts.errors import BadValue, Busy


def write_bytes(path: Path, data: bytes, mode: int = 0o644) -> None:
    """`path` holding `data`; after a kill at any moment it holds all of it or what it held before. mode: who may read it."""
    with whole_file(path, mode) as made:
        made.write_bytes(data)


@contextmanager
def whole_file(path: Path, mode: int = 0o644) -> Iterator[Path]:
    """A file to write into, which becomes `path` at the end: all of it, synced, or, whatever happens before, nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    made = Path(name)
    try:
        yield made
        made.chmod(mode)
        sync(made)
        made.replace(path)
    except BaseException:
        made.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with whole_file(path) as made:
        try:
            save_file(apart(tensors), made)  # without a copy in memory
        except SafetensorError as error:
            found = re.search(r"os error (\d+)", str(error))
            if found is None:
                raise
            number = int(found[1])  # of a disk that is full, for one
            raise OSError(number, os.strerror(number), str(path)) from error


def encoded(tensors: Mapping[str, Tensor]) -> bytes:
    """`tensors` as safetensors."""
    return save(apart(tensors))


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` as safetensors takes them, which is no two that share memory: each of these comes whole."""
    found: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, tensor in tensors.items():
        held = tensor.detach().contiguous()
        found[name] = held.clone() if held.untyped_storage().data_ptr() in memory else held
        memory.add(held.untyped_storage().data_ptr())
    return found


def even_start(path: Path) -> None:
    """Pads the header of a safetensors file until its tensors begin at a multiple of 64 bytes.

    Readers map the file into memory, and products of what begins elsewhere differ in their last bits.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
        header += b" " * (-(8 + length) % 64)  # which the format allows
        made = path.with_name(f".{path.name}")
        with made.open("wb") as even:
            even.write(len(header).to_bytes(8, "little") + header)
            shutil.copyfileobj(file, even)
    made.replace(path)


def identity(folder: Path) -> str:
    """What the run in `folder` is called by others, such as its clients on other machines: drawn once, noted in `folder`/id."""
    named = folder / "id"
    if not named.exists():
        write_text(named, uuid4().hex)
    return named.read_text()


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` at the end: all of it, synced, or, whatever happens before, nothing.

    Raises:
        BadValue: `folder` is there and holds something.
    """
    require_room(folder)
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield made
        made.chmod(0o755)
        for path in (*made.rglob("*"), made):
            sync(path)
        require_room(folder)
        made.replace(folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def require_room(folder: Path) -> None:
    """Raises BadValue when `folder` is there and is no empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadValue(f"{folder} is there already and holds something; give a folder that does not exist yet, or an empty one")


def sync(path: Path) -> None:
    """Has the disk hold what was written to a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder, made where it is missing, for one process; the lock ends with it, however it ends.

    Raises:
        Busy: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise Busy(f"another process is running in {folder}; wait for it, or give another folder with --out") from None
    finally:
        os.close(handle)
