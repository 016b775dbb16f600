"""What answers that need no model score in the settings of docs/results: docs/results/reference_lines.csv, per seed.

    python benchmarks/reference_lines.py [OUT.csv]

The constant answer (the most frequent one in the client's training data) and a copy of the input, on the same test examples and
by the same metrics as the tables. `table` is the CSV of such a table. Needs FEDEXPERTS_DATA. Later
tables have these lines in their own CSVs.
"""

import csv
import sys
from pathlib import Path

from fedexperts.config import read
from fedexperts.experiment.reference_lines import lines_of
from fedexperts.experiment.setup import Parts, prepare_run

TABLES = {
    "flex/superni": ("runs/flex/superni.toml", [], 5),
    "flex/pathological": ("runs/flex/pathological.toml", [], 3),
    "flex/dirichlet-0.5": ("runs/flex/dirichlet.toml", ["data.partition.alpha=0.5"], 3),
    "flex/dirichlet-1.0": ("runs/flex/dirichlet.toml", ["data.partition.alpha=1.0"], 3),
    "fedmoe/standard-t": ("runs/fedmoe/standard-t.toml", [], 3),
    "fedmoe/standard-td": ("runs/fedmoe/standard-td.toml", [], 3),
    "fedmoe/enforced-t": ("runs/fedmoe/enforced-t.toml", [], 3),
    "fedmoe/enforced-td": ("runs/fedmoe/enforced-td.toml", [], 3),
    "hfedmoe/four": ("runs/hfedmoe/four.toml", [], 3),
    "hfedmoe/twenty": ("runs/hfedmoe/twenty.toml", [], 3),
}
"""CSV of a table → its run file, settings on top, and number of seeds."""
COLUMNS = ("table", "seed", "line", "task", "metric", "examples", "value")


def main(out: Path) -> None:
    rows, parts = [], Parts()
    for table, (run_file, changes, seeds) in TABLES.items():
        for seed in range(seeds):
            config = read(Path(run_file), [*changes, f"seed={seed}", "evaluation.retained=[]"])
            for line in lines_of(prepare_run(config, parts=parts)):
                if line["client"] is None:
                    found = (line["line"], line["task"] or "", line["metric"], line["examples"], line["value"])
                    rows.append((table, seed, *found))
        print(table, flush=True)
    with out.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("docs/results/reference_lines.csv"))
