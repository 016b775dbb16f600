"""The answers that clients show at an evaluation, as lines of a results folder."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedexperts.core.ledger import Ledger
from fedexperts.experiment.setup import Prepared
from fedexperts.io.manifest import PREDICTIONS, append


def keep_predictions(prepared: Prepared, round: int, ledger: Ledger, out: Path) -> None:
    """Appends the answers that clients sent with their scores to predictions.jsonl; writes nothing if there are none."""
    if lines := list(lines_of(prepared, round, ledger)):
        append(out / PREDICTIONS, lines)


def lines_of(prepared: Prepared, round: int, ledger: Ledger) -> Iterator[Mapping[str, Any]]:
    metrics, sources = prepared.clients.metrics(), prepared.clients.pool.sources
    named = ", ".join(source.name for source in prepared.config.data.sources)  # where the pool does not know the sources
    for client, rows in ledger.predictions.items():
        for row in rows:
            task = row["task"]
            yield {"round": round, "client": client, **row, "source": sources.get(task, named), "metric": metrics[task]}
