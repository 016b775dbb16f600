"""Which experts a client should hold: FedMoE's coarse initialisation (section 4.2) and its random counterpart."""

from collections.abc import Mapping
from random import Random

import torch
from jaxtyping import Float
from torch import Tensor

from fedexperts.errors import TooSmall
from fedexperts.moe.anatomy import Anatomy, Experts
from fedexperts.types import Client, Server

Activation = Mapping[str, Float[Tensor, " experts"]]
"""p of one client: MoE block → the share of its tokens that each expert was chosen for."""

HALVINGS = 40
"""Of the interval of θ; it is then far smaller than one token's share."""


def search(server: Server, client: Client, p: Activation, reserve: float) -> Experts:
    """The experts that cover the largest share θ of the client's routing in every layer and fit into `reserve` · M_k.

    FedMoE's optimisation problem, solved by binary search on θ as in the paper: for a θ each layer keeps the shortest
    prefix of its experts, by falling p, whose p sum to θ of the layer's sum (1 for top-1 routing, as in the paper; with
    top-k routing p sums to k). No layer keeps fewer than its top-k. A client that holds that minimum within its memory
    but not within the reserve gets the minimum.

    Raises:
        TooSmall: the memory does not hold the minimum.
    """
    if client.memory_bytes is None:
        return server.anatomy.all_experts
    require_minimum(server, client, p)
    budget = reserve * client.memory_bytes
    low, high = 0.0, 1.0
    if server.footprint.of(covering(server.anatomy, p, high)) <= budget:
        return covering(server.anatomy, p, high)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        fits = server.footprint.of(covering(server.anatomy, p, middle)) <= budget
        low, high = (middle, high) if fits else (low, middle)
    return covering(server.anatomy, p, low)


def covering(anatomy: Anatomy, p: Activation, share: float) -> Experts:
    """In each layer the shortest prefix by falling p that reaches `share` (θ) of the layer's sum, and top-k at least."""
    return {block: shortest(p[block], share, shape.fewest) for block, shape in anatomy.blocks.items()}


def shortest(p: Float[Tensor, " experts"], share: float, fewest: int) -> tuple[int, ...]:
    """Ids, ascending; among equal p the lower id comes first."""
    order = torch.argsort(p, descending=True, stable=True)
    covered = p.double()[order].cumsum(0)
    enough = int((covered < share * covered[-1] - 1e-12).sum()) + 1
    return tuple(sorted(order[: max(enough if share else 0, fewest)].tolist()))


def require_minimum(server: Server, client: Client, p: Activation | None = None) -> None:
    """Raises TooSmall when `client` holds no legal sub-model: top-k experts in each layer."""
    least = {block: tuple(range(shape.fewest)) for block, shape in server.anatomy.blocks.items()}
    needed = server.footprint.of(least)
    if client.memory_bytes is not None and client.memory_bytes < needed:
        raise TooSmall(
            f"client {client.name} has {client.memory_bytes / 1e6:.1f} MB of memory, but the smallest legal sub-model "
            f"(as many experts in each layer as its router picks) takes {needed / 1e6:.1f} MB to train; "
            "give it more memory, a smaller batch, or leave it out"
        )


def predict(
    client: Client, known: Mapping[str, Float[Tensor, " all"]], clients: Mapping[str, Client]
) -> Float[Tensor, " all"] | None:
    """p of a client too small to measure it: the data-size-weighted mean over the clients of its task.

    Where none of its task was measured, over all that were (ours); None where none was.
    """
    of_task = [name for name in known if clients[name].task == client.task]
    measured = of_task or list(known)
    if not measured:
        return None
    weights = [float(clients[name].examples) for name in measured]
    mean = sum(weight * known[name].double() for weight, name in zip(weights, measured, strict=True)) / sum(weights)
    return mean.float()  # type: ignore[union-attr]  # a sum of at least one tensor


def at_random(server: Server, client: Client, reserve: float, per_layer: int | None, rng: Random) -> Experts:
    """`per_layer` random experts in each layer; None: as many as fit into `reserve` · M_k, spread evenly over the layers.

    Raises:
        TooSmall: the memory does not hold the minimum.
    """
    require_minimum(server, client)
    orders = {block: rng.sample(range(shape.num_experts), shape.num_experts) for block, shape in server.anatomy.blocks.items()}
    return first(orders, server.anatomy, even_number(server, client, reserve) if per_layer is None else per_layer)


def even_number(server: Server, client: Client, reserve: float = 1.0) -> int:
    """How many experts in each layer, the same in all as far as they have them, fit into `reserve` · M_k; 0 where none do."""
    most = max(shape.num_experts for shape in server.anatomy.blocks.values())
    if client.memory_bytes is None:
        return most
    sizes = {
        n: {name: range(min(n, shape.num_experts)) for name, shape in server.anatomy.blocks.items()} for n in range(most + 1)
    }
    held = {n: {name: tuple(ids) for name, ids in each.items()} for n, each in sizes.items()}
    return max((n for n in held if server.footprint.of(held[n]) <= reserve * client.memory_bytes), default=0)


def first(orders: Mapping[str, list[int]], anatomy: Anatomy, number: int) -> Experts:
    """The first `number` of each order, and top-k at least."""
    return {block: tuple(sorted(order[: max(number, anatomy.blocks[block].fewest)])) for block, order in orders.items()}


def by_block(anatomy: Anatomy, vector: Tensor) -> dict[str, Tensor]:
    """The layers' parts of a flat vector, which holds all layers' experts one after the other."""
    sizes = [shape.num_experts for shape in anatomy.blocks.values()]
    return dict(zip(anatomy.blocks, vector.split(sizes), strict=True))


def mask(anatomy: Anatomy, experts: Experts) -> Tensor:
    """`experts` as a flat vector of booleans."""
    held = {block: torch.zeros(shape.num_experts, dtype=torch.bool) for block, shape in anatomy.blocks.items()}
    for block, ids in experts.items():
        held[block][list(ids)] = True
    return torch.cat(list(held.values()))


def unmask(anatomy: Anatomy, held: Tensor) -> Experts:
    """The experts that a flat vector of booleans marks."""
    return {block: tuple(part.nonzero().flatten().tolist()) for block, part in by_block(anatomy, held).items()}
