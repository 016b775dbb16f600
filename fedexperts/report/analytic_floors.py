"""The least bytes and memory that a client's sub-model can take, beside what was measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from fedexperts.report import expert_sets, resources
from fedexperts.report.read import RunResults
from fedexperts.report.resources import MB


@dataclass(frozen=True)
class Floor:
    """What a client's part in a round took beside the least that its sub-model can take, in MB, as means over all parts."""

    cost: str
    measured: float
    analytic: float


def floors(run: RunResults) -> list[Floor]:
    """What clients' parts in training rounds took, beside the analytic floor, where the plan has what that is made of.

    Down: the weights of the experts a client held and all others that travel. Up: of those it sent. Memory: weights and
    optimiser state of what it held, and the larger of gradients and activations, since one comes as the other goes; none where
    backward reached only some of the experts.
    """
    held = {(row.round, client): each for row in expert_sets.training(run) for client, each in row.holds.items()}
    sent = held | {(row.round, client): each for row in expert_sets.training(run) for client, each in row.sends.items()}
    rows = [row for row in resources.trained(run) if row.failed is None and (row.round, row.client) in held]
    if (patch := run.plan.patch) is None or not rows:
        return []
    down, up = ([patch.of(which[row.round, row.client]) for row in rows] for which in (held, sent))
    found = [_floor("down", [row.bytes_down for row in rows], down), _floor("up", [row.bytes_up for row in rows], up)]
    measured = [row.peak_bytes for row in rows]
    if (memory := run.plan.memory) is None or not all(measured) or expert_sets.told(run, "reached"):
        return found
    floor = [
        memory.of(held[row.round, row.client]) + max(memory.activation_bytes - gradients, 0)
        for row, gradients in zip(rows, down, strict=True)
    ]
    return [*found, _floor("peak memory", measured, floor)]


def _floor(cost: str, measured: Sequence[int], analytic: Sequence[int]) -> Floor:
    return Floor(cost, fmean(measured) / MB, fmean(analytic) / MB)
