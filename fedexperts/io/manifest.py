"""The sha256 of what a run writes, by which a damaged results folder is noticed, and its logs as lines of valid JSON."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from fedexperts.errors import Damaged, shortened
from fedexperts.io.files import write_text

STARTED = ("resolved.json", "run.toml", "versions.json", "partition.json", "reference_lines.jsonl", "plan.json")
"""Files that do not change during a run."""
MANIFEST = "manifest.json"
"""Their sha256, by name."""
NUMBERS = ("rounds.jsonl", "evals.jsonl", "ledger.jsonl")
PREDICTIONS = "predictions.jsonl"
LOGS = (*NUMBERS, PREDICTIONS)
STATE = "state.json"
"""The manifest of a checkpoint, written last."""
SEAL = "sha256"
"""Key in a manifest of the sha256 of all its other content."""
PIECE = 1 << 20


def digest(path: Path, length: int | None = None) -> str:
    """sha256 of the first `length` bytes of a file; None: of all."""
    whole, left = sha256(), path.stat().st_size if length is None else length
    with path.open("rb") as file:
        while left > 0 and (piece := file.read(min(PIECE, left))):
            whole.update(piece)
            left -= len(piece)
    return whole.hexdigest()


def finite(value: Any) -> Any:
    """`value`, a tree of JSON values, with None in place of NaN and infinities, which JSON does not have."""
    match value:
        case float() if not math.isfinite(value):
            return None
        case Mapping():
            return {key: finite(inner) for key, inner in value.items()}
        case list() | tuple():
            return [finite(inner) for inner in value]
    return value


def append(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Appends `lines` as JSON and syncs the file, before the checkpoint that relies on them."""
    with path.open("a") as file:
        file.writelines(json.dumps(finite(line), allow_nan=False) + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())


def write_sealed(path: Path, tree: Mapping[str, Any]) -> None:
    """Writes `tree` as JSON with its own sha256."""
    write_text(path, json.dumps({**tree, SEAL: seal(tree)}, allow_nan=False))


def seal(tree: Mapping[str, Any]) -> str:
    return sha256(json.dumps({key: value for key, value in tree.items() if key != SEAL}, sort_keys=True).encode()).hexdigest()


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; if it has a seal, what was sealed.

    Raises:
        Damaged: the file is missing, is no JSON object, or differs from what was sealed.
    """
    try:
        tree = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise Damaged(f"{path} is missing") from None
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} is damaged ({shortened(str(error), 60)})") from None
    if not isinstance(tree, dict) or (SEAL in tree and tree[SEAL] != seal(tree)):
        raise Damaged(f"{path} is damaged (its content is not what was written)")
    return tree


def write_manifest(folder: Path) -> None:
    """Writes the sha256 of the files of `folder` that do not change during the run."""
    write_sealed(folder / MANIFEST, {name: digest(folder / name) for name in STARTED if (folder / name).exists()})


def changed(folder: Path) -> dict[str, str]:
    """The files of `folder` that its manifest names and that have changed since → what is wrong; empty without a manifest."""
    if not (folder / MANIFEST).exists():
        sealed = any(SEAL in object_or_empty(saved / STATE) for saved in checkpoints(folder))
        return {MANIFEST: f"{folder / MANIFEST} is missing"} if sealed else {}  # older versions wrote none
    try:
        entries = read_object(folder / MANIFEST)
    except Damaged as error:
        return {MANIFEST: str(error)}
    wrong = {name: file_error(folder / name, wanted) for name, wanted in entries.items() if name != SEAL}
    return {name: error for name, error in wrong.items() if error}


def object_or_empty(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty if it is missing or damaged."""
    try:
        return read_object(path)
    except Damaged:
        return {}


def file_error(path: Path, wanted: object, length: int | None = None) -> str | None:
    """Why the first `length` bytes of `path` (None: all) do not have the sha256 `wanted`; None if they have it."""
    if not path.is_file():
        return f"{path} is missing"
    if length is not None and path.stat().st_size < length:
        return f"{path} was cut off"
    return None if digest(path, length) == wanted else f"{path} has changed since it was written"


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, newest first."""
    states = [path.parent for path in (folder / "checkpoint").glob(f"*/{STATE}")]
    return sorted(states, key=lambda step: (step.name[:6], written(step / STATE)), reverse=True)


def written(path: Path) -> int:
    """When `path` was written, in nanoseconds; 0 if it is gone by now: a run that is under way removes old checkpoints."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def log_errors(folder: Path, state: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the logs of `folder` up to the checkpoint with the manifest `state`."""
    for name, wanted in state.get("log_sha256", {}).items():
        if error := file_error(folder / name, wanted, state["logs"][name]):
            yield error


def require_undamaged(folder: Path) -> None:
    """Checks what a report reads: the files written at the start, and the logs up to the last checkpoint that can be read.

    Raises:
        Damaged: one of them has changed or is missing.
    """
    errors = [error for name, error in changed(folder).items() if name != "partition.json"]
    readable = [state for saved in checkpoints(folder) if (state := object_or_empty(saved / STATE))]
    if readable and SEAL in readable[0]:  # a damaged one is left to `run --resume`, which says so
        errors += log_errors(folder, readable[0])
    if errors:
        raise Damaged(f"{errors[0]}, so these are not the results of its run; bring {folder} back from a copy, or run again")
