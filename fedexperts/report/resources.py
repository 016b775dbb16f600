"""What a run cost: bytes, peak memory, and the clients that failed.

MB is 10^6 bytes everywhere. Rows of the task "evaluate" measure the run and are not a cost of its method.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from fedexperts.report.read import LedgerRow, RunResults

MB = 1e6


@dataclass(frozen=True)
class ClientFailure:
    """A client that failed in a round, and why."""

    round: int
    client: str
    task: str
    reason: str


@dataclass(frozen=True)
class MemoryExcess:
    """A client whose measured peak exceeded its memory."""

    client: str
    peak_bytes: int
    memory_bytes: int


def cost_rows(run: RunResults, client: str | None = None) -> list[LedgerRow]:
    """The rows that count as the method's cost (all but evaluations), of all clients or of `client` only."""
    rows = run.ledger if client is None else run.work_of.get(client, ())
    return [row for row in rows if row.task != "evaluate"]


def training_rows(run: RunResults) -> list[LedgerRow]:
    """The rows of the training rounds, without the setup tasks before them."""
    return [row for row in run.ledger if row.task == "train"]


def bytes_down(rows: Sequence[LedgerRow]) -> int:
    """Bytes sent from the server to the clients of `rows`."""
    return sum(row.bytes_down for row in rows)


def bytes_up(rows: Sequence[LedgerRow]) -> int:
    """Bytes sent to the server by the clients of `rows`."""
    return sum(row.bytes_up for row in rows)


def bytes_both_ways(rows: Sequence[LedgerRow]) -> int:
    """Bytes of all `rows`, down and up together."""
    return bytes_down(rows) + bytes_up(rows)


def per_client_round(run: RunResults, of: Callable[[Sequence[LedgerRow]], int]) -> float | None:
    """`of` the training rows, divided by their number: the mean per client and round, without setup tasks."""
    rows = training_rows(run)
    return of(rows) / len(rows) if rows else None


def bytes_per_client_round(run: RunResults) -> float | None:
    """Mean bytes, down and up together, per client and training round."""
    return per_client_round(run, bytes_both_ways)


def bytes_before_rounds(run: RunResults) -> float | None:
    """Bytes of the setup tasks, down and up, per client that took part in them; 0 without setup tasks."""
    rows = [row for row in cost_rows(run) if row.task != "train"]
    return bytes_both_ways(rows) / max(len({row.client for row in rows}), 1) if run.ledger else None


def peaks(rows: Sequence[LedgerRow]) -> list[int]:
    """The measured peaks of the jobs that did not fail."""
    return [row.peak_bytes for row in rows if row.failed is None and row.peak_bytes > 0]


def largest_peak(run: RunResults) -> int | None:
    """The largest measured peak of any client."""
    return max(peaks(cost_rows(run)), default=None)


def median_peak(run: RunResults) -> float | None:
    """The median peak over all clients' training rounds, without setup tasks."""
    measured = peaks(training_rows(run))
    return median(measured) if measured else None


def failures(run: RunResults) -> list[ClientFailure]:
    """Every failure of a client once, whether rounds.jsonl or ledger.jsonl has it."""
    in_ledger = {(row.round, row.client, row.task): row.failed for row in run.ledger if row.failed is not None}
    in_rounds = {(row.round, client, row.task): reason for row in run.rounds for client, reason in row.failed.items()}
    merged = in_ledger | in_rounds
    return [ClientFailure(*key, reason) for key, reason in sorted(merged.items())]


def over_memory(run: RunResults) -> list[MemoryExcess]:
    """The clients whose largest measured peak exceeded their memory."""
    peak = peak_by_client(run)
    limited = ((client.name, peak.get(client.name, 0), client.memory_bytes) for client in run.plan.clients)
    return [MemoryExcess(name, most, limit) for name, most, limit in limited if limit is not None and most > limit]


def peak_by_client(run: RunResults) -> dict[str, int]:
    """Each client's largest measured peak."""
    most = {client: max((row.peak_bytes for row in cost_rows(run, client)), default=0) for client in run.work_of}
    return {client: peak for client, peak in most.items() if peak}
