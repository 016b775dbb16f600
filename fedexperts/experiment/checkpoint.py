"""A server on disk after every round, whole or not at all, and the way back."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from math import inf
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from fedexperts.engines.client_store import key
from fedexperts.errors import BadRun
from fedexperts.io.files import write_tensors, write_text
from fedexperts.types import Server

LOGS = ("rounds.jsonl", "evals.jsonl", "ledger.jsonl")


def save(folder: Path, server: Server, answered: Mapping[str, str] | None = None) -> None:
    """The server after its last round, how long the logs were then and what clients here keep, below `folder`/checkpoint.

    answered: client → the key of its last job whose answer counted, as `accepted` gives it.

    Nothing random is saved because nothing is carried over: every draw is seeded by its round and its client.
    """
    checkpoint = folder / "checkpoint"
    step = checkpoint / f"{server.round:06d}-{server.task}"
    shutil.rmtree(step, ignore_errors=True)  # of an attempt that was killed before its state.json
    write_tensors(step / "weights.safetensors", server.weights)
    write_tensors(step / "memory.safetensors", server.method_state)
    lengths = {name: (folder / name).stat().st_size for name in LOGS if (folder / name).exists()}
    kept = {client: last for client, last in (answered or {}).items() if kept_at(folder, client, last).exists()}
    state = {"round": server.round, "task": server.task, "logs": lengths, **({"kept": kept} if kept else {})}
    write_text(step / "state.json", json.dumps(state))  # last: with it the checkpoint counts
    for other in checkpoint.iterdir():
        if other != step:
            shutil.rmtree(other)


def load(folder: Path, server: Server) -> Server:
    """`server` as it was when it was last saved in `folder`, or itself when it never was.

    What the logs got after that is cut off: those rounds will be done again.
    """
    saved = latest(folder)
    state = json.loads((saved / "state.json").read_text()) if saved else {"logs": {}}
    trim(folder, state["logs"])
    return server if saved is None else restored(saved, server)


def restored(saved: Path, server: Server) -> Server:
    """`server` as the checkpoint in `saved` has it."""
    state = json.loads((saved / "state.json").read_text())
    weights, memory = tensors(saved)
    return replace(server, weights=weights, method_state=memory, round=state["round"], task=state["task"])


def accepted(folder: Path, round: float = inf) -> dict[str, str]:
    """Client → the key of its last job, up to `round`, whose answer counted, of the run in `folder`."""
    ledger = folder / "ledger.jsonl"
    entries = map(json.loads, ledger.read_text().splitlines() if ledger.exists() else ())
    counted = (entry for entry in entries if entry["round"] <= round and counts(entry["task"], entry["failed"]))
    return {entry["client"]: key(entry["round"], entry["task"]) for entry in counted}


def counts(task: str, failed: str | None) -> bool:
    """Whether a client may have kept something of a job with this end, which others then count on."""
    return task != "evaluate" and not failed


def kept_at(folder: Path, client: str, last: str) -> Path:
    """Where a client on this machine has what it kept in the job whose key is `last`."""
    return folder / "clients" / client / f"{last}.safetensors"


def require_kept(folder: Path, name: str | None = None) -> None:
    """Raises BadRun when what a client (`name`: this one) kept at the last checkpoint in `folder` is not there any more."""
    saved = latest(folder)
    kept = json.loads((saved / "state.json").read_text()).get("kept", {}) if saved else {}
    for client, last in kept.items():
        path = kept_at(folder, client, last)
        if name in (None, client) and not path.exists():
            raise BadRun(
                f"what {client} keeps to itself is gone: there is no {path}; bring it back, or run anew with another --out"
            )


def tensors(saved: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The server's weights and its memory in the checkpoint in `saved`."""
    return load_file(saved / "weights.safetensors"), load_file(saved / "memory.safetensors")


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint below `folder`."""
    states = [path.parent for path in (folder / "checkpoint").glob("*/state.json")]
    return max(states, key=lambda step: (step.name[:6], (step / "state.json").stat().st_mtime_ns), default=None)


def trim(folder: Path, lengths: Mapping[str, int]) -> None:
    """The logs cut to `lengths`."""
    for name in LOGS:
        if (folder / name).exists():
            os.truncate(folder / name, lengths.get(name, 0))
