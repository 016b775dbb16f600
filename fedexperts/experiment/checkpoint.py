"""Atomic checkpoints of the server after each step of a run, and how a run resumes from them."""

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
    """Saves the server, the lengths of the logs and the versions of the client states on this machine to `folder`/checkpoint.

    No generator state is saved: every draw is seeded by its round and its client.
    """
    checkpoint = folder / "checkpoint"
    step = checkpoint / job_key(server.round, server.task)
    shutil.rmtree(step, ignore_errors=True)  # of a process that was killed before it wrote state.json
    write_tensors(step / "weights.safetensors", server.weights)
    write_tensors(step / "method_state.safetensors", server.method_state)
    lengths = {name: (folder / name).stat().st_size for name in LOGS if (folder / name).exists()}
    client_states = {client: job for client, job in server.accepted.items() if state_path(folder, client, job).exists()}
    state = {
        "round": server.round,
        "task": server.task,
        "logs": lengths,
        "accepted": dict(server.accepted),
        "kept": client_states,
    }
    write_text(step / "state.json", json.dumps(state))  # written last: it completes the checkpoint
    for other in checkpoint.iterdir():
        if other != step:
            shutil.rmtree(other)


def rewind(folder: Path, method: Method, rounds: int) -> int:
    """Number of the run's steps that were completed at the last checkpoint in `folder`.

    Truncates the logs to that checkpoint, because later rounds will be repeated.
    """
    saved = latest(folder)
    state = json.loads((saved / "state.json").read_text()) if saved else {"logs": {}}
    trim(folder, state["logs"])
    return steps(method, rounds).index((state["round"], state["task"])) + 1 if saved else 0


def load(folder: Path, server: Server) -> Server:
    """`server` in the state of the last checkpoint in `folder`; unchanged without a checkpoint."""
    saved = latest(folder)
    return server if saved is None else restored(saved, server)


def restored(saved: Path, server: Server) -> Server:
    """`server` in the state of the checkpoint in `saved`."""
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
    client_states = json.loads((saved / "state.json").read_text()).get("kept", {}) if saved else {}
    for client, job in client_states.items():
        path = state_path(folder, client, job)
        if name in (None, client) and not path.exists():
            raise BadRun(
                f"what {client} keeps to itself is gone: there is no {path}; bring it back, or run anew with another --out"
            )


def tensors(saved: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The server's weights and the method state in the checkpoint in `saved`."""
    state = saved / "method_state.safetensors"
    return load_file(saved / "weights.safetensors"), load_file(state if state.exists() else saved / "memory.safetensors")


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`."""
    states = [path.parent for path in (folder / "checkpoint").glob("*/state.json")]
    return max(states, key=lambda step: (step.name[:6], (step / "state.json").stat().st_mtime_ns), default=None)


def trim(folder: Path, lengths: Mapping[str, int]) -> None:
    """Truncates the logs to `lengths` in bytes."""
    for name in LOGS:
        if (folder / name).exists():
            os.truncate(folder / name, lengths.get(name, 0))
