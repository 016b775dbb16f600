"""Runs a run file in child processes that kill themselves at some touch of the results folder, and resumes it until it is done.

    python tests/resuming.py RUN.toml OUT [seed]

Without a seed nothing is killed. Prints, as JSON, how many touches there were at the end and how many children were killed.
A program of its own, since a fork of a process that has threads is none: here nothing has trained before the fork.
"""

import json
import os
import signal
import sys
from itertools import count
from pathlib import Path
from random import Random

import torch

from fedexperts import config
from fedexperts.config import RunConfig
from fedexperts.experiment import runner
from fedexperts.experiment.setup import Parts, prepare_run

TOUCHES = ("open", "os.rename", "os.mkdir", "os.truncate", "os.remove", "os.rmdir", "shutil.rmtree")
MOST_KILLS = 4


def attempt(settings: RunConfig, parts: Parts, out: Path, last: int) -> tuple[bool, int]:
    """Whether the child ended by itself, and how often it touched `out`; it is killed just before its `last` touch."""
    receiving, sending = os.pipe()
    child = os.fork()
    if not child:
        touched = count(1)

        def notice(event: str, args: tuple) -> None:
            if event in TOUCHES and str(args[0]).startswith(str(out)):
                number = next(touched)
                os.write(sending, b".")
                if number == last:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(notice)
        runner.run(settings, out, resume=True, parts=parts)
        os._exit(0)
    os.close(sending)
    with os.fdopen(receiving, "rb") as pipe:
        touches = len(pipe.read())
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0, "a child failed by itself"
    return os.WIFEXITED(status), touches


def main(run_file: Path, out: Path, seed: str | None) -> None:
    torch.set_num_threads(1)
    settings, parts = config.read(run_file), Parts()
    prepare_run(settings, parts=parts)  # all children have what it loads and counts
    rng, kills, done, touches = Random(seed), 0, False, 0
    while not done:
        last = rng.randint(1, 60) if seed is not None and kills < MOST_KILLS else 0
        done, touches = attempt(settings, parts, out, last)
        kills += not done
    print(json.dumps({"touches": touches, "kills": kills}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
