"""Runs run files on the local engine and on Flower's simulation, all of them over one simulation.

    python tests/agreeing.py TREES.json OUT

TREES.json: name → a run file as a tree. Leaves OUT/local/NAME and OUT/flower/NAME, and last OUT/said.json: the methods that
stopped and why, the processes that played clients, and which of them loaded a base model. A tree's `kill` names a client whose
first training kills the process that plays it; its `hang` one whose first training interrupts the run and never
ends. A program of its own, since Ray's processes end with it.
"""

import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from time import sleep
from typing import Any

from fedexperts.config import RunConfig
from fedexperts.engines.flower.simulation import Simulation
from fedexperts.engines.message import Message
from fedexperts.errors import FedExpertsError
from fedexperts.experiment import flower, runner, setup
from fedexperts.experiment.setup import Parts
from fedexperts.io.toml import checked

WORKERS = 2
load_base = setup.load_base


def play(message: Message, node: Mapping[str, Any]) -> Message:
    """What `flower.play` does, with a note of who plays and who loads."""
    out = Path(json.loads(message.head["run"])["folder"]).parents[1]
    setup.load_base = lambda *given, **named: [load_base(*given, **named), note(out / "loads")][0]
    note(out / "played")
    if is_for(out / "kill", message):
        os.kill(os.getpid(), signal.SIGKILL)
    if is_for(out / "hang", message):
        os.kill(int((out / "driver").read_text()), signal.SIGINT)
        sleep(100_000)
    return flower.play(message, node)


def is_for(path: Path, message: Message) -> bool:
    """Whether the file names the client that is to train; it then goes."""
    job = message.head.get("job", {"task": None})
    found = job["task"] == "train" and path.exists() and path.read_text() == job["client"]
    if found:
        path.unlink()
    return found


def note(path: Path) -> None:
    with path.open("a") as file:
        file.write(f"{os.getpid()}\n")


def pids(path: Path) -> list[int]:
    return [int(line) for line in path.read_text().splitlines()]


def main(trees: Mapping[str, Any], out: Path) -> None:
    parts, stopped = Parts(), {}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    out.mkdir()
    (out / "driver").write_text(str(os.getpid()))
    with Simulation(play, nodes=max(tree["data"]["clients"] for tree in trees.values()) + 1, workers=WORKERS) as simulation:
        over = flower.over(simulation.grid, simulation.check)
        for name, tree in trees.items():
            federation = {**tree["federation"], "engine": "flower", "workers": WORKERS}
            for order in ("kill", "hang"):
                if order in tree:
                    (out / order).write_text(tree.pop(order))
            try:
                runner.run(checked(RunConfig, tree), out / "local" / name, parts=parts)
                config = checked(RunConfig, {**tree, "federation": federation})
                runner.run(config, out / "flower" / name, parts=parts, engine=over)
            except (FedExpertsError, KeyboardInterrupt) as error:
                stopped[name] = str(error)
    said = {"stopped": stopped, "loads": pids(out / "loads"), "played": pids(out / "played")}
    (out / "said.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
