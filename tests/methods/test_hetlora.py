"""HetLoRA of Cho et al."""

from dataclasses import replace

import pytest
import torch

from fedexperts.experiment.client_task import apply_update
from fedexperts.federation import jobs_for
from fedexperts.methods.fedit import FedIT
from fedexperts.methods.hetlora import HetLoRA
from fedexperts.moe import factors, rows
from fedexperts.moe.anatomy import Anatomy, BlockShape
from fedexperts.moe.footprint import Footprint
from fedexperts.testing import tiny_context, tiny_model, tiny_server
from fedexperts.types import Client, Patch, Server, Training, Update

A, B = "q.lora_A.default.weight", "q.lora_B.default.weight"
CLIENTS = [Client("a", 8), Client("b", 12)]
LORA = Training(train="lora", rank=8, batch_size=4, local_steps=3, lr=0.01)
every_family = pytest.mark.parametrize("family", ["olmoe", "switch_transformers"])


def row(matrix):
    """One row, row-first."""
    return torch.tensor([matrix])


def bare():
    """A server of one adapted matrix, rank 3, and a router."""
    weights = {A: torch.full((1, 3, 2), 9.0), B: torch.full((1, 2, 3), 9.0), "gate": row([0.0])}
    clients = {name: Client(name, 1) for name in "ab"}
    return Server(weights, dict.fromkeys(weights), Anatomy({"0": BlockShape(4, 1)}), Footprint(0, {"0": 1}, 0), clients)


def sent(client, a, b, examples, gate=0.0):
    return Update(client, 1, "train", Patch({A: row(a), B: row(b), "gate": row([gate])}), examples)


ONE = sent("a", [[4.0, 0.0]], [[1.0], [0.0]], 1, 4.0)  # rank 1, ‖BA‖ = 4
OTHER = sent("b", [[0.0, 4.0], [8.0, 0.0]], [[0.0, 0.0], [3.0, 0.0]], 3, 8.0)  # rank 2, ‖BA‖ = 12


@pytest.mark.parametrize("aggregate", ["examples", "sparsity"])
def test_a_merge_by_hand(aggregate):
    """1 : 3 by examples; 4 : 12 by norm, the same. Rank 2 is three quarters of the other's; rank 3, which none has, stays."""
    merged = HetLoRA(aggregate=aggregate).merge(bare(), iter([ONE, OTHER])).weights
    assert merged[A].tolist() == [[[1.0, 3.0], [6.0, 0.0], [9.0, 9.0]]]
    assert merged[B].tolist() == [[[0.25, 0.0, 9.0], [2.25, 0.0, 9.0]]]
    assert merged["gate"].tolist() == [[7.0]]


def test_adapters_are_weighted_by_their_norm_and_other_weights_by_examples():
    merged = HetLoRA().merge(bare(), iter([replace(ONE, examples=3), replace(OTHER, examples=1)])).weights
    assert merged[A].tolist() == [[[1.0, 3.0], [6.0, 0.0], [9.0, 9.0]]]
    assert merged["gate"].tolist() == [[5.0]]


def test_each_expert_is_weighted_by_the_norm_of_its_own_adapter():
    a, b = "0.experts.lora.up_proj.a", "0.experts.lora.up_proj.b"
    weights = {a: torch.zeros(2, 1, 1), b: torch.zeros(2, 1, 1)}
    server = replace(bare(), weights=weights, layout=dict.fromkeys(weights, "0"))

    def of(client, *values):
        return Update(client, 1, "train", Patch({a: torch.tensor(values)[:, None, None], b: torch.ones(2, 1, 1)}), 1)

    merged = HetLoRA().merge(server, iter([of("a", 1.0, 6.0), of("b", 3.0, 2.0)])).weights
    assert merged[a].flatten().tolist() == [(1 * 1 + 3 * 3) / 4, (6 * 6 + 2 * 2) / 8]


def test_ranks_that_no_weighted_client_sent_keep_their_values():
    """Expert 0 of the client of rank 2 saw no token: its B is 0 as it came. The other's rank 1 counts there, rank 2 stays."""
    a, b = "0.experts.lora.up_proj.a", "0.experts.lora.up_proj.b"
    weights = {a: torch.full((2, 2, 1), 9.0), b: torch.zeros(2, 1, 2)}
    server = replace(bare(), weights=weights, layout=dict.fromkeys(weights, "0"))
    low = Update("a", 1, "train", Patch({a: torch.tensor([[[4.0]], [[4.0]]]), b: torch.tensor([[[1.0]], [[1.0]]])}), 1)
    high = Update("b", 1, "train", Patch({a: torch.full((2, 2, 1), 2.0), b: torch.tensor([[[0.0, 0.0]], [[1.0, 1.0]]])}), 1)
    for order in ([low, high], [high, low]):
        merged = HetLoRA().merge(server, iter(order)).weights
        assert merged[a].tolist() == [[[4.0], [9.0]], [[3.0], [1.0]]]  # of expert 1 both have a norm of 4
        assert merged[b].tolist() == [[[1.0, 0.0]], [[1.0, 0.5]]]


