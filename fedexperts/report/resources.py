"""What a run cost: bytes, peak memory, and the clients that failed.

MB is 10^6 bytes everywhere. Rows of the task "evaluate" measure the run and are no cost of its method.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from fedexperts.report.read import LedgerRow, RunResults

MB = 1e6


@dataclass(frozen=True)
class Failed:
    """A client left out of a round, and why."""

    round: int
    client: str
    task: str
    reason: str


@dataclass(frozen=True)
class Over:
    """A client whose measured peak was above the memory it has."""

    client: str
    peak_bytes: int
    memory_bytes: int


def counted(run: RunResults, client: str | None = None) -> list[LedgerRow]:
    """The rows that cost the method something: all but the evaluations; those of `client` where one is named."""
    rows = run.ledger if client is None else run.work_of.get(client, ())
    return [row for row in rows if row.task != "evaluate"]


def trained(run: RunResults) -> list[LedgerRow]:
    """The rows of the rounds themselves, without the stages before them."""
    return [row for row in run.ledger if row.task == "train"]


def down(rows: Sequence[LedgerRow]) -> int:
    """Bytes that went down to the clients of `rows`."""
    return sum(row.bytes_down for row in rows)


def up(rows: Sequence[LedgerRow]) -> int:
    """Bytes that came up from the clients of `rows`."""
    return sum(row.bytes_up for row in rows)


def carried(rows: Sequence[LedgerRow]) -> int:
    """Bytes down and up of all `rows`."""
    return down(rows) + up(rows)


def per_client_round(run: RunResults, of: Callable[[Sequence[LedgerRow]], int]) -> float | None:
    """`of` the training rounds' rows for each client's part in a round, on average; stages before the rounds apart."""
    rows = trained(run)
    return of(rows) / len(rows) if rows else None


def bytes_per_client_round(run: RunResults) -> float | None:
    """Bytes down and up that a client's part in a training round takes, on average."""
    return per_client_round(run, carried)


def bytes_before_rounds(run: RunResults) -> float | None:
    """Bytes down and up of all stages before the rounds for each client that took part in them; 0 where there are none."""
    rows = [row for row in counted(run) if row.task != "train"]
    return carried(rows) / max(len({row.client for row in rows}), 1) if run.ledger else None


def peaks(rows: Sequence[LedgerRow]) -> list[int]:
    """The measured peaks of the work that came to its end."""
    return [row.peak_bytes for row in rows if row.failed is None and row.peak_bytes > 0]


def largest_peak(run: RunResults) -> int | None:
    """The largest measured peak of any client."""
    return max(peaks(counted(run)), default=None)


def median_peak(run: RunResults) -> float | None:
    """The median over all clients' training rounds, stages before them apart."""
    measured = peaks(trained(run))
    return median(measured) if measured else None


def failures(run: RunResults) -> list[Failed]:
    """Every client's failure, once, whether the round or the ledger wrote it."""
    in_ledger = {(row.round, row.client, row.task): row.failed for row in run.ledger if row.failed is not None}
    in_rounds = {(row.round, client, row.task): reason for row in run.rounds for client, reason in row.failed.items()}
    merged = in_ledger | in_rounds
    return [Failed(*key, reason) for key, reason in sorted(merged.items())]


def over_memory(run: RunResults) -> list[Over]:
    """The clients whose largest measured peak was above their memory."""
    peak = peak_by_client(run)
    limited = ((client.name, peak.get(client.name, 0), client.memory_bytes) for client in run.plan.clients)
    return [Over(name, most, limit) for name, most, limit in limited if limit is not None and most > limit]


def peak_by_client(run: RunResults) -> dict[str, int]:
    """Each client's largest measured peak."""
    most = {client: max((row.peak_bytes for row in counted(run, client)), default=0) for client in run.work_of}
    return {client: peak for client, peak in most.items() if peak}
