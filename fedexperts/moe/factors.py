"""The factors of low-rank adapters, row-first and by name: A [rows, rank, in] and B [rows, out, rank]; a row is an expert.

BA is the product without the scale, which is the same for all clients and is applied when BA is added to weights.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from fedexperts.moe import lora, rows

Tensors = Mapping[str, Tensor]

_STACKED = ".experts.lora."  # in the names of adapters of stacked experts, which are ours; all others are peft's


def pairs(names: Iterable[str]) -> dict[str, str]:
    """Name of each A among `names` → name of its B."""
    return {name: b for name in names if (b := _b_of(name))}


def _b_of(a: str) -> str | None:
    if _STACKED in a and a.endswith(".a"):
        return f"{a.removesuffix('.a')}.b"
    own, peft, rest = a.rpartition(".lora_A.")
    return f"{own}.lora_B.{rest}" if peft else None


def rank_axes(names: Iterable[str]) -> dict[str, int]:
    """Name of each A and B among `names` → the axis of its rank, row-first."""
    return {name: axis for pair in pairs(names).items() for name, axis in zip(pair, (1, 2), strict=True)}


def rank_of(tensors: Tensors) -> int:
    """The rank of the adapters in `tensors`, which all have the same."""
    return next(tensors[name].shape[axis] for name, axis in rank_axes(tensors).items())


def rank_step(tensors: Tensors) -> int:
    """The number of which ranks must be multiples: that of the adapters of stacked experts, or 1 if there are none."""
    return max((lora.rank_step(tensors[a].dtype) for a in pairs(tensors) if _STACKED in a), default=1)


def cut(tensors: Tensors, rank: int) -> dict[str, Tensor]:
    """`tensors`, their adapters truncated to the first `rank` rows of A and columns of B."""
    truncated = {name: tensors[name].narrow(axis, 0, rank).contiguous() for name, axis in rank_axes(tensors).items()}
    return {**tensors, **truncated}


def padded(tensor: Tensor, axis: int, rank: int) -> Tensor:
    """An A or B, padded with zeros to `rank` along `axis`, 1 or 2."""
    missing = rank - tensor.shape[axis]
    return functional.pad(tensor, (0, 0, 0, missing) if axis == 1 else (0, missing))


def stacked(parts: Sequence[tuple[float, Tensors]]) -> dict[str, Tensor]:
    """Factors of Σ p_k B_k A_k over `parts`, pairs of a weight and adapters: the A_k stacked, the p_k B_k side by side.

    p_k is the weight of a part over the sum of all weights.
    """
    total = sum(weight for weight, _ in parts)
    factors = {}
    for a, b in pairs(parts[0][1]).items():
        factors[a] = torch.cat([tensors[a] for _, tensors in parts], dim=1)
        factors[b] = torch.cat([weight / total * tensors[b] for weight, tensors in parts], dim=2)
    return factors


def truncated_svd(
    b: Float[Tensor, "rows out many"], a: Float[Tensor, "rows many in"], rank: int
) -> tuple[Float[Tensor, "rows out {rank}"], Float[Tensor, "rows {rank} in"]]:
    """B and A of this rank whose product is nearest to b a: U Σ and Vᵀ of its singular value decomposition, largest first.

    Computed in float64, from the QR decompositions of the factors: b a itself, [out, in], is not computed. If its rank is lower,
    the rest of Σ is zero, and the rest of Vᵀ is in the span of the rows of `a`. Beyond a rank of out or in there are zeros.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().mT)
    u, sigma, vt = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    new_b, new_a = (q_b @ u * sigma.unsqueeze(1))[..., :rank], (vt @ q_a.mT)[:, :rank]
    return padded(new_b, 2, rank).to(b.dtype), padded(new_a, 1, rank).to(a.dtype)


def norm(b: Float[Tensor, "rows out rank"], a: Float[Tensor, "rows rank in"]) -> Float[Tensor, " rows"]:
    """The Frobenius norm of BA of each row, without computing BA: ‖BA‖² is the sum over BᵀB ∘ AAᵀ."""
    b, a = b.double(), a.double()
    return ((b.mT @ b) * (a @ a.mT)).sum((1, 2)).clamp(min=0).sqrt()


def add_to_base(model: nn.Module, change: Tensors) -> None:
    """Adds to the weights of `model` under its adapters, in its own memory, each product BA of `change`, by the name of its A."""
    if change:
        lora.add_to_base_weights(model, rows.paired(model, change))
