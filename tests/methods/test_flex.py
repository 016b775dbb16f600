"""FLEx on tiny models: the selection of experts, personal weights, and the weights that are sent."""

from dataclasses import replace

import pytest
import torch

from fedexperts.errors import BadData, BadValue
from fedexperts.federation import jobs_for
from fedexperts.methods.flex import FLEx, as_state, grafted_ids
from fedexperts.methods.public_text import windows
from fedexperts.moe import graft
from fedexperts.moe.reconstruction import by_reconstruction, most_used
from fedexperts.testing import tiny_context, tiny_model, tiny_server
from fedexperts.types import Client, Split, Training

TRAINING = Training(train="lora", parts=("attention",), rank=4, batch_size=4, local_steps=2, router_aux_loss_coef=0)
CLIENTS = [Client("a", 8, "x"), Client("b", 12, "y")]


def one_round(method, family="olmoe", training=TRAINING, rounds=1):
    """The contexts, the jobs and updates of the last round, and the server after it."""
    model = tiny_model(family)
    server = tiny_server(model, CLIENTS, training)
    contexts = {client.name: tiny_context(model, client, training) for client in CLIENTS}
    for number in range(1, rounds + 1):
        current = replace(server, round=number, task="train")
        jobs = list(jobs_for(current, method, CLIENTS))
        updates = [method.train(job, contexts[job.client]) for job in jobs]
        server = method.merge(current, iter(updates))
    return contexts, jobs, updates, server


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "switch_transformers"])
def test_only_shared_adapters_are_sent_and_all_other_trained_weights_are_kept(family):
    contexts, jobs, updates, server = one_round(FLEx(), family)
    for job, update in zip(jobs, updates, strict=True):
        assert update.patch.tensors.keys() == job.patch.tensors.keys() == server.weights.keys()
        assert not update.extra
        assert not any(graft.is_personal(name) for name in update.patch.tensors)
        client_state = contexts[update.client].client_state
        assert len(client_state) > len(server.anatomy.blocks) and all(graft.is_personal(name) for name in client_state)
        assert client_state.keys() > {f"grafted/{block}" for block in server.anatomy.blocks}
        assert all(tensor.abs().sum() > 0 for name, tensor in client_state.items() if name.endswith(".b") or "lora_B" in name)


def test_the_shared_weights_are_the_mean_by_examples():
    _, _, (a, b), server = one_round(FLEx())
    for name, tensor in server.weights.items():
        expected = (8 * a.patch.tensors[name].double() + 12 * b.patch.tensors[name].double()) / 20
        assert torch.equal(tensor, expected.to(tensor.dtype))


def test_what_is_evaluated_has_the_clients_own_experts():
    contexts, _, _, server = one_round(FLEx())
    (job, _) = jobs_for(replace(server, task="evaluate"), FLEx(), CLIENTS)
    model = FLEx().build_model(job, contexts["a"])
    weights = dict(model.named_parameters())
    personal = {name: tensor for name, tensor in contexts["a"].client_state.items() if not name.startswith("grafted/")}
    assert personal and all(torch.equal(weights[name].reshape(tensor.shape), tensor) for name, tensor in personal.items())


def test_experts_are_selected_once_and_stay():
    first = {name: context.client_state for name, context in one_round(FLEx(select="random"))[0].items()}
    later = {name: context.client_state for name, context in one_round(FLEx(select="random"), rounds=3)[0].items()}
    assert all(grafted_ids(first[name]) == grafted_ids(later[name]) for name in first)
    assert grafted_ids(first["a"]) != grafted_ids(first["b"])


def test_each_selection_uses_its_criterion(tmp_path):
    def chosen(method):
        return {name: grafted_ids(context.client_state) for name, context in one_round(method)[0].items()}

    context = tiny_context(tiny_model("olmoe"), CLIENTS[0], TRAINING)
    batches = [context.encoder.batch(context.data.train[start : start + 4]) for start in (0, 4)]
    assert chosen(FLEx())["a"] == by_reconstruction(context.model, batches, stride=2)
    few = FLEx(num_grafted=2, calibration_examples=4, calibration_stride=1)
    assert chosen(few)["a"] == by_reconstruction(context.model, batches[:1], 2)
    assert chosen(FLEx(select="most_used"))["a"] == most_used(context.model, batches)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{number % 60 + 3}" for number in range(400)))
    shared = chosen(FLEx(select="shared", public_text=str(text)))
    assert shared["a"] == shared["b"]


def test_an_encoder_and_its_decoder_both_see_the_public_text(tmp_path):
    words = " ".join(f"w{number % 60 + 3}" for number in range(400))
    (tmp_path / "text.txt").write_text(words)
    context = tiny_context(tiny_model("switch_transformers"), CLIENTS[0], TRAINING)
    (batch,) = FLEx(select="shared", public_text=str(tmp_path / "text.txt")).calibration(context)
    read, written = batch["attention_mask"].sum(), (batch["labels"] != -100).sum()
    assert read > 10 and written > 10


