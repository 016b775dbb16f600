"""The main score of each client, method, seed and evaluated round of a comparison, as a CSV for the pages of results.

    python benchmarks/client_scores.py FOLDER OUT.csv

Finished runs alone; the untrained model (round 0), and means over clients, are left out.
"""

import sys
from pathlib import Path

import fedexperts


def main(folder: Path, out: Path) -> None:
    found = fedexperts.results(folder)
    runs, rows = found.runs, found.evaluations
    finished = runs[runs.finished][["setting", "method", "seed"]]
    rows = rows[rows.main & (rows["round"] > 0) & rows.client.fillna("").ne("")].merge(finished)
    columns = ["method", "seed", "round", "client", "task", "examples", "value"]
    rows[columns].sort_values(columns[:4], kind="stable").to_csv(out, index=False, lineterminator="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
