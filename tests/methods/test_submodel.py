"""The selection of a client's experts, on numbers that can be done in the head."""

from dataclasses import replace
from fractions import Fraction
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedexperts.errors import TooSmall
from fedexperts.methods.submodel import (
    at_random,
    covering,
    even_number,
    evenly,
    mask,
    predict,
    same_for_all,
    search,
    units,
    unmask,
)
from fedexperts.moe import shrink
from fedexperts.moe.anatomy import Anatomy, BlockShape
from fedexperts.moe.footprint import Footprint
from fedexperts.testing import bare_server
from fedexperts.types import Client

FOUR = BlockShape(num_experts=4, top_k=1)
CLEAR, EVEN = torch.tensor([0.7, 0.1, 0.1, 0.1]), torch.tensor([0.25, 0.25, 0.25, 0.25])
TOKENS = 64


def selected(p, memory, *, top_k=1, reserve=0.5, dense_bytes=2):
    """The search on layers of four experts of one byte each."""
    client = Client("weak", 1, memory_bytes=memory)
    server = bare_server([BlockShape(len(each), top_k) for each in p], [client], dense_bytes=dense_bytes)
    return search(server, client, {str(i): each for i, each in enumerate(p)}, reserve)


@pytest.mark.parametrize(
    ("memory", "clear", "even"),
    [
        (8, (0,), (0,)),  # 2 dense and 2 experts in half of it: θ = 0.25
        (10, (0,), (0, 1)),  # θ = 0.5
        (12, (0,), (0, 1, 2)),  # θ = 0.7
        (14, (0, 1), (0, 1, 2)),  # θ = 0.75
        (16, (0, 1), (0, 1, 2, 3)),  # θ = 0.8
        (20, (0, 1, 2, 3), (0, 1, 2, 3)),  # θ = 1
        (10**9, (0, 1, 2, 3), (0, 1, 2, 3)),
    ],
)
def test_one_theta_for_all_layers_gives_them_different_numbers_of_experts(memory, clear, even):
    assert selected([CLEAR, EVEN], memory) == {"0": clear, "1": even}


def test_experts_are_kept_by_falling_p_whatever_their_ids_and_given_in_order():
    assert selected([torch.tensor([0.1, 0.2, 0.3, 0.4])], memory=10) == {"0": (1, 2, 3)}


def test_no_layer_keeps_fewer_experts_than_its_router_picks():
    p = [torch.tensor([0.9, 0.5, 0.4, 0.2]), torch.tensor([0.5, 0.5, 0.5, 0.5])]
    assert selected(p, memory=12, top_k=2) == {"0": (0, 1), "1": (0, 1)}


def test_with_top_k_above_one_theta_is_a_share_of_k():
    p = {"0": torch.tensor([1.0, 0.5, 0.25, 0.25])}  # sums to 2
    shapes = Anatomy({"0": BlockShape(4, top_k=2)})
    assert covering(shapes, p, 0.75) == {"0": (0, 1)}  # 1.5 of 2
    assert covering(shapes, p, 0.8) == {"0": (0, 1, 2)}


def test_an_expert_that_no_token_reached_is_not_kept_even_without_a_limit():
    p = [torch.tensor([0.5, 0.0, 0.5, 0.0]), EVEN]
    assert selected(p, memory=None) == selected(p, memory=10**9) == {"0": (0, 2), "1": (0, 1, 2, 3)}


def test_a_layer_that_saw_no_token_keeps_its_top_k():
    assert selected([torch.zeros(4)], memory=None, top_k=2) == {"0": (0, 1)}


def test_a_client_that_holds_the_minimum_but_not_within_the_reserve_gets_the_minimum():
    assert selected([CLEAR, EVEN], memory=4, reserve=0.5) == {"0": (0,), "1": (0,)}


def test_a_client_too_small_for_the_minimum_is_named_with_its_memory_and_what_it_needs():
    client = Client("c07", 1, memory_bytes=3_900_000)
    server = bare_server([FOUR, FOUR], [client], expert_bytes=1_000_000, dense_bytes=2_000_000)
    for choose in (
        lambda: search(server, client, {"0": CLEAR, "1": EVEN}, 0.7),
        lambda: at_random(server, client, 0.7, None, Random(0)),
    ):
        with pytest.raises(TooSmall, match=r"client c07 has 3\.9 MB of memory.* takes 4\.0 MB"):
            choose()


