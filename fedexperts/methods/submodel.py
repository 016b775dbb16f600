"""Selection of a client's experts: FedMoE's coarse initialization (section 4.2), and random selection."""

import math
from collections.abc import Iterable, Mapping
from itertools import accumulate
from random import Random

import torch
from jaxtyping import Float
from torch import Tensor

from fedexperts.errors import TooSmall
from fedexperts.moe.anatomy import Anatomy, BlockShape, Experts
from fedexperts.types import Client, Server

Activation = Mapping[str, Float[Tensor, " experts"]]
"""p of one client: MoE block → the share of tokens that were routed to each expert."""

HALVINGS = 40
"""Bisection steps for θ; the interval is then far smaller than one token's share."""


def search(server: Server, client: Client, p: Activation, reserve: float) -> Experts:
    """The experts that cover the largest share θ of the client's routing in every layer and fit `reserve` · M_k.

    Solves FedMoE's optimization problem by binary search on θ, as in the paper: for a θ each layer keeps the shortest prefix of
    its experts, in descending order of p, whose p sum to θ of the layer's sum (1 with top-1 routing, as in the paper; k with
    top-k). No layer keeps fewer than top-k experts. A client whose memory, but not its reserve, fits this minimum gets the
    minimum; a client without a memory limit gets all experts that its data was routed to (θ = 1).

    Raises:
        TooSmall: the minimum does not fit the memory.
    """
    require_minimum(server, client)
    budget = math.inf if client.memory_bytes is None else reserve * client.memory_bytes

    def fits(share: float) -> bool:
        return server.footprint.of(covering(server.anatomy, p, share)) <= budget

    if fits(1.0):
        return covering(server.anatomy, p, 1.0)
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return covering(server.anatomy, p, low)


def covering(anatomy: Anatomy, p: Activation, share: float) -> Experts:
    """In each layer, the shortest prefix in descending p that reaches `share` (θ) of the layer's sum, at least top-k experts."""
    return {block: shortest(p[block], share, shape) for block, shape in anatomy.blocks.items()}


