"""Which experts a client should hold: FedMoE's coarse initialisation (section 4.2) and its random counterpart."""

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
"""p of one client: MoE block → the share of its tokens that each expert was chosen for."""

HALVINGS = 40
"""Of the interval of θ; it is then far smaller than one token's share."""


def search(server: Server, client: Client, p: Activation, reserve: float) -> Experts:
    """The experts that cover the largest share θ of the client's routing in every layer and fit into `reserve` · M_k.

    FedMoE's optimisation problem, solved by binary search on θ as in the paper: for a θ each layer keeps the shortest
    prefix of its experts, by falling p, whose p sum to θ of the layer's sum (1 for top-1 routing, as in the paper; with
    top-k routing p sums to k). No layer keeps fewer than its top-k. A client that holds that minimum within its memory
    but not within the reserve gets the minimum; one without a limit gets all experts that its data ever reached (θ = 1).

    Raises:
        TooSmall: the memory does not hold the minimum.
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
    """In each layer the shortest prefix by falling p that reaches `share` (θ) of the layer's sum, and top-k at least."""
    return {block: shortest(p[block], share, shape) for block, shape in anatomy.blocks.items()}


def shortest(p: Float[Tensor, " experts"], share: float, shape: BlockShape) -> tuple[int, ...]:
    """Ids, ascending; among equal p the lower id comes first. A grouped router's groups stay whole: one counts as one."""
    shares = p.double().view(-1, shape.unit).sum(1)
    order = torch.argsort(shares, descending=True, stable=True)
    covered = shares[order].cumsum(0)
    enough = int((covered < share * covered[-1]).sum()) + 1
    return members(order[: max(enough, shape.fewest // shape.unit)].tolist(), shape)


def members(units: Iterable[int], shape: BlockShape) -> tuple[int, ...]:
    """The experts of these units of a block, ascending."""
    return tuple(unit * shape.unit + offset for unit in sorted(units) for offset in range(shape.unit))


def require_minimum(server: Server, client: Client) -> None:
    """Raises TooSmall when `client` holds no legal sub-model: top-k experts in each layer."""
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
    """p of a client that could not measure it: the data-size-weighted mean over the clients of its task that did.

    Where none of its task did, over all that did (ours).
    """
    known = [name for name in clients if name in measured]
    alike = [name for name in known if clients[name].task == client.task] or known
    weights = torch.tensor([clients[name].examples for name in alike], dtype=torch.float64)
    return (weights @ torch.stack([measured[name].double() for name in alike]) / weights.sum()).float()


def at_random(server: Server, client: Client, reserve: float, per_layer: int | None, rng: Random) -> Experts:
    """`per_layer` random experts in each layer; None: as many as fit into `reserve` · M_k, spread evenly over the layers.

    A layer that has fewer keeps all; none keeps fewer than its top-k, nor a part of a grouped router's group.

    Raises:
        TooSmall: the memory does not hold the minimum, or not as many as were asked for (told with what all clients hold).
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
            require_minimum(server, each)  # where one holds nothing, no number helps
        most = min(even_number(server, each) for each in (client, *server.clients.values()))
        raise TooSmall(
            f"client {client.name} has {client.memory_bytes / 1e6:.1f} MB of memory, but experts_per_layer = {per_layer} takes "
            f"{needed / 1e6:.1f} MB to train; ask for at most {most}, which every client holds, or leave it out"
        )
    return experts


def same_for_all(server: Server, client: Client, per_layer: int | None) -> Experts:
    """The same `per_layer` random experts in each layer for every client of a run; None: all experts, whatever the memory.

    The homogeneous small model that FedMoE's paper gives its baselines (section 5: 8 of 32 experts).

    Raises:
        TooSmall: the memory of `client` does not hold as many.
    """
    if per_layer is None:
        return server.anatomy.all_experts
    return at_random(server, client, 1.0, per_layer, Random(f"{server.seed}/experts"))


def even_number(server: Server, client: Client, reserve: float = 1.0) -> int:
    """How many experts in each layer, the same in all as far as they have them, fit into `reserve` · M_k; 0 where none do."""
    most = max(shape.num_experts for shape in server.anatomy.blocks.values())
    if client.memory_bytes is None:
        return most
    sizes = {number: evenly(server.anatomy, number) for number in range(1, most + 1)}
    experts = {number: {name: tuple(range(count)) for name, count in counts.items()} for number, counts in sizes.items()}
    return max((n for n in experts if server.footprint.of(experts[n]) <= reserve * client.memory_bytes), default=0)


def evenly(anatomy: Anatomy, number: int) -> dict[str, int]:
    """`number` experts for each layer, as near below it as whole groups allow: not more than it has, not fewer than its top-k."""
    return {
        name: max(min(number, shape.num_experts) // shape.unit * shape.unit, shape.fewest)
        for name, shape in anatomy.blocks.items()
    }


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


def units(anatomy: Anatomy) -> list[slice]:
    """The places in a flat vector of the experts that are held or dropped together: one by one, or whole groups."""
    sizes = [shape.unit for shape in anatomy.blocks.values() for _ in range(shape.num_experts // shape.unit)]
    return [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]
