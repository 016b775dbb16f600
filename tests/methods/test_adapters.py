"""FedIT, FFA-LoRA, FedSA-LoRA, one random expert; and what methods on adapters of different ranks share."""

from dataclasses import replace

import pytest
import torch

from fedexperts.config import RunConfig
from fedexperts.errors import BadValue
from fedexperts.federation import jobs_for
from fedexperts.io.toml import checked
from fedexperts.methods import METHODS
from fedexperts.methods.adapters import at_rank, rank_for
from fedexperts.methods.fedavg import FedAvg
from fedexperts.methods.fedit import FedIT
from fedexperts.methods.fedsa_lora import FedSALoRA
from fedexperts.methods.ffa_lora import FFALoRA
from fedexperts.methods.hetlora import HetLoRA
from fedexperts.methods.random_expert import RandomExpert
from fedexperts.moe import factors, rows
from fedexperts.moe.tuning import Tuning
from fedexperts.testing import tiny_batch, tiny_context, tiny_model, tiny_server
from fedexperts.types import Client, Training

ADAPTERS = ("fedit", "ffa_lora", "fedsa_lora", "flora", "flexlora", "hetlora", "random_expert")
CLIENTS = [Client("a", 8), Client("b", 12)]
LORA = Training(train="lora", rank=8, batch_size=4, local_steps=2)
every_family = pytest.mark.parametrize("family", ["olmoe", "switch_transformers"])


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Played:
    """Rounds of both clients, each with what it keeps."""

    def __init__(self, family, method, rounds=1, training=LORA, seed="0"):
        self.model, self.method = tiny_model(family), method
        self.start = self.server = tiny_server(self.model, CLIENTS, training, seed)
        self.pairs = factors.pairs(self.start.weights)
        self.contexts = [tiny_context(self.model, client, training) for client in CLIENTS]
        for number in range(1, rounds + 1):
            server = replace(self.server, round=number, task="train")
            self.jobs = list(jobs_for(server, method, CLIENTS))
            self.updates = [method.train(job, context) for job, context in zip(self.jobs, self.contexts, strict=True)]
            self.server = method.merge(server, iter(self.updates))

    def evaluated(self):
        """The models that the clients would be scored with."""
        jobs = jobs_for(replace(self.server, task="evaluate"), self.method, CLIENTS)
        return [self.method.build_model(job, context) for job, context in zip(jobs, self.contexts, strict=True)]


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("tuning", [Tuning(), Tuning("lora", parts=("router",))], ids=["full", "routers"])
def test_a_run_without_adapters_is_refused(name, tuning):
    server = tiny_server(tiny_model("olmoe", num_hidden_layers=1), CLIENTS, replace(LORA, **vars(tuning)))
    with pytest.raises(BadValue, match=f'^method {name} works on LoRA.*this run trains none; set training.train = "lora"'):
        METHODS[name]().assign(server, CLIENTS[0])


def test_one_random_expert_needs_adapters_of_experts():
    training = replace(LORA, train="lora", parts=("attention",))
    server = tiny_server(tiny_model("olmoe", num_hidden_layers=1), CLIENTS, training)
    with pytest.raises(BadValue, match=r"random_expert works on LoRA's adapters of experts"):
        RandomExpert().assign(server, CLIENTS[0])


@every_family
def test_fedit_is_fedavg_of_adapters_bit_for_bit(family):
    one, other = Played(family, FedIT()), Played(family, FedAvg())
    assert equal(one.server.weights, other.server.weights)
    assert not equal(one.server.weights, one.start.weights)


@every_family
def test_under_ffa_lora_a_is_the_servers_on_all_clients_and_is_never_sent(family):
    played = Played(family, FFALoRA(), rounds=2)
    travelling = played.start.weights.keys() - played.pairs.keys()
    for job, update in zip(played.jobs, played.updates, strict=True):
        assert job.patch.tensors.keys() == update.patch.tensors.keys() == travelling
        assert not update.extra
        assert job.nbytes == sum(played.start.weights[name].nbytes for name in travelling) + id_bytes(job) + len("0/start")
    for model in played.evaluated():
        weights = rows.read(model)
        assert all(torch.equal(weights[a], played.start.weights[a]) for a in played.pairs)
        assert equal(weights, dict(played.server.weights))


