"""The score of each client, method, seed and evaluated round of a comparison, as a CSV for the pages of results.

    python benchmarks/client_scores.py FOLDER OUT.csv            # the main score
    python benchmarks/client_scores.py FOLDER OUT.csv dbpedia14  # the score in one of the tasks that are retained

Finished runs alone; the untrained model (round 0), and means over clients, are left out.
"""

import sys
from pathlib import Path

import fedexperts


def main(folder: Path, out: Path, retained: str | None = None) -> None:
    found = fedexperts.results(folder)
    runs, scores = found.runs, found.evaluations
    rows = found.retained[found.retained.task == retained] if retained else scores[scores.main]
    finished = runs[runs.finished][["setting", "method", "seed"]]
    rows = rows[(rows["round"] > 0) & rows.client.fillna("").ne("")].merge(finished)
    if rows.empty:
        raise SystemExit(f"{folder} has no finished run with scores of clients" + (f" in {retained}" if retained else ""))
    columns = ["method", "seed", "round", "client", "task", "examples", "value"]
    rows[columns].sort_values(columns[:4], kind="stable").to_csv(out, index=False, lineterminator="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
