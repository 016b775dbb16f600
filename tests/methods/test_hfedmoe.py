"""HFedMoE: a round by hand from (3) to (21), then on tiny models."""

import json
from dataclasses import replace
from itertools import permutations

import pytest
import torch

from fedexperts.config import RunConfig
from fedexperts.core.training import Fitted
from fedexperts.errors import BadValue
from fedexperts.experiment.progress import Quiet
from fedexperts.experiment.runner import run
from fedexperts.federation import jobs_for
from fedexperts.io.toml import checked
from fedexperts.methods import hfedmoe
from fedexperts.methods.contract import Method
from fedexperts.methods.fedavg import FedAvg
from fedexperts.methods.hfedmoe import HFedMoE
from fedexperts.moe import rows
from fedexperts.moe.anatomy import BlockShape, blocks
from fedexperts.moe.footprint import Footprint, footprint
from fedexperts.moe.routing import Recorder
from fedexperts.moe.tuning import Tuning
from fedexperts.testing import bare_server, tiny_context, tiny_model, tiny_server
from fedexperts.types import Client, Cost, Training

TRAINING = Training(batch_size=4, local_steps=3, label_smoothing=0.0, router_aux_loss_coef=0.0)
CLIENTS = [Client("a", 8), Client("b", 24)]
every_family = pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "switch_transformers"])


def small(family="olmoe", **overrides):
    """A tiny model with two MoE layers."""
    return tiny_model(family, **(overrides if family == "switch_transformers" else {"num_hidden_layers": 2, **overrides}))


def trained(method, server, model, training, clients=CLIENTS):
    """Each client's update."""
    jobs = jobs_for(replace(server, round=1, task="train"), method, clients)
    return [method.train(job, tiny_context(model, server.clients[job.client], training)) for job in jobs]


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# By hand: two layers of four experts see three tokens; G of each token, the router's full softmax. Client a has 8 examples and
# a budget of 3 experts, b has 24 and no limit; τ = 0.25, λ = 0.9, β = 0.1, top 1.
#
# a, layer 0.  s_cum = (0.5, 0.3, 0.1, 0.1)                                                                         (3)
#              s_spec = (0.7, 0.7, 0.1, 0.1)                                                                        (4)
#              s = 0.9 s_cum + 0.1 s_spec = (0.52, 0.34, 0.1, 0.1)                                                  (5)
#              I = s − 0.1 · ((1.4 ln 1.4 − 0.1 ln 5) / 3, (0.7 ln 7/3 − 0.2 ln 3) / 3, 0, 0) = (0.5097, 0.3276, 0.1, 0.1)    (14)
#              top 1 sends two tokens to expert 0 and one to expert 1
# a, layer 1.  s_cum = (1/3, 4/15, 0.2, 0.2), s_spec = (0.4, 0.4, 0.2, 0.2), s = (0.34, 0.28, 0.2, 0.2)
#              I = s − 0.1 · ((0.8 ln 1.2 − 0.2 ln 5/3) / 3, 0.4 (ln 3/4 + ln 3/2) / 3, 0, 0) = (0.3385, 0.2784, 0.2, 0.2)
#              two tokens to expert 0, one to expert 1
#              Of the four that were picked the best of each layer, expert 0 of both; then expert 1 of layer 0,
#              since 0.3276 > 0.2784                                                                                (15)
#              u = s_cum; S_a = {0, 1} and {0, 1}; expert 1 of layer 1 was not trained, so it is not sent           (16)
#              preference: 0.5 · 0.52 + 0.3 · 0.34 = 0.362 in layer 0, 0.34 / 3 + 0.28 · 4/15 = 0.188 in layer 1    (19)
# b            sees three times the same token: u = s_cum = s_spec = s = I = (0.1, 0.1, 0.7, 0.1) and (0.4, 0.2, 0.2, 0.2)
#              trains expert 2 and expert 0; S_b = {2} and {0}; preference 0.49 and 0.16
# server       ∪S = {0, 1, 2} and {0, 1}, five; r_a = 4/5, r_b = 2/5                                                (18)
#              α_a = 4/5 · (0.362 + 0.188) / 4 = 0.11, α_b = 2/5 · (0.49 + 0.16) / 2 = 0.13                         (19), (20)
#              routers: (0.11 a + 0.13 b) / 0.24                                                                    (21)
#              expert 0 of layer 1: (8 a + 24 b) / 32; 0 and 1 of layer 0 are a's, 2 is b's; all others stay        (17)
GATES = {
    "a": [
        [[0.7, 0.1, 0.1, 0.1], [0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1]],
        [[0.4, 0.2, 0.2, 0.2], [0.4, 0.2, 0.2, 0.2], [0.2, 0.4, 0.2, 0.2]],
    ],
    "b": [[[0.1, 0.1, 0.7, 0.1]] * 3, [[0.4, 0.2, 0.2, 0.2]] * 3],
}
LEFT_AS = {"a": 1.0, "b": 5.0}  # what a client's weights are after training


