"""A round of every method with its clients on another device: the answers and the server are those of the CPU."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from fedexperts.federation import jobs_for, steps
from fedexperts.methods import METHODS
from fedexperts.moe import factors
from fedexperts.moe.device import device_of, on_device
from fedexperts.testing import tiny_context, tiny_model, tiny_server
from fedexperts.types import Client, Training

ADAPTERS = {"fedit", "ffa_lora", "fedsa_lora", "flora", "flexlora", "hetlora", "random_expert"}
SWITCH = ("fedmoe", "hfedmoe", "flex", "scaffold", "flora")  # all that works differently where experts are modules
CASES = [("olmoe", name) for name in METHODS] + [("switch_transformers", name) for name in SWITCH]
every_case = pytest.mark.parametrize(("family", "name"), CASES)
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation")


def training_of(name):
    # A first step of AdamW is the sign of the gradient, of which rounding is enough to change an element that is nearly 0.
    training = Training(batch_size=4, local_steps=2, optimizer="sgd", lr=0.1)
    if name == "flex":
        return replace(training, train="lora", parts=("attention",), rank=8)
    return replace(training, train="lora", rank=8) if name in ADAPTERS else training


@cache
def played(name, family, device):
    """All stages and one round with three clients on `device`: the server, all updates, and what clients keep."""
    model, training, method = tiny_model(family), training_of(name), METHODS[name]()
    whole = tiny_server(model, [], training)
    memory = round(0.9 * whole.footprint.of(whole.anatomy.all_experts))
    clients = [Client("a", 8, "x"), Client("b", 12, "y"), Client("c", 8, "x", memory_bytes=memory)]
    server = replace(whole, clients={client.name: client for client in clients})
    base = on_device(model, device)
    contexts = {client.name: tiny_context(base, client, training) for client in clients}
    updates = []
    for round_, task in steps(method, 1):
        asked = replace(server, round=round_, task=task)
        answers = [method.train(job, contexts[job.client]) for job in jobs_for(asked, method, clients)]
        server = method.merge(asked, iter(answers))
        updates += answers
    return server, updates, {name: context.client_state for name, context in contexts.items()}, base


@every_case
def test_every_answer_is_the_one_of_the_cpu_and_on_the_cpu(name, family, device, near):
    (_, ours, kept, _), (_, theirs, kept_there, base) = played(name, family, "cpu"), played(name, family, device)
    assert device_of(base) == torch.device(device)
    for mine, its in zip(ours, theirs, strict=True):
        assert near(mine.patch.tensors, its.patch.tensors) and near(mine.patch.rows, its.patch.rows)
        assert near(mine.extra, its.extra)
        assert mine.metrics.get("routed") == its.metrics.get("routed")
        assert mine.metrics.get("loss", 0) == pytest.approx(its.metrics.get("loss", 0), abs=1e-4)
        assert mine.cost.tokens == its.cost.tokens and its.cost.peak_bytes > 0
    assert all(near(kept[client], kept_there[client]) for client in kept)


@every_case
def test_the_merged_server_is_the_one_of_the_cpu(name, family, device, near):
    here, there = played(name, family, "cpu")[0], played(name, family, device)[0]
    ours, theirs = (products(dict(server.weights)) if name == "flexlora" else server.weights for server in (here, there))
    assert near(ours, theirs)
    assert near(here.method_state, there.method_state)
    moved = sum(not torch.equal(tensor, tiny_start(name, family)[key]) for key, tensor in there.weights.items())
    assert moved > 2 or name in ("local", "flora")


def products(weights):
    """FlexLoRA's factors are those of a decomposition, in which signs are free: BA in their place."""
    made = {a: weights.pop(b) @ weights.pop(a) for a, b in factors.pairs([*weights]).items()}
    return weights | made


@cache
def tiny_start(name, family):
    return tiny_server(tiny_model(family), [], training_of(name)).weights


@every_case
def test_the_base_stays_as_it_was_and_on_its_device(name, family, device):
    base, before = played(name, family, device)[3], tiny_model(family).state_dict()
    assert all(tensor.device == torch.device(device) for tensor in base.state_dict().values())
    assert all(torch.equal(tensor.cpu(), before[key]) for key, tensor in base.state_dict().items())
