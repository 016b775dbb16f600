"""FedMoE: its two stages, step by step on numbers done by hand, then on tiny models."""

from dataclasses import replace
from itertools import permutations

import pytest
import torch

from fedexperts.core.ledger import Ledger
from fedexperts.core.training import fit
from fedexperts.errors import TooSmall
from fedexperts.experiment import checkpoint
from fedexperts.federation import federate, job_for, jobs_for
from fedexperts.methods import fedmoe
from fedexperts.methods.base import entries
from fedexperts.methods.fedavg import FedAvg
from fedexperts.methods.fedmoe import FedMoE
from fedexperts.methods.submodel import mask, unmask
from fedexperts.moe import rows, shrink
from fedexperts.moe.anatomy import BlockShape, blocks
from fedexperts.moe.footprint import Footprint
from fedexperts.moe.tuning import prepare
from fedexperts.testing import bare_server, tiny_context, tiny_model, tiny_server
from fedexperts.types import Client, Patch, Training, Update

FOUR = BlockShape(num_experts=4, top_k=1)
TRAINING = Training(batch_size=4, local_steps=1)
SIZES = {"a": 8, "b": 12}
GROUPS = {"n_group": 4, "topk_group": 2}


def small(family="olmoe", **overrides):
    """A tiny model with two MoE layers."""
    return tiny_model(family, **({"num_hidden_layers": 2} if family == "olmoe" else overrides))


def bools(*ids, size=4):
    return torch.zeros(size, dtype=torch.bool).scatter(0, torch.tensor(ids), True)


def reported(client, p, score=-1.0, task="train"):
    extra = {"p": torch.tensor(p), "score": torch.tensor(score, dtype=torch.float64)}
    return Update(client, 1, task, Patch({}), examples=1, extra=extra)


# Stage 1


def stage_one(method, clients, answers):
    server = replace(bare_server([FOUR, FOUR], clients), task="profile")
    return method.merge(server, answers)


def test_after_stage_one_each_client_has_the_most_used_experts_that_fit_its_memory():
    clients = [Client("large", 30, "sort"), Client("small", 30, "sort", memory_bytes=10), Client("other", 30, "add")]
    answers = [
        reported("large", [0.7, 0.1, 0.1, 0.1, 0.25, 0.25, 0.25, 0.25], task="profile"),
        reported("other", [0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.5, 0.5], task="profile"),
    ]
    server = stage_one(FedMoE(reserve=0.5), clients, answers)
    experts = {name: unmask(server.anatomy, each) for name, each in entries("held", server.method_state).items()}
    assert experts == {
        "large": server.anatomy.all_experts,
        "small": {"0": (0, 1), "1": (0, 1, 2)},  # as large predicts: θ = 0.75 takes five of 10 bytes
        "other": {"0": (3,), "1": (2, 3)},
    }
    assert torch.equal(server.method_state["p/small"], server.method_state["p/large"])


def test_a_client_that_failed_in_stage_one_gets_experts_by_the_routing_of_its_task():
    clients = [Client("a", 1, "sort"), Client("failed", 1, "sort"), Client("b", 1, "add")]
    answers = [
        reported("a", [1.0, 0, 0, 0, 0, 1, 0, 0], task="profile"),
        reported("b", [0, 0, 1.0, 0, 0, 0, 1, 0], task="profile"),
    ]
    server = stage_one(FedMoE(), clients, answers)
    assert unmask(server.anatomy, server.method_state["held/failed"]) == {"0": (0,), "1": (1,)}


def test_if_all_clients_fail_stage_one_does_not_change_the_server():
    server = replace(bare_server([FOUR], [Client("a", 1)]), task="profile")
    assert FedMoE().merge(server, []) == server


def before_stage_one(*clients):
    """One layer of four experts of 1 MB; the frozen model and adapters of rank 8 take 2 MB + 16 · 8 · 10⁴ bytes = 3.28 MB."""
    cost = Footprint(0, {"0": 10**6}, 0, frozen_bytes=2 * 10**6, sides=10**4)
    return replace(bare_server([FOUR], clients), footprint=cost, task="profile")


