"""Measured bytes and memory of clients beside the analytic minimum for their sub-models."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from fedexperts.report import client_metrics, expert_sets, resources
from fedexperts.report.read import RunResults
from fedexperts.report.resources import MB
from fedexperts.types import BLOCK

LEAST = {"float32": 1.0, "bfloat16": 0.5, "int8": (1 + 4 / BLOCK) / 4}
"""The dtype that weights travel in → bytes that they take at least, over those in float32."""


@dataclass(frozen=True)
class Floor:
    """A measured cost and the analytic minimum for the same sub-models, in MB, as means over clients and rounds."""

    cost: str
    measured: float
    analytic: float


def floors(run: RunResults) -> list[Floor]:
    """Measured costs of training rounds beside their analytic floors; none if plan.json lacks the sizes of weights.

    Down: the weights of the assigned experts and all dense weights that are sent. Up: the same for the experts that were sent.
    Memory: weights and optimizer state of the sub-model, and the larger of gradients and activations, since gradients are
    allocated as activations are freed; no floor of memory if backward reached only some of the experts.
    """
    assigned = {(row.round, client): each for row in expert_sets.training_rounds(run) for client, each in row.holds.items()}
    sent = assigned | {
        (row.round, client): each for row in expert_sets.training_rounds(run) for client, each in row.sends.items()
    }
    rows = [row for row in resources.training_rows(run) if row.failed is None and (row.round, row.client) in assigned]
    if (patch := run.plan.patch) is None or not rows:
        return []
    down, up = ([patch.of(which[row.round, row.client]) for row in rows] for which in (assigned, sent))
    share = LEAST[patch.wire_dtype]
    both = [
        _floor("down", [row.bytes_down for row in rows], [share * each for each in down]),
        _floor("up", [row.bytes_up for row in rows], [share * each for each in up]),
    ]
    measured = [row.peak_bytes for row in rows]
    if (memory := run.plan.memory) is None or not all(measured) or client_metrics.reached(run):
        return both
    floor = [
        memory.of(assigned[row.round, row.client]) + max(memory.activation_bytes - gradients, 0)
        for row, gradients in zip(rows, down, strict=True)
    ]
    return [*both, _floor("peak memory", measured, floor)]


def _floor(cost: str, measured: Sequence[int], analytic: Sequence[float]) -> Floor:
    return Floor(cost, fmean(measured) / MB, fmean(analytic) / MB)
