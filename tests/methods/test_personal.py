"""Personal weights by part of the model."""

from dataclasses import replace

import pytest

from fedexperts.config import RunConfig
from fedexperts.errors import BadValue
from fedexperts.io.toml import checked
from fedexperts.methods.personal import parts, shared_names, sum_of_costs
from fedexperts.moe import rows, tuning
from fedexperts.moe.shrink import shrink
from fedexperts.moe.tuning import PARTS, Tuning, prepare
from fedexperts.testing import FAMILIES, tiny_model, tiny_server
from fedexperts.types import Cost, Training


@pytest.mark.parametrize("family", FAMILIES)
def test_the_part_of_a_weight_is_the_same_by_name_as_by_model(family):
    base = tiny_model(family)
    model = prepare(shrink(base, tiny_server(base, [], Training()).anatomy.all_experts), Tuning(), seed="")
    by_name, by_model = parts(rows.layout(model)), tuning.parts(model)
    assert {*by_name.values()} == {*PARTS}
    for name, part in by_name.items():
        joint = family == "switch_transformers" and ".experts." in name  # experts that are modules of their own
        assert part == ("experts" if joint else by_model[name])
    assert sum(part == "attention" for part in by_name.values()) >= 4


@pytest.mark.parametrize("family", ["olmoe", "switch_transformers", "deepseek_v2"])
@pytest.mark.parametrize("modules", [("v_proj",), ("q_proj", "k_proj", "v_proj")])
def test_adapters_belong_to_the_part_that_they_adapt(family, modules):
    lora = Training(train="lora", rank=4, attention_modules=modules)
    part_of = parts(tiny_server(tiny_model(family), [], lora).layout)
    for name, part in part_of.items():
        expected = "experts" if ".experts." in name else "attention" if ".lora_" in name else "router"
        assert part == expected
    assert {*part_of.values()} == {"attention", "experts", "router"}


def test_all_weights_of_no_personal_part_are_sent():
    server = tiny_server(tiny_model("olmoe", num_hidden_layers=1), [], Training())
    layer = "model.layers.0"
    own = {f"{layer}.mlp.gate.weight", *(f"{layer}.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))}
    assert server.weights.keys() - shared_names(server, ("router", "experts")) == own


def test_a_part_that_is_not_trained_cannot_be_personal():
    trained = Training(parts=("attention", "experts"))
    server = tiny_server(tiny_model("olmoe", num_hidden_layers=1), [], trained)
    said = "method.personal has 'router', but this run trains attention, experts; name some of these, or add 'router' to training"
    with pytest.raises(BadValue, match=f"^{said}"):
        shared_names(server, ("router",))


def test_a_run_without_shared_weights_is_refused():
    server = tiny_server(tiny_model("olmoe", num_hidden_layers=1), [], Training(parts=("router", "experts")))
    with pytest.raises(BadValue, match=r"^method\.personal has all that this run trains \(router, experts\), .*method local$"):
        shared_names(server, ("experts", "router"))


@pytest.mark.parametrize("method", ["fedper", "fedrep"])
@pytest.mark.parametrize(
    ("personal", "place"), [(["ears"], r"personal\.0 = 'ears'"), ([], r"personal is empty"), ("router", "personal")]
)
def test_a_value_that_names_no_parts_is_refused(method, personal, place):
    tree = {"method": {"name": method, "personal": personal}, "data": {"sources": ["synthetic/double"], "clients": 2}}
    with pytest.raises(BadValue, match=rf"^method\.{place}"):
        checked(RunConfig, tree)


def test_costs_are_summed_except_for_the_peak():
    one, other = Cost(tokens=3, peak_bytes=50, flops_estimated=2.0), Cost(tokens=4, peak_bytes=40, flops_estimated=5.0)
    assert sum_of_costs(one, other) == replace(one, tokens=7, flops_estimated=7.0)
