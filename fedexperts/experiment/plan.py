"""The plan of a run: its model, clients and costs, computed before it starts."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, cast

import numpy as np
import torch

from fedexperts.core.devices import held_by
from fedexperts.experiment.lost import lost, sentences
from fedexperts.experiment.setup import Prepared
from fedexperts.federation import job_for, steps
from fedexperts.methods.submodel import even_number, evenly
from fedexperts.models.files import is_config_file
from fedexperts.moe.device import find_devices
from fedexperts.moe.footprint import as_trained, checkpoint_activations
from fedexperts.moe.packed import has_half_kernels
from fedexperts.moe.precision import HALF
from fedexperts.report.read import Lost
from fedexperts.types import Client, Example, Patch, Server

WHAT_THEN = {
    "train anyway": "it trains there all the same, and the report marks them",
    "fail": 'their jobs fail where the measured peak is above it, unless devices.out_of_memory = "train anyway"',
}
"""What happens on a client with too little memory, by `devices.out_of_memory`."""


def plan(prepared: Prepared) -> dict[str, Any]:
    """The content of plan.json: the model, and the data, memory and experts of each client."""
    server = prepared.server
    full = server.footprint.of(server.anatomy.all_experts)
    clients = [client_plan(prepared, client, full) for client in server.clients.values()]
    losses = lost(prepared)
    return {
        "method": prepared.label,
        "setting": prepared.setting,
        "reference": prepared.method.declare().reference,
        "seed": prepared.config.seed,
        "model": {
            "name": prepared.base.name,
            "parameters": sum(parameter.numel() for parameter in prepared.base.model.parameters()),
            "blocks": {
                name: {"num_experts": block.num_experts, "top_k": block.top_k} for name, block in server.anatomy.blocks.items()
            },
        },
        "clients": clients,
        "devices": {name: asdict(profile) for name, profile in prepared.profiles.items()},
        "partition": prepared.config.data.partition.model_dump(mode="json", exclude_none=True),
        "full_bytes": full,
        "fixed_bytes": server.footprint.fixed_bytes,
        "reached_bytes": server.footprint.reached_bytes,
        "personal_bytes": prepared.personal_bytes,
        "full_patch_bytes": Patch(server.weights, wire_dtype=server.wire_dtype).nbytes,
        "patch": patch_bytes(server),
        "memory": {
            "dense_bytes": server.footprint.dense_bytes,
            "expert_bytes": dict(server.footprint.expert_bytes),
            "activation_bytes": server.footprint.activation_bytes,
            "parts": prepared.memory.of(server.anatomy.all_experts),
        },
        "held_by": held_by(full + prepared.personal_bytes),
        "round_flops_estimated": round_flops(prepared),
        "lost": [asdict(each) for each in losses],
        "warnings": warnings(prepared, clients, losses),
    }


def round_flops(prepared: Prepared) -> float:
    """An upper bound of the FLOPs of a participant's round: on the whole model and full-length examples.

    All that a method computes in a round counts (`Method.round_flops`), but no setup task and no evaluation.
    """
    config, base, training = prepared.config, prepared.base, prepared.training
    model = as_trained(base.model, training.tuning, prepared.method.declare().personal_experts)
    if training.gradient_checkpointing:
        checkpoint_activations(model)
    ids = torch.zeros(training.batch_size, config.data.max_tokens, dtype=torch.int64)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return prepared.method.round_flops(model, batch, training)


def patch_bytes(server: Server) -> dict[str, Any]:
    """Bytes of the sent weights: of the dense weights, and per MoE block of one expert."""
    experts = dict.fromkeys(server.anatomy.blocks, 0)
    for name, tensor in server.weights.items():
        if (block := server.layout[name]) is not None:
            experts[block] += tensor[0].nbytes
    dense = sum(tensor.nbytes for name, tensor in server.weights.items() if server.layout[name] is None)
    return {"dense_bytes": dense, "expert_bytes": experts, "wire_dtype": server.wire_dtype}


def warnings(prepared: Prepared, clients: Sequence[Mapping[str, Any]], losses: Sequence[Lost]) -> list[str]:
    """Warnings about memory, labels and what is cut, as sentences."""
    config = prepared.config
    over = [client["name"] for client in clients if client["first_experts"] and not client["first_fits"]]
    memory_warning = (
        f"{len(over)} of {len(clients)} clients have less memory than {prepared.label} would use on them: {', '.join(over)}; "
        + WHAT_THEN[prepared.config.devices.out_of_memory]
    )
    tokenizer_warning = (
        f"model.name = {prepared.base.name!r} is a configuration without a tokenizer: tokens are counted with that of tiny, "
        "which makes more of a text than most"
    )
    configuration_only = is_config_file(prepared.base.name)
    return [
        *([memory_warning] if over else []),
        *([tokenizer_warning] if configuration_only else []),
        *shown_examples(prepared),
        *too_few_clients(prepared),
        *too_few_for_the_rule(prepared),
        *too_long_labels(prepared),
        *too_many_positions(prepared),
        *(() if config.data.own else slow_products(prepared)),  # which train elsewhere
        *sentences(losses, config.data.max_tokens, config.evaluation.generate_tokens),
    ]


def shown_examples(prepared: Prepared) -> Iterator[str]:
    """A sentence if clients send examples of their own data to the server."""
    if prepared.config.data.own and (number := prepared.config.predictions):
        yield (
            f"evaluation.predictions = {number}: at each evaluation a client whose own run file says so too sends the server as "
            "many prompts, references and answers of its own examples, which are otherwise never sent"
        )


def too_few_clients(prepared: Prepared) -> Iterator[str]:
    """A sentence if more clients are to be sampled in a round than there are."""
    wanted, there = prepared.config.federation.clients_per_round, len(prepared.clients)
    if wanted is not None and wanted > there:
        yield f"federation.clients_per_round = {wanted}, but there are {there} clients, so all of them train in every round"


def too_few_for_the_rule(prepared: Prepared) -> Iterator[str]:
    """A sentence if no row can have as many contributors as the rule of robust merging needs."""
    robust, there = prepared.config.federation.robust, len(prepared.clients)
    most = min(prepared.config.federation.clients_per_round or there, there)
    if robust is not None and not robust.is_enough(most, most):
        yield (
            f"federation.robust = {robust.name!r} needs more than the {most} clients of a round: every weight becomes a clipped "
            "mean in which the server's own counts as one more client's, so training is slower"
        )


def too_many_positions(prepared: Prepared) -> Iterator[str]:
    """A sentence if sequences may be longer than those that the model was made for."""
    positions = getattr(cast("Any", prepared.base.model).config, "max_position_embeddings", None)
    longest = prepared.config.data.max_tokens
    if isinstance(positions, int) and longest > positions:
        yield f"data.max_tokens = {longest} is above the {positions} positions of {prepared.base.name}; lower it"


def slow_products(prepared: Prepared) -> Iterator[str]:
    """A sentence if what trains on this machine does so in bfloat16 or float16, on a processor that has no products of these."""
    dtype = next(weight.dtype for weight in prepared.base.model.parameters() if weight.is_floating_point())
    on_processor = find_devices(prepared.training.device) == ("cpu",)
    if on_processor and dtype in HALF and prepared.config.model.quantize is None and not has_half_kernels():
        yield (
            f"the model is in {str(dtype).removeprefix('torch.')}, for which this processor has no fast products (it lacks "
            'AVX-512): backward takes many times longer; set model.dtype = "float32", or model.quantize = "nf4"'
        )


def too_long_labels(prepared: Prepared) -> Iterator[str]:
    """A sentence for each task with labels that are longer than generated answers."""
    limit = prepared.config.evaluation.generate_tokens
    labels_of = {example.task: example.choices for example in prepared.clients.pool.test if generated(example)}
    for task, choices in labels_of.items():
        lengths = [len(ids) for ids in prepared.base.tokenizer(list(choices), add_special_tokens=False)["input_ids"]]
        if max(lengths) > limit:
            yield (
                f"{sum(length > limit for length in lengths)} of the {len(choices)} labels of {task} are longer than "
                f"evaluation.generate_tokens = {limit} and will never be answered right; set it to {max(lengths) + 1}"
            )


def generated(example: Example) -> bool:
    """Whether the answer to `example` is a label that must be generated."""
    return bool(example.choices) and example.metric != "likelihood"


def client_plan(prepared: Prepared, client: Client, full: int) -> dict[str, Any]:
    """A client's entry in plan.json; `first_…` and `budget` (experts that backward reaches) are those of its first job."""
    split, server, method = prepared.clients[client.name], prepared.server, prepared.method
    first = replace(server, task=steps(method, 1)[0][1])
    assignment = method.assign(first, client) if client.name in prepared.participants else None
    assigned_experts = assignment.experts if assignment else {}
    budget = method.budget_of(assignment) if assignment else None
    shared = server.footprint.of(assigned_experts) if budget is None else server.footprint.reaching(budget)
    needed = shared + prepared.personal_bytes
    return {
        "name": client.name,
        "task": client.task,
        "examples": len(split.train),
        "validation": len(split.validation),
        "test": len(split.test),
        "memory_bytes": client.memory_bytes,
        "experts_fit": experts_fit(server, client),
        "full_fits": client.memory_bytes is None or full + prepared.personal_bytes <= client.memory_bytes,
        "tasks": prepared.clients.tasks(client.name),
        **({} if prepared.config.data.own else distributions(split.train)),
        "first_task": first.task,
        "first_experts": sum(len(ids) for ids in assigned_experts.values()),
        "budget": budget,
        "first_memory": prepared.memory.of(assigned_experts, budget) if assigned_experts else {},
        "first_bytes_down": job_for(first, client, assignment).nbytes if assignment else 0,
        "first_fits": first.task != "train" or client.memory_bytes is None or needed <= client.memory_bytes,
    }


def distributions(examples: Sequence[Example]) -> dict[str, Any]:
    """`labels`: task → class → how many of `examples` have it, of tasks with classes. `lengths`: of prompts and of answers, in
    characters: the least, the quartiles and the most. No text of the examples but the names of their classes.
    """
    labels: dict[str, Counter[str]] = {}
    for example in examples:
        if example.label is not None:
            name = example.choices[example.label] if example.choices else f"class {example.label}"
            labels.setdefault(example.task, Counter())[name] += 1
    texts = {"prompt": [len(each.prompt) for each in examples], "answer": [len(each.response) for each in examples]}
    lengths = {name: np.quantile(each, (0, 0.25, 0.5, 0.75, 1)).tolist() for name, each in texts.items()}
    return {"labels": {task: dict(counts.most_common()) for task, counts in labels.items()}, "lengths": lengths}


def experts_fit(server: Server, client: Client) -> int:
    """The largest number of experts, spread evenly over the layers, that the client's memory can train."""
    number = even_number(server, client)
    return sum(evenly(server.anatomy, number).values()) if number else 0