def test_under_full_training_whole_experts_and_gates_are_personal():
    training = replace(TRAINING, train="full", parts=("attention",))
    contexts, _, updates, _ = one_round(FLEx(), training=training)
    assert not any(graft.is_personal(name) for name in updates[0].patch.tensors)
    own = [name for name in contexts["a"].client_state if not name.startswith("grafted/")]
    assert {name.rpartition(".grafted.")[2] for name in own} == {"copies.gate_up_proj", "copies.down_proj", "own_gate.weight"}


def test_the_flops_of_the_selection_are_counted():
    assert one_round(FLEx())[2][0].cost.flops_estimated > one_round(FLEx(select="random"))[2][0].cost.flops_estimated


@pytest.mark.parametrize(
    ("method", "training", "said"),
    [
        (FLEx(num_grafted=9), TRAINING, "method.num_grafted = 9, but a layer has 8 experts"),
        (FLEx(), Training(), "flex leaves the pretrained experts as they are"),
        (FLEx(select="shared"), TRAINING, "go together"),
        (FLEx(public_text="x"), TRAINING, "go together"),
        (FLEx(select="shared", public_text="nowhere.txt"), TRAINING, "'nowhere.txt' is no file with text"),
    ],
)
def test_settings_that_cannot_be_combined_are_refused_before_the_run(method, training, said):
    server = tiny_server(tiny_model("olmoe"), CLIENTS, training)
    with pytest.raises(BadValue, match=said):
        method.assign(replace(server, task="train"), CLIENTS[0])


@pytest.mark.parametrize("content", [b"", b" \n\t\n", b"\x80\x8c"])
def test_a_public_text_file_without_text_is_refused(tmp_path, content):
    (tmp_path / "text.txt").write_bytes(content)
    method = FLEx(select="shared", public_text=str(tmp_path / "text.txt"))
    with pytest.raises(BadValue, match=r"text.txt' is no file with text \(UTF-8\)"):
        method.assign(replace(tiny_server(tiny_model("olmoe"), CLIENTS, TRAINING), task="train"), CLIENTS[0])


def test_a_public_text_that_differs_from_the_servers_is_refused(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("w3 w4")
    method = FLEx(select="shared", public_text=str(text))
    context = tiny_context(tiny_model("olmoe"), CLIENTS[0], TRAINING)
    server = replace(tiny_server(context.model, CLIENTS, TRAINING), task="train")
    job, _ = jobs_for(server, method, CLIENTS)
    text.write_text("w3 w5")
    with pytest.raises(BadData, match="is another text here than the server's; give all the same"):
        method.train(job, context)
    assert not context.client_state


@pytest.mark.parametrize("family", ["olmoe", "switch_transformers"])
def test_a_rank_that_stacked_personal_experts_do_not_support_is_refused_before_the_run(family):
    training = replace(TRAINING, train="lora", parts=("attention",), rank=6)
    server = replace(tiny_server(tiny_model(family), CLIENTS, training), task="train")
    if family == "switch_transformers":  # whose experts are matrices like any other
        assert FLEx().assign(server, CLIENTS[0])
        return
    with pytest.raises(BadValue, match=r"training\.rank = 6, but adapters of stacked experts in float32 need a multiple of 4"):
        FLEx().assign(server, CLIENTS[0])


def test_a_client_without_examples_for_the_selection_fails():
    model = tiny_model("olmoe")
    server = replace(tiny_server(model, CLIENTS, TRAINING), round=1, task="train")
    (job, _) = jobs_for(server, FLEx(), CLIENTS)
    context = tiny_context(model, CLIENTS[0], TRAINING)
    empty = replace(context, data=Split([], context.data.validation, context.data.test))
    with pytest.raises(BadData, match="client a has no training examples to select its experts by"):
        FLEx().train(job, empty)


def test_the_selection_uses_examples_of_each_task_of_the_client():
    model = tiny_model("olmoe")
    context = tiny_context(model, CLIENTS[1], TRAINING)
    tasks = ["x"] * 9 + ["y"] * 3
    train = [replace(example, task=task) for example, task in zip(context.data.train, tasks, strict=True)]
    context = replace(context, data=replace(context.data, train=train))
    batches = FLEx(calibration_examples=4).calibration(context)
    expected = context.encoder.batch([*train[:3], train[9]])
    assert len(batches) == 1 and batches[0].keys() == expected.keys()
    assert all(torch.equal(batches[0][key], expected[key]) for key in expected)


def test_windows_are_spread_over_the_text():
    text = "".join(str(number % 10) * 2000 for number in range(10))
    assert [piece.response[0] for piece in windows(text, 5)] == ["0", "2", "4", "6", "8"]
    assert [piece.response[0] for piece in windows(text, 6)] == ["0", "1", "3", "5", "6", "8"]
    assert len(windows(text, 100)) == 10


def test_ids_are_stored_as_tensors_and_read_among_other_entries():
    ids = {"model.layers.0.mlp": (3, 1), "model.layers.1.mlp": (0, 2)}
    assert grafted_ids({"model.layers.0.mlp.grafted.own_gate.weight": torch.zeros(1), **as_state(ids)}) == ids