def id_bytes(job):
    return replace(job.patch, tensors={}).nbytes


@every_family
def test_under_ffa_lora_the_mean_of_b_is_the_mean_of_the_products(family):
    played = Played(family, FFALoRA())
    one, other = (update.patch.tensors for update in played.updates)
    for a, b in played.pairs.items():
        frozen = played.start.weights[a]
        mean = (8 * one[b] @ frozen + 12 * other[b] @ frozen) / 20
        torch.testing.assert_close(played.server.weights[b] @ played.server.weights[a], mean, rtol=1e-4, atol=1e-7)
        assert one[b].any() and torch.equal(played.server.weights[a], frozen)
    assert len(played.pairs) > 10


@every_family
def test_under_fedsa_lora_b_never_leaves_its_client_and_is_trained_further_in_the_next_round(family):
    played = Played(family, FedSALoRA(), rounds=2)
    own = {*played.pairs.values()}
    for job, update, context in zip(played.jobs, played.updates, played.contexts, strict=True):
        assert job.patch.tensors.keys() == update.patch.tensors.keys() == played.start.weights.keys() - own
        assert not job.extra and not update.extra
        assert context.client_state.keys() == own
        again = rows.read(played.method.build_model(job, context))
        assert equal({name: again[name] for name in own}, context.client_state)
    one, other = (context.client_state for context in played.contexts)
    assert any(not torch.equal(one[name], other[name]) for name in own)
    assert all(torch.equal(played.server.weights[name], played.start.weights[name]) for name in own)
    assert not any(played.server.weights[name].any() for name in own)
    for model, context in zip(played.evaluated(), played.contexts, strict=True):
        assert equal(rows.read(model), {**played.server.weights, **context.client_state})


@every_family
def test_only_the_chosen_experts_adapter_is_sent_and_changes(family):
    played = Played(family, RandomExpert(), rounds=2)
    layout, seen, moved = played.start.layout, 0, 0
    chosen = dict(zip(played.start.anatomy.blocks, played.jobs[0].extra["adapted"].tolist(), strict=True))
    for job, update in zip(played.jobs, played.updates, strict=True):
        for name, whole in played.start.weights.items():
            sent = len(whole) if not layout[name] or rows.router_of(name, layout) else 1
            assert len(job.patch.tensors[name]) == len(update.patch.tensors[name]) == sent
            if sent == 1 and layout[name]:
                assert job.patch.rows[name].tolist() == update.patch.rows[name].tolist() == [chosen[layout[name]]]
                changed = (played.server.weights[name] != whole).flatten(1).any(1).nonzero().flatten().tolist()
                assert {*changed} <= {chosen[layout[name]]}  # Switch picks one expert for a token, and may never pick this one
                moved += len(changed)
                seen += 1
    assert seen == 2 * 4 * len(chosen) and moved


@every_family
def test_the_random_experts_adapter_takes_the_bytes_of_all_adapters_divided_by_the_number_of_experts(family):
    """In bytes of a job: attention and routers as ever, and an eighth of what the experts' adapters are."""
    played = Played(family, RandomExpert())
    sizes = {"experts": 0, "rest": 0}
    for name, tensor in played.start.weights.items():
        of_expert = played.start.layout[name] and not rows.router_of(name, played.start.layout)
        sizes["experts" if of_expert else "rest"] += tensor.nbytes
    chosen_bytes = 8 * len(played.start.anatomy.blocks)  # ids of the chosen experts
    for job, update in zip(played.jobs, played.updates, strict=True):
        assert job.nbytes - id_bytes(job) == sizes["rest"] + sizes["experts"] // 8 + chosen_bytes
        assert sum(tensor.nbytes for tensor in update.patch.tensors.values()) == sizes["rest"] + sizes["experts"] // 8


