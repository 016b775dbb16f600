"""FedAvg, Algorithm 1 of McMahan et al."""

import torch

from fedexperts.federation import jobs_for
from fedexperts.methods.fedavg import FedAvg
from fedexperts.moe.anatomy import BlockShape
from fedexperts.testing import bare_server, tiny_context, tiny_model, tiny_server
from fedexperts.types import Client, Training

TRAINING = Training(batch_size=4, local_steps=1)


def test_every_client_gets_all_experts_regardless_of_its_memory():
    clients = [Client("small", 1, memory_bytes=1), Client("large", 1)]
    server = bare_server([BlockShape(4, 2)], clients)
    assert [FedAvg().assign(server, client).experts for client in clients] == [{"0": (0, 1, 2, 3)}] * 2


def test_a_number_of_experts_gives_every_client_the_same_small_model_and_leaves_the_others_as_they_were():
    model = tiny_model("olmoe", num_hidden_layers=2)
    clients = [Client("a", 4), Client("b", 12)]
    server, method = tiny_server(model, clients, TRAINING), FedAvg(experts_per_layer=3)
    jobs = list(jobs_for(server, method, clients))
    assert jobs[0].experts == jobs[1].experts != server.anatomy.all_experts
    updates = [method.train(job, tiny_context(model, client, TRAINING)) for job, client in zip(jobs, clients, strict=True)]
    merged, seen = method.merge(server, iter(updates)), 0
    for name, block in server.layout.items():
        if block is not None:
            experts = list(jobs[0].experts[block])
            changed = {row for row in range(8) if not torch.equal(merged.weights[name][row], server.weights[name][row])}
            assert len(experts) == 3 and changed == set(experts)
            seen += 1
    assert seen == 3 * 2


def test_the_next_model_is_the_mean_of_the_clients_weighted_by_their_examples():
    model = tiny_model("olmoe", num_hidden_layers=1)
    clients = [Client("a", 4), Client("b", 12)]
    server = tiny_server(model, clients, TRAINING)
    jobs = jobs_for(server, FedAvg(), clients)
    a, b = [FedAvg().train(job, tiny_context(model, client, TRAINING)) for job, client in zip(jobs, clients, strict=True)]
    merged = FedAvg().merge(server, iter([a, b]))
    seen = 0
    for name, tensor in merged.weights.items():
        expected = (4 * a.patch.tensors[name].double() + 12 * b.patch.tensors[name].double()) / 16
        assert torch.equal(tensor, expected.float()), name
        seen += 1
    assert seen == len(server.weights) > 8