def test_in_stage_one_clients_take_part_whose_memory_fits_the_whole_model_and_its_adapters():
    clients = [Client("enough", 1, memory_bytes=3_280_000), Client("short", 1, memory_bytes=3_279_999), Client("free", 1)]
    server = before_stage_one(*clients)
    assignments = {client.name: FedMoE().assign(server, client) for client in clients}
    assert assignments["enough"].experts == assignments["free"].experts == server.anatomy.all_experts
    assert assignments["short"] is None


def test_if_no_client_can_execute_stage_one_the_error_names_the_largest_and_a_remedy():
    server = before_stage_one(Client("c1", 1, memory_bytes=2 * 10**6), Client("c2", 1, memory_bytes=3 * 10**6))
    with pytest.raises(TooSmall, match=r'client c2, the largest, has 3\.0 MB .* needs 3\.3 MB .*method\.initial = "random"'):
        FedMoE().assign(server, server.clients["c1"])
    assert FedMoE(initial="random").assign(replace(server, task="train"), server.clients["c1"]).experts


def test_a_client_too_small_for_any_sub_model_is_refused_in_both_stages():
    server = bare_server([FOUR, FOUR], [Client("c1", 1), Client("c2", 1, memory_bytes=1)])
    for task in ("profile", "train"):
        with pytest.raises(TooSmall, match="client c2"):
            FedMoE().assign(replace(server, task=task), server.clients["c2"])


@pytest.mark.parametrize("train", ["full", "lora"])
def test_stage_one_sends_the_whole_model_down_gets_routing_alone_back_and_leaves_the_weights(train):
    model = small()
    training = replace(TRAINING, train=train, rank=4)
    server = replace(tiny_server(model, [Client("a", 8), Client("b", 8)], training), task="profile")
    jobs = list(jobs_for(server, FedMoE(profile_rounds=1), server.clients.values()))
    assert [job.patch.tensors.keys() for job in jobs] == [server.weights.keys()] * 2
    before = {name: tensor.clone() for name, tensor in server.weights.items()}
    answers = [FedMoE(profile_rounds=1).train(job, tiny_context(model, server.clients[job.client], training)) for job in jobs]
    assert [update.patch.nbytes for update in answers] == [0, 0]
    assert all(update.extra.keys() == {"p"} and update.extra["p"].shape == (16,) for update in answers)
    after = FedMoE().merge(server, answers)
    assert all(torch.equal(after.weights[name], tensor) for name, tensor in before.items())
    assert entries("p", after.method_state).keys() == entries("held", after.method_state).keys() == {"a", "b"}


@pytest.mark.parametrize("family", ["olmoe", "switch_transformers"])
def test_stage_one_trains_an_adapter_of_every_expert_and_nothing_else(family, monkeypatch):
    model = small(family)
    server = replace(tiny_server(model, [Client("a", 8)], TRAINING), task="profile")
    (job,) = jobs_for(server, FedMoE(), server.clients.values())
    fitted = []
    monkeypatch.setattr(fedmoe, "fit", lambda model, *given, **named: fitted.append(model) or fit(model, *given, **named))
    FedMoE(profile_rounds=1, profile_rank=4).train(job, tiny_context(model, server.clients["a"], TRAINING))
    trained, layout = rows.read(fitted[0]), rows.layout(fitted[0])
    assert set(layout.values()) == set(server.anatomy.blocks)
    assert all("lora" in name and ".experts." in name for name in trained)
    assert {len(tensor) for tensor in trained.values()} == {8}
    assert len(trained) == 2 * 2 * len(server.anatomy.blocks), "A and B of both matrices"
    assert sum(tensor.numel() for tensor in trained.values()) == 4 * server.footprint.sides


