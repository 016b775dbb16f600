"""What a comparison's runs have cost up to each round, by method and seed, as a CSV for the pages of results.

    python benchmarks/round_costs.py FOLDER OUT.csv

Finished runs alone. Cumulative, setup tasks and failed jobs included: bytes down and up of all clients, FLOPs (estimated).
"""

import sys
from pathlib import Path

import fedexperts


def main(folder: Path, out: Path) -> None:
    found = fedexperts.results(folder)
    finished = found.runs[found.runs.finished][["setting", "method", "seed"]]
    rounds = found.rounds.merge(finished)
    if rounds.empty:
        raise SystemExit(f"{folder} has no finished run")
    rounds = rounds.assign(bytes_sent=rounds.bytes_down + rounds.bytes_up)
    keys, costs = ["setting", "method", "seed", "round"], ["bytes_sent", "flops_estimated"]
    table = rounds.groupby(keys)[costs].sum().groupby(level=keys[:3]).cumsum().reset_index()
    table[keys[1:] + costs].to_csv(out, index=False, lineterminator="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
