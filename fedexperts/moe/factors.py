"""The factors of low-rank adapters, row-first and by name: A [rows, rank, in] and B [rows, out, rank], a row being an expert.

What is said of BA is said of the product alone; the scale, the same for all clients, comes in where it meets the weights.
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
    """Each A among `names`, and what its B is called."""
    return {name: b for name in names if (b := _b_of(name))}


def _b_of(a: str) -> str | None:
    if _STACKED in a and a.endswith(".a"):
        return f"{a.removesuffix('.a')}.b"
    own, peft, rest = a.rpartition(".lora_A.")
    return f"{own}.lora_B.{rest}" if peft else None


def rank_axes(names: Iterable[str]) -> dict[str, int]:
    """Each A and B of `names`, and the axis of its rank, row-first."""
    return {name: axis for pair in pairs(names).items() for name, axis in zip(pair, (1, 2), strict=True)}


def rank_of(tensors: Tensors) -> int:
    """The rank of all adapters in `tensors`."""
    return next(tensors[name].shape[axis] for name, axis in rank_axes(tensors).items())


def rank_step(tensors: Tensors) -> int:
    """What ranks are multiples of: with adapters of stacked experts among them, what those take."""
    return max((lora.rank_step(tensors[a].dtype) for a in pairs(tensors) if _STACKED in a), default=1)


def cut(tensors: Tensors, rank: int) -> dict[str, Tensor]:
    """`tensors`, their adapters truncated to the first `rank` rows of A and columns of B."""
    short = {name: tensors[name].narrow(axis, 0, rank).contiguous() for name, axis in rank_axes(tensors).items()}
    return {**tensors, **short}


def padded(tensor: Tensor, axis: int, rank: int) -> Tensor:
    """An A or B with zeros up to `rank` along `axis`, 1 or 2."""
    missing = rank - tensor.shape[axis]
    return functional.pad(tensor, (0, 0, 0, missing) if axis == 1 else (0, missing))


def stacked(parts: Sequence[tuple[float, Tensors]]) -> dict[str, Tensor]:
    """Factors of Σ p_k B_k A_k over `parts`, (weight, adapters): A_k above one another, p_k B_k side by side.

    p_k is the part's share of all weight.
    """
    total = sum(weight for weight, _ in parts)
    found = {}
    for a, b in pairs(parts[0][1]).items():
        found[a] = torch.cat([tensors[a] for _, tensors in parts], dim=1)
        found[b] = torch.cat([weight / total * tensors[b] for weight, tensors in parts], dim=2)
    return found


def truncated_svd(
    b: Float[Tensor, "rows out many"], a: Float[Tensor, "rows many in"], rank: int
) -> tuple[Float[Tensor, "rows out {rank}"], Float[Tensor, "rows {rank} in"]]:
    """B and A of this rank whose product is nearest to b a: U Σ and Vᵀ of its singular value decomposition, largest first.

    In float64, from QR of the factors: b a itself, [out, in], is not made. Where it has fewer ranks, the rest of Σ is zero, and
    the rest of Vᵀ lies in what the rows of `a` span. What a rank above out or in leaves is zeros.
    """
    left, left_rest = torch.linalg.qr(b.double())
    right, right_rest = torch.linalg.qr(a.double().mT)
    u, sigma, vt = torch.linalg.svd(left_rest @ right_rest.mT, full_matrices=False)
    first, second = (left @ u * sigma.unsqueeze(1))[..., :rank], (vt @ right.mT)[:, :rank]
    return padded(first, 2, rank).to(b.dtype), padded(second, 1, rank).to(a.dtype)


def norm(b: Float[Tensor, "rows out rank"], a: Float[Tensor, "rows rank in"]) -> Float[Tensor, " rows"]:
    """The Frobenius norm of each row's BA, which is not made: ‖BA‖² is the sum over BᵀB ∘ AAᵀ."""
    b, a = b.double(), a.double()
    return ((b.mT @ b) * (a @ a.mT)).sum((1, 2)).clamp(min=0).sqrt()


def add_to_base(model: nn.Module, change: Tensors) -> None:
    """Adds a `base_change` to the weights of `model` under its adapters, in its own memory."""
    if change:
        lora.add_beneath(model, rows.paired(model, {name.removeprefix("change/"): t for name, t in change.items()}))