def test_stage_one_takes_the_local_steps_of_profile_rounds_rounds():
    model = small()
    server = replace(tiny_server(model, [Client("a", 8)], TRAINING), task="profile")
    (job,) = jobs_for(server, FedMoE(), server.clients.values())
    context = tiny_context(model, server.clients["a"], TRAINING)
    one, three = (FedMoE(profile_rounds=rounds).train(job, context) for rounds in (1, 3))
    assert 2 * one.cost.tokens < three.cost.tokens < 4 * one.cost.tokens
    assert one.cost.peak_bytes < server.footprint.of(server.anatomy.all_experts), "adapters alone are trained"


# p


def routed(model, context):
    """Of each block, how many validation tokens reach each expert and how many there are, one unpadded example at a time."""
    counts = {name: torch.zeros(block.shape.num_experts) for name, block in blocks(model).items()}
    tokens = dict.fromkeys(counts, 0)

    def count(name, block):
        def hook(module, args, output):
            weight = block.router.classifier.weight if block.is_switch else block.router.weight
            logits = args[0].reshape(-1, weight.shape[1]) @ weight.T
            chosen = logits.topk(block.shape.top_k).indices
            counts[name] += torch.bincount(chosen.flatten(), minlength=len(counts[name]))
            tokens[name] += len(logits)

        return block.router.register_forward_hook(hook)

    hooks = [count(name, block) for name, block in blocks(model).items()]
    with torch.no_grad():
        for example in context.data.validation:
            model(**context.encoder.batch([example]))
    for hook in hooks:
        hook.remove()
    return counts, tokens


@pytest.mark.parametrize("family", ["olmoe", "switch_transformers"])
def test_p_is_the_share_of_the_validation_tokens_of_that_side_without_padding(family):
    model = small(family)
    server = replace(tiny_server(model, [Client("a", 8, memory_bytes=10**9)], TRAINING), task="train")
    method = FedMoE(initial="random", experts_per_layer=3)
    (job,) = jobs_for(server, method, server.clients.values())
    context = tiny_context(model, server.clients["a"], TRAINING)
    update = method.train(job, context)

    trained = prepare(shrink.shrink(model, job.experts), TRAINING.tuning, "any").eval()
    rows.write(trained, update.patch.tensors)
    counts, tokens = routed(trained, context)
    assert len(set(tokens.values())) == (2 if family == "switch_transformers" else 1), "prompts and answers differ in length"
    expected = torch.cat([counts[name] / tokens[name] for name in counts])
    assert torch.allclose(update.extra["p"], expected)
    assert update.extra["p"].sum() == pytest.approx(sum(block.shape.top_k for block in blocks(trained).values()))
    assert update.extra["p"].dtype == torch.float32

    after = method.merge(server, [update])
    held = mask(server.anatomy, job.experts)
    assert torch.equal(after.method_state["p/a"][held], update.extra["p"])
    assert not after.method_state["p/a"][~held].any()


def test_the_score_is_the_negative_validation_loss():
    model, training = small(), replace(TRAINING, local_steps=8, label_smoothing=0.0)
    server = replace(tiny_server(model, [Client("a", 8)], training), task="train")
    method = FedMoE(initial="random")
    (job,) = jobs_for(server, method, server.clients.values())
    context = tiny_context(model, server.clients["a"], training)
    familiar = replace(context, data=replace(context.data, validation=context.data.train))
    untrained = replace(familiar, training=replace(training, lr=1e-9))
    before, after = (method.train(job, each) for each in (untrained, familiar))
    assert after.extra["score"] > before.extra["score"]
    assert after.extra["score"].item() == -after.metrics["validation_loss"] < 0


def test_p_of_a_sub_model_is_stored_at_its_experts_places_in_the_whole_model():
    server = replace(bare_server([FOUR, FOUR], [Client("a", 1)]), task="train", method_state={"held/a": bools(1, 3, 4, size=8)})
    after = FedMoE().merge(server, [reported("a", [0.25, 0.75, 1.0])])
    assert after.method_state["p/a"].tolist() == [0, 0.25, 0, 0.75, 1.0, 0, 0, 0]
    assert torch.equal(after.method_state["held/a"], server.method_state["held/a"])


# Stage 2, step 4


