"""Local training: no weights are sent, each client continues from its client state."""

import torch

from fedexperts.federation import jobs_for
from fedexperts.methods.contract import Method
from fedexperts.methods.local import Local
from fedexperts.moe import rows
from fedexperts.testing import tiny_context, tiny_model, tiny_server
from fedexperts.types import Client, Training

TRAINING = Training(batch_size=4, local_steps=2)
CLIENT = Client("a", 8)


def start():
    model = tiny_model("olmoe", num_hidden_layers=1)
    server = tiny_server(model, [CLIENT], TRAINING)
    (job,) = jobs_for(server, Local(), [CLIENT])
    return server, job, tiny_context(model, CLIENT, TRAINING)


def test_no_weights_are_sent_and_the_server_does_not_change():
    server, job, context = start()
    assert job.nbytes == 0
    update = Local().train(job, context)
    assert not update.patch.tensors and not update.extra
    assert Local().merge(server, iter([update])) is server


def test_the_stream_of_updates_is_read_to_its_end():
    server, *_ = start()
    waiting = iter(range(3))
    Local().merge(server, waiting)
    assert list(waiting) == []


def test_a_client_keeps_its_trained_weights_and_continues_from_them():
    server, job, context = start()
    Local().train(job, context)
    first = {name: tensor.clone() for name, tensor in context.client_state.items()}
    assert first.keys() == server.weights.keys()
    assert any(not torch.equal(first[name], server.weights[name]) for name in first)
    installed = rows.read(Method().build_model(job, context))
    assert all(torch.equal(installed[name], first[name]) for name in first), "what is evaluated is what was kept"
    Local().train(job, context)
    assert any(not torch.equal(context.client_state[name], first[name]) for name in first)


def test_experts_per_layer_limits_the_clients_model():
    server, _, context = start()
    method = Local(experts_per_layer=3)
    (job,) = jobs_for(server, method, [CLIENT])
    for _ in range(2):
        method.train(job, context)
    assert {len(context.client_state[name]) for name, block in server.layout.items() if block is not None} == {3}
    installed = rows.read(Method().build_model(job, context))
    assert all(torch.equal(installed[name], context.client_state[name]) for name in server.weights)


def test_more_rounds_fit_the_training_examples_better():
    _, job, context = start()
    losses = [Local().train(job, context).metrics["loss"] for _ in range(8)]
    assert losses[-1] < losses[0] - 0.1
