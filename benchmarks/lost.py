"""What each run file under runs/ loses of its data, as its plan says: docs/results/lost.csv.

    python benchmarks/lost.py [OUT.csv]

Needs FEDEXPERTS_DATA.
"""

import csv
import json
import subprocess
import sys
from pathlib import Path

RUN_FILES = [*sorted(Path("runs").glob("*/*.toml")), Path("runs/quickstart.toml"), Path("runs/real.toml")]
SHARES = ("prompts_cut", "prompt_tokens_lost", "answers_cut", "references_cut", "tested_on_training", "majority")


def main(out: Path) -> None:
    rows = []
    for path in RUN_FILES:
        planned = subprocess.run(
            [sys.executable, "-m", "fedexperts", "plan", path, "--json"], capture_output=True, text=True, check=False
        )
        if planned.returncode:
            print(f"{path}: {planned.stderr.strip().splitlines()[-1]}")
            continue
        for row in json.loads(planned.stdout)["lost"]:
            rows.append((path, row["task"], row["examples"], *(f"{100 * row[name]:.1f}" for name in SHARES)))
            print(*rows[-1], flush=True)
    with out.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("run_file", "task", "examples", *SHARES), *rows])


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("docs/results/lost.csv"))
