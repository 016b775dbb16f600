"""Robust merging: a wrapper that limits what single clients can do to the server's weights, row by row.

The updates of a round are kept on disk until all are there. Each is then passed on to the method with other weights: clipped, or
with the robust value of each row in place of its own, so that the method's mean of them is this value. Rules:

clip: each client's change is scaled down to `multiple` times the median norm of the round's clients (norm clipping, Sun et al.,
    "Can you really backdoor federated learning?", 2019, https://arxiv.org/abs/1911.07963, the median for a constant).
trimmed_mean, median: of each coordinate (Yin et al., "Byzantine-robust distributed learning", ICML 2018, definitions 1 and 2).
krum, multi_krum: of each row the client whose row is closest to its neighbors', or the mean of the n − f closest ones (Blanchard
    et al., "Machine learning with adversaries", NeurIPS 2017, sections 4 and 5).
geometric_median: of each row, by the smoothed Weiszfeld algorithm (Pillutla et al., "Robust aggregation for federated learning",
    2022, https://arxiv.org/abs/1912.13445, algorithm 2).

All rules but clip give every client the same weight. (ours) They are applied to rows, since clients may send different experts;
and a row with too few contributors for the rule becomes a clipped mean in which the server's own row is one more voice. That is
how experts are merged that few clients train, through which one client could otherwise do what it likes (BadMoE,
https://arxiv.org/abs/2504.18598).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median_low
from tempfile import TemporaryDirectory
from typing import Annotated, Literal, cast

import torch
from jaxtyping import Float
from pydantic import ConfigDict, Field
from safetensors import safe_open
from torch import Tensor

from fedexperts.io.files import safetensors_bytes
from fedexperts.methods.base import Positive
from fedexperts.methods.contract import Wrapper
from fedexperts.types import Patch, Server, Tensors, Update

Name = Literal["clip", "trimmed_mean", "median", "krum", "multi_krum", "geometric_median"]
Voices = Float[Tensor, "voices rows width"]
"""The same rows of several clients, in float64."""

WEISZFELD_STEPS = 32
SMOOTHING = 1e-6


@dataclass(frozen=True)
class RobustMerging:
    """A rule, and how many clients it has to withstand.

    attackers: the share of a round's clients that may send anything: f = ⌊attackers · n⌋, and at least one, unless it is 0.
    multiple: of the median norm, to which a change is clipped (clip, and rows with too few contributors).
    examples: of the median number of examples, at which a client's weight ends.

    Medians of an even number are the lower of the middle two: of two clients, the larger does not set its own limit.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: Name = "clip"
    attackers: Annotated[float, Field(ge=0, lt=0.5)] = 0.2
    multiple: Positive = 2.0
    examples: Positive = 3.0

    def faulty(self, answers: int) -> int:
        """f: how many of so many answers the rule has to withstand."""
        return max(1, int(self.attackers * answers + 1e-9)) if self.attackers else 0  # 0.29 of 100 are 29

    def is_enough(self, contributors: int, answers: int) -> bool:
        """Whether a row that so many of a round's clients sent becomes the rule's, or else a clipped mean."""
        return contributors > FEWEST[self.name](self.faulty(answers))


@dataclass(frozen=True)
class WithRobustMerging(Wrapper):
    """`method`, whose merge gets robust updates; setup tasks are unchanged."""

    robust: RobustMerging

    def merge(self, server: Server, updates: Iterable[Update]) -> Server:
        if server.task != "train":
            return self.method.merge(server, updates)
        with TemporaryDirectory(prefix="fedexperts-robust-") as folder:
            spool = [Spooled.written(Path(folder) / f"{number}.safetensors", update) for number, update in enumerate(updates)]
            most = self.robust.examples * median_low([each.update.examples for each in spool]) if spool else 0.0
            spool = [each.of_at_most(max(1, round(most))) for each in spool]
            changed = clipped(server, spool, self.robust) if self.robust.name == "clip" else replaced(server, spool, self.robust)
            return self.method.merge(server, changed)


