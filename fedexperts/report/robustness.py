"""What robust merging could not do and rounds that were undone, in sentences beside the tables."""

import tomllib
from collections import Counter
from collections.abc import Mapping
from typing import Any

from fedexperts.methods.robust import FEWEST
from fedexperts.report.expert_sets import training_rounds
from fedexperts.report.read import Groups, Round, RunResults


def warning(groups: Groups) -> str:
    """The sentences about `groups`; empty if no round was undone and each expert had contributors enough."""
    return " ".join(filter(None, [undone(groups), few_contributors(groups)]))


def undone(groups: Groups) -> str:
    """A sentence about the rounds that were undone, with the suspects; empty if there are none."""
    found = []
    for label, runs in groups.items():
        rounds = [(row, run) for run in runs for row in run.rounds if row.undone]
        names = Counter(name for row, _ in rounds for name in row.suspects)
        whom = ", ".join(f"{name} {number} times" for name, number in sorted(names.items()))
        if rounds:
            found.append(f"{label} {len(rounds)} ({f'suspects: {whom}' if names else 'no client stood out'})")
    return f"Warning: rounds were undone (federation.undo): {'; '.join(found)}." if found else ""


def few_contributors(groups: Groups) -> str:
    """A sentence about experts that too few clients sent for the robust rule; empty if there are none."""
    found = []
    for label, runs in groups.items():
        few, merged = map(sum, zip(*(counted(run) for run in runs), strict=True)) if runs else (0, 0)
        if few:
            found.append(f"{label} {few} of {merged} ({100 * few / merged:.3g} %)")
    return (
        "Warning: for some merges of an expert too few clients sent it for the robust rule, so they are clipped means with the "
        f"server's own expert as one voice: {'; '.join(found)}."
        if found
        else ""
    )


def counted(run: RunResults) -> tuple[int, int]:
    """Merges of an expert with too few contributors for the run's robust rule, and all merges; (0, 0) without such a rule."""
    robust = rule_of(run)
    if robust.get("name") not in FEWEST:
        return 0, 0
    counts = [number for row in training_rounds(run) for number in contributors(row, robust)]
    return sum(few for few, _ in counts), sum(merged for _, merged in counts)


def contributors(row: Round, robust: Mapping[str, Any]) -> list[tuple[int, int]]:
    """For each MoE block: its experts with too few contributors, and those that were sent at all."""
    clients = [client for client in row.holds if client not in row.failed]
    fewest = FEWEST[robust["name"]](int(float(robust.get("attackers", 0.2)) * len(clients)))
    sent: dict[str, Counter[int]] = {}
    for client in clients:
        for block, experts in {**row.holds[client], **row.sends.get(client, {})}.items():
            sent.setdefault(block, Counter()).update(experts)
    return [(sum(number <= fewest for number in counts.values()), len(counts)) for counts in sent.values()]


def rule_of(run: RunResults) -> Mapping[str, Any]:
    """The settings of the run's robust merging; empty if it has none or its run file cannot be read."""
    try:
        robust = tomllib.loads(run.run_file).get("federation", {}).get("robust", {})
    except (tomllib.TOMLDecodeError, AttributeError):
        return {}
    return robust if isinstance(robust, dict) else {"name": robust}
