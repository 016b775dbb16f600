"""A server on disk after every round, whole or not at all, and the way back."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from fedexperts.files import write_tensors, write_text
from fedexperts.types import Server

LOGS = ("rounds.jsonl", "evals.jsonl", "ledger.jsonl")


def save(folder: Path, server: Server) -> None:
    """The server after its last round, and how long the logs were then, below `folder`/checkpoint.

    Nothing random is saved because nothing is carried over: every draw is seeded by its round and its client.
    """
    checkpoint = folder / "checkpoint"
    step = checkpoint / f"{server.round:06d}-{server.task}"
    shutil.rmtree(step, ignore_errors=True)  # of an attempt that was killed before its state.json
    write_tensors(step / "weights.safetensors", server.weights)
    write_tensors(step / "memory.safetensors", server.memory)
    lengths = {name: (folder / name).stat().st_size for name in LOGS if (folder / name).exists()}
    state = {"round": server.round, "task": server.task, "logs": lengths}
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
    return replace(server, weights=weights, memory=memory, round=state["round"], task=state["task"])


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
