"""A server on disk after every round, whole or not at all, and the way back."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from fedexperts.errors import BadRun
from fedexperts.federation import steps
from fedexperts.io.files import write_tensors, write_text
from fedexperts.methods.contract import Method
from fedexperts.types import Server, job_key

LOGS = ("rounds.jsonl", "evals.jsonl", "ledger.jsonl")


def save(folder: Path, server: Server) -> None:
    """The server after its last round, how long the logs were then and what clients here keep, below `folder`/checkpoint.

    Nothing random is saved because nothing is carried over: every draw is seeded by its round and its client.
    """
    checkpoint = folder / "checkpoint"
    step = checkpoint / job_key(server.round, server.task)
    shutil.rmtree(step, ignore_errors=True)  # of an attempt that was killed before its state.json
    write_tensors(step / "weights.safetensors", server.weights)
    write_tensors(step / "method_state.safetensors", server.method_state)
    lengths = {name: (folder / name).stat().st_size for name in LOGS if (folder / name).exists()}
    kept = {client: last for client, last in server.accepted.items() if kept_at(folder, client, last).exists()}
    state = {"round": server.round, "task": server.task, "logs": lengths, "accepted": dict(server.accepted), "kept": kept}
    write_text(step / "state.json", json.dumps(state))  # last: with it the checkpoint counts
    for other in checkpoint.iterdir():
        if other != step:
            shutil.rmtree(other)


def rewind(folder: Path, method: Method, rounds: int) -> int:
    """How many of the run's steps the last checkpoint in `folder` has behind it.

    What the logs got after that is cut off: those rounds will be done again.
    """
    saved = latest(folder)
    state = json.loads((saved / "state.json").read_text()) if saved else {"logs": {}}
    trim(folder, state["logs"])
    return steps(method, rounds).index((state["round"], state["task"])) + 1 if saved else 0


def load(folder: Path, server: Server) -> Server:
    """`server` as it was when it was last saved in `folder`, or itself when it never was."""
    saved = latest(folder)
    return server if saved is None else restored(saved, server)


def restored(saved: Path, server: Server) -> Server:
    """`server` as the checkpoint in `saved` has it."""
    state = json.loads((saved / "state.json").read_text())
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
    state = json.loads((saved / "state.json").read_text())
    return dict(state["accepted"]) if "accepted" in state else accepted_before(saved.parents[1], state["round"])


def accepted_before(folder: Path, round: int) -> dict[str, str]:
    """`Server.accepted` after `round`, from the ledger of a run whose checkpoint is of version 0.1.0 and does not have it."""
    ledger = folder / "ledger.jsonl"
    entries = map(json.loads, ledger.read_text().splitlines() if ledger.exists() else ())
    counted = (each for each in entries if each["round"] <= round and each["task"] != "evaluate" and not each["failed"])
    return {entry["client"]: job_key(entry["round"], entry["task"]) for entry in counted}


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
    """The server's weights and the method's state in the checkpoint in `saved`."""
    state = saved / "method_state.safetensors"
    return load_file(saved / "weights.safetensors"), load_file(state if state.exists() else saved / "memory.safetensors")


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint below `folder`."""
    states = [path.parent for path in (folder / "checkpoint").glob("*/state.json")]
    return max(states, key=lambda step: (step.name[:6], (step / "state.json").stat().st_mtime_ns), default=None)


def trim(folder: Path, lengths: Mapping[str, int]) -> None:
    """The logs cut to `lengths`."""
    for name in LOGS:
        if (folder / name).exists():
            os.truncate(folder / name, lengths.get(name, 0))