class Course:
    """A client `me` with one expert, beside one with three and the same routing, over rounds of scores."""

    def __init__(self, method):
        self.method = method
        server = bare_server([FOUR], [Client("me", 1), Client("other", 1)])
        memory = {
            "held/me": bools(0),
            "p/me": torch.tensor([1.0, 0, 0, 0]),
            "held/other": bools(0, 1, 2),
            "p/other": torch.tensor([0.5, 0.3, 0.2, 0.0]),
        }
        self.server = replace(server, task="train", method_state=memory)

    def after(self, score):
        """The experts of `me` after a round with this score."""
        number = int(self.server.method_state["held/me"].sum())
        self.server = self.method.merge(self.server, [reported("me", [1.0] + [0.0] * (number - 1), score)])
        return unmask(self.server.anatomy, self.server.method_state["held/me"])["0"]

    def says(self, name):
        return self.server.method_state[f"{name}/me"].item()


def test_a_client_without_a_better_score_for_patience_rounds_gets_a_recommendation():
    course = Course(FedMoE(patience=2))
    assert course.after(-1.0) == (0,)  # the first score is the best so far
    assert course.after(-1.0) == (0,)  # as good is not better: one
    assert course.after(-1.1) == (0, 1, 2)  # two
    assert course.server.method_state["former/me"].tolist() == [True, False, False, False]
    assert (course.says("best"), course.says("stale")) == (-1.0, 0)


def test_a_better_score_resets_the_patience():
    course = Course(FedMoE(patience=2))
    assert [course.after(score) for score in (-1.0, -1.1, -0.9, -1.0)] == [(0,)] * 4
    assert course.after(-0.95) == (0, 1, 2)


def test_if_the_change_does_not_improve_the_score_the_former_experts_are_restored_for_good():
    course = Course(FedMoE(patience=2))
    for score in (-1.0, -1.1, -1.1):
        course.after(score)
    assert course.after(-1.2) == (0, 1, 2)  # on trial
    assert course.after(-1.3) == (0,)  # two in vain
    assert course.says("frozen") is True
    assert "former/me" not in course.server.method_state
    assert [course.after(score) for score in (-2.0, -2.0, -2.0, -2.0, -2.0)] == [(0,)] * 5
    assert course.after(-0.5) == (0,)
    assert course.says("best") == -0.5


def test_a_change_that_improves_the_score_is_kept_and_another_may_follow():
    course = Course(FedMoE(patience=2))
    for score in (-1.0, -1.1, -1.1):
        course.after(score)
    assert course.after(-0.5) == (0, 1, 2)
    assert "former/me" not in course.server.method_state
    course.server = replace(course.server, method_state={**course.server.method_state, "held/other": bools(0, 1, 2, 3)})
    assert [course.after(score) for score in (-0.6, -0.6)] == [(0, 1, 2), (0, 1, 2, 3)]


def test_a_recommendation_of_the_current_experts_starts_no_trial():
    course = Course(FedMoE(patience=1))
    course.server = replace(course.server, method_state={**course.server.method_state, "held/other": bools(1)})
    assert [course.after(score) for score in (-1.0, -1.1, -1.2, -1.3)] == [(0,)] * 4
    assert not {"former/me", "frozen/me"} & course.server.method_state.keys()


def test_without_adjustment_experts_do_not_change_but_routing_is_recorded():
    course = Course(FedMoE(patience=1, adjust=False))
    assert [course.after(-1.0) for _ in range(4)] == [(0,)] * 4
    assert course.server.method_state.keys() == {"held/me", "p/me", "held/other", "p/other"}


def test_a_client_that_is_not_sampled_keeps_its_experts_and_still_is_a_neighbor():
    course = Course(FedMoE(patience=1))
    other = {key: value for key, value in course.server.method_state.items() if key.endswith("/other")}
    course.after(-1.0)
    assert course.after(-1.0) == (0, 1, 2), "other was asked though it never answered"
    assert all(torch.equal(course.server.method_state[key], value) for key, value in other.items())