def shortest(p: Float[Tensor, " experts"], share: float, shape: BlockShape) -> tuple[int, ...]:
    """The ids of one layer, ascending; of equal p the lower id is preferred. Groups of a grouped router are kept whole."""
    shares = p.double().view(-1, shape.unit).sum(1)
    order = torch.argsort(shares, descending=True, stable=True)
    covered = shares[order].cumsum(0)
    enough = int((covered < share * covered[-1]).sum()) + 1
    return members(order[: max(enough, shape.fewest // shape.unit)].tolist(), shape)


def members(units: Iterable[int], shape: BlockShape) -> tuple[int, ...]:
    """The experts of `units` (single experts or groups) of a block, ascending."""
    return tuple(unit * shape.unit + offset for unit in sorted(units) for offset in range(shape.unit))


def require_minimum(server: Server, client: Client) -> None:
    """Raises TooSmall if the smallest legal sub-model, top-k experts per layer, does not fit the memory of `client`."""
    least = {block: tuple(range(shape.fewest)) for block, shape in server.anatomy.blocks.items()}
    needed = server.footprint.of(least)
    if client.memory_bytes is not None and client.memory_bytes < needed:
        raise TooSmall(
            f"client {client.name} has {client.memory_bytes / 1e6:.1f} MB of memory, but the smallest legal sub-model "
            f"(as many experts in each layer as its router picks) takes {needed / 1e6:.1f} MB to train; "
            "give it more memory, a smaller batch or a lower data.max_tokens, or leave it out"
        )


def predict(
    client: Client, measured: Mapping[str, Float[Tensor, " all"]], clients: Mapping[str, Client]
) -> Float[Tensor, " all"]:
    """p of a client that did not measure it: the mean over the clients of its task that did, weighted by data size.

    If no client of its task did, the mean over all that did (ours).
    """
    known = [name for name in clients if name in measured]
    alike = [name for name in known if clients[name].task == client.task] or known
    weights = torch.tensor([clients[name].examples for name in alike], dtype=torch.float64)
    return (weights @ torch.stack([measured[name].double() for name in alike]) / weights.sum()).float()


def at_random(server: Server, client: Client, reserve: float, per_layer: int | None, rng: Random) -> Experts:
    """`per_layer` random experts in each layer; None: as many as fit `reserve` · M_k, spread evenly over the layers.

    A layer that has fewer keeps all; no layer keeps fewer than top-k, or only a part of a grouped router's group.

    Raises:
        TooSmall: the minimum or `per_layer` experts do not fit the memory; the error names a number that fits every client's.
    """
    require_minimum(server, client)
    blocks = server.anatomy.blocks
    orders = {
        name: rng.sample(range(shape.num_experts // shape.unit), shape.num_experts // shape.unit)
        for name, shape in blocks.items()
    }
    counts = evenly(server.anatomy, even_number(server, client, reserve) if per_layer is None else per_layer)
    experts = {name: members(order[: counts[name] // blocks[name].unit], blocks[name]) for name, order in orders.items()}
    needed = server.footprint.of(experts)
    if client.memory_bytes is not None and client.memory_bytes < needed:
        for each in server.clients.values():
            require_minimum(server, each)  # if a client cannot train the minimum, no number fits
        most = min(even_number(server, each) for each in (client, *server.clients.values()))
        raise TooSmall(
            f"client {client.name} has {client.memory_bytes / 1e6:.1f} MB of memory, but experts_per_layer = {per_layer} takes "
            f"{needed / 1e6:.1f} MB to train; ask for at most {most}, which every client holds, or leave it out"
        )
    return experts


def same_for_all(server: Server, client: Client, per_layer: int | None) -> Experts:
    """The same `per_layer` random experts in each layer for every client of a run; None: all experts, regardless of memory.

    The homogeneous small model of the baselines in FedMoE's paper (section 5: 8 of 32 experts).

    Raises:
        TooSmall: they do not fit the memory of `client`.
    """
    if per_layer is None:
        return server.anatomy.all_experts
    return at_random(server, client, 1.0, per_layer, Random(f"{server.seed}/experts"))


def even_number(server: Server, client: Client, reserve: float = 1.0) -> int:
    """The largest number of experts per layer, the same in all layers that have as many, that fits `reserve` · M_k; 0 if none."""
    most = max(shape.num_experts for shape in server.anatomy.blocks.values())
    if client.memory_bytes is None:
        return most
    sizes = {number: evenly(server.anatomy, number) for number in range(1, most + 1)}
    experts = {number: {name: tuple(range(count)) for name, count in counts.items()} for number, counts in sizes.items()}
    return max((n for n in experts if server.footprint.of(experts[n]) <= reserve * client.memory_bytes), default=0)


def evenly(anatomy: Anatomy, number: int) -> dict[str, int]:
    """Layer → `number` experts, rounded down to whole groups, at least its top-k and at most all."""
    return {
        name: max(min(number, shape.num_experts) // shape.unit * shape.unit, shape.fewest)
        for name, shape in anatomy.blocks.items()
    }


def by_block(anatomy: Anatomy, vector: Tensor) -> dict[str, Tensor]:
    """Splits a flat vector over all experts, layer by layer, into MoE block → its part."""
    sizes = [shape.num_experts for shape in anatomy.blocks.values()]
    return dict(zip(anatomy.blocks, vector.split(sizes), strict=True))


def mask(anatomy: Anatomy, experts: Experts) -> Tensor:
    """`experts` as a flat boolean mask over all experts."""
    flags = {block: torch.zeros(shape.num_experts, dtype=torch.bool) for block, shape in anatomy.blocks.items()}
    for block, ids in experts.items():
        flags[block][list(ids)] = True
    return torch.cat(list(flags.values()))


def unmask(anatomy: Anatomy, flags: Tensor) -> Experts:
    """The experts that are set in a flat boolean mask; the inverse of `mask`."""
    return {block: tuple(part.nonzero().flatten().tolist()) for block, part in by_block(anatomy, flags).items()}


def units(anatomy: Anatomy) -> list[slice]:
    """The slices of a flat mask whose experts are added or removed together: single experts, or groups of grouped routers."""
    sizes = [shape.unit for shape in anatomy.blocks.values() for _ in range(shape.num_experts // shape.unit)]
    return [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]