@dataclass(frozen=True)
class Spooled:
    """An update whose weights are in a file."""

    path: Path
    update: Update  # without weights

    @classmethod
    def written(cls, path: Path, update: Update) -> "Spooled":
        path.write_bytes(safetensors_bytes(update.patch.tensors))
        return cls(path, replace(update, patch=replace(update.patch, tensors={})))

    def of_at_most(self, examples: int) -> "Spooled":
        """The same, whose client counts with no more than so many examples."""
        return replace(self, update=replace(self.update, examples=min(self.update.examples, examples)))

    @property
    def names(self) -> list[str]:
        """The weights that the client sent, sorted: sums over them are in one order."""
        with safe_open(self.path, "pt") as file:
            return sorted(file.keys())

    def tensor(self, name: str) -> Tensor:
        with safe_open(self.path, "pt") as file:
            return cast("Tensor", file.get_tensor(name))

    def ids(self, name: str, number: int) -> Tensor:
        """The rows of the server's tensor of `number` rows that the update has."""
        return self.update.patch.rows.get(name, torch.arange(number))

    def with_tensors(self, tensors: Tensors) -> Update:
        patch: Patch = self.update.patch
        return replace(self.update, patch=replace(patch, tensors=tensors))


def clipped(server: Server, spool: Sequence[Spooled], robust: RobustMerging) -> Iterator[Update]:
    """The updates with changes of at most `multiple` times the median norm; a norm is per weight sent, as clients send different
    numbers of experts (ours).
    """
    norms = [norm_of(server, each) for each in spool]
    most = robust.multiple * median_low(norms) if norms else 0.0
    for each, norm in zip(spool, norms, strict=True):
        scale = min(1.0, most / norm) if norm > 0 else 1.0
        tensors = {}
        for name in each.names:
            sent, before = each.tensor(name), server.weights[name][each.ids(name, len(server.weights[name]))]
            tensors[name] = sent if scale == 1.0 else (before.double() + scale * (sent.double() - before.double())).to(sent.dtype)
        yield each.with_tensors(tensors)


def norm_of(server: Server, spooled: Spooled) -> float:
    """The root mean square of the change of the weights that a client sent."""
    squares: float = 0.0
    number: int = 0
    for name in spooled.names:
        sent = spooled.tensor(name)
        change = sent.double() - server.weights[name][spooled.ids(name, len(server.weights[name]))].double()
        squares, number = squares + float(change.square().sum()), number + change.numel()
    return float((squares / max(number, 1)) ** 0.5)


def replaced(server: Server, spool: Sequence[Spooled], robust: RobustMerging) -> Iterator[Update]:
    """The updates with the robust value of each row in place of the client's own."""
    names = sorted({name for each in spool for name in each.names})
    values = {name: robust_rows(server.weights[name], name, spool, robust) for name in names}
    for each in spool:
        yield each.with_tensors({name: values[name][each.ids(name, len(values[name]))] for name in each.names})


def robust_rows(before: Tensor, name: str, spool: Sequence[Spooled], robust: RobustMerging) -> Tensor:
    """The tensor `name` with the robust value of each row that a client sent; `before`: the server's."""
    sent = [(each.ids(name, len(before)), each.tensor(name)) for each in spool if name in each.names]
    has = torch.zeros(len(sent), len(before), dtype=torch.bool)
    for voice, (ids, _) in enumerate(sent):
        has[voice, ids] = True
    typical = typical_norm(before, sent)
    result = before.clone()
    for voices in has.unique(dim=1).T:
        rows = (has == voices[:, None]).all(0).nonzero().flatten()
        if not voices.any():
            continue
        x = torch.stack([of_rows(sent[voice][0], sent[voice][1], rows) for voice in voices.nonzero().flatten().tolist()])
        own = before[rows].double().reshape(1, len(rows), -1)
        enough = robust.is_enough(len(x), len(spool))
        value = RULES[robust.name](x, robust.faulty(len(spool))) if enough else with_server(x, own, robust.multiple * typical)
        result[rows] = value.reshape(before[rows].shape).to(before.dtype)
    return result