def test_a_recommendation_looks_at_the_routing_that_neighbors_report_in_the_same_round():
    course = Course(FedMoE(patience=1))
    course.after(-1.0)
    third = {"held/third": bools(0), "p/third": torch.tensor([1.0, 0, 0, 0])}  # two neighbors hold two experts on average
    server = replace(course.server, method_state={**course.server.method_state, **third})
    after = FedMoE(patience=1).merge(server, [reported("me", [1.0]), reported("other", [0.5, 0.1, 0.4])])  # 0.5, 0.3, 0.2 before
    assert unmask(after.anatomy, after.method_state["held/me"])["0"] == (0, 2)


def test_the_order_of_the_participants_changes_nothing():
    names = ["a", "b", "c"]
    start = bare_server([FOUR, FOUR], [Client(name, 1) for name in names])
    masks = {"a": bools(0, 4, size=8), "b": bools(0, 1, 4, size=8), "c": bools(0, 1, 2, 4, 5, size=8)}
    p = {"a": [1.0, 1.0], "b": [0.5, 0.5, 1.0], "c": [0.4, 0.3, 0.3, 0.5, 0.5]}
    start = replace(start, task="train", method_state={f"held/{name}": each for name, each in masks.items()})
    ends = []
    for order in permutations(names):
        server = start
        for score in (-1.0, -1.1):
            server = FedMoE(patience=1, neighbors=2).merge(server, [reported(name, p[name], score) for name in order])
        ends.append(server.method_state)
    assert len(ends) == 6
    assert any(not torch.equal(ends[0][f"held/{name}"], masks[name]) for name in names), "somebody changed"
    for other in ends[1:]:
        assert other.keys() == ends[0].keys()
        assert all(torch.equal(other[key], ends[0][key]) and other[key].dtype == ends[0][key].dtype for key in other)


def test_the_method_state_survives_a_checkpoint(tmp_path):
    frozen, trial = Course(FedMoE(patience=1)), Course(FedMoE(patience=1))
    for score in (-1.0, -1.0, -1.0):
        frozen.after(score)
    for score in (-1.0, -1.0):
        trial.after(score)
    kinds = {key.partition("/")[0] for course in (frozen, trial) for key in course.server.method_state}
    assert kinds == {"p", "held", "best", "stale", "former", "frozen"}
    for number, course in enumerate((frozen, trial)):
        folder = tmp_path / str(number)
        checkpoint.save(folder, course.server)
        again = checkpoint.load(folder, replace(course.server, method_state={}))
        assert again.method_state.keys() == course.server.method_state.keys()
        for key, value in course.server.method_state.items():
            assert torch.equal(again.method_state[key], value) and again.method_state[key].dtype == value.dtype, key


def test_the_method_state_of_many_predicted_clients_survives_a_checkpoint(tmp_path):
    server = stage_one(FedMoE(), [Client(name, 1) for name in "abc"], [reported("a", [0.125] * 8, task="profile")])
    checkpoint.save(tmp_path, server)
    assert checkpoint.load(tmp_path, replace(server, method_state={})).method_state.keys() == server.method_state.keys()


# Whole rounds


class Here:
    """An engine: one client after the other, in the order given or the other way round."""

    def __init__(self, method, model, clients, training, backwards=False):
        self.method, self.backwards = method, backwards
        self.contexts = {client.name: tiny_context(model, client, training) for client in clients}

    def run(self, jobs):
        answers = [self.method.train(job, self.contexts[job.client]) for job in jobs]
        return reversed(answers) if self.backwards else answers


def rounds(method, number=2, family="olmoe", memory=None, training=TRAINING, backwards=False, **overrides):
    model = small(family, **overrides)
    clients = [Client(name, examples, memory_bytes=memory) for name, examples in SIZES.items()]
    server = tiny_server(model, clients, training)
    engine = Here(method, model, clients, training, backwards)
    *_, last = federate(server, method, engine, Ledger(), rounds=number, clients_per_round=2)
    return last


