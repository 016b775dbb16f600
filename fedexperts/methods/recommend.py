"""FedMoE's expert recommendation (section 4.4): what clients with similar routing hold."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fedexperts.methods.submodel import units, unmask
from fedexperts.moe.anatomy import Experts
from fedexperts.types import Client, Server


def recommend(server: Server, client: Client, p: Mapping[str, Tensor], held: Mapping[str, Tensor], neighbours: int) -> Tensor:
    """The flat mask of experts that `client` should try next; its own when there is nothing to learn from the others.

    With S' the K = `neighbours` clients whose p is most similar (cosine), p̂ = Σ sim·p / Σ sim over S', and
    n = round(mean |S_a| over S') − |S_k|: n > 0 adds the n experts outside S_k with the highest p̂, n < 0 drops the |n|
    inside with the lowest. Guards (ours): never beyond the client's memory, then the best that fit are added; never
    below top-k in a layer; a grouped router's group as one, by its mean p̂. `p` and `held` are flat vectors of the clients
    heard from so far.
    """
    own = held[client.name]
    alike = {
        other: float(functional.cosine_similarity(p[client.name].double(), p[other].double(), dim=0))
        for other in p.keys() & held.keys() - {client.name}
    }
    closest = sorted(alike, key=lambda other: (-alike[other], other))[:neighbours]
    total = sum(alike[other] for other in closest)
    if total <= 0:
        return own
    expected = torch.stack([alike[other] * p[other].double() for other in closest]).sum(0) / total
    number = round(sum(int(held[other].sum()) for other in closest) / len(closest)) - int(own.sum())
    if number > 0:
        outside = [unit for unit in units(server.anatomy) if not own[unit].any()]
        likeliest = sorted(outside, key=lambda unit: -float(expected[unit].mean()))
        return changed(server, own, likeliest, number, within_memory(server, client))
    inside = [unit for unit in units(server.anatomy) if own[unit].any()]
    return changed(server, own, sorted(inside, key=lambda unit: float(expected[unit].mean())), -number, at_least_top_k(server))


def changed(server: Server, held: Tensor, order: Sequence[slice], number: int, legal: Callable[[Experts], bool]) -> Tensor:
    """`held` with up to `number` experts flipped, in `order`, each unit only if the result is `legal`."""
    left = number
    for unit in order:
        size = unit.stop - unit.start
        if size > left:
            continue
        tried = held.clone()
        tried[unit] = ~tried[unit]
        if legal(unmask(server.anatomy, tried)):
            held, left = tried, left - size
    return held


def within_memory(server: Server, client: Client) -> Callable[[Experts], bool]:
    return lambda experts: client.memory_bytes is None or server.footprint.of(experts) <= client.memory_bytes


def at_least_top_k(server: Server) -> Callable[[Experts], bool]:
    blocks = server.anatomy.blocks
    return lambda experts: all(len(ids) >= blocks[block].fewest for block, ids in experts.items())
