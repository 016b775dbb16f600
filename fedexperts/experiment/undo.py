"""Rounds that are undone: those after which the clients' loss on their validation examples explodes (ours)."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from statistics import median, median_low
from typing import Any

import torch
from torch import Tensor

from fedexperts.core.ledger import Ledger
from fedexperts.experiment.assess import failures
from fedexperts.experiment.pooled import evaluate_clients
from fedexperts.experiment.progress import Progress
from fedexperts.experiment.setup import Prepared
from fedexperts.io.manifest import append
from fedexperts.types import Engine, Server, Update

BUCKETS = 256
"""Numbers of a sketch of an update."""
LARGE = 3.0
"""A change of more than so many times the median norm makes a client a suspect."""


class Undo:
    """Accepts a round unless the median, over clients, of the ratio of their validation losses after and before it is above
    `federation.undo`, or the merged weights are not finite. An undone round leaves the server and the clients' states unchanged.

    The median is that of an honest majority, whatever the others report. Suspects of an undone round are clients whose change
    was large, or pointed away from the others'.
    """

    def __init__(self, prepared: Prepared, engine: Engine, out: Path, progress: Progress) -> None:
        self.prepared, self.engine, self.out, self.progress = prepared, engine, out, progress
        self.most = float(prepared.config.federation.undo or math.inf)
        self.losses = last_losses(out)  # client → validation loss with the server's weights, in nats per token
        self.metrics: Mapping[str, Mapping[str, Any]] | None = None  # of the evaluation of the round's server, if it is accepted
        self.sketches: dict[str, Tensor] = {}
        self.line: dict[str, Any] = {}  # for rounds.jsonl

    def seen(self, server: Server, updates: Iterable[Update]) -> Iterator[Update]:
        """The same updates; keeps a sketch of each change."""
        self.sketches, self.metrics, self.line = {}, None, {}  # also of a round that all clients fail in
        for update in updates:
            self.sketches[update.client] = sketch(server, update)
            yield update

    def accepts(self, before: Server, after: Server) -> bool:
        """Whether the round stays; writes the evaluation's costs into ledger.jsonl."""
        if not self.losses:
            self.losses, _ = self.evaluated(before)
        if unfit := next((name for name, tensor in after.weights.items() if not bool(torch.isfinite(tensor).all())), None):
            return self.undone(after, f"the merged weights hold NaN or infinity in {unfit}")
        losses, metrics = self.evaluated(after)
        ratios = [losses[client] / before for client, before in self.losses.items() if client in losses and 0 < before < math.inf]
        if not ratios:
            self.progress.noted(
                after, "the round stays without a check, since no client has a validation loss before and after it"
            )
        if ratios and (ratio := median_low(ratios)) > self.most:
            why = f"the clients' validation loss is {ratio:.4g} times what it was, above federation.undo = {self.most:g}"
            return self.undone(after, why)
        self.losses, self.metrics, self.line = losses, metrics, {"validation_losses": losses}
        return True

    def undone(self, after: Server, reason: str) -> bool:
        names = suspects(self.sketches)
        whom = f"; suspects: {', '.join(names)}" if names else "; no client stands out"
        self.progress.noted(after, f"the round is undone, since {reason}{whom}")
        self.line = {"undone": reason, "suspects": names}
        return False

    def evaluated(self, server: Server) -> tuple[dict[str, float], Mapping[str, Mapping[str, Any]]]:
        """Each client's validation loss with the weights of `server`, and all metrics of the evaluation."""
        ledger = Ledger()
        metrics = evaluate_clients(self.prepared, server, self.engine, ledger, self.progress)
        self.progress.failed(server, failures(ledger))
        append(self.out / "ledger.jsonl", [entry.as_json() for entry in ledger.entries])
        return {client: loss_of(each["validation"]) for client, each in metrics.items() if "validation" in each}, metrics


def undo_for(prepared: Prepared, engine: Engine, out: Path, progress: Progress) -> Undo | None:
    """Decides whether the rounds of the run stay; None if all do."""
    return Undo(prepared, engine, out, progress) if prepared.config.federation.undo else None


def loss_of(scores: Mapping[str, Mapping[str, Any]]) -> float:
    """Nats per token of the references, of scores as JSON; infinite where they are not finite."""
    nll, tokens = (sum(task[name] for task in scores.values()) for name in ("nll", "tokens"))
    return nll / tokens if tokens and math.isfinite(nll) else math.inf


def last_losses(out: Path) -> dict[str, float]:
    """The validation losses of the last round in rounds.jsonl that was not undone; empty if there are none."""
    path = out / "rounds.jsonl"
    for line in reversed(path.read_text().splitlines() if path.exists() else []):
        if losses := json.loads(line).get("validation_losses"):
            return {client: math.inf if loss is None else loss for client, loss in losses.items()}
    return {}


def sketch(server: Server, update: Update) -> Tensor:
    """Sums of BUCKETS classes of elements of the change, with random signs: inner products of two changes are those of
    their sketches in expectation (Charikar et al., "Finding frequent items in data streams", 2002).
    """
    total = torch.zeros(BUCKETS, dtype=torch.float64)
    for name in sorted(update.patch.tensors):
        sent, weight = update.patch.tensors[name], server.weights.get(name)
        had = None if weight is None else weight[update.patch.rows[name]] if name in update.patch.rows else weight
        change = sent.double() - had.double() if had is not None and had.shape == sent.shape else sent.double()
        flat = torch.nn.functional.pad(change.reshape(-1), (0, -change.numel() % BUCKETS)).view(-1, BUCKETS)
        generator = torch.Generator().manual_seed(int.from_bytes(sha256(name.encode()).digest()[:7], "big"))
        signs = torch.randint(0, 2, (len(flat), 1), generator=generator).double() * 2 - 1
        total += (flat * signs).sum(0)
    return total


def suspects(sketches: Mapping[str, Tensor]) -> list[str]:
    """Clients whose change is more than LARGE times the median norm, or points away from the median direction."""
    norms = {client: float(each.norm()) for client, each in sketches.items()}
    if len(norms) < 3:  # of two nobody can say which one is wrong
        return []
    typical = median(norms.values())
    directions = torch.stack([each / max(norms[client], 1e-300) for client, each in sketches.items()])
    middle = directions.median(0).values
    away = {client for client, each in zip(sketches, directions, strict=True) if norms[client] > 0 and float(each @ middle) <= 0}
    return [client for client, norm in norms.items() if not norm <= LARGE * typical or client in away]