def of_rows(ids: Tensor, tensor: Tensor, rows: Tensor) -> Float[Tensor, "rows width"]:
    """The rows `rows` of a client's `tensor`, which has the ascending rows `ids`, in float64."""
    return tensor[torch.searchsorted(ids, rows)].double().reshape(len(rows), -1)


def typical_norm(before: Tensor, sent: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The median over clients of the median norm of their rows' changes: who sends many rows has one voice, too (ours)."""
    changes = [tensor.double() - before[ids].double() for ids, tensor in sent if len(ids)]
    norms = [float(change[:, None].flatten(1).norm(dim=1).median()) for change in changes]
    return median_low(norms) if norms else 0.0


def with_server(x: Voices, own: Voices, most: float) -> Tensor:
    """The mean of the rows, each moved to within `most` of the server's, and of the server's own (ours)."""
    change = x - own
    scale: Tensor = (most / change.norm(dim=2, keepdim=True).clamp(min=1e-300)).clamp(max=1.0)
    return (own + (scale * change).sum(0) / (len(x) + 1))[0]


def trimmed_mean(x: Voices, faulty: int) -> Tensor:
    """The mean of each coordinate without its `faulty` largest and smallest values."""
    kept: Tensor = x.sort(dim=0).values[faulty : len(x) - faulty]
    return kept.mean(0)


def coordinate_median(x: Voices, faulty: int) -> Tensor:
    """The median of each coordinate; of an even number the mean of the middle two."""
    ordered, middle = x.sort(dim=0).values, len(x) // 2
    return ordered[middle] if len(x) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def krum_order(x: Voices, faulty: int) -> Tensor:
    """The voices [voices, rows] of each row by their score: the sum of the squared distances to the n − f − 2 closest others."""
    by_row = x.transpose(0, 1)
    distances = torch.cdist(by_row, by_row, compute_mode="donot_use_mm_for_euclid_dist").square()  # rows, voices, voices
    closest = distances.sort(dim=2).values[:, :, 1 : len(x) - faulty - 1]  # without itself
    return closest.sum(2).argsort(dim=1, stable=True).T


def krum(x: Voices, faulty: int) -> Tensor:
    """Of each row the voice with the lowest score."""
    return x.gather(0, krum_order(x, faulty)[:1, :, None].expand(1, -1, x.shape[2]))[0]


def multi_krum(x: Voices, faulty: int) -> Tensor:
    """Of each row the mean of the n − f voices with the lowest scores."""
    return x.gather(0, krum_order(x, faulty)[: len(x) - faulty, :, None].expand(-1, -1, x.shape[2])).mean(0)


def geometric_median(x: Voices, faulty: int) -> Tensor:
    """Of each row the point with the smallest sum of distances to the voices."""
    center = coordinate_median(x, faulty)  # from the mean, one row far away would take all steps
    scale = (x - center).norm(dim=2).median(0).values.clamp(min=1e-300)  # of each row: smoothing does not depend on units
    for step in range(WEISZFELD_STEPS):
        smoothing = max(SMOOTHING, 0.5**step)  # large at first (ours): else a center that is also a voice stays there
        weights = 1 / ((x - center).norm(dim=2) / scale).clamp(min=smoothing)
        center = (weights[..., None] * x).sum(0) / weights.sum(0)[:, None]
    return center


RULES: Mapping[str, Callable[[Voices, int], Tensor]] = {
    "trimmed_mean": trimmed_mean,
    "median": coordinate_median,
    "krum": krum,
    "multi_krum": multi_krum,
    "geometric_median": geometric_median,
}
FEWEST: Mapping[str, Callable[[int], int]] = {
    "clip": lambda faulty: 0,
    **dict.fromkeys(("trimmed_mean", "median", "geometric_median"), lambda faulty: max(2 * faulty, 1)),
    **dict.fromkeys(("krum", "multi_krum"), lambda faulty: 2 * faulty + 2),
}
"""Rule → the number of contributors, for `faulty` attackers, that a row must have more of."""
