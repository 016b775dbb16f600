"""The importance of each expert for a batch, by its router alone, and the selection of experts within a budget.

Fang et al., "HFedMoE: Resource-aware Heterogeneous Federated Learning with Mixture-of-Experts", https://arxiv.org/abs/2601.00583,
section 4. Equation numbers are the paper's; choices that it leaves open are marked (ours). No label, loss or gradient is used.
Vectors over all experts of a model have the experts of its first MoE block first, then those of the next.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from fedexperts.errors import BadValue
from fedexperts.moe.routing import Recorder, log_gates, recorded_logits


@dataclass(frozen=True)
class Importance:
    """Scores of the experts for one batch without padding; each is a vector over all experts, float32 or int64."""

    usage: Float[Tensor, " all"]  # s_cum of (3): the mean of G, the router's full softmax
    combined: Float[Tensor, " all"]  # s of (5)
    bottleneck: Float[Tensor, " all"]  # I of (14)
    picked: Int[Tensor, " all"]  # tokens that top-k routing sent to the expert
    tokens: Int[Tensor, " all"]  # tokens that the expert's router saw


@torch.no_grad()
def importance(recorder: Recorder, mean_share: float = 0.9, redundancy: float = 0.1) -> Importance:
    """(3), (4), (5) and (14) for every expert, one token being one x (ours). `mean_share` is λ, `redundancy` β.

    Raises:
        BadValue: the recorder has no logits.
    """
    logits = recorded_logits(recorder)
    same_shape: dict[tuple[int, int, bool], list[str]] = {}
    for name, block_logits in logits.items():
        same_shape.setdefault((*block_logits.shape, recorder.blocks[name].sigmoid), []).append(name)
    scores = {name: torch.zeros(3, block.shape.num_experts) for name, block in recorder.blocks.items()}
    for (_, _, sigmoid), names in same_shape.items():
        stacked = torch.stack([logits[name] for name in names])
        scores |= zip(names, terms(stacked, sigmoid, mean_share, redundancy).unbind(1), strict=True)
    usage, combined, bottleneck = torch.cat([block_scores.cpu() for block_scores in scores.values()], 1)
    routing = recorder.routing()
    tokens = [torch.full_like(counts, routing.tokens[name]) for name, counts in routing.counts.items()]
    return Importance(usage, combined, bottleneck, torch.cat(list(routing.counts.values())), torch.cat(tokens))


def terms(
    logits: Float[Tensor, "blocks tokens experts"], sigmoid: bool, mean_share: float, redundancy: float
) -> Float[Tensor, "3 blocks experts"]:
    """s_cum, s and I of blocks with the same number of tokens and experts."""
    log_g = log_gates(logits, sigmoid)
    g = log_g.exp()
    mean, maximum = g.mean(1), g.amax(1)  # (3), (4)
    combined = mean_share * mean + (1 - mean_share) * maximum  # (5)
    log_mean = log_g.logsumexp(1, keepdim=True) - math.log(logits.shape[1])
    surprise = torch.where(g > 0, g * (log_g - log_mean), 0.0).mean(1)  # 0 log 0 = 0
    return torch.stack([mean, combined, combined - redundancy * surprise.clamp_min(0)])  # (14); below 0 only by rounding


def select(score: Num[Tensor, " all"], picked: Num[Tensor, " all"], sizes: Sequence[int], budget: int) -> Bool[Tensor, " all"]:
    """(15): of the experts that were picked, the best of each block, then the best of all blocks, until `budget` are selected.

    `sizes` are the numbers of experts of the blocks. Of equal scores the lower index in the vector comes first. If fewer experts
    were picked than `budget`, all that were picked are selected.

    Raises:
        BadValue: `budget` does not cover the blocks.
    """
    require_coverage(budget, len(sizes))
    best_first = score.argsort(descending=True, stable=True)
    best_first = best_first[picked[best_first] > 0]
    block = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[best_first]
    rank = torch.arange(len(block))
    first_rank = torch.full((len(sizes),), len(block)).scatter_reduce(0, block, rank, "amin")[block]  # in the same block
    selected = torch.cat([best_first[rank == first_rank], best_first[rank != first_rank]])[:budget]
    return torch.zeros(len(score), dtype=torch.bool).index_fill(0, selected, True)


def require_coverage(budget: int, blocks: int, setting: str | None = None) -> None:
    """Raises BadValue for a budget of fewer experts than there are MoE blocks; `setting` is the setting that gave it, if any."""
    if budget < blocks:
        subject = setting or f"a budget of {budget} experts"
        raise BadValue(f"{subject} does not reach one in each of the model's {blocks} MoE layers; give at least {blocks} experts")


def at_random(number: int, seed: str) -> Float[Tensor, " all"]:
    """A random score for each expert, drawn from `seed`."""
    return torch.rand(number, generator=torch.Generator().manual_seed(Random(seed).getrandbits(63)))