def test_with_all_experts_assigned_it_is_federated_averaging_bit_for_bit():
    one, other = rounds(FedMoE(initial="random", adjust=False)), rounds(FedAvg())
    assert len(other.weights) > 15
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in other.weights)


def test_answers_in_another_order_give_the_same_server_bit_for_bit():
    one, other = (rounds(FedMoE(patience=1, profile_rounds=1), 2, backwards=backwards) for backwards in (False, True))
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)
    assert one.method_state.keys() == other.method_state.keys()
    assert all(torch.equal(one.method_state[key], other.method_state[key]) for key in one.method_state)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [("switch_transformers", {}), ("deepseek_v3", GROUPS), ("deepseek_v2", {**GROUPS, "topk_method": "group_limited_greedy"})],
)
def test_it_runs_on_encoder_decoders_and_grouped_routers_with_sub_models_they_allow(family, overrides):
    whole = tiny_server(small(family, **overrides), [], TRAINING)
    memory = whole.footprint.of(whole.anatomy.all_experts)
    method = FedMoE(patience=1, profile_rounds=1, reserve=0.9)
    last = rounds(method, 2, family, memory, **overrides)
    seen = 0
    for name in SIZES:
        experts = unmask(last.anatomy, last.method_state[f"held/{name}"])
        shrink.check(last.anatomy, experts)
        assert last.footprint.of(experts) <= memory
        assert sum(map(len, experts.values())) < last.anatomy.num_experts
        seen += 1
    assert seen == 2
    assert all(tensor.isfinite().all() for tensor in last.weights.values())


def test_an_expert_that_no_client_has_keeps_its_weights_and_its_router_row():
    method = FedMoE(initial="random", experts_per_layer=2, adjust=False)
    before, after = tiny_server(small(), [], TRAINING), rounds(method, 1, memory=10**9)
    assigned = torch.stack(list(entries("held", after.method_state).values())).any(0)
    by_block = unmask(after.anatomy, ~assigned)
    seen = 0
    for name, block in after.layout.items():
        if block is not None:
            idle = list(by_block[block])
            assert torch.equal(after.weights[name][idle], before.weights[name][idle])
            busy = [e for e in range(8) if e not in idle]
            assert not torch.equal(after.weights[name][busy], before.weights[name][busy])
            seen += len(idle)
    assert seen >= 2


def test_a_client_that_gets_an_expert_gets_the_server_s_newest_weights_of_it():
    server = rounds(FedMoE(initial="random", adjust=False), 1)
    assigned = bools(*range(5), *range(8, 16), size=16)
    server = replace(server, task="train", method_state={**server.method_state, "held/a": assigned})
    job = job_for(server, server.clients["a"], FedMoE().assign(server, server.clients["a"]))
    first = next(iter(server.anatomy.blocks))
    name = f"{first}.experts.down_proj"
    assert torch.equal(job.patch.tensors[name], server.weights[name][:5])
    assert job.patch.tensors[f"{first}.gate.weight"].shape[0] == 5, "a router over its own experts"


def test_a_run_that_trains_lora_profiles_only_clients_whose_memory_fits_its_adapters():
    training = Training(train="lora", rank=64, batch_size=2)
    model = tiny_model("olmoe")
    cost = tiny_server(model, [], training).footprint
    assert cost.lora_training_bytes(rank=8) == cost.of(tiny_server(model, [], training).anatomy.all_experts)
    small = Client("small", 8, memory_bytes=cost.lora_training_bytes(8) - 1)
    server = replace(tiny_server(model, [small, Client("large", 8)], training), task="profile")
    assert [FedMoE().assign(server, client) is None for client in server.clients.values()] == [True, False]


def test_profiling_with_sgd_needs_less_memory_than_with_adamw():
    model = tiny_model("olmoe")
    adamw, sgd = (tiny_server(model, [], Training(optimizer=kind)).footprint for kind in ("adamw", "sgd"))
    assert adamw.lora_training_bytes(8) - sgd.lora_training_bytes(8) == 2 * 4 * 8 * adamw.sides
