"""Reads and plans spoiled run files and counts how each ends: planned, refused with a sentence, a traceback, or a hang.

    python benchmarks/fuzzed_run_files.py [--first 0] [--number 7500] [--seed fuzz] [--show]

All in one process, with the base tiny and generated tasks, without the hub, in at most 6 GB of memory. A file that takes above
20 s of the processor, or 300 s on the clock, is a hang; a sentence above 300 characters is counted.
"""

import argparse
import os
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path
from time import process_time

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from mutated_run_files import spoiled

from fedexperts import config
from fedexperts.errors import FedExpertsError
from fedexperts.experiment.plan import plan
from fedexperts.experiment.setup import Parts, prepare_run
from fedexperts.models.shapes import load_shapes

PATIENCE = 20  # seconds of the processor, which other processes do not take
PATIENCE_WAITING = 300  # seconds on the clock
LONGEST = 300  # characters of a sentence
MEMORY = 6 * 2**30


class Hang(BaseException):
    """A file that takes too long."""


def end_of(path: Path, parts: Parts) -> tuple[str, str]:
    """How reading and planning `path` ends, and what it says."""
    try:
        plan(prepare_run(config.read(path), parts=parts))
    except FedExpertsError as error:
        return ("a long sentence" if len(str(error)) > LONGEST else "refused"), str(error)
    except Hang:
        return "a hang", "".join(traceback.format_stack(limit=3))
    except Exception:  # what this counts
        return "a traceback", traceback.format_exc(limit=-4)
    return "planned", ""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--first", type=int, default=0)
    options.add_argument("--number", type=int, default=7500)
    options.add_argument("--seed", default="fuzz")
    options.add_argument("--show", action="store_true", help="Show each file that does not end well.")
    given = options.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")

    def hang(*_: object) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, hang)
    signal.signal(signal.SIGPROF, hang)
    ends, slowest, parts = Counter[str](), 0.0, Parts(load=load_shapes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.toml"
        for number in range(given.first, given.first + given.number):
            path.write_text(spoiled(f"{given.seed}/{number}"), encoding="utf-8", errors="surrogatepass")
            started = process_time()
            signal.alarm(PATIENCE_WAITING)
            signal.setitimer(signal.ITIMER_PROF, PATIENCE)
            end, said = end_of(path, parts)
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)
            slowest = max(slowest, process_time() - started)
            ends[end] += 1
            if given.show and end not in ("planned", "refused"):
                print(f"--- {number}: {end}\n{said[-1500:]}", flush=True)
    taken = f"{process_time():.0f} s of the processor, the slowest {slowest:.1f} s"
    print(f"{given.number} files in {taken}: {dict(sorted(ends.items()))}")


if __name__ == "__main__":
    main()
