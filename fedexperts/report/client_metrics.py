"""Metrics that clients report with their updates: `reached`, which the core defines, and those that a method defines."""

from collections.abc import Mapping
from math import isfinite

from fedexperts.report import resources
from fedexperts.report.read import RunResults

CORE = frozenset({"loss", "reached", "routed"})  # all others belong to the method


def reached(run: RunResults) -> dict[str, list[float]]:
    """MoE block → experts that backward reached per step, one number per client and training round; empty if not reported."""
    blocks = list(run.plan.model.blocks)
    rows = [_per_block(row.metrics.get("reached"), blocks) for row in resources.training_rows(run)]
    return {block: [row[i] for row in rows if row] for i, block in enumerate(blocks)} if any(rows) else {}


def of_method(run: RunResults) -> dict[str, list[float]]:
    """Name → the numbers that clients reported under it, one per client and training round, for metrics of the method."""
    values: dict[str, list[float]] = {}
    for row in resources.training_rows(run):
        for name, value in row.metrics.items():
            if name not in CORE and (number := _finite(value)) is not None:
                values.setdefault(name, []).append(number)
    return values


def _per_block(value: object, blocks: list[str]) -> list[float]:
    """`value`, a list or a mapping with a number for each block, in the order of `blocks`; empty if it is anything else."""
    if isinstance(value, Mapping):
        value = [value.get(block) for block in blocks]
    numbers = [_finite(each) for each in value] if isinstance(value, list) else []
    finite = [each for each in numbers if each is not None]
    return finite if len(finite) == len(numbers) == len(blocks) else []


def _finite(value: object) -> float | None:
    """`value` as a float; None if it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # an int of more than 308 digits
        return None
    return number if isfinite(number) else None
