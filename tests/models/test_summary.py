"""The costs that the papers print, from configs alone."""

import io
import json
import shutil

import pytest
from rich.console import Console

from fedexperts.errors import BadValue
from fedexperts.models.summary import inspect, lora_option, render

SWITCH = "configs/switch-base-32.json"
QWEN = "configs/qwen1.5-moe-a2.7b.json"


def gib(number):
    return f"{number / 2**30:.3f}"


def million(number, digits):
    return f"{number / 1e6:.{digits}f}"


def test_switch_base_has_the_parameters_of_the_fedmoe_paper():
    inspection = inspect(SWITCH)
    assert million(inspection.dense_parameters, 2) == "166.28"
    assert len(inspection.layers) == 12
    assert {million(layer.expert_parameters, 4) for layer in inspection.layers} == {"4.7186"}
    assert {layer.router_row_parameters for layer in inspection.layers} == {768}
    assert inspection.full.experts == 384


def test_65_experts_of_switch_base_are_1_762_gib():
    kept = inspect(SWITCH, keep_total=65).kept
    assert kept.experts == 65
    assert gib(kept.send_bytes) == "1.762"
    assert kept.training_bytes == 4 * kept.send_bytes


def test_96_experts_of_switch_base_are_2_307_gib():
    assert gib(inspect(SWITCH, keep=8).kept.send_bytes) == "2.307"


def test_the_sub_model_of_8_experts_costs_what_switch_base_8_does():
    assert inspect(SWITCH, keep=8).kept == inspect("configs/switch-base-8.json").full


def test_switch_base_with_lora_on_every_expert_is_7_458_gib():
    adapters = inspect(SWITCH, lora=lora_option("experts", 8)).adapters
    assert adapters.parameters == 384 * 2 * 8 * (768 + 3072)
    assert gib(adapters.with_model_bytes) == "7.458"


def test_lora_on_the_attention_of_qwen_is_9_44_million():
    adapters = inspect(QWEN, lora=lora_option("attention", 32, "q,k,v")).adapters
    assert million(adapters.parameters, 2) == "9.44"


def test_lora_on_all_experts_of_qwen_as_well_is_487_2_million():
    adapters = inspect(QWEN, lora=lora_option("attention+experts", 32, "q,k,v")).adapters
    assert million(adapters.parameters_by_matrix, 1) == "487.2"
    one_matrix_less = 24 * 60 * 32 * 2048  # the A that our adapters of gate and up share
    assert adapters.parameters == adapters.parameters_by_matrix - one_matrix_less


def test_one_expert_of_qwen_is_8_65_million_a_layer():
    inspection = inspect(QWEN)
    assert {million(layer.expert_parameters, 2) for layer in inspection.layers} == {"8.65"}
    assert million(inspection.grafted_parameters, 1) == "207.6"


@pytest.mark.parametrize(
    "name, total, active",
    [
        ("qwen1.5-moe-a2.7b", 14.3, 2.7),
        ("deepseek-v2-lite", 15.7, 2.7),
        ("olmoe-1b-7b", 6.9, 1.3),
    ],
)
def test_billions_of_parameters_are_those_of_the_model_cards(name, total, active):
    full = inspect(f"configs/{name}.json").full
    assert round(full.parameters / 1e9, 1) == total
    assert round(full.active_parameters / 1e9, 1) == active


def test_the_json_and_the_table_hold_the_same_numbers():
    inspection = inspect(SWITCH, keep_total=65, lora=lora_option("experts", 8))
    assert json.loads(inspection.to_json())["kept"]["experts"] == 65
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render(inspection))
    text = console.export_text()
    assert all(number in text for number in ("1.762 GiB", "7.458 GiB", "166.28 M", "4.72 M"))
    assert "…" not in text, text


def test_a_folder_is_read_like_a_file(tmp_path):
    shutil.copy("configs/switch-base-8.json", tmp_path / "config.json")
    assert inspect(tmp_path).full == inspect("configs/switch-base-8.json").full


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"keep": 33}, "keep 1 to 32 a layer"),
        ({"keep_total": 11}, "12 to 384 in all"),
        ({"keep": 2, "keep_total": 24}, "give one of them"),
    ],
)
def test_a_sub_model_that_cannot_be_is_refused(options, sentence):
    with pytest.raises(BadValue, match=sentence):
        inspect(SWITCH, **options)


@pytest.mark.parametrize("content, sentence", [("{", "could not be read as JSON"), ('{"a": 1}', "names no model_type")])
def test_a_file_that_is_no_config_is_refused(tmp_path, content, sentence):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(BadValue, match=sentence):
        inspect(path)


def test_a_model_without_experts_is_refused(tmp_path):
    path = tmp_path / "gpt2.json"
    path.write_text(json.dumps({"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 8}))
    with pytest.raises(BadValue, match="no Mixture-of-Experts layers"):
        inspect(path)