def recorder_of(model, gates):
    """What a recorder knows after a batch with these G."""
    recorder = Recorder(model, keep_logits=True)
    for name, each in zip(recorder.blocks, torch.tensor(gates), strict=True):
        recorder._logits[name] = [(each.log(), torch.ones(len(each), dtype=torch.bool))]
        recorder._counts[name] = torch.bincount(each.argmax(1), minlength=each.shape[1])
        recorder._tokens[name] = torch.tensor(len(each))
    return recorder


@pytest.fixture
def by_hand(monkeypatch):
    """Runs the round above with a method and gives the server before, the updates, and the server after."""

    def fake_fit(model, context, *, seed, watch, select_experts, through):
        recorder = recorder_of(model, GATES[context.client.name])
        assert watch(recorder) is None
        if context.client.name == "a":
            assert [list(ids) for ids in select_experts(recorder).values()] == [[0, 1], [0]]
        else:
            assert select_experts is None
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.fill_(LEFT_AS[context.client.name])
        return Fitted(0.5, Cost())

    def run(absolute_floor=0.25, **fields):
        monkeypatch.setattr(hfedmoe, "fit", fake_fit)
        model = small(num_experts=4, top_k=1)
        server = tiny_server(model, CLIENTS, TRAINING)
        method = HFedMoE(absolute_floor=absolute_floor, **fields)
        updates = []
        for budget, client in zip((3, 8), CLIENTS, strict=True):
            (update,) = trained(replace(method, budget=budget), server, model, TRAINING, [client])
            updates.append(update)
        return server, updates, method.merge(server, iter(updates))

    return run


def means(server, name):
    """The mean of each row of a weight."""
    return server.weights[name].double().flatten(1).mean(1).tolist()


def expected(server, name, first, second):
    """Row means after the round, by layer; None where the row stays as it was."""
    wanted = first if ".0." in name else second
    return [old if new is None else new for old, new in zip(means(server, name), wanted, strict=True)]


def test_a_round_by_hand(by_hand):
    before, (a, b), after = by_hand()
    assert a.extra["usage"].tolist() == pytest.approx([0.5, 0.3, 0.1, 0.1, 1 / 3, 4 / 15, 0.2, 0.2])
    assert b.extra["usage"].tolist() == pytest.approx([0.1, 0.1, 0.7, 0.1, 0.4, 0.2, 0.2, 0.2])
    assert a.extra["preference"].tolist() == pytest.approx([0.362, 0.188])
    assert b.extra["preference"].tolist() == pytest.approx([0.49, 0.16])
    assert (a.metrics["reached"], a.metrics["qualified"], a.metrics["sent"]) == ([2, 1], 4, 3)
    assert (b.metrics["reached"], b.metrics["qualified"], b.metrics["sent"]) == ([1, 1], 2, 2)
    router = (0.11 * 1 + 0.13 * 5) / 0.24
    seen = {"expert": 0, "router": 0, "dense": 0}
    for name, block in before.layout.items():
        if block is None:
            assert means(after, name) == pytest.approx([(8 * 1 + 24 * 5) / 32])
            seen["dense"] += 1
        elif rows.router_of(name, before.layout):
            assert means(after, name) == pytest.approx([router] * 4)
            seen["router"] += 1
        else:
            wanted = expected(before, name, [1.0, 1.0, 5.0, None], [4.0, None, None, None])
            assert means(after, name) == pytest.approx(wanted)
            seen["expert"] += 1
    assert seen["expert"] == 4 and seen["router"] == 2 and seen["dense"] > 10


