"""How much each expert matters to a batch, by its router alone, and which of them a budget should go to.

Fang et al., "HFedMoE: Resource-aware Heterogeneous Federated Learning with Mixture-of-Experts", https://arxiv.org/abs/2601.00583,
section 4. Equation numbers are the paper's; what it leaves open is marked (ours). No label, loss or gradient is looked at.
Vectors over all experts of a model hold those of its first MoE block, then those of the next.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from fedexperts.errors import BadValue
from fedexperts.moe.routing import Recorder, kept_logits, log_gates


@dataclass(frozen=True)
class Importance:
    """What the routers made of one batch, padding left out; each a vector over all experts, float32 unless told."""

    usage: Float[Tensor, " all"]  # s_cum of (3): the mean of G, the router's full softmax
    combined: Float[Tensor, " all"]  # s of (5)
    bottleneck: Float[Tensor, " all"]  # I of (14)
    picked: Int[Tensor, " all"]  # tokens that top-k routing sent to the expert
    tokens: Int[Tensor, " all"]  # that the expert's router saw


@torch.no_grad()
def importance(recorder: Recorder, mean_share: float = 0.9, redundancy: float = 0.1) -> Importance:
    """(3), (4), (5) and (14) for every expert, one token being one x (ours). `mean_share` is λ, `redundancy` β.

    Raises:
        BadValue: the recorder kept no logits.
    """
    logits = kept_logits(recorder)
    alike: dict[tuple[int, int, bool], list[str]] = {}
    for name, each in logits.items():
        alike.setdefault((*each.shape, recorder.blocks[name].sigmoid), []).append(name)
    found = {name: torch.zeros(3, block.shape.num_experts) for name, block in recorder.blocks.items()}
    for (_, _, sigmoid), names in alike.items():
        stacked = torch.stack([logits[name] for name in names])
        found |= zip(names, terms(stacked, sigmoid, mean_share, redundancy).unbind(1), strict=True)
    usage, combined, bottleneck = torch.cat([each.cpu() for each in found.values()], 1)
    routing = recorder.routing()
    seen = [torch.full_like(counts, routing.tokens[name]) for name, counts in routing.counts.items()]
    return Importance(usage, combined, bottleneck, torch.cat(list(routing.counts.values())), torch.cat(seen))


def terms(
    logits: Float[Tensor, "blocks tokens experts"], sigmoid: bool, mean_share: float, redundancy: float
) -> Float[Tensor, "3 blocks experts"]:
    """s_cum, s and I of blocks that have the same shape."""
    log_g = log_gates(logits, sigmoid)
    g = log_g.exp()
    mean, most = g.mean(1), g.amax(1)  # (3), (4)
    combined = mean_share * mean + (1 - mean_share) * most  # (5)
    log_mean = log_g.logsumexp(1, keepdim=True) - math.log(logits.shape[1])
    surprise = torch.where(g > 0, g * (log_g - log_mean), 0.0).mean(1)  # 0 log 0 = 0
    return torch.stack([mean, combined, combined - redundancy * surprise.clamp_min(0)])  # (14); below 0 by rounding alone


def select(score: Num[Tensor, " all"], picked: Num[Tensor, " all"], sizes: Sequence[int], budget: int) -> Bool[Tensor, " all"]:
    """(15): of the experts that were picked, the best of each block, then the best of all, `budget` of them or all there are.

    `sizes` are the blocks' numbers of experts. Of equal scores the lower place in the vector comes first.

    Raises:
        BadValue: `budget` does not cover the blocks.
    """
    require_coverage(budget, len(sizes))
    best_first = score.argsort(descending=True, stable=True)
    best_first = best_first[picked[best_first] > 0]
    block = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[best_first]
    place = torch.arange(len(block))
    first = torch.full((len(sizes),), len(block)).scatter_reduce(0, block, place, "amin")[block]  # of the same block
    chosen = torch.cat([best_first[place == first], best_first[place != first]])[:budget]
    return torch.zeros(len(score), dtype=torch.bool).index_fill(0, chosen, True)


def require_coverage(budget: int, blocks: int, given: str | None = None) -> None:
    """Raises BadValue for a budget of fewer experts than there are MoE blocks; `given`: how the user put it."""
    if budget < blocks:
        said = given or f"a budget of {budget} experts"
        raise BadValue(f"{said} does not reach one in each of the model's {blocks} MoE layers; give at least {blocks} experts")


def at_random(number: int, seed: str) -> Float[Tensor, " all"]:
    """A score for each expert that is chance alone."""
    return torch.rand(number, generator=torch.Generator().manual_seed(Random(seed).getrandbits(63)))
