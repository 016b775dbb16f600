"""FlexLoRA, the averaged products of Bai et al."""

from dataclasses import replace

import pytest
import torch

from fedexperts.federation import jobs_for
from fedexperts.methods.flexlora import FlexLoRA
from fedexperts.moe import factors
from fedexperts.moe.anatomy import Anatomy, BlockShape
from fedexperts.moe.footprint import Footprint
from fedexperts.testing import tiny_context, tiny_model, tiny_server
from fedexperts.types import Client, Patch, Server, Training, Update

A, B = "q.lora_A.default.weight", "q.lora_B.default.weight"
CLIENTS = [Client("a", 8), Client("b", 12)]
LORA = Training(train="lora", rank=8, batch_size=4, local_steps=2, lr=0.01)
every_family = pytest.mark.parametrize("family", ["olmoe", "switch_transformers"])


def row(matrix):
    """One row, row-first."""
    return torch.tensor([matrix])


def bare(rank=2):
    """A server of one adapted matrix and a router."""
    weights = {A: torch.eye(2)[None, :rank], B: torch.zeros(1, 2, rank), "gate": row([0.0])}
    clients = {name: Client(name, 1) for name in "ab"}
    return Server(weights, dict.fromkeys(weights), Anatomy({"0": BlockShape(4, 1)}), Footprint(0, {"0": 1}, 0), clients)


def sent(client, a, b, examples, gate=0.0):
    return Update(client, 1, "train", Patch({A: row(a), B: row(b), "gate": row([gate])}), examples)


ONE = sent("a", [[1.0, 0.0]], [[4.0], [0.0]], 1, 4.0)  # BA = diag(4, 0), rank 1
OTHER = sent("b", [[0.0, 2.0], [1.0, 0.0]], [[0.0, 8.0], [4.0, 0.0]], 3, 8.0)  # diag(8, 8), rank 2


def product(weights):
    return weights[B] @ weights[A]


def test_a_merge_by_hand():
    """A quarter of diag(4, 0) and three of diag(8, 8)."""
    merged = FlexLoRA().merge(bare(), iter([ONE, OTHER]))
    torch.testing.assert_close(product(merged.weights), row([[7.0, 0.0], [0.0, 6.0]]))
    assert merged.weights["gate"].tolist() == [[7.0]]
    low = FlexLoRA(ranks=(1, 2)).assign(merged, Client("a", 1))
    torch.testing.assert_close(product(low.patch.tensors), row([[7.0, 0.0], [0.0, 0.0]]))
    assert int(low.extra["rank"]) == 1
    high = FlexLoRA(ranks=(1, 2)).assign(merged, Client("b", 1))
    torch.testing.assert_close(product(high.patch.tensors), row([[7.0, 0.0], [0.0, 6.0]]))


def test_a_server_of_a_lower_rank_holds_the_largest_directions():
    merged = FlexLoRA().merge(bare(rank=1), iter([replace(ONE, examples=1), sent("b", [[0.0, 1.0]], [[0.0], [6.0]], 1)]))
    torch.testing.assert_close(product(merged.weights), row([[0.0, 0.0], [0.0, 3.0]]))  # of diag(2, 3)


def test_the_order_of_updates_does_not_matter_and_a_single_clients_product_is_adopted():
    one, other = (FlexLoRA().merge(bare(), iter(order)).weights for order in ([ONE, OTHER], [OTHER, ONE]))
    torch.testing.assert_close(product(one), product(other))
    torch.testing.assert_close(product(FlexLoRA().merge(bare(), iter([OTHER])).weights), row([[8.0, 0.0], [0.0, 8.0]]))


def test_ranks_that_no_client_filled_can_still_be_trained():
    """B is zero there, A is not: else neither would ever get a gradient."""
    merged = FlexLoRA().merge(bare(), iter([ONE])).weights
    torch.testing.assert_close(merged[B], row([[4.0, 0.0], [0.0, 0.0]]) * merged[B][0, 0, 0].sign())
    torch.testing.assert_close(merged[A] @ merged[A].mT, torch.eye(2)[None])


def test_without_updates_the_weights_do_not_change():
    server = bare()
    assert FlexLoRA().merge(server, iter([])) == server


@every_family
def test_clients_of_different_ranks_get_the_nearest_of_theirs_to_the_mean_of_the_products(family):
    model = tiny_model(family)
    server, method = tiny_server(model, CLIENTS, LORA), FlexLoRA(ranks=(8, 4))
    jobs = list(jobs_for(server, method, CLIENTS))
    updates = [method.train(job, tiny_context(model, client, LORA)) for job, client in zip(jobs, CLIENTS, strict=True)]
    merged = method.merge(server, iter(updates))
    one, other = (update.patch.tensors for update in updates)
    assert (factors.rank_of(one), factors.rank_of(other)) == (8, 4)
    seen = 0
    for a, b in factors.pairs(server.weights).items():
        mean = (8 * one[b].double() @ one[a].double() + 12 * other[b].double() @ other[a].double()) / 20
        u, sigma, vt = torch.linalg.svd(mean, full_matrices=False)
        for job in jobs_for(merged, method, CLIENTS):
            rank = int(job.extra["rank"])
            nearest = (u[..., :rank] * sigma[:, None, :rank]) @ vt[:, :rank]
            product = job.patch.tensors[b] @ job.patch.tensors[a]
            assert job.patch.tensors[a].shape[1] == rank
            torch.testing.assert_close(product.double(), nearest, rtol=1e-3, atol=1e-6)
            seen += bool(nearest.any())
    assert seen > 20