def test_usage_weighs_each_batch_by_its_tokens(monkeypatch):
    def fake_fit(model, context, *, seed, watch, select_experts, through):
        for gates in ([[0.7, 0.1, 0.1, 0.1]] * 3, [[0.3, 0.5, 0.1, 0.1]]):
            watch(recorder_of(model, [gates, gates]))
        return Fitted(0.5, Cost())

    monkeypatch.setattr(hfedmoe, "fit", fake_fit)
    model = small(num_experts=4, top_k=1)
    (update,) = trained(HFedMoE(budget=8), tiny_server(model, CLIENTS, TRAINING), model, TRAINING, CLIENTS[:1])
    assert update.extra["usage"].tolist() == pytest.approx([(3 * 0.7 + 0.3) / 4, (3 * 0.1 + 0.5) / 4, 0.1, 0.1] * 2)


def test_with_one_alpha_per_layer_each_router_is_weighted_by_its_own_preferences(by_hand):
    before, _, after = by_hand(alpha="layer")
    first, second = (0.362 + 0.49 * 5) / (0.362 + 0.49), (0.188 + 0.16 * 5) / (0.188 + 0.16)
    routers = [name for name, block in before.layout.items() if rows.router_of(name, before.layout)]
    assert [means(after, name)[0] for name in routers] == pytest.approx([first, second])


def test_selective_alone_weights_routers_by_examples(by_hand):
    before, _, after = by_hand(aggregate="selective")
    for name, block in before.layout.items():
        if rows.router_of(name, before.layout):
            assert means(after, name) == pytest.approx([4.0] * 4)
        elif block is not None:
            assert means(after, name) == pytest.approx(expected(before, name, [1.0, 1.0, 5.0, None], [4.0, None, None, None]))


def test_fedavg_takes_all_experts_from_all_clients(by_hand):
    before, updates, after = by_hand(aggregate="fedavg")
    for update in updates:
        assert all(len(tensor) == len(before.weights[name]) for name, tensor in update.patch.tensors.items())
    assert all(means(after, name) == pytest.approx([4.0] * len(tensor)) for name, tensor in after.weights.items())


@pytest.mark.parametrize(("floor", "sent"), [(0.0, 3), (0.32, 2), (0.6, 0)])
def test_the_floor_decides_which_trained_experts_are_sent(by_hand, floor, sent):
    before, (a, _), after = by_hand(absolute_floor=floor)
    assert a.metrics["sent"] == sent == sum(len(ids) for ids in experts_sent(a, before).values())
    if sent == 0:  # a prefers nothing, b expert 2 of layer 0 alone: all routers are b's
        assert a.extra["preference"].tolist() == [0.0, 0.0]
        routers = [name for name in before.layout if rows.router_of(name, before.layout)]
        assert [means(after, name)[0] for name in routers] == pytest.approx([5.0, 5.0])


def test_routers_without_preference_and_experts_that_no_client_qualifies_keep_their_values(by_hand):
    before, _, after = by_hand(absolute_floor=2.0)
    of_blocks = [name for name, block in before.layout.items() if block is not None]
    assert len(of_blocks) == 6 and all(torch.equal(after.weights[name], before.weights[name]) for name in of_blocks)


