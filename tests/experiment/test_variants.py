"""Each method of a comparison trains as it can, with its own settings, and a line says so."""

import json

import pytest
import tomli_w

from fedexperts import config as configs
from fedexperts.config import RunConfig
from fedexperts.errors import BadValue
from fedexperts.experiment.setup import Parts, prepare_run
from fedexperts.experiment.sweep import compare, named, read_settings, read_variants
from fedexperts.experiment.variants import alike, as_folder, training_notes, trains
from fedexperts.io.toml import checked
from fedexperts.methods import METHODS
from fedexperts.report import cautions, read
from fedexperts.types import Training

ADAPTERS = ("fedit", "ffa_lora", "fedsa_lora", "flora", "flexlora", "hetlora")


@pytest.fixture
def config(tiny_tree):
    return checked(RunConfig, tiny_tree)


def variant(text, config=None):
    (one,) = read_variants(text, named({"": config}) if config else None)
    return one


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_prepared_in_a_comparison_whatever_the_run_file_trains(config, method):
    parts, tried = Parts(), 0
    for training in (Training(), Training(train="lora"), Training(parts=("router", "dense"))):
        run = config.model_copy(update={"training": training})
        prepare_run(variant(method).of(run), parts=parts)
        tried += 1
    assert tried == 3


@pytest.mark.parametrize("method", METHODS)
def test_a_method_that_can_train_as_the_run_says_does_so(config, method):
    training = Training(train="lora", parts=("attention", "router")) if method == "flex" else Training(train="lora", rank=4)
    assert variant(method).of(config.model_copy(update={"training": training})).training == training
    if method not in (*ADAPTERS, "flex", "random_expert"):
        assert variant(method).of(config).training == config.training


def test_flex_trains_adapters_on_attention_with_all_other_settings_of_the_run(config):
    training = variant("flex").of(config).training
    assert (training.train, training.parts) == ("lora", ("attention",))
    assert (training.lr, training.local_steps) == (config.training.lr, config.training.local_steps)


def test_settings_of_a_variant_go_on_top_of_what_its_method_needs(config):
    training = variant("flex:training.rank=16:training.dropout=0.1").of(config).training
    assert (training.train, training.parts, training.rank, training.dropout) == ("lora", ("attention",), 16, 0.1)
    alone = variant('flex:training.parts=["attention"]').of(config).training  # whole weights: the method can train so
    assert (alone.train, alone.parts) == ("full", ("attention",))


def test_a_run_file_has_settings_for_one_method_and_for_a_named_variant(tiny_tree):
    own = {"flex": {"num_grafted": 2, "training": {"lr": 0.5}}, "slow": {"name": "fedavg", "training": {"clip": 3.0}}}
    config = checked(RunConfig, {**tiny_tree, "methods": own})
    flex, slow, fedavg = (variant(name, config).of(config) for name in ("flex", "slow", "fedavg"))
    assert flex.method == {"name": "flex", "num_grafted": 2}
    assert (flex.training.lr, flex.training.train, fedavg.training.lr) == (0.5, "lora", config.training.lr)
    assert (slow.method, slow.training.max_grad_norm) == ({"name": "fedavg"}, 3.0)
    assert variant("slow", config).label == variant("slow", config).folder == "slow"
    assert variant("slow:training.lr=0.25", config).of(config).training.lr == 0.25
    assert not [run for run in (flex, slow, fedavg) if run.methods or "methods" in run.resolved()]


def test_a_single_run_takes_the_settings_of_its_method_and_the_shell_has_the_last_word(tiny_tree, tmp_path):
    path, own = tmp_path / "run.toml", {"fedmoe": {"patience": 9, "training": {"lr": 0.5}}}
    path.write_text(tomli_w.dumps({**tiny_tree, "method": {"name": "fedmoe"}, "methods": own}))
    config = configs.read(path)
    assert (config.method["patience"], config.training.lr, config.methods) == (9, 0.5, {})
    config = configs.read(path, ["training.lr=0.25", "method.patience=4"])
    assert (config.method["patience"], config.training.lr) == (4, 0.25)
    shared = read_settings([path], ["training.lr=0.25"])["run"]
    assert variant("fedmoe").of(shared).training.lr == 0.25
    assert configs.read(path, ["method.name=fedavg"]).training.lr == tiny_tree["training"].get("lr", 1e-3)


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        ({"flexx": {}}, r"^\[methods\.flexx\]: method\.name = 'flexx' is not one of .*; did you mean flex\?"),
        ({"flex": {"training": {"rl": 1}}}, r"^\[methods\.flex\]: training\.rl is not a setting; did you mean training\.lr\?"),
        ({"flex": {"grafted": 1}}, r"^\[methods\.flex\]: method\.grafted is not a setting of flex"),
        (
            {"flex": {"data": {}}},
            r"^\[methods\.flex\]: data is the same for all methods of a run file; only training, federation",
        ),
        ({"flex": {"training": 3}}, r"^\[methods\.flex\]: training = 3 should be a table, such as training = \{"),
        ({"flex": 3}, r"^methods\.flex = 3 should be a valid dictionary"),
    ],
)
def test_settings_of_a_method_that_are_not_allowed_are_refused(tiny_tree, methods, said):
    with pytest.raises(BadValue, match=said):
        checked(RunConfig, {**tiny_tree, "methods": methods})