@st.composite
def layers(draw):
    """Tokens of each expert, 64 to a layer, and the bytes of one of the layer's experts."""
    made = []
    for _ in range(draw(st.integers(1, 3))):
        cuts = sorted(draw(st.lists(st.integers(0, TOKENS), min_size=1, max_size=5)))
        counts = [end - start for start, end in zip([0, *cuts], [*cuts, TOKENS], strict=True)]
        made.append((counts, draw(st.integers(1, 5))))
    return made


@settings(max_examples=200, deadline=None)
@given(layers(), st.integers(0, 120), st.integers(1, 2))
def test_the_binary_search_finds_what_trying_every_theta_finds(layers, spare, top_k):
    blocks = [BlockShape(len(counts), top_k) for counts, _ in layers]
    least = sum(top_k * size for _, size in layers)
    client = Client("c", 1, memory_bytes=least + spare)
    cost = Footprint(0, {str(i): size for i, (_, size) in enumerate(layers)}, 0)
    server = replace(bare_server(blocks, [client]), footprint=cost)

    def covering_experts(theta):
        """Exact, with whole tokens."""
        chosen = {}
        for i, (counts, _) in enumerate(layers):
            order = sorted(range(len(counts)), key=lambda e: (-counts[e], e))
            number = next(n for n in range(1, len(order) + 1) if sum(counts[e] for e in order[:n]) >= theta * TOKENS)
            chosen[str(i)] = tuple(sorted(order[: max(number, top_k)]))
        return chosen

    thetas = {Fraction(n, TOKENS) for n in range(TOKENS + 1)}
    best = max(theta for theta in thetas if cost.of(covering_experts(theta)) <= client.memory_bytes)
    p = {str(i): torch.tensor(counts) / TOKENS for i, (counts, _) in enumerate(layers)}
    assert search(server, client, p, reserve=1.0) == covering_experts(best)


def test_a_weak_client_is_given_the_size_weighted_mean_of_its_task():
    clients = {
        c.name: c for c in (Client("weak", 5, "sort"), Client("a", 30, "sort"), Client("b", 10, "sort"), Client("c", 90, "add"))
    }
    measured = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.0, 1.0]), "c": torch.tensor([0.5, 0.5])}
    assert predict(clients["weak"], measured, clients).tolist() == [0.75, 0.25]


def test_a_weak_client_whose_task_nobody_measured_is_given_the_mean_of_all():
    clients = {c.name: c for c in (Client("weak", 5, "new"), Client("a", 30, "sort"), Client("b", 10, "add"))}
    measured = {"b": torch.tensor([0.0, 1.0]), "a": torch.tensor([1.0, 0.0])}
    assert predict(clients["weak"], measured, clients).tolist() == [0.75, 0.25]


def test_random_experts_are_as_many_as_fit_the_reserve_the_same_in_each_layer():
    client = Client("c", 1, memory_bytes=20)
    server = bare_server([FOUR, FOUR], [client], dense_bytes=5)
    experts = at_random(server, client, 0.5, None, Random("seed"))  # 10 bytes: 5 dense, 2 in each layer, one too few for 3
    assert {block: len(ids) for block, ids in experts.items()} == {"0": 2, "1": 2}
    assert experts == at_random(server, client, 0.5, None, Random("seed"))
    assert experts["0"] != experts["1"] or experts != at_random(server, client, 0.5, None, Random("other"))


def test_random_experts_without_a_limit_are_all():
    client = Client("c", 1)
    server = bare_server([FOUR, BlockShape(6, 2)], [client])
    assert at_random(server, client, 0.7, None, Random(0)) == server.anatomy.all_experts


def test_as_many_random_experts_as_asked_for_but_no_more_than_a_layer_has_and_no_fewer_than_top_k():
    client = Client("c", 1)
    server = bare_server([FOUR, BlockShape(8, 2)], [client])
    sizes = {n: [len(ids) for ids in at_random(server, client, 0.7, n, Random(0)).values()] for n in (1, 3, 6)}
    assert sizes == {1: [1, 2], 3: [3, 3], 6: [4, 6]}


def test_more_random_experts_than_the_memory_holds_are_refused_with_the_number_that_fits():
    client = Client("c07", 1, memory_bytes=5)
    server = bare_server([FOUR, FOUR], [client])
    assert len(at_random(server, client, 0.7, 2, Random(0))["0"]) == 2
    with pytest.raises(TooSmall, match=r"client c07 .* experts_per_layer = 3 .* at most 2"):
        at_random(server, client, 0.7, 3, Random(0))