def experts_sent(update, server):
    """MoE block → ids of the experts that the update has, the same in all their tensors."""
    ids_of = {}
    for name, block in server.layout.items():
        if block is not None and not rows.router_of(name, server.layout) and name in update.patch.tensors:
            ids = update.patch.rows[name].tolist()
            assert ids_of.setdefault(block, ids) == ids and len(update.patch.tensors[name]) == len(ids)
    return ids_of


# On tiny models


@pytest.mark.parametrize("tuning", [Tuning(), Tuning("lora", rank=4)], ids=["full", "lora"])
@every_family
def test_a_client_sends_the_selected_experts_and_whole_routers_and_dense_weights(family, tuning):
    """τ = 0: all that backward reached is sent, so what is not sent must be as it was received."""
    model, training = small(family), replace(TRAINING, **vars(tuning))
    server = tiny_server(model, CLIENTS, training)
    (job,) = jobs_for(server, HFedMoE(usage_floor=0.0, budget=4), CLIENTS[:1])
    models = []

    def kept_model(self, job, context):
        models.append(Method().build_model(job, context))
        return models[-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(HFedMoE, "build_model", kept_model)
        update = HFedMoE(usage_floor=0.0, budget=4).train(job, tiny_context(model, CLIENTS[0], training))
    sent, after = experts_sent(update, server), rows.read(models[0])
    assert update.patch.tensors.keys() == server.weights.keys()
    assert sum(len(ids) for ids in sent.values()) == update.metrics["sent"] >= 4
    moved = dict.fromkeys(sent, 0)
    for name, tensor in update.patch.tensors.items():
        block = server.layout[name]
        if block is None or rows.router_of(name, server.layout):
            assert torch.equal(tensor, after[name])
            continue
        others = [expert for expert in range(8) if expert not in sent[block]]
        assert others and torch.equal(tensor, after[name][sent[block]])
        assert torch.equal(after[name][others], server.weights[name][others])
        moved[block] += int((tensor != server.weights[name][sent[block]]).flatten(1).any(1).sum())
    assert all(moved.values())
    assert len(update.metrics["reached"]) == len(blocks(model)) and sum(update.metrics["reached"]) <= 4


@every_family
def test_every_layer_has_an_expert_that_backward_reaches_under_every_criterion(family):
    model = small(family)
    server, number = tiny_server(model, CLIENTS, TRAINING), len(blocks(model))
    for select in ("importance", "usage", "random"):
        for refresh in ("batch", "round"):
            method = HFedMoE(select=select, refresh=refresh, usage_floor=0.0, budget=number + 1)
            (update,) = trained(method, server, model, TRAINING, CLIENTS[:1])
            counts = [len(ids) for ids in experts_sent(update, server).values()]
            assert len(counts) == number and min(counts) >= 1
            assert refresh == "batch" or sum(counts) == number + 1, "chosen once, so no more than the budget"


def test_gradients_through_all_experts_change_what_lower_layers_learn_and_with_all_chosen_nothing():
    model = small()
    server = tiny_server(model, CLIENTS, TRAINING)

    def routers(**fields):
        (update,) = trained(HFedMoE(select="usage", **fields), server, model, replace(TRAINING, local_steps=1), CLIENTS[:1])
        return [tensor for name, tensor in sorted(update.patch.tensors.items()) if name.endswith("gate.weight")]

    chosen, through_all = routers(budget=2), routers(budget=2, gradient_through="all")
    assert not torch.equal(chosen[0], through_all[0])
    assert all(map(torch.equal, routers(budget=1.0), routers(budget=1.0, gradient_through="all")))


@pytest.mark.parametrize("fields", [{"select": "none"}, {"budget": 1.0}, {}], ids=["none", "all", "memory"])
@every_family
def test_a_client_without_limit_trains_bit_for_bit_as_in_fedavg(family, fields):
    model, training = small(family), replace(TRAINING, router_aux_loss_coef=0.01, label_smoothing=0.1)
    server = tiny_server(model, CLIENTS, training)
    plain = trained(FedAvg(), server, model, training)
    ours = trained(HFedMoE(aggregate="fedavg", **fields), server, model, training)
    for one, other in zip(plain, ours, strict=True):
        assert equal(one.patch.tensors, other.patch.tensors) and equal(one.patch.rows, other.patch.rows)
        assert one.metrics["loss"] == other.metrics["loss"]
        assert other.extra["usage"].shape == (server.anatomy.num_experts,)
    merged = HFedMoE(aggregate="fedavg").merge(server, iter(ours))
    assert equal(merged.weights, FedAvg().merge(server, iter(plain)).weights)


def test_without_a_limit_only_experts_that_some_token_reached_are_sent():
    """Under weight decay an expert moves without a token, and is still none that was trained."""
    model = small(num_experts=16, top_k=1)
    training = replace(TRAINING, weight_decay=0.5, local_steps=1, batch_size=1)
    server = tiny_server(model, CLIENTS, training)
    (update,) = trained(HFedMoE(usage_floor=0.0), server, model, training, CLIENTS[:1])
    assert update.metrics["qualified"] == 32
    assert 2 <= update.metrics["sent"] == sum(update.metrics["reached"]) < 32


def test_the_order_of_updates_does_not_matter_and_one_client_is_taken_at_its_word():
    model = small()
    clients = [*CLIENTS, Client("c", 12)]
    server = tiny_server(model, clients, TRAINING)
    method = HFedMoE(usage_floor=0.5, budget=6)
    updates = trained(method, server, model, TRAINING, clients)
    ends = [method.merge(server, iter(order)).weights for order in permutations(updates)]
    assert all(equal(end, ends[0]) for end in ends)
    alone, (update, *_) = method.merge(server, iter(updates[:1])).weights, updates
    for name, tensor in update.patch.tensors.items():
        ids = update.patch.rows.get(name, torch.tensor([0]))
        torch.testing.assert_close(alone[name][ids], tensor)
        left = [row for row in range(len(alone[name])) if row not in ids]
        assert torch.equal(alone[name][left], server.weights[name][left])


WIDE = {"olmoe": {"intermediate_size": 64}, "switch_transformers": {"d_ff": 128}}  # experts that weigh something


@pytest.mark.parametrize("family", WIDE)
def test_the_measured_peak_is_within_what_is_planned_for_the_budget(family):
    model, client = small(family, **WIDE[family]), Client("a", 8)
    context = tiny_context(model, client, TRAINING)
    tokens = context.encoder.batch(context.data.train)["input_ids"].shape[1]
    cost = footprint(model, TRAINING.tuning, (TRAINING.batch_size, tokens))
    server = replace(tiny_server(model, [client], TRAINING), footprint=cost)
    most = server.anatomy.num_experts
    for budget in (len(blocks(model)), most // 2, most):
        (update,) = trained(HFedMoE(budget=budget), server, model, TRAINING, [client])
        peak = update.cost.peak_bytes
        assert peak <= cost.reaching(budget)
    assert peak > cost.reaching(most // 2), "what is planned for half of the experts does not hold all"


# Whole runs


class RecordedNotes(Quiet):
    """Records the notes of a run."""

    def __init__(self):
        self.notes = []

    def noted(self, server, sentence):
        self.notes.append((server.round, sentence))


def lines(path, **fields):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if all(row[key] == value for key, value in fields.items())]


@pytest.mark.parametrize(("floor", "silent"), [(2.0, True), (0.0, False)])
def test_a_run_logs_what_each_client_sent_and_notes_once_if_no_client_sent_an_expert(tiny_tree, tmp_path, floor, silent):
    method = {"name": "hfedmoe", "budget": 0.5, "absolute_floor": floor}
    progress, config = RecordedNotes(), checked(RunConfig, {**tiny_tree, "method": method, "federation": {"rounds": 2}})
    out = run(config, tmp_path / "out", progress=progress)
    metrics = [line["metrics"] for line in lines(out / "ledger.jsonl", task="train")]
    assert len(metrics) == 8 and all(set(each) == {"reached", "qualified", "sent"} for each in metrics)
    assert all(len(each["reached"]) == 3 and sum(each["reached"]) <= 12 for each in metrics)
    assert [each["sent"] == 0 for each in metrics] == [silent] * 8
    assert {len(line["metrics"]) for line in lines(out / "ledger.jsonl", task="evaluate")} == {0}
    assert [round for round, _ in progress.notes] == ([1] if silent else [])
    assert all("lower method.usage_floor" in sentence for _, sentence in progress.notes)


# Budgets


def limits(method, *clients):
    """C_k of each client: two layers of four experts of 10 bytes, 6 of them to train it; 8 · 4 + 8 bytes are fixed."""
    shapes = [BlockShape(4, 1), BlockShape(4, 1)]
    cost = Footprint(8, {"0": 10, "1": 10}, 0, num_experts={"0": 4, "1": 4}, update_bytes={"0": 6, "1": 6})
    server = replace(bare_server(shapes, clients), footprint=cost)
    return [method.assign(server, client) for client in clients]


def test_the_budget_is_what_fits_the_memory_between_one_expert_per_layer_and_all():
    memory = {"free": None, "all": 88, "less": 87, "three": 58, "two": 52, "one": 46, "none": 1}
    clients = [Client(name, 1, memory_bytes=bytes) for name, bytes in memory.items()]
    assert [int(each.extra["budget"]) for each in limits(HFedMoE(), *clients)] == [8, 8, 7, 3, 2, 2, 2]
    assert all(each.experts == {"0": (0, 1, 2, 3), "1": (0, 1, 2, 3)} for each in limits(HFedMoE(), *clients))


def test_a_budget_may_be_given_for_all_clients_as_a_count_or_a_share():
    clients = [Client("a", 1), Client("b", 1, memory_bytes=1)]
    for given, number in ((3, 3), (0.5, 4), (1.0, 8), (100, 8)):
        assert [int(each.extra["budget"]) for each in limits(HFedMoE(budget=given), *clients)] == [number, number]
    assert [each.extra for each in limits(HFedMoE(select="none"), *clients)] == [{}, {}]


@pytest.mark.parametrize(
    ("given", "said"), [(1, "method.budget = 1 does"), (0.1, "method.budget = 0.1, which is 1 of 8 experts, does")]
)
def test_a_budget_below_one_expert_per_layer_is_refused_in_the_users_terms(given, said):
    with pytest.raises(BadValue, match=rf"^{said} not .* 2 MoE layers; give at least 2 experts$"):
        limits(HFedMoE(budget=given), Client("a", 1))


@pytest.mark.parametrize("name", ["hfedmoe", "pfl_moe"])
@pytest.mark.parametrize("given", [0, -1, 1.5, 0.0, True, float("nan"), "half", [3]])
def test_a_value_that_is_not_a_budget_is_refused_in_one_sentence(name, given):
    data = {"sources": ["synthetic/double"], "clients": 2}
    with pytest.raises(BadValue) as refused:
        checked(RunConfig, {"method": {"name": name, "budget": given}, "data": data})
    wanted = "give a count of experts from 1, or a share of all above 0 and at most 1"
    assert str(refused.value) == f"method.budget = {given!r} is no budget; {wanted}"


@pytest.mark.parametrize("given", [1, 96, 10**30, 0.01, 1.0])
def test_a_count_stays_a_count_and_a_share_a_share(given):
    data = {"sources": ["synthetic/double"], "clients": 2}
    budget = checked(RunConfig, {"method": {"name": "hfedmoe", "budget": given}, "data": data}).build_method().budget
    assert (budget, type(budget)) == (given, type(given))