def test_a_variant_of_one_run_file_is_missed_in_another(config, tiny_tree):
    slow = checked(RunConfig, {**tiny_tree, "methods": {"slow": {"name": "fedavg"}}})
    (missed,) = read_variants("slow", named({"one": slow, "two": config}))
    with pytest.raises(BadValue, match=r"has no \[methods\.slow\], which another one has"):
        missed.of(config)


def test_a_line_for_each_method_says_what_it_trains_and_a_warning_where_these_differ(config):
    variants = read_variants("fedmoe,flex,fedavg")
    *lines, warning = training_notes({"run": config}, variants)
    assert lines == [
        "fedmoe trains the whole model (as the run file says)",
        "flex trains adapters of rank 8 on attention (as its method or settings need; the run file says the whole model)",
        "fedavg trains the whole model (as the run file says)",
    ]
    assert "warning: the compared methods train different parts (fedmoe, fedavg: the whole model; flex: adapters" in warning
    added = warning.split("add '")[1].split("'")[0]
    (paired,) = read_variants(added)  # works as typed
    assert paired.of(config).training == variant("flex").of(config).training
    others = alike({each: each.of(config).training for each in [*variants, paired]})
    assert others.startswith("; to compare fedmoe with flex on equal terms, add 'fedmoe:training.train=lora")
    assert len(list(training_notes({"run": config}, read_variants("fedmoe,fedavg")))) == 2


def test_what_is_trained_is_put_into_words():
    assert trains(Training(parts=("router",))) == "all weights of router"
    assert trains(Training(train="lora")) == "adapters of rank 8 on attention, experts and all weights of the router"
    assert trains(Training(train="lora", parts=("router",))) == "all weights of the router"


def test_the_headline_comparison_runs_as_typed_and_its_table_warns(fedexperts, tiny_tree, tmp_path):
    path, out = tmp_path / "my-run.toml", tmp_path / "out"
    path.write_text(tomli_w.dumps({**tiny_tree, "federation": {"rounds": 1, "clients_per_round": 2}}))
    code, printed, err = fedexperts("compare", path, "--methods", "fedmoe,hfedmoe,flex,fedavg", "--out", out)
    assert (code, err) == (0, "")
    assert "flex trains adapters of rank 8 on attention" in printed
    assert "Warning: these methods train different parts" in " ".join(printed.split())
    assert "Warning: these methods train different parts" in (out / "report.md").read_text()
    groups = read.grouped(read.read_all([out]))
    assert list(groups) == ["fedavg", "fedmoe", "flex", "hfedmoe"]
    assert cautions.different_parts({"flex": groups["flex"]}) == ""
    assert {json.loads((out / f"{name}/seed-0/resolved.json").read_text())["training"]["train"] for name in groups} == {
        "full",
        "lora",
    }


def test_a_long_variant_has_a_short_folder_and_continues_the_one_of_its_former_name(config, tmp_path):
    text = 'fedavg:training.train=lora:training.parts=["attention","router"]:training.rank=4'
    (long,) = read_variants(text)
    assert long.label == long.folder.replace(",", ":") and len(long.label) <= 40 and long.label.startswith("fedavg:train=lora")
    (longer,) = read_variants(text.replace("rank=4", "rank=8"))
    assert longer.label != long.label
    chosen = {"": config.model_copy(update={"federation": config.federation.model_copy(update={"rounds": 1})})}
    assert compare(chosen, [long], 1, tmp_path / "new").folders == (tmp_path / "new" / long.folder / "seed-0",)
    (tmp_path / "old" / as_folder(text)).mkdir(parents=True)
    assert compare(chosen, [long], 1, tmp_path / "old").folders == (tmp_path / "old" / as_folder(text) / "seed-0",)
    plan = json.loads((tmp_path / "old" / as_folder(text) / "seed-0/plan.json").read_text())
    assert plan["method"] == long.former == text