def test_the_same_random_experts_for_every_client_of_a_run():
    clients = [Client("a", 1), Client("b", 9, "x", memory_bytes=4)]
    server = bare_server([BlockShape(16, 2), BlockShape(16, 2)], clients)
    drawn = [same_for_all(replace(server, round=round), client, 2) for client in clients for round in (1, 5)]
    assert all(each == drawn[0] for each in drawn)
    assert [len(ids) for ids in drawn[0].values()] == [2, 2]
    others = [same_for_all(replace(server, seed=str(seed)), clients[0], 2) for seed in range(1, 9)]
    assert all(each != drawn[0] for each in others)
    assert drawn[0]["0"] != drawn[0]["1"] or others[0]["0"] != others[0]["1"]


def test_the_same_experts_for_all_are_all_of_them_whatever_the_memory_unless_a_number_is_asked_for():
    small = Client("c07", 1, memory_bytes=5)
    server = bare_server([FOUR, FOUR], [small])
    assert same_for_all(server, small, None) == server.anatomy.all_experts
    assert len(same_for_all(server, small, 2)["0"]) == 2
    with pytest.raises(TooSmall, match=r"client c07 .* experts_per_layer = 3 .* at most 2"):
        same_for_all(server, small, 3)


def test_the_number_that_fits_is_that_of_the_client_with_the_least_memory_whichever_is_refused_first():
    first, least = Client("c01", 1, memory_bytes=7), Client("c02", 1, memory_bytes=5)
    server = bare_server([FOUR, FOUR], [first, least, Client("c03", 1)])
    assert (even_number(server, first), even_number(server, least)) == (3, 2)
    for ask in (
        lambda number: same_for_all(server, first, number),
        lambda number: at_random(server, first, 0.7, number, Random(0)),
    ):
        with pytest.raises(TooSmall, match=r"client c01 .* experts_per_layer = 4 .* at most 2, which every client holds"):
            ask(4)
    nothing = bare_server([FOUR, FOUR], [first, Client("c04", 1, memory_bytes=1)])
    with pytest.raises(TooSmall, match=r"client c04 .* smallest legal sub-model"):
        same_for_all(nothing, first, 4)


def test_every_expert_is_drawn_by_somebody():
    server = bare_server([FOUR], [])
    drawn = {e for seed in range(20) for e in at_random(server, Client("c", 1), 0.7, 1, Random(seed))["0"]}
    assert drawn == {0, 1, 2, 3}


def test_how_many_experts_fit_evenly():
    shapes = [FOUR, BlockShape(8, 2)]
    for memory, number in ((2, 0), (3, 1), (4, 2), (6, 3), (8, 4), (9, 5), (12, 8), (None, 8)):
        client = Client("c", 1, memory_bytes=memory)
        assert even_number(bare_server(shapes, [client]), client) == number, memory
    assert evenly(bare_server(shapes, []).anatomy, 5) == {"0": 4, "1": 5}
    assert evenly(bare_server(shapes, []).anatomy, 1) == {"0": 1, "1": 2}


GROUPED = BlockShape(num_experts=8, top_k=2, groups=4, least=2)


def test_experts_of_a_grouped_router_are_kept_by_whole_groups():
    p = {"0": torch.tensor([0.4, 0.0, 0.3, 0.3, 0.1, 0.1, 0.3, 0.5])}  # groups: 0.4, 0.6, 0.2, 0.8 of 2
    anatomy = Anatomy({"0": GROUPED})
    assert covering(anatomy, p, 0.39) == {"0": (6, 7)}
    assert covering(anatomy, p, 0.5) == {"0": (2, 3, 6, 7)}
    assert covering(anatomy, p, 0.9) == {"0": (0, 1, 2, 3, 6, 7)}


@pytest.mark.parametrize("number", range(1, 9))
def test_random_experts_of_a_grouped_router_are_whole_groups_a_sub_model_can_have(number):
    client = Client("c", 1)
    server = bare_server([GROUPED, FOUR], [client])
    experts = at_random(server, client, 0.7, number, Random(0))
    shrink.check(server.anatomy, experts)
    assert len(experts["0"]) == max(number - number % 2, 2)


def test_units_are_single_experts_or_whole_groups():
    places = units(Anatomy({"a": BlockShape(3, 1), "b": GROUPED}))
    assert places == [slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 5), slice(5, 7), slice(7, 9), slice(9, 11)]


@given(st.lists(st.booleans(), min_size=7, max_size=7))
def test_a_mask_says_the_same_as_the_experts_it_came_from(marks):
    anatomy = Anatomy({"a": BlockShape(3, 1), "b": BlockShape(4, 1)})
    flags = torch.tensor(marks)
    assert torch.equal(mask(anatomy, unmask(anatomy, flags)), flags)
