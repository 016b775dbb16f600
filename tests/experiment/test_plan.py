"""Plans of clients with a budget, and of personal experts."""

from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from fedexperts.config import RunConfig
from fedexperts.experiment import plan as module
from fedexperts.experiment.plan import distributions, plan
from fedexperts.experiment.plan_tables import plan_tables
from fedexperts.experiment.setup import Parts, prepare_run
from fedexperts.io.toml import checked
from fedexperts.methods.hfedmoe import HFedMoE
from fedexperts.models.shapes import load_shapes
from fedexperts.types import Example


def prepared_with(tiny_tree, **devices):
    return prepare_run(checked(RunConfig, {**tiny_tree, "devices": devices}))


def printed(planned):
    out = StringIO()
    console = Console(file=out, width=200)
    for table in plan_tables(planned):
        console.print(table)
    return out.getvalue()


def test_the_planned_memory_of_a_client_with_a_budget_is_that_of_the_reached_experts(tiny_tree):
    cost = prepared_with(tiny_tree).server.footprint
    memory = [cost.reaching(5), cost.reaching(24), cost.reaching(3), cost.reaching(3) - 1]
    prepared = prepared_with(tiny_tree, memory_gb=[each / 1e9 for each in memory])
    usual, with_budget = plan(prepared), plan(replace(prepared, method=HFedMoE()))
    assert [(client["budget"], client["first_fits"]) for client in usual["clients"]] == [
        (None, False),
        (None, True),
        (None, False),
        (None, False),
    ]
    assert [(client["budget"], client["first_fits"]) for client in with_budget["clients"]] == [
        (5, True),
        (24, True),
        (3, True),
        (3, False),
    ], "one expert of each of the three layers, even where that is too much"
    assert (with_budget["fixed_bytes"], with_budget["reached_bytes"]) == (cost.reaching(0), cost.reaching(1) - cost.reaching(0))
    of_memory = [warning for warning in with_budget["warnings"] if "memory" in warning]
    assert ["c04" in warning and "c01" not in warning for warning in of_memory] == [True]


def test_budgets_are_printed_if_there_are_any(tiny_tree):
    cost = prepared_with(tiny_tree).server.footprint
    prepared = prepared_with(tiny_tree, memory_gb=cost.reaching(17) / 1e9)
    shown = printed(plan(replace(prepared, method=HFedMoE())))
    assert shown.rpartition("Clients")[2].count(" 17 ") == 4
    assert f"{cost.fixed_bytes / 1e6:.1f} MB" in shown
    assert f"{cost.reached_bytes / 1e6:.3f} MB" in shown
    without = printed(plan(prepared))
    assert "budget" in shown and "backward" in shown
    assert "budget" not in without and "backward" not in without


def test_the_bytes_of_the_parts_sum_to_those_of_the_whole_model(tiny_tree):
    prepared = prepared_with(tiny_tree)
    planned, server = plan(prepared), prepared.server
    every = {block: shape.num_experts for block, shape in server.anatomy.blocks.items()}
    patch, memory = planned["patch"], planned["memory"]
    assert all(patch["expert_bytes"].values())
    assert (
        patch["dense_bytes"] + sum(patch["expert_bytes"][block] * number for block, number in every.items())
        == (planned["full_patch_bytes"])
    )
    experts = sum(memory["expert_bytes"][block] * number for block, number in every.items())
    assert memory["dense_bytes"] + experts + memory["activation_bytes"] == planned["full_bytes"]


def test_the_memory_of_personal_experts_is_added_to_that_of_the_job(tiny_tree):
    flex = {
        **tiny_tree,
        "training": {**tiny_tree["training"], "train": "lora", "parts": ["attention"]},
        "method": {"name": "flex"},
    }
    prepared = prepared_with(flex)
    shared, own = prepared.server.footprint.of(prepared.server.anatomy.all_experts), prepared.personal_bytes
    memory = [shared + own, shared + own - 1, shared, shared + own]

    planned = plan(prepared_with(flex, memory_gb=[each / 1e9 for each in memory]))
    assert (planned["full_bytes"], planned["personal_bytes"]) == (shared, own)
    assert [client["first_fits"] for client in planned["clients"]] == [True, False, False, True]
    assert [client["full_fits"] for client in planned["clients"]] == [True, False, False, True]
    assert "more for personal experts (estimated)" in printed(planned)

    three = prepared_with({**flex, "method": {"name": "flex", "num_grafted": 3}}).personal_bytes
    assert three > 2 * own
    stepped = {**flex["federation"], "server_optimizer": {"name": "fedavgm"}}
    assert prepared_with({**flex, "federation": stepped}).personal_bytes == own
    without = plan(prepared_with({**flex, "method": {"name": "fedit"}}))
    assert without["full_bytes"] == shared and without["personal_bytes"] == 0
    assert without["round_flops_estimated"] < planned["round_flops_estimated"]
    assert "personal" not in printed(without)


