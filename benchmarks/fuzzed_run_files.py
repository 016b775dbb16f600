"""Reads and plans spoiled run files and counts how each ends: planned, refused with a sentence, a traceback, or a hang.

    python benchmarks/fuzzed_run_files.py [--number 7500] [--seed fuzz] [--show]

All in one process, with the base tiny and generated tasks, without the hub, in at most 6 GB of memory. A file that takes above
20 s is a hang; a sentence above 300 characters is counted.
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
from time import perf_counter

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from mutated_run_files import spoiled

from fedexperts import config
from fedexperts.errors import FedExpertsError
from fedexperts.experiment.plan import plan
from fedexperts.experiment.setup import Parts, prepare_run
from fedexperts.models.shapes import load_shapes

PATIENCE = 20  # seconds
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
    options.add_argument("--number", type=int, default=7500)
    options.add_argument("--seed", default="fuzz")
    options.add_argument("--show", action="store_true", help="Show each file that does not end well.")
    given = options.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")

    def hang(*_: object) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, hang)
    ends, slowest, begun, parts = Counter[str](), 0.0, perf_counter(), Parts(load=load_shapes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.toml"
        for number in range(given.number):
            path.write_text(spoiled(f"{given.seed}/{number}"), encoding="utf-8", errors="surrogatepass")
            started = perf_counter()
            signal.alarm(PATIENCE)
            end, said = end_of(path, parts)
            signal.alarm(0)
            slowest = max(slowest, perf_counter() - started)
            ends[end] += 1
            if given.show and end not in ("planned", "refused"):
                print(f"--- {number}: {end}\n{said[-1500:]}", flush=True)
    print(f"{given.number} files in {perf_counter() - begun:.0f} s, the slowest {slowest:.1f} s: {dict(sorted(ends.items()))}")


if __name__ == "__main__":
    main()
