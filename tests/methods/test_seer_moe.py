"""SEER-MoE: counting and pruning of experts, then training with gating entropy in the loss."""

from dataclasses import replace

import pytest
import torch

from fedexperts.errors import TooSmall
from fedexperts.federation import jobs_for
from fedexperts.methods.contract import Method
from fedexperts.methods.seer_moe import SEERMoE
from fedexperts.moe import rows, shrink
from fedexperts.moe.anatomy import BlockShape, blocks
from fedexperts.moe.flops import FlopsEstimate
from fedexperts.moe.footprint import Footprint
from fedexperts.moe.routing import Recorder
from fedexperts.moe.tuning import Tuning, prepare
from fedexperts.testing import bare_server, tiny_context, tiny_model, tiny_server
from fedexperts.types import Client, Patch, Training, Update

FOUR = BlockShape(4, 1)
TRAINING = Training(batch_size=4, local_steps=1)
CLIENTS = [Client("a", 8), Client("b", 10)]
every_family = pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "switch_transformers"])


def counted(client, counts):
    return Update(client, 0, "count", Patch({}), 1, {"counts": torch.tensor(counts, dtype=torch.float64)})


def test_counts_are_summed_and_each_client_gets_the_most_used_experts_that_fit():
    """Sums (4, 1, 3, 0) and (8, 0, 0, 0). Without a limit, all that was ever used; in three bytes, one an expert, the largest of
    each layer and expert 2, which with it covers 7 of 8 in layer 0; in two the largest alone.
    """
    clients = [Client("large", 1), Client("small", 1, memory_bytes=3), Client("smallest", 1, memory_bytes=2)]
    server = replace(bare_server([FOUR, FOUR], clients), task="count")
    counted_server = SEERMoE().merge(
        server, iter([counted("large", [1, 1, 3, 0, 4, 0, 0, 0]), counted("small", [3, 0, 0, 0, 4, 0, 0, 0])])
    )
    assert counted_server.method_state["counts"].tolist() == [4, 1, 3, 0, 8, 0, 0, 0]
    experts = [SEERMoE().assign(replace(counted_server, task="train"), client).experts for client in clients]
    assert experts == [{"0": (0, 1, 2), "1": (0,)}, {"0": (0, 2), "1": (0,)}, {"0": (0,), "1": (0,)}]
    assert experts == [SEERMoE().assign(replace(counted_server, task="evaluate", round=7), client).experts for client in clients]
    with_reserve = SEERMoE(reserve=0.7).assign(replace(counted_server, task="train"), clients[1])
    assert with_reserve.experts == {"0": (0,), "1": (0,)}, "of 0.7 times three bytes two whole ones"


def test_the_order_of_counts_does_not_matter_and_without_any_the_server_does_not_change():
    server = replace(bare_server([FOUR], CLIENTS), task="count")
    one, other = counted("a", [0.1, 0.2, 0.3, 0.4]), counted("b", [7.0, 0, 0, 1])
    merged = [SEERMoE().merge(server, iter(order)).method_state["counts"] for order in ([one, other], [other, one])]
    assert torch.equal(*merged)
    assert SEERMoE().merge(server, iter([])) == server


