"""Files that are there whole or not at all."""

import os
from pathlib import Path


def save(path: Path, text: str) -> Path:
    """`text` at `path`, replaced in one step: a reader, or a crash, sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with fresh.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)  # the rename itself is only on disk with its folder
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return path