def test_the_random_experts_are_the_same_for_all_clients_and_rounds_and_others_for_another_seed():
    model, chosen = tiny_model("olmoe"), {}
    for seed in ("0", "1", "2"):
        server = tiny_server(model, CLIENTS, LORA, seed)
        drawn = [
            RandomExpert().assign(replace(server, round=number), client).extra["adapted"]
            for number in (1, 2)
            for client in CLIENTS
        ]
        assert all(torch.equal(each, drawn[0]) for each in drawn)
        chosen[seed] = tuple(drawn[0].tolist())
    assert len(set(chosen.values())) == 3


@every_family
def test_adapters_on_one_random_expert_need_less_memory_than_on_all(family):
    peaks = [sum(update.cost.peak_bytes for update in Played(family, method).updates) for method in (RandomExpert(), FedIT())]
    assert peaks[0] < peaks[1]


@every_family
def test_a_client_of_a_lower_rank_has_the_first_ranks_of_the_servers_adapters_at_the_same_scale(family):
    """So it computes what the run's rank would with zeros in the others."""
    model = tiny_model(family)
    server = tiny_server(model, CLIENTS, LORA)
    chance = torch.Generator().manual_seed(0)
    pairs = factors.pairs(server.weights)
    drawn = {b: 0.1 * torch.randn(server.weights[b].shape, generator=chance) for b in pairs.values()}
    server = replace(server, weights={**server.weights, **drawn})
    zeroed = {b: torch.cat([drawn[b][..., :4], torch.zeros_like(drawn[b][..., 4:])], 2) for b in pairs.values()}
    reference = replace(server, weights={**server.weights, **zeroed})
    context = tiny_context(model, CLIENTS[0], LORA)

    method = FedIT()

    class Lower(HetLoRA):
        def assign(self, server, client):
            return at_rank(server, 4)

    (short,), (whole,), (other,) = (
        jobs_for(each, method, CLIENTS[:1]) for each, method in ((server, Lower()), (reference, method), (server, method))
    )
    with torch.no_grad():
        built = (each.build_model(job, context) for each, job in ((Lower(), short), (method, whole), (method, other)))
        logits, expected, full = (model(**tiny_batch(family)).logits for model in built)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(logits, full, atol=1e-4)
    assert factors.rank_of(short.patch.tensors) == 4 and short.nbytes < 0.6 * whole.nbytes


def test_ranks_are_assigned_in_turn_to_clients_sorted_by_name():
    clients = [Client(name, 1) for name in "cab"]
    server = tiny_server(tiny_model("switch_transformers"), clients, LORA)
    for ranks, expected in ((None, [8, 8, 8]), (3, [3, 3, 3]), ((4, 2), [4, 4, 2]), ((1, 2, 3, 5), [3, 1, 2])):
        assert [rank_for(server, client, ranks, "flora") for client in clients] == expected


def test_a_rank_that_is_not_allowed_is_refused():
    server = tiny_server(tiny_model("olmoe", num_hidden_layers=1), CLIENTS, LORA)
    with pytest.raises(BadValue, match=r"method.ranks has 16, but no rank may be above training.rank = 8; raise that"):
        rank_for(server, CLIENTS[1], (8, 16), "flora")
    with pytest.raises(
        BadValue, match=r"method.ranks = 6, but adapters of stacked experts in float32 need a multiple of 4; try 8"
    ):
        rank_for(server, CLIENTS[0], 6, "flora")
    attention = replace(LORA, train="lora", rank=8, parts=("attention",))
    free = tiny_server(tiny_model("olmoe", num_hidden_layers=1), CLIENTS, attention)
    assert rank_for(free, CLIENTS[0], 6, "flora") == 6


@pytest.mark.parametrize("ranks", [0, [0], [], [4, "x"], 4.5, True, "x"])
def test_a_value_that_is_not_a_rank_is_refused_in_one_sentence(ranks):
    tree = {"method": {"name": "hetlora", "ranks": ranks}, "data": {"sources": ["synthetic/sort"]}}
    with pytest.raises(
        BadValue, match=r"^method\.ranks = .* is no rank; give a whole number from 1, or a list of some"
    ) as caught:
        checked(RunConfig, tree)
    assert "\n" not in str(caught.value)
    assert checked(RunConfig, {**tree, "method": {"name": "hetlora", "ranks": [4, 8]}}).build_method().ranks == (4, 8)