@pytest.mark.parametrize("tuning", [Tuning(), Tuning("lora", rank=4)], ids=["full", "lora"])
@every_family
def test_counts_are_of_all_training_tokens_and_nothing_is_trained(family, tuning):
    model, training = tiny_model(family), replace(TRAINING, **vars(tuning))
    server = replace(tiny_server(model, CLIENTS, training), task="count")
    context = tiny_context(model, CLIENTS[1], training)  # ten examples in batches of four
    _, job = jobs_for(server, SEERMoE(), CLIENTS)
    hard, soft = (SEERMoE(counting=counting).train(job, context) for counting in ("hard", "soft"))

    batches = [context.encoder.batch(context.data.train[start : start + 4]) for start in (0, 4, 8)]
    with torch.no_grad(), Recorder(model, keep_logits=True) as recorder:
        for batch in batches:
            model(**batch)
    routing = recorder.routing()
    assert torch.equal(hard.extra["counts"], torch.cat(list(routing.counts.values())).double())
    expected = [torch.cat(passes).softmax(-1).sum(0) for passes in recorder.logits.values()]
    torch.testing.assert_close(soft.extra["counts"].float(), torch.cat(expected), rtol=1e-4, atol=1e-4)

    for update in (hard, soft):
        assert not update.patch.tensors and update.task == "count"
        estimate = FlopsEstimate(prepare(shrink.shrink(model, {}), training.tuning, "0"))  # with the adapters that the run trains
        assert update.cost.flops_estimated == sum(estimate.forward(estimate.size(batch)) for batch in batches)
        weights, activations = server.footprint.frozen_bytes, server.footprint.activation_bytes
        assert update.cost.tokens > 0 and weights < update.cost.peak_bytes <= weights + activations
    assert SEERMoE().merge(server, iter([hard])).weights == server.weights


@every_family
def test_a_client_trains_its_sub_model_and_the_penalty_lowers_its_routers_entropy(family):
    model = tiny_model(family)
    whole = tiny_server(model, [], TRAINING)
    client = Client("a", 8, memory_bytes=round(0.9 * whole.footprint.of(whole.anatomy.all_experts)))
    counts = torch.arange(whole.anatomy.num_experts, dtype=torch.float64) + 1
    server = replace(whole, clients={"a": client}, task="train", method_state={"counts": counts})
    (job,) = jobs_for(server, SEERMoE(), [client])
    assert all(0 < len(job.experts[name]) < 8 for name in blocks(model))
    shrink.check(server.anatomy, job.experts)
    assert 7 in job.experts[next(iter(job.experts))]

    context = tiny_context(model, client, TRAINING)
    plain, none, much = Method().train(job, context), *(SEERMoE(entropy=weight).train(job, context) for weight in (0.0, 3.0))
    assert all(torch.equal(plain.patch.tensors[name], none.patch.tensors[name]) for name in plain.patch.tensors)
    assert much.metrics["loss"] > none.metrics["loss"]
    routers = [name for name in much.patch.tensors if rows.router_of(name, server.layout)]
    assert any(not torch.equal(much.patch.tensors[name], none.patch.tensors[name]) for name in routers)


# Who can count


def before_counting(*clients):
    """A layer of four experts of 1 MB when trained, the whole frozen model 2.5 MB, activations half a MB."""
    cost = Footprint(0, {"0": 10**6}, 5 * 10**5, frozen_bytes=25 * 10**5)
    return replace(bare_server([FOUR], clients), footprint=cost, task="count")


def test_clients_count_whose_memory_fits_the_whole_model_and_activations():
    clients = [Client("enough", 1, memory_bytes=3 * 10**6), Client("short", 1, memory_bytes=3 * 10**6 - 1), Client("free", 1)]
    assignments = [SEERMoE().assign(before_counting(*clients), client) for client in clients]
    assert [each is not None for each in assignments] == [True, False, True]
    assert assignments[0].experts == {"0": (0, 1, 2, 3)}


def test_if_no_client_can_count_the_error_names_the_bytes():
    client = Client("c", 1, memory_bytes=2 * 10**6)
    with pytest.raises(TooSmall, match=r"no client can count .* 3\.0 MB and all clients have less memory; give one of them more"):
        SEERMoE().assign(before_counting(client), client)


def test_a_client_too_small_for_any_sub_model_is_refused_in_both_stages():
    client = Client("c3", 1, memory_bytes=1)
    for task in ("count", "train"):
        with pytest.raises(TooSmall, match="client c3"):
            SEERMoE().assign(replace(before_counting(client, Client("free", 1)), task=task), client)
