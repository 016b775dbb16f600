"""Comparisons: labels of methods, folders of runs, and runs in several processes."""

import json
import os
import subprocess
import sys

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from fedexperts.config import RunConfig
from fedexperts.errors import BadRun, BadValue
from fedexperts.experiment import setup, sweep
from fedexperts.experiment.runner import run
from fedexperts.experiment.sweep import Compared, Variant, compare, read_settings, read_variants
from fedexperts.io.files import locked
from fedexperts.io.toml import checked
from fedexperts.methods import METHODS


@pytest.fixture
def settings(tiny_tree):
    """Two settings of one round each."""
    short = {**tiny_tree, "federation": {"rounds": 1, "clients_per_round": 2}}
    by_task = {**short, "federation": {**short["federation"], "sampling": "by task"}}
    return {"standard": checked(RunConfig, short), "enforced": checked(RunConfig, by_task)}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def rounds(out):
    """Results folder, relative to `out` → the rounds it has done."""
    logs = {path.parent.relative_to(out).as_posix(): path for path in out.rglob("rounds.jsonl")}
    return {name: [line["round"] for line in lines(path)] for name, path in logs.items()}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fedavg", [Variant("fedavg", "fedavg")]),
        ("fedavg , local,,", [Variant("fedavg", "fedavg"), Variant("local", "local")]),
        ("fedavg,fedavg", [Variant("fedavg", "fedavg")]),
        (
            'flex:training.train=lora:training.parts=["attention"]',
            [
                Variant(
                    "flex:train=lora:parts=attention",
                    "flex",
                    ("training.train=lora", 'training.parts=["attention"]'),
                    former='flex:training.train=lora:training.parts=["attention"]',
                )
            ],
        ),
        ("fedmoe:adjust=false", [Variant("fedmoe:adjust=false", "fedmoe", ("method.adjust=false",))]),
        ("fedavg:training.lr=1e-3", [Variant("fedavg:training.lr=1e-3", "fedavg", ("training.lr=1e-3",))]),
        ("slow=fedmoe:patience=3:training.lr=1e-4", [Variant("slow", "fedmoe", ("method.patience=3", "training.lr=1e-4"))]),
        (
            'two = fedavg:training.parts=["experts","a:b"],local',
            [Variant("two", "fedavg", ('training.parts=["experts","a:b"]',)), Variant("local", "local")],
        ),
        (
            "fedavg:own={uniform=[1,2]}:training.lr=1",
            [Variant("fedavg:own={uniform=[1,2]}:training.lr=1", "fedavg", ("method.own={uniform=[1,2]}", "training.lr=1"))],
        ),
    ],
)
def test_methods_are_read_with_their_labels_and_settings(text, expected):
    assert read_variants(text) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (" ,", "no method was named"),
        ("fedavgg", "did you mean fedavg"),
        ("a=fedavg,a=local", "two methods are called a"),
        ("../x=fedavg", "a name begins with a letter"),
        ("=fedavg", "a name begins with a letter"),
        (f"{'x' * 300}=fedavg", "give it a short one"),
        ("fedavg:training.lr=1:data.clients=3", r"sets data\.clients=3, but the methods of a comparison share data"),
        ("fedavg: devices.memory_gb=1", r"sets devices\.memory_gb=1, .* set it for all with --set, or give another run file"),
        ("mine=fedavg:evaluation.split=validation", r"mine=.* sets evaluation\.split=validation, but"),
        ("fedavg:seed=3", "sets seed=3, but"),
    ],
)
def test_methods_that_cannot_be_read_are_refused(text, said):
    with pytest.raises(BadValue, match=said):
        read_variants(text)


@given(st.lists(st.text(min_size=1), min_size=2, max_size=2, unique=True))
def test_no_two_labels_share_a_folder_and_each_is_one_part_of_a_path(labels):
    folders = [Variant(label, "fedavg").folder for label in labels]
    assert len(set(folders)) == 2
    assert not [folder for folder in folders if "/" in folder or "\0" in folder]