def test_a_plan_without_weights_is_that_of_the_run(method_trees):
    with_weights, without = Parts(), Parts(load=load_shapes)
    for name, tree in method_trees.items():
        planned = [plan(prepare_run(checked(RunConfig, tree), parts=parts)) for parts in (with_weights, without)]
        assert planned[0] == planned[1], name
        for client in planned[0]["clients"]:
            assert not client["first_experts"] or client["first_memory"]["weights"] > 0
    assert all(tensor.is_meta for base in without.bases.values() for tensor in base.model.parameters())


def test_a_plan_of_a_configuration_says_whose_tokenizer_counts(tiny_tree):
    tree = {**tiny_tree, "model": {"name": "granite-3.0-1b-a400m"}}
    planned = plan(prepare_run(checked(RunConfig, tree), parts=Parts(load=load_shapes)))
    assert planned["model"]["parameters"] == 1_334_628_352
    assert planned["held_by"][-1] == "server_gpu"
    assert any("with that of tiny" in warning for warning in planned["warnings"])
    assert "largest first job" in printed(planned)


@pytest.mark.parametrize(("dtype", "kernels", "warned"), [("bfloat16", False, 1), ("bfloat16", True, 0), ("float32", False, 0)])
def test_a_plan_warns_of_half_precision_on_a_processor_without_products_of_it(tiny_tree, monkeypatch, dtype, kernels, warned):
    monkeypatch.setattr(module, "has_half_kernels", lambda: kernels)
    tree = {**tiny_tree, "model": {"name": "tiny", "dtype": dtype}, "training": {**tiny_tree["training"], "device": "cpu"}}
    warnings = plan(prepare_run(checked(RunConfig, tree)))["warnings"]
    assert len([each for each in warnings if "no fast products" in each and 'model.dtype = "float32"' in each]) == warned


@pytest.mark.parametrize(
    ("robust", "sampled", "warned"),
    [("multi_krum", None, 1), ("median", None, 0), ("median", 2, 1), ("clip", 2, 0), (None, 2, 0)],
)
def test_a_plan_warns_of_too_few_clients_for_a_rule_of_robust_merging(tiny_tree, robust, sampled, warned):
    federation = {"rounds": 1, **({"robust": robust} if robust else {}), **({"clients_per_round": sampled} if sampled else {})}
    prepared = prepare_run(checked(RunConfig, {**tiny_tree, "federation": federation}))
    assert len(prepared.clients) == 4
    assert sum("the server's own counts as one more" in each for each in plan(prepared)["warnings"]) == warned


def test_the_bound_of_a_rounds_flops_counts_every_batch_of_a_step_and_the_second_forward_of_checkpointing(tiny_tree):
    def most(**training):
        return plan(prepared_with({**tiny_tree, "training": {**tiny_tree["training"], **training}}))["round_flops_estimated"]

    plain = most()
    assert most(gradient_accumulation_steps=3) == 3 * plain
    assert 1.2 * plain < most(gradient_checkpointing=True) < 1.34 * plain  # of three parts a fourth, without the head


def test_the_bound_counts_what_a_method_computes_beside_its_steps(tiny_tree):
    training, most = {**tiny_tree["training"], "validation_examples": 12}, {}
    for name in ("fedavg", "ditto", "fedmoe"):
        tree = {**tiny_tree, "method": {"name": name}, "training": training}
        most[name] = plan(prepared_with(tree))["round_flops_estimated"]
    steps, batches = training["local_steps"], -(-12 // training["batch_size"])
    assert most["ditto"] == 2 * most["fedavg"]
    forward = (most["fedmoe"] - most["fedavg"]) / batches
    assert 3.0 < most["fedavg"] / steps / forward < 3.1  # and fused attention's second product


def test_the_classes_and_lengths_of_a_clients_examples_are_counted_without_their_text():
    labeled = [
        Example("12345", "World", "news", label=0, choices=("World", "Sports")),
        Example("1", "Sports", "news", label=1, choices=("World", "Sports")),
        Example("123", "World", "news", label=0, choices=("World", "Sports")),
        Example("", "once upon", "text", label=7),
        Example("secret", "secret", "sort"),
    ]
    assert distributions(labeled) == {
        "labels": {"news": {"World": 2, "Sports": 1}, "text": {"class 7": 1}},
        "lengths": {"prompt": [0, 1, 3, 5, 6], "answer": [5, 5, 6, 6, 9]},
    }
