import tomllib
from pathlib import Path

import pytest

from fedexperts.config import RunConfig, read
from fedexperts.errors import BadValue
from fedexperts.io.toml import checked, different, keys, to_toml, with_settings
from fedexperts.methods import METHODS

TREE = {"method": {"name": "fedmoe"}, "data": {"sources": ["synthetic/sort"]}}


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('method = { name = "fedmoe" }\n[data]\nsources = ["synthetic/sort"]\n')
    return path


def refusal(*settings, tree=TREE):
    with pytest.raises(BadValue) as refused:
        checked(RunConfig, with_settings(tree, settings))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_setting_from_the_shell_takes_the_place_of_the_files(run_file):
    config = read(
        run_file, ["training.lr=3e-5", "method.patience=7", "data.partition.by=iid", "seed=4", "model.name=some/folder"]
    )
    assert config.training.lr == 3e-5
    assert config.build_method().patience == 7
    assert (config.data.partition.by, config.seed, config.model.name) == ("iid", 4, "some/folder")


def test_a_setting_may_be_a_list_or_a_table(run_file):
    config = read(run_file, ['training.parts=["experts"]', "devices.memory_share={ uniform = [0.4, 1.0] }"])
    assert config.training.parts == ("experts",)
    assert config.devices.memory_share == {"uniform": [0.4, 1.0]}


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("training.learning_rate=1", "training.learning_rate is not a setting; did you mean training.lr?"),
        ("training.bach_size=1", "training.bach_size is not a setting; did you mean training.batch_size?"),
        ("federation.round=1", "federation.round is not a setting; did you mean federation.rounds?"),
        ("training.rounds=1", "training.rounds is not a setting; did you mean federation.rounds?"),
        (
            "data.sources=[{name='a', text='b'}]",
            "data.sources.0.text is not a setting; settings there are name, test, folder, config, "
            "split, test_split, format, messages, system, template, prompt, response, label, task, metric, limit",
        ),
        ("evalution.every=1", "evalution is not a setting; did you mean evaluation?"),
        ("data.client=1", "data.client is not a setting; did you mean data.clients?"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_nearest(setting, sentence):
    assert refusal(setting) == sentence


@pytest.mark.parametrize("key", ["training.", "training.__", "_", "training.x", "a..b", "training.lr.x", "data.sources.x"])
def test_a_key_that_is_no_name_is_refused(key):
    assert refusal(f"{key}=1")


def test_an_unknown_method_is_refused_with_all_there_are_and_the_nearest():
    there = ", ".join(METHODS)
    assert refusal("method.name=fedmoee") == f"method.name = 'fedmoee' is not one of {there}; did you mean fedmoe?"
    mine = "for one of your own, install its package (docs/extending.md)"
    assert refusal("method.name=xyz") == f"method.name = 'xyz' is not one of {there}; {mine}"


@pytest.mark.parametrize("name", ["3", "[1]", "{a = 1}", ""])
def test_a_method_that_is_no_name_is_refused(name):
    assert refusal(f"method.name={name}").startswith("method.name = ")


def test_a_method_without_a_name_is_refused():
    assert "method.name" in refusal(tree={**TREE, "method": {"patience": 3}})


def test_dropout_without_adapters_is_refused():
    said = refusal("training.train=full", "training.dropout=0.05")
    assert said.startswith("training.dropout = 0.05 applies to LoRA adapters, and training.train = 'full' has none; set")


def test_a_field_that_the_method_does_not_have_is_refused_with_the_nearest():
    said = refusal("method.name=fedmoe", "method.patient=3")
    assert said.startswith("method.patient is not a setting of fedmoe, which has initial, adjust")
    assert said.endswith("; did you mean patience?")
    assert "centralized, which has none" in refusal("method.name=centralized", "method.patience=3")


@pytest.mark.parametrize(
    "setting",
    [
        "method.patience=soon",
        "method.initial=best",
        "training.lr=0",
        "training.dropout=1",
        "training.dropout=-0.1",
        "training.lr=nan",
        "training.lr=inf",
        "training.batch_size=0",
        "training.batch_size=many",
        "training.train=half",
        'training.parts=["ears"]',
        "training.parts=[]",
        "federation.rounds=0",
        "federation.workers=0",
        "federation.engine=steam",
        "federation.sampling=fair",
        "evaluation.every=0",
        "data.clients=0",
        "data.partition.by=luck",
        "data.partition.alpha=1",
        "data.sources=[]",
        "seed=",
        "seed=1.5",
        "training=3",
        "method=fedavg",
        "model=tiny",
    ],
)
def test_a_value_that_is_not_allowed_is_refused_and_named(setting):
    key = setting.partition("=")[0]
    said = refusal(setting)
    assert key in said or key.rpartition(".")[2] in said
    assert len(said) < 300


def test_a_run_without_data_is_refused_in_a_few_words():
    said = refusal(tree={"seed": 1, "model": {"name": "x" * 500}})
    assert said.startswith("data ")
    assert len(said) < 150


@pytest.mark.parametrize("setting", ["training.lr", "=3", "", "  =3"])
def test_what_is_no_setting_is_refused(setting):
    assert "is not of the form a.b=c" in refusal(setting)


@pytest.mark.parametrize("text", ["seed = ", "[data", 'x = "', "seed = 1\nseed = 2"])
def test_a_file_that_is_no_toml_is_refused_with_the_place(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(BadValue, match=r"run\.toml is not TOML: .*(line|end of document)") as refused:
        read(path)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadValue, match="is not TOML"):
        read(path)


def test_a_file_that_is_not_there_or_a_folder_is_refused(tmp_path):
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(BadValue, match="cannot be read"):
            read(path)


def test_the_resolved_run_is_the_same_run_and_says_every_default(run_file):
    config = read(run_file, ["training.parts=['experts']", "data.clients=3"])
    text = to_toml(config.resolved())
    again = checked(RunConfig, tomllib.loads(text))
    assert different(config.resolved(), again.resolved()) == []
    assert again.training == config.training
    assert again.data == config.data
    assert again.build_method() == config.build_method()
    assert "patience = 3" in text


def test_what_differs_between_two_runs_is_named_in_full(run_file):
    one, other = (read(run_file, settings).resolved() for settings in ([], ["training.lr=1", "method.patience=9", "seed=2"]))
    assert different(one, other) == ["method.patience", "seed", "training.lr"]


def test_every_setting_has_a_full_name():
    names = list(keys(RunConfig))
    assert {"seed", "training.lr", "federation.rounds", "data.partition.alpha"} <= set(names)
    assert len(names) == len(set(names)) > 40


def test_the_run_files_that_come_with_the_library_are_runs():
    files = [path for path in Path(__file__).parents[1].joinpath("runs").rglob("*.toml") if not path.stem.startswith("pretrain")]
    assert [read(path).build_method() for path in files]