def test_a_variant_changes_its_settings_and_preserves_the_run_files_settings_of_its_method(tiny_tree):
    config = checked(RunConfig, {**tiny_tree, "method": {"name": "fedmoe", "patience": 7, "neighbors": 2}})
    (variant,) = read_variants("fedmoe:patience=1:training.lr=0.5:federation.rounds=9:model.name=other")
    changed = variant.of(config)
    assert changed.method == {"name": "fedmoe", "patience": 1, "neighbors": 2}
    assert (changed.training.lr, changed.federation.rounds, changed.model.name) == (0.5, 9, "other")
    assert changed.training.local_steps == config.training.local_steps == 2
    with pytest.raises(BadValue, match=r"training\.rl is not a setting; did you mean training\.lr\?"):
        read_variants("fedavg:training.rl=1")[0].of(config)
    with pytest.raises(BadValue, match=r"^'training\.lr' is not of the form a\.b=c"):
        read_variants("fedavg:training.lr")[0].of(config)


def test_references_are_distinguished_from_federated_methods():
    assert {name for name, method in METHODS.items() if method().declare().reference} == {"local", "centralized"}


def test_former_names_of_settings_and_methods_name_the_same_variant(tiny_tree):
    config = checked(RunConfig, tiny_tree)
    (old,) = read_variants("centralised:training.clip=0")
    assert old.method == "centralized"
    assert old.of(config).training.max_grad_norm == 0
    for settings in ({}, {"neighbors": 2}, {"neighbours": 2}):
        config = checked(RunConfig, {**tiny_tree, "method": {"name": "fedmoe", **settings}})
        (old,) = read_variants("fedmoe:neighbours=4")
        assert old.of(config).method == {"name": "fedmoe", "neighbors": 4} and old.label == "fedmoe:neighbours=4"


def test_run_files_of_one_name_are_refused(tiny_tree, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "run.toml").write_text(tomli_w.dumps(tiny_tree))
    with pytest.raises(BadValue, match="two run files are called run"):
        read_settings([tmp_path / "a/run.toml", tmp_path / "b/run.toml"])
    assert read_settings([tmp_path / "a/run.toml"], ["seed=5"])["run"].seed == 5


def test_each_combination_of_varied_values_is_a_setting(tiny_tree, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps(tiny_tree))
    settings = read_settings([path], ["training.batch_size=3"], ["training.lr = 1e-3, 0.5"])
    assert list(settings) == ["run training.lr=1e-3", "run training.lr=0.5"]
    assert [(each.training.lr, each.training.batch_size) for each in settings.values()] == [(1e-3, 3), (0.5, 3)]
    settings = read_settings([path], [], ["federation.rounds=1,2", 'training.parts=["experts"],["experts","router"]'])
    assert [(each.federation.rounds, each.training.parts) for each in settings.values()] == [
        (1, ("experts",)),
        (1, ("experts", "router")),
        (2, ("experts",)),
        (2, ("experts", "router")),
    ]


@pytest.mark.parametrize(
    ("vary", "said"),
    [
        (["training.lr"], r"'training\.lr' is not of the form a\.b=c,d"),
        (["training.lr=,"], "is not of the form"),
        (["training.lr=1,2", "training.lr=3"], "training.lr is varied twice"),
        (["method.patience=1,2"], "--methods takes variants: NAME:patience="),
        (["seed=1,2"], "--seeds says how many"),
        (["training.rl=1,2"], r"training\.rl is not a setting; did you mean training\.lr\?"),
        ([f"model.name={'x' * 300}"], "write a run file for each"),
    ],
)
def test_keys_that_cannot_be_varied_are_refused(tiny_tree, tmp_path, vary, said):
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps(tiny_tree))
    with pytest.raises(BadValue, match=said):
        read_settings([path], [], vary)


def test_a_sweep_in_two_processes_completes_despite_failures_with_the_bits_of_one_process(tiny_tree, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps({**tiny_tree, "federation": {"rounds": 1}}))
    chosen = read_settings([path], [], ["training.lr=1e-3,1e30"])  # the second gives NaN
    variants = read_variants("fedavg,local")
    compared = compare(chosen, variants, 1, tmp_path / "two", jobs=2)
    assert [folder.relative_to(tmp_path / "two").parts[:2] for folder in compared.failed] == [
        ("run training.lr=1e30", "fedavg"),
        ("run training.lr=1e30", "local"),
    ]
    assert all("clients failed" in reason for reason in compared.failed.values())
    assert compared.left == ()
    alone = compare(chosen, variants, 1, tmp_path / "one")
    assert len(alone.folders) == len(compared.folders) == 4
    for folder in set(compared.folders) - compared.failed.keys():
        assert results(folder) == results(tmp_path / "one" / folder.relative_to(tmp_path / "two"))


