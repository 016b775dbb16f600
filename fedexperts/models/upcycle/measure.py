"""How an upcycled model compares with its dense model, and how it uses its experts."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedexperts.models.upcycle.parts import Window


@dataclass(frozen=True)
class Comparison:
    """The predictions of two models on the same tokens."""

    kl: float  # of the new model from the dense one, in nats per token
    dense_bits_per_byte: float
    bits_per_byte: float  # of the new model
    tokens: int


def compare(
    hidden: Iterable[tuple[Float[Tensor, "tokens hidden"], Float[Tensor, "tokens hidden"]]],
    windows: Sequence[Window],
    head: Float[Tensor, "vocabulary hidden"],
    dtype: torch.dtype,
) -> Comparison:
    """From the last hidden states of the dense and of the new model on each of `windows`.

    head: of the dense model, and in `dtype` of the new one.

    The divergence counts every token; bits per byte all but the first of a window, over the bytes of their text.
    """
    old_head, kl, nats = head.float(), 0.0, [0.0, 0.0]
    new_head = old_head if dtype == head.dtype else head.to(dtype).float()
    for states, window in zip(hidden, windows, strict=True):
        dense, new = ((state @ each.T).log_softmax(-1) for state, each in zip(states, (old_head, new_head), strict=True))
        kl += float((dense.exp() * (dense - new)).sum(dtype=torch.float64))
        following = torch.tensor(window.ids[1:])[:, None]
        for model, logprobs in enumerate((dense, new)):
            nats[model] -= float(logprobs[:-1].gather(1, following).sum(dtype=torch.float64))
    tokens, size = sum(len(window.ids) for window in windows), sum(window.bytes for window in windows)
    old, new_bits = (each / max(size, 1) / math.log(2) for each in nats)
    return Comparison(max(kl, 0.0) / tokens, old, new_bits, tokens)


def load_of(picks: Sequence[Int[Tensor, "tokens top_k"]], windows: Sequence[Window], num_experts: int) -> dict[str, float]:
    """Load of the least and of the most used expert, in parts of a fair share.

    Where the windows belong to experts, also the share of tokens whose first choice is their own expert.
    """
    counts = torch.bincount(torch.cat(list(picks)).flatten(), minlength=num_experts).double()
    shares = counts / counts.sum() * num_experts
    facts = {"load_least": float(shares.min()), "load_most": float(shares.max())}
    own = [pick[:, 0] == window.expert for pick, window in zip(picks, windows, strict=True) if window.expert is not None]
    return facts | ({"own_expert": float(torch.cat(own).double().mean())} if own else {})
