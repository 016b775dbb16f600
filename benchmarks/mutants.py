"""How many small bugs the tests catch: each mutant of mutants.json in a copy of the package, one after the other.

    python benchmarks/mutants.py --commit HEAD   # those that mutants.csv does not have yet, or whose text has changed since
    python benchmarks/mutants.py --again 3 17    # these once more, after tests were added: only the columns `after…` change

A mutant is a change of one line. Its tests run file by file, cheap ones first, until one fails: then it is killed. A file that
fails without any mutant is left out. Package and tests are those of a commit, or copied from the working tree, which is never
written, except for mutants.csv.

Each file runs in a fork of this process, which has imported the libraries, but not the package: that saves most of the time.
"""

import argparse
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from time import perf_counter, sleep

ROOT = Path(__file__).resolve().parent.parent
MUTANTS, RESULTS = ROOT / "benchmarks" / "mutants.json", ROOT / "benchmarks" / "mutants.csv"
LIMIT_SECONDS = 240.0  # of one test file
LIBRARIES = ("torch", "transformers.integrations.moe", "peft", "pydantic", "rouge_score.rouge_scorer", "typer", "pytest")
SURVIVED = "survived"


@dataclass(frozen=True)
class Mutant:
    """A small bug: `old`, which stands once in `file`, becomes `new`."""

    number: int
    file: str
    old: str
    new: str
    description: str
    tests: Sequence[str]  # files, in the order in which they run; "FILE -k EXPRESSION": some tests of one

    @property
    def key(self) -> str:
        """Changes with the text of the mutant."""
        return sha256(f"{self.file}\n{self.old}\n{self.new}".encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Result:
    """A line of mutants.csv. before: of the suite as it was when the mutants were chosen; after: with the tests added since."""

    number: int
    file: str
    description: str
    before: str  # "killed" or "survived"
    killed_before_by: str  # the first test that failed
    after: str
    killed_after_by: str
    seconds: float
    key: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", type=int, nargs="+", default=[], help="numbers of mutants to run once more")
    parser.add_argument("--commit", help="take the files of this commit, not of the working tree")
    options = parser.parse_args()
    again = options.again
    mutants = [Mutant(**each) for each in json.loads(MUTANTS.read_text())]
    results = read_results(mutants)
    todo = [each for each in mutants if (each.number in again if again else each.number not in results)]
    for name in LIBRARIES:
        import_module(name)
    with copy_of_tree(options.commit) as copy:
        sound: dict[str, bool] = {}
        for mutant in todo:
            result = run(mutant, copy, sound)
            if mutant.number in again and (earlier := results.get(mutant.number)):
                result = replace(earlier, after=result.after, killed_after_by=result.killed_after_by)
            results[mutant.number] = result
            print(f"{mutant.number:3} {result.after:8} {result.killed_after_by}  {mutant.description}", flush=True)
            write_results(results)
    print(shares(results.values()))


def run(mutant: Mutant, copy: Path, sound: dict[str, bool]) -> Result:
    """What its tests say of `mutant`, in `copy`, which is as before afterwards; `sound`: files that are known to pass without."""
    path, started, killer = copy / mutant.file, perf_counter(), ""
    text = path.read_text()
    assert text.count(mutant.old) == 1, f"mutant {mutant.number}: its text stands {text.count(mutant.old)} times in {mutant.file}"
    for file in mutant.tests:
        path.write_text(text.replace(mutant.old, mutant.new))
        failed = first_failure(copy, file)
        path.write_text(text)
        if failed and file not in sound:
            unsound = first_failure(copy, file)
            sound[file] = unsound is None
            if unsound:
                print(f"    left out: {unsound} fails without a mutant", flush=True)
        if failed and sound[file]:
            killer = failed
            break
    state, seconds = ("killed" if killer else SURVIVED), round(perf_counter() - started, 1)
    return Result(mutant.number, mutant.file, mutant.description, state, killer, state, killer, seconds, mutant.key)


def first_failure(copy: Path, file: str) -> str | None:
    """The first test of `file` that fails in `copy`; None where all pass, or where they take too long to say."""
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        child = os.fork()
        if child == 0:
            test_and_exit(copy, file, log.fileno())
        status = wait_for(child)
        written = Path(log.name).read_text(errors="replace")
    if status in (None, 0):
        return None
    match = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", written, re.MULTILINE)
    return match.group(1) if match else f"{file} ended with status {status}"


def test_and_exit(copy: Path, file: str, log: int) -> None:
    """Runs pytest on `file` in this process, which was forked for it, and ends it."""
    os.setsid()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(copy)
    os.environ |= {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "COLUMNS": "500", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True  # a mutant is restored within the second by which Python tells whether a file has changed
    sys.path[:] = [str(copy), *(each for each in sys.path if Path(each or ".").resolve() not in (ROOT, ROOT / "benchmarks"))]
    status = 99
    try:
        options = ["-x", "-q", "-rfE", "--tb=line", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
        status = int(import_module("pytest").main([*options, *file.split(" ", 2)]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait_for(child: int) -> int | None:
    """The exit status of `child`; None where it took longer than LIMIT_SECONDS and was ended with all that it had started."""
    deadline = perf_counter() + LIMIT_SECONDS
    while perf_counter() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


@contextmanager
def copy_of_tree(commit: str | None) -> Iterator[Path]:
    """A copy of the files of `commit`; None: of all in the working tree that git tracks, or would."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        if commit:
            archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
            subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
        else:
            listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
            names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
            for name in (name for name in names if (ROOT / name).is_file()):
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, Path(folder) / name)
        yield Path(folder)


def read_results(mutants: Sequence[Mutant]) -> dict[int, Result]:
    """Number → the line of mutants.csv, of mutants whose text is the same as then."""
    if not RESULTS.exists():
        return {}
    keys = {each.number: each.key for each in mutants}
    with RESULTS.open(newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["number"].isdigit()]
    found = [Result(**{**line, "number": int(line["number"]), "seconds": float(line["seconds"])}) for line in lines]  # type: ignore[arg-type]
    return {each.number: each for each in found if keys.get(each.number) == each.key}


def write_results(results: dict[int, Result]) -> None:
    """mutants.csv, with the shares in its last line."""
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, Result.__dataclass_fields__.keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(results[number]) for number in sorted(results))
        writer.writerow({"number": "share", "description": shares(results.values())})


def shares(results: Iterable[Result]) -> str:
    """How many were killed, before and after."""
    lines = list(results)
    before, after = (sum(getattr(each, column) == "killed" for each in lines) for column in ("before", "after"))
    return f"killed: {before} of {len(lines)} before ({before / len(lines):.1%}), {after} after ({after / len(lines):.1%})"


if __name__ == "__main__":
    main()