def test_the_order_of_updates_does_not_matter_and_one_client_is_taken_at_its_word():
    one, other = (HetLoRA().merge(bare(), iter(order)).weights for order in ([ONE, OTHER], [OTHER, ONE]))
    assert all(torch.equal(one[name], other[name]) for name in one)
    alone = HetLoRA().merge(bare(), iter([OTHER])).weights
    assert torch.equal(alone[A][:, :2], OTHER.patch.tensors[A]) and torch.equal(alone[B][..., :2], OTHER.patch.tensors[B])


def test_without_updates_the_weights_do_not_change():
    server = bare()
    merged = HetLoRA().merge(server, iter([]))
    assert all(torch.equal(merged.weights[name], server.weights[name]) for name in server.weights) and not merged.method_state


def awake(family, training=LORA, clients=CLIENTS):
    """A model and a server whose B are not zero."""
    model = tiny_model(family)
    server = tiny_server(model, clients, training)
    chance = torch.Generator().manual_seed(0)
    names = factors.pairs(server.weights).values()
    drawn = {b: 0.1 * torch.randn(server.weights[b].shape, generator=chance) for b in names}
    return model, replace(server, weights={**server.weights, **drawn})


def played(model, server, method, training=LORA):
    jobs = list(jobs_for(server, method, CLIENTS))
    updates = [method.train(job, tiny_context(model, client, training)) for job, client in zip(jobs, CLIENTS, strict=True)]
    return updates, method.merge(server, iter(updates))


@every_family
def test_equal_ranks_weighed_by_examples_and_never_pruned_are_fedit_bit_for_bit(family):
    model, server = awake(family)
    _, one = played(model, server, HetLoRA(aggregate="examples", prune=0))
    _, other = played(model, server, FedIT())
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in server.weights)
    assert any(not torch.equal(one.weights[name], server.weights[name]) for name in server.weights)


@every_family
def test_a_client_is_sent_its_first_ranks_and_sends_as_many(family):
    model, server = awake(family)
    method = HetLoRA(ranks=(4, 8), prune=0)
    updates, merged = played(model, server, method)
    for job, update, rank in zip(jobs_for(server, method, CLIENTS), updates, (4, 8), strict=True):
        assert int(job.extra["rank"]) == rank
        expected = factors.cut(server.weights, rank)
        assert all(torch.equal(job.patch.tensors[name], expected[name]) for name in server.weights)
        assert factors.rank_of(update.patch.tensors) == rank
    assert {name: int(rank) for name, rank in merged.method_state.items()} == {"rank/a": 4, "rank/b": 8}


@pytest.mark.parametrize(
    ("family", "decay", "low"), [("olmoe", 0.99, 4), ("switch_transformers", 0.99, 7), ("switch_transformers", 0.8, 6)]
)
def test_last_ranks_whose_norm_shrinks_are_pruned_and_the_server_records_the_rank(family, decay, low):
    """A regulariser that outweighs all else; stacked experts take multiples of 4 only."""
    model, server = awake(family)
    method = HetLoRA(prune=100.0, decay=decay)
    updates, merged = played(model, server, method)
    assert [factors.rank_of(update.patch.tensors) for update in updates] == [low, low]
    assert {name: int(rank) for name, rank in merged.method_state.items()} == {"rank/a": low, "rank/b": low}
    assert [int(job.extra["rank"]) for job in jobs_for(merged, method, CLIENTS)] == [low, low]
    assert merged.weights.keys() == server.weights.keys() and factors.rank_of(merged.weights) == 8


@every_family
def test_a_client_that_has_pruned_can_be_scored_before_the_merge(family):
    model, server = awake(family)
    method = HetLoRA(prune=100.0)
    (job,), context = jobs_for(server, method, CLIENTS[:1]), tiny_context(model, CLIENTS[0], LORA)
    update = method.train(job, context)
    weights = rows.read(HetLoRA().build_model(apply_update(job, update), context))
    assert factors.rank_of(weights) < 8
    assert all(torch.equal(weights[name], update.patch.tensors[name]) for name in server.weights)


def test_pruning_stops_at_the_lowest_allowed_rank():
    training = replace(LORA, train="lora", rank=4)
    model, server = awake("olmoe", training)
    updates, _ = played(model, server, HetLoRA(prune=100.0, decay=0.5), training)
    assert [factors.rank_of(update.patch.tensors) for update in updates] == [4, 4]


def test_last_ranks_whose_norm_grows_are_kept():
    """Fresh adapters: B is zero, and cannot become less."""
    model = tiny_model("olmoe")
    updates, _ = played(model, tiny_server(model, CLIENTS, LORA), HetLoRA(prune=1e-6))
    assert [factors.rank_of(update.patch.tensors) for update in updates] == [8, 8]
