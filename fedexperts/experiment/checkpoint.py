"""Atomic checkpoints of the server after each step of a run, and how a run resumes from them."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fedexperts.errors import BadRun, Damaged, shortened
from fedexperts.federation import steps
from fedexperts.io.files import sync, write_tensors
from fedexperts.io.manifest import (
    LOGS,
    SEAL,
    STATE,
    checkpoints,
    digest,
    file_error,
    log_errors,
    object_or_empty,
    read_object,
    write_sealed,
)
from fedexperts.methods.contract import Method
from fedexperts.types import Server, job_key

WEIGHTS, METHOD_STATE = "weights.safetensors", "method_state.safetensors"
REMEDY = "bring the folder back from a copy, or start a new run with another --out"


def save(folder: Path, server: Server, keep: int = 2, score: float | None = None) -> None:
    """Saves the server, the lengths of the logs and the client states on this machine to `folder`/checkpoint, with their sha256.

    Client states are links to their files. No generator state is saved: every draw is seeded by its round and its client.
    keep: number of checkpoints that stay, with this one. score: of which more is better; the best checkpoint that has one stays.
    """
    checkpoint = folder / "checkpoint"
    step = checkpoint / job_key(server.round, server.task)
    shutil.rmtree(step, ignore_errors=True)  # of a process that was killed before it wrote state.json
    write_tensors(step / WEIGHTS, server.weights)
    write_tensors(step / METHOD_STATE, server.method_state)
    lengths = {name: (folder / name).stat().st_size for name in LOGS if (folder / name).exists()}
    client_states = {client: job for client, job in server.accepted.items() if state_path(folder, client, job).exists()}
    known = files_in(latest(folder))
    files = {name: digest(step / name) for name in (WEIGHTS, METHOD_STATE)}
    for client, job in client_states.items():
        name = str(state_path(Path(), client, job))
        link(folder / name, step / name)
        files[name] = known.get(name) or digest(step / name)
    state = {
        "round": server.round,
        "task": server.task,
        "logs": lengths,
        "log_sha256": {name: digest(folder / name, length) for name, length in lengths.items()},
        "accepted": dict(server.accepted),
        "kept": client_states,
        "files": files,
        "validation_score": score,
    }
    write_sealed(step / STATE, state)  # written last: it completes the checkpoint
    stay = [*checkpoints(folder)[:keep], best(folder)]
    for other in checkpoint.iterdir():
        if other not in stay:
            shutil.rmtree(other)


def link(source: Path, target: Path) -> None:
    """Makes `target` another name of the file `source`, or a copy where the disk has no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
        sync(target)


def files_in(saved: Path | None) -> dict[str, str]:
    """File → sha256 in the manifest of the checkpoint `saved`; empty if there is none, or none that can be read."""
    return dict(object_or_empty(saved / STATE).get("files", {})) if saved else {}


def rewind(folder: Path, method: Method, rounds: int, say: Callable[[str], object] = lambda sentence: None) -> int:
    """Number of the run's steps that were completed at the last undamaged checkpoint in `folder`, which becomes the last one.

    Truncates the logs to that checkpoint, because later rounds will be repeated, and brings back client states that it has and
    that are missing. `say` is told what cannot be verified, and which checkpoints are damaged.

    Raises:
        Damaged: all checkpoints are damaged or missing.
    """
    damaged: dict[Path, str] = {}
    for saved in checkpoints(folder):
        if (error := damage(folder, saved)) is None:
            break
        damaged[saved] = error
    else:
        saved = None
    if saved is None and damaged:
        raise Damaged(f"{next(iter(damaged.values()))}, and no other checkpoint can be used; {REMEDY}")
    state = state_in(saved) if saved else {"logs": {}}
    beyond = lines_beyond(folder / "rounds.jsonl", state["logs"].get("rounds.jsonl", 0))
    if beyond > 1 and saved is None:
        raise Damaged(f"the checkpoints in {folder} are missing, but {beyond} of its steps were done; {REMEDY}")
    if saved and SEAL not in state:
        say(f"{folder} was written by an older version without hashes, so its files cannot be verified")
    for error in damaged.values():
        say(f"{error}; continuing from the checkpoint before, {saved.name}" if saved else error)
    if saved and beyond > 1 and not damaged:
        say(f"newer checkpoints of {folder} are missing; continuing from {saved.name}")
    for other in damaged:
        shutil.rmtree(other)
    trim(folder, state["logs"])
    if saved:
        bring_back(folder, saved, state)
    return steps(method, rounds).index((state["round"], state["task"])) + 1 if saved else 0


def bring_back(folder: Path, saved: Path, state: Mapping[str, Any]) -> None:
    """Links the client states of the checkpoint `saved` where clients read them, in place of missing and damaged files."""
    for client, job in state.get("kept", {}).items():
        there = state_path(folder, client, job)
        name = str(there.relative_to(folder))
        if name in state.get("files", {}) and file_error(there, state["files"][name]):
            link(saved / name, there)


