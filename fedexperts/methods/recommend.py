"""FedMoE's expert recommendation (section 4.4), from the experts of clients with similar routing."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fedexperts.methods.submodel import units, unmask
from fedexperts.moe.anatomy import Experts
from fedexperts.types import Client, Server


def recommend(server: Server, client: Client, p: Mapping[str, Tensor], experts: Mapping[str, Tensor], neighbors: int) -> Tensor:
    """The flat mask of the experts recommended to `client`; its current ones if no other client is similar.

    With S' the K = `neighbors` clients whose p is most similar (cosine), p̂ = Σ sim·p / Σ sim over S', and
    n = round(mean |S_a| over S') − |S_k|: n > 0 adds the n experts outside S_k with the highest p̂, n < 0 removes the |n|
    experts inside with the lowest. Constraints (ours): only experts that fit the client's memory are added; at least top-k
    experts stay in a layer; the group of a grouped router is one unit, with its mean p̂. `p` and `experts`: client → flat
    vector over all experts, of the clients that have reported so far.
    """
    own = experts[client.name]
    alike = {
        other: float(functional.cosine_similarity(p[client.name].double(), p[other].double(), dim=0))
        for other in p.keys() & experts.keys() - {client.name}
    }
    closest = sorted(alike, key=lambda other: (-alike[other], other))[:neighbors]
    total = sum(alike[other] for other in closest)
    if total <= 0:
        return own
    expected = torch.stack([alike[other] * p[other].double() for other in closest]).sum(0) / total
    number = round(sum(int(experts[other].sum()) for other in closest) / len(closest)) - int(own.sum())
    if number > 0:
        outside = [unit for unit in units(server.anatomy) if not own[unit].any()]
        likeliest = sorted(outside, key=lambda unit: -float(expected[unit].mean()))
        return flipped(server, own, likeliest, number, within_memory(server, client))
    inside = [unit for unit in units(server.anatomy) if own[unit].any()]
    return flipped(server, own, sorted(inside, key=lambda unit: float(expected[unit].mean())), -number, at_least_top_k(server))


def flipped(server: Server, mask: Tensor, order: Sequence[slice], number: int, legal: Callable[[Experts], bool]) -> Tensor:
    """`mask` with up to `number` experts flipped, in `order`, each unit only if the result is `legal`."""
    left = number
    for unit in order:
        size = unit.stop - unit.start
        if size > left:
            continue
        tried = mask.clone()
        tried[unit] = ~tried[unit]
        if legal(unmask(server.anatomy, tried)):
            mask, left = tried, left - size
    return mask


def within_memory(server: Server, client: Client) -> Callable[[Experts], bool]:
    """Whether training experts fits the client's memory."""
    return lambda experts: client.memory_bytes is None or server.footprint.of(experts) <= client.memory_bytes


def at_least_top_k(server: Server) -> Callable[[Experts], bool]:
    """Whether each layer has as many experts as its router needs."""
    blocks = server.anatomy.blocks
    return lambda experts: all(len(ids) >= blocks[block].fewest for block, ids in experts.items())