def test_a_run_with_an_unexpected_error_is_named_and_the_others_are_executed(settings, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(METHODS["local"], "merge", lambda self, server, updates: 1 / 0)
    compared = compare({"standard": settings["standard"]}, read_variants("local,fedavg"), 1, tmp_path)
    assert compared.failed == {tmp_path / "local/seed-0": "ZeroDivisionError: division by zero"}
    assert "ZeroDivisionError" in capfd.readouterr().err
    assert rounds(tmp_path)["fedavg/seed-0"] == [1]


def test_each_setting_has_its_folder_and_its_name_in_the_plan(settings, tmp_path):
    compared = compare(settings, read_variants("fedavg,mine=local:training.lr=0.5"), 2, tmp_path)
    assert (compared.left, compared.failed) == ((), {})
    assert [path.relative_to(tmp_path).as_posix() for path in compared.folders[:3]] == [
        "standard/fedavg/seed-0",
        "standard/mine/seed-0",
        "enforced/fedavg/seed-0",
    ]
    assert rounds(tmp_path) == {
        f"{setting}/{method}/seed-{seed}": [1]
        for setting in ("standard", "enforced")
        for method in ("fedavg", "mine")
        for seed in (0, 1)
    }
    plan = json.loads((tmp_path / "enforced/mine/seed-1/plan.json").read_text())
    assert (plan["method"], plan["setting"], plan["seed"], plan["reference"]) == ("mine", "enforced", 1, True)
    assert not json.loads((tmp_path / "enforced/fedavg/seed-1/plan.json").read_text())["reference"]


def test_a_single_setting_has_no_folder_of_its_own_but_its_name_in_the_plan(settings, tmp_path):
    compare({"standard": settings["standard"]}, read_variants("local"), 1, tmp_path)
    assert rounds(tmp_path) == {"local/seed-0": [1]}
    assert json.loads((tmp_path / "local/seed-0/plan.json").read_text())["setting"] == "standard"


def test_a_run_of_another_process_is_left_to_it_and_the_others_are_executed(settings, tmp_path):
    busy, methods = tmp_path / "standard/fedavg/seed-0", read_variants("fedavg,local")
    with locked(busy):
        assert compare(settings, methods, 1, tmp_path).left == (busy,)
    assert set(rounds(tmp_path)) == {"standard/local/seed-0", "enforced/fedavg/seed-0", "enforced/local/seed-0"}
    assert compare(settings, methods, 1, tmp_path).left == ()
    assert rounds(tmp_path)["standard/fedavg/seed-0"] == [1]


def test_two_commands_started_together_share_the_runs(tiny_tree, tmp_path):
    run_files = [tmp_path / "one.toml", tmp_path / "two.toml"]
    for path in run_files:
        path.write_text(tomli_w.dumps(tiny_tree))
    command = [sys.executable, "-m", "fedexperts", "compare", *run_files, "--methods", "fedavg,local", "--seeds", "2", "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen([*command, "--out", tmp_path / "out"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for _ in range(2)
    ]
    said = [process.communicate()[0].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    logs = rounds(tmp_path / "out")
    assert len(logs) == 2 * 2 * 2
    assert set(map(tuple, logs.values())) == {(1, 2, 3)}  # each round once: no two processes did the same run


RUNS = ("run", "fedavg/seed-0", "standard/fedavg/seed-0", "more/standard/fedavg/seed-0")
"""Where runs lie below a folder, by their depth."""


def put(out, *paths):
    for path in paths:
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_text("{}")


@pytest.mark.parametrize("there", RUNS)
@pytest.mark.parametrize(("number", "own"), [(1, RUNS[1]), (2, RUNS[2])])
def test_a_comparison_is_not_put_among_runs_of_another_form(tmp_path, there, number, own):
    put(tmp_path, f"{there}/resolved.json")
    if there == own:
        sweep.require_room(tmp_path, number)
    else:
        with pytest.raises(BadRun, match=rf"holds the run {there}, which no comparison over .* run files? wrote"):
            sweep.require_room(tmp_path, number)


@pytest.mark.parametrize(("there", "said"), [("resolved.json", "holds a single run"), ("report.md", "would write over it")])
def test_a_comparison_overwrites_no_single_run_and_no_report_but_its_own(settings, tmp_path, there, said):
    put(tmp_path, there)
    with pytest.raises(BadRun, match=said):
        compare(settings, read_variants("local"), 1, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [there]


def test_a_comparison_is_not_put_into_a_file(settings, tmp_path):
    put(tmp_path, "out")
    with pytest.raises(BadRun, match="out is a file; give a folder"):
        compare(settings, read_variants("local"), 1, tmp_path / "out")


@pytest.mark.parametrize("number", [1, 2])
def test_a_comparison_is_resumed_beside_its_reports_and_other_files(settings, tmp_path, number):
    chosen = dict(list(settings.items())[:number])
    put(tmp_path, "notes.txt", ".DS_Store", "local/.DS_Store")
    begun = compare(chosen, read_variants("local"), 1, tmp_path)
    put(tmp_path, "report.html", "png/quality.png", "mine.csv", "mine.md", "local/report.html", "standard/report.html")
    again = compare(chosen, read_variants("local,fedavg"), 1, tmp_path)
    assert set(begun.folders) < set(again.folders)
    assert set(rounds(tmp_path)) == {path.relative_to(tmp_path).as_posix() for path in again.folders}
    assert (len(again.folders), again.failed, again.left) == (2 * number, {}, ())


def test_runs_of_a_comparison_share_cached_parts_and_give_the_bits_of_single_runs(settings, tmp_path, monkeypatch):
    made = []
    for name in ("load_base", "load_pool", "make_clients", "footprint"):
        real = getattr(setup, name)
        monkeypatch.setattr(
            setup, name, lambda *given, real=real, name=name, **options: made.append(name) or real(*given, **options)
        )
    chosen = read_variants("fedavg,fedmoe,half=scaffold:experts_per_layer=4,centralized")
    compared = compare(settings, chosen, 2, tmp_path / "together")
    assert len(compared.folders) == 16
    assert sorted(made) == ["footprint", "load_base", "load_pool", "make_clients", "make_clients"]  # clients: of each seed
    for folder in compared.folders[:4]:
        config = checked(RunConfig, json.loads((folder / "resolved.json").read_text()))
        alone = run(config, tmp_path / "alone" / folder.parent.name)
        assert results(alone) == results(folder)


def results(folder):
    """What a run came to: the bytes of its weights and of what its clients keep, its evaluations and who has which examples."""
    files = [*folder.rglob("*.safetensors"), folder / "evals.jsonl", folder / "partition.json"]
    contents = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    assert any(name.startswith("checkpoint/") for name in contents)
    return contents


def test_a_repeated_comparison_leaves_finished_runs_unchanged_and_detects_changed_data(tiny_tree, tmp_path):
    source = tmp_path / "mine.jsonl"
    rows = [{"prompt": f"double {number}", "response": str(2 * number)} for number in range(40)]
    source.write_text("\n".join(map(json.dumps, rows)))
    data = {**tiny_tree["data"], "sources": [str(source)], "partition": "iid", "limit": None}
    chosen = {"mine": checked(RunConfig, {**tiny_tree, "data": data, "federation": {"rounds": 1}})}
    out = tmp_path / "out"
    compare(chosen, read_variants("fedavg"), 1, out)
    before = results(out / "fedavg/seed-0")
    assert compare(chosen, read_variants("fedavg"), 1, out).failed == {}
    assert results(out / "fedavg/seed-0") == before
    source.write_text("\n".join(map(json.dumps, rows[:-1])))
    with pytest.raises(BadRun, match="the data changed"):
        compare(chosen, read_variants("fedavg"), 1, out)


def test_what_a_comparison_returns_shows_as_its_table_and_has_its_results(settings, tmp_path):
    compared = compare({"standard": settings["standard"]}, read_variants("fedavg,local"), 1, tmp_path / "out")
    text, html = str(compared), compared._repr_html_()
    assert repr(compared) == text and all(name in part for name in ("fedavg", "local") for part in (text, html))
    assert html.count("<tr>") >= 3 and "2 runs" in html
    assert set(compared.results.runs.method) == {"fedavg", "local"}
    folder = tmp_path / "<none>"
    failed = Compared((folder,), (), {folder: "no memory"}, ("fedavg trains all",))
    assert str(failed) == f"fedavg trains all\n{folder} failed: no memory"
    assert failed._repr_html_() == "<p>fedavg trains all</p>" + f"<p>{tmp_path}/&lt;none&gt; failed: no memory</p>"