def client_state_error(folder: Path, saved: Path, client: str) -> str | None:
    """What is wrong with the client state of `client` at the checkpoint `saved`; None: nothing, or nothing that can be known."""
    state = state_in(saved)
    path = state_path(folder, client, state.get("kept", {}).get(client, ""))
    wanted = state.get("files", {}).get(str(path.relative_to(folder)))
    return file_error(path, wanted) if wanted else None


def lines_beyond(path: Path, length: int) -> int:
    """Number of complete lines of a log after its first `length` bytes."""
    return path.read_bytes()[length:].count(b"\n") if path.exists() else 0


def damage(folder: Path, saved: Path) -> str | None:
    """Why the run in `folder` cannot be continued from the checkpoint `saved`; None if it can."""
    try:
        state = state_in(saved)
        if SEAL not in state:  # of an older version: at least it can be read
            tensors(saved)
            return None
    except Damaged as error:
        return str(error)
    if saved.name != job_key(state["round"], state["task"]):
        return f"{saved} has the content of {job_key(state['round'], state['task'])}"
    wrong = (file_error(saved / name, wanted) for name, wanted in state["files"].items())
    return next(filter(None, [*wrong, *log_errors(folder, state)]), None)


def state_in(saved: Path) -> dict[str, Any]:
    """The manifest of the checkpoint in `saved`.

    Raises:
        Damaged: it is missing, or is not what was written.
    """
    state = read_object(saved / STATE)
    kinds = {"round": int, "task": str, "logs": dict}
    if not all(isinstance(state.get(key), kind) for key, kind in kinds.items()):
        raise Damaged(f"{saved / STATE} is damaged (it lacks {', '.join(kinds)})")
    return state


def load(folder: Path, server: Server) -> Server:
    """`server` in the state of the last checkpoint in `folder`; unchanged without a checkpoint."""
    saved = latest(folder)
    return server if saved is None else restored(saved, server)


def restored(saved: Path, server: Server) -> Server:
    """`server` in the state of the checkpoint in `saved`."""
    state = state_in(saved)
    weights, method_state = tensors(saved)
    return replace(
        server,
        weights=weights,
        method_state=method_state,
        round=state["round"],
        task=state["task"],
        accepted=accepted_in(saved),
    )


def accepted_in(saved: Path) -> dict[str, str]:
    """`Server.accepted` of the checkpoint in `saved`."""
    state = state_in(saved)
    return dict(state["accepted"]) if "accepted" in state else accepted_before(saved.parents[1], state["round"])


def accepted_before(folder: Path, round: int) -> dict[str, str]:
    """`Server.accepted` after `round`, reconstructed from the ledger: checkpoints of version 0.1.0 do not contain it."""
    ledger = folder / "ledger.jsonl"
    entries = map(json.loads, ledger.read_text().splitlines() if ledger.exists() else ())
    merged = (each for each in entries if each["round"] <= round and each["task"] != "evaluate" and not each["failed"])
    return {entry["client"]: job_key(entry["round"], entry["task"]) for entry in merged}


def state_path(folder: Path, client: str, job: str) -> Path:
    """The file of the client state after the job with key `job`, of a client on this machine."""
    return folder / "clients" / client / f"{job}.safetensors"


def require_client_state(folder: Path, name: str | None = None) -> None:
    """Raises BadRun if the client state of a client (`name`: of this client) at the last checkpoint in `folder` is missing."""
    saved = latest(folder)
    client_states = state_in(saved).get("kept", {}) if saved else {}
    for client, job in client_states.items():
        path = state_path(folder, client, job)
        if name in (None, client) and not path.exists():
            raise BadRun(
                f"what {client} keeps to itself is gone: there is no {path}; bring it back, or run anew with another --out"
            )


def tensors(saved: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The server's weights and the method state in the checkpoint in `saved`.

    Raises:
        Damaged: a file is missing, or cannot be read.
    """
    state = saved / METHOD_STATE
    try:
        return load_file(saved / WEIGHTS), load_file(state if state.exists() else saved / "memory.safetensors")
    except (SafetensorError, FileNotFoundError) as error:
        raise Damaged(f"the tensors in {saved} are missing or damaged ({shortened(str(error), 60)})") from None


def best(folder: Path) -> Path | None:
    """The checkpoint in `folder` with the best score, the first of several; None if none has a score."""
    scores = {saved: object_or_empty(saved / STATE).get("validation_score") for saved in reversed(checkpoints(folder))}
    scored = {saved: score for saved, score in scores.items() if score is not None}
    return max(scored, key=lambda saved: scored[saved], default=None)


def of_round(folder: Path, round: int) -> Path | None:
    """The last checkpoint of `round` in `folder`."""
    return next((saved for saved in checkpoints(folder) if saved.name[:6] == f"{round:06d}"), None)


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`."""
    return next(iter(checkpoints(folder)), None)


def trim(folder: Path, lengths: Mapping[str, int]) -> None:
    """Truncates the logs to `lengths` in bytes."""
    for name in LOGS:
        if (folder / name).exists():
            os.truncate(folder / name, lengths.get(name, 0))
