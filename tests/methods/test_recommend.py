"""Expert recommendation, on vectors whose cosines can be done in the head."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedexperts.methods.recommend import recommend
from fedexperts.methods.submodel import mask, unmask
from fedexperts.moe import shrink
from fedexperts.moe.anatomy import BlockShape
from fedexperts.moe.footprint import Footprint
from fedexperts.testing import bare_server
from fedexperts.types import Client

FOUR = BlockShape(num_experts=4, top_k=1)
P = {
    "me": torch.tensor([1.0, 0.0, 0.0, 0.0]),
    "near": torch.tensor([2.0, 0.0, 2.0, 1.0]) / 3,  # cosine 2/3
    "next": torch.tensor([3.0, 4.0, 0.0, 0.0]) / 5,  # cosine 3/5
    "far": torch.tensor([0.0, 0.0, 0.0, 1.0]),  # cosine 0
}
# Over near and next, p̂ goes as 2/3 · near + 3/5 · next: 0.80, 0.48, 0.44, 0.22. Over near alone: 0.67, 0, 0.67, 0.33.


def bools(*ids, size=4):
    return torch.zeros(size, dtype=torch.bool).scatter(0, torch.tensor(ids), True)


def recommended(own, near, next, *, neighbors=2, memory=None, top_k=1, far=(0, 1, 2, 3)):
    """The experts recommended to `me`, on one layer of four experts of one byte each."""
    me = Client("me", 1, memory_bytes=memory)
    server = bare_server([BlockShape(4, top_k)], [me])
    masks = {"me": bools(*own), "near": bools(*near), "next": bools(*next), "far": bools(*far)}
    return unmask(server.anatomy, recommend(server, me, P, masks, neighbors))["0"]


def test_a_client_with_fewer_experts_than_its_neighbors_gets_their_most_used_ones():
    assert recommended(own=[0], near=[0, 2], next=[0, 1]) == (0, 1)  # n = 1
    assert recommended(own=[0], near=[0, 1, 2], next=[0, 1, 3]) == (0, 1, 2)  # n = 2
    assert recommended(own=[3], near=[0, 1], next=[0, 1]) == (0, 3)


def test_only_the_most_similar_clients_are_used():
    assert recommended(own=[0], near=[0, 2], next=[0, 1, 2, 3], neighbors=1) == (0, 2)  # p̂ of near puts 2 before 1
    assert recommended(own=[0], near=[0], next=[0], neighbors=2, far=[0, 1, 2, 3]) == (0,)
    # with all three: mean size 2, and far has no say in p̂ since its cosine is 0
    assert recommended(own=[0], near=[0], next=[0], neighbors=3, far=[0, 1, 2, 3]) == (0, 1)


def test_a_client_with_more_experts_than_its_neighbors_loses_its_least_used_ones():
    assert recommended(own=[0, 1, 2, 3], near=[0, 2, 3], next=[0, 1, 2]) == (0, 1, 2)  # n = −1
    assert recommended(own=[0, 1, 2, 3], near=[0, 2], next=[0, 1]) == (0, 1)  # n = −2
    assert recommended(own=[1, 3], near=[0], next=[0]) == (1,)


def test_a_client_with_as_many_experts_as_its_neighbors_keeps_its_own():
    assert recommended(own=[2, 3], near=[0, 1], next=[0, 1]) == (2, 3)


def test_the_number_is_that_of_the_whole_model_not_of_each_layer():
    me = Client("me", 1)
    server = bare_server([FOUR, FOUR], [me])
    p = {"me": torch.tensor([1.0, 0, 0, 0, 1, 0, 0, 0]), "other": torch.tensor([1.0, 0, 0, 0, 0.4, 0.3, 0.2, 0.1])}
    masks = {"me": bools(0, 4, size=8), "other": bools(0, 4, 5, 6, size=8)}
    assert unmask(server.anatomy, recommend(server, me, p, masks, 3)) == {"0": (0,), "1": (0, 1, 2)}


@pytest.mark.parametrize(("memory", "expected"), [(1, (0,)), (2, (0, 1)), (3, (0, 1, 2)), (9, (0, 1, 2))])
def test_no_more_experts_are_added_than_fit_the_memory(memory, expected):
    assert recommended(own=[0], near=[0, 1, 2], next=[0, 1, 2], memory=memory) == expected


def test_an_expert_that_does_not_fit_is_skipped_for_the_best_that_does():
    me = Client("me", 1, memory_bytes=6)
    server = replace(bare_server([FOUR, FOUR], [me]), footprint=Footprint(0, {"0": 3, "1": 1}, 0))
    p = {"me": torch.tensor([1.0, 0, 0, 0, 1, 0, 0, 0]), "other": torch.tensor([1.0, 0.9, 0, 0, 1, 0.1, 0.2, 0])}
    masks = {"me": bools(0, 4, size=8), "other": bools(0, 1, 4, 5, 6, size=8)}
    assert unmask(server.anatomy, recommend(server, me, p, masks, 3)) == {"0": (0,), "1": (0, 1, 2)}  # n = 3, 2 bytes free


def test_no_layer_falls_below_its_top_k():
    assert recommended(own=[0, 1, 2, 3], near=[0], next=[0], top_k=2) == (0, 1)


def test_without_a_similar_client_the_experts_do_not_change():
    me = Client("me", 1)
    server = bare_server([FOUR], [me])
    own = bools(0)
    for others in ([], ["far"]):
        p, masks = {"me": P["me"], **{o: P[o] for o in others}}, {"me": own, **{o: bools(0, 1, 2, 3) for o in others}}
        assert torch.equal(recommend(server, me, p, masks, 3), own)


def test_groups_are_added_and_removed_as_a_whole():
    me = Client("me", 1)
    server = bare_server([BlockShape(8, top_k=2, groups=4, least=2)], [me])
    p = {"me": torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 0]), "other": torch.tensor([1.0, 1, 0.5, 0, 0.1, 0.1, 0.3, 0.3])}
    small, large, odd = bools(0, 1, size=8), bools(0, 1, 2, 3, 6, 7, size=8), bools(0, 1, 2, size=8)

    def recommendation(own, other):
        return unmask(server.anatomy, recommend(server, me, p, {"me": own, "other": other}, 1))["0"]

    assert recommendation(small, large) == (0, 1, 2, 3, 6, 7)  # means 0.3, 0.25 and 0.1: the last stays out
    assert recommendation(small, odd) == (0, 1)  # one more is no group
    assert recommendation(large, small) == (0, 1)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_recommendation_is_legal_fits_the_memory_and_changes_at_most_the_required_number(data):
    shapes = data.draw(st.sampled_from([[FOUR, BlockShape(6, 2)], [BlockShape(8, 2, groups=4, least=2), FOUR]]))
    total = sum(shape.num_experts for shape in shapes)
    names = ["me", "a", "b", "c"]
    server = bare_server(shapes, [])

    def some_held():
        counts = [data.draw(st.integers(s.fewest // s.unit, s.num_experts // s.unit)) for s in shapes]
        places = [data.draw(st.permutations(range(s.num_experts // s.unit))) for s in shapes]
        chosen = {
            str(i): tuple(sorted(u * s.unit + o for u in order[:n] for o in range(s.unit)))
            for i, (s, n, order) in enumerate(zip(shapes, counts, places, strict=True))
        }
        return mask(server.anatomy, chosen)

    p = {n: torch.tensor(data.draw(st.lists(st.integers(0, 9), min_size=total, max_size=total))) / 9 for n in names}
    masks = {name: some_held() for name in names}
    own = masks["me"]
    me = Client("me", 1, memory_bytes=int(own.sum()) + data.draw(st.integers(0, 4)))
    new = recommend(server, me, p, masks, neighbors=2)

    shrink.check(server.anatomy, unmask(server.anatomy, new))
    assert int(new.sum()) <= me.memory_bytes
    mine, *theirs = [int(masks[name].sum()) for name in names]
    added, dropped = int((new & ~own).sum()), int((own & ~new).sum())
    assert not (added and dropped), "it adds or drops, never both"
    assert added <= max(max(theirs) - mine, 0) and dropped <= max(mine - min(theirs), 0)
    backwards = {name: p[name] for name in reversed(names)}
    assert torch.equal(recommend(server, me, backwards, masks, 2), new), "whoever comes first"
