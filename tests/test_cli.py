"""The command, mostly in this process: what it does, and what it says to mistakes."""

import json
import shutil
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest
import tomli_w
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedexperts import cli
from fedexperts.experiment import checkpoint, runner
from fedexperts.io.files import locked
from fedexperts.io.toml import RenamedSetting
from fedexperts.methods.fedavg import FedAvg

ROW = '{"prompt": "a", "response": "b"}'


def write(tree, path):
    path.write_text(tomli_w.dumps(tree))
    return path


@pytest.fixture
def run_file(tiny_tree, tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(tomli_w.dumps(tiny_tree))
    return path


@pytest.fixture(scope="module")
def finished(tiny_tree, tmp_path_factory):
    """The run file and results folder of a run that is done; not to be written."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.toml").write_text(tomli_w.dumps(tiny_tree))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fedexperts", "run", str(folder / "tiny.toml"), "--out", str(folder / "out"), "--quiet"])
        try:
            cli.main()
        except SystemExit as end:
            assert not end.code
    return folder / "tiny.toml", folder / "out"


def refused(called, out):
    """The one sentence of a mistake, after which nothing is there."""
    code, _, said = called
    assert code == 2
    assert said.startswith("fedexperts: ")
    assert said.count("\n") == 1
    assert "Traceback" not in said
    assert not Path(out).exists()
    return said.removeprefix("fedexperts: ").strip()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_version_is_printed_after_the_name(fedexperts):
    assert fedexperts("--version") == (0, f"fedexperts {version('fedexperts')}\n", "")


def test_the_former_name_of_a_setting_is_noted_in_one_plain_line(fedexperts, run_file):
    former = ("training.balance=0.1", "devices.utilisation=0.3", "method.name=fedmoe", "method.neighbours=2")
    code, shown, notes = fedexperts("plan", run_file, "--json", *(part for each in former for part in ("--set", each)))
    assert code == 0 and json.loads(shown)
    assert notes.splitlines() == [
        "note: training.balance is now called training.router_aux_loss_coef; the former name still works",
        "note: devices.utilisation is now called devices.utilization; the former name still works",
        "note: method.neighbours is now called method.neighbors; the former name still works",
    ]


def test_a_note_is_shown_once_and_other_warnings_are_shown_as_ever(capsys):
    with pytest.warns(UserWarning, match="something else"), cli.renamed_settings_as_notes():
        for _ in range(2):
            warnings.warn("a is now called b", RenamedSetting, stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert capsys.readouterr().err == "note: a is now called b\n"


@pytest.mark.parametrize("both", [True, False])
def test_a_server_is_started_either_with_keys_or_without_any(fedexperts, run_file, tmp_path, both):
    options = ("--keys", tmp_path, "--insecure") if both else ()
    called = fedexperts("server", run_file, "--out", tmp_path / "out", "--set", "federation.engine=local", *options)
    assert "of --keys and --insecure given; give --keys" in refused(called, tmp_path / "out")


def test_a_run_leaves_its_settings_plan_logs_checkpoint_and_report(finished):
    _, out = finished
    expected = {"run.toml", "resolved.json", "plan.json", "versions.json", "partition.json", "rounds.jsonl", "evals.jsonl"}
    assert expected | {"ledger.jsonl", "checkpoint", "report.html", "report.md", "report.csv"} <= {p.name for p in out.iterdir()}
    assert [line["round"] for line in lines(out / "rounds.jsonl")] == [1, 2, 3]
    assert sorted({line["round"] for line in lines(out / "evals.jsonl")}) == [0, 2, 3]
    assert not list(out.rglob("*.tmp*")) + list(out.rglob(".*"))


def test_a_folder_in_which_a_process_runs_is_refused_to_another(fedexperts, finished):
    _, out = finished
    with locked(out):
        code, _, said = fedexperts("run", out / "run.toml", "--out", out, "--resume")
    assert (code, said.count("\n")) == (2, 1)
    assert "another process is running" in said


def test_the_ledger_of_a_run_counts_what_the_plan_says_is_sent(finished):
    _, out = finished
    plan, ledger = json.loads((out / "plan.json").read_text()), lines(out / "ledger.jsonl")
    trained = [entry for entry in ledger if entry["task"] == "train"]
    assert len(trained) == 3 * 2
    ids = 3 * 8 * 8  # of each of three blocks, the int64 ids of eight experts
    assert {entry["bytes_down"] for entry in trained} == {plan["full_patch_bytes"] + ids}
    assert all(entry["bytes_up"] >= plan["full_patch_bytes"] + ids for entry in trained)
    assert len([entry for entry in ledger if entry["task"] == "evaluate"]) == 3 * 4


def test_the_run_file_that_is_saved_gives_the_same_run(fedexperts, finished):
    _, out = finished
    before = {path: path.read_bytes() for path in (out / "checkpoint").rglob("*.*")}
    assert fedexperts("run", out / "run.toml", "--out", out, "--resume")[0] == 0
    assert {path: path.read_bytes() for path in (out / "checkpoint").rglob("*.*")} == before


def test_resuming_a_finished_run_does_nothing_and_says_so(fedexperts, finished):
    run_file, out = finished
    logs = {name: (out / name).read_bytes() for name in ("rounds.jsonl", "evals.jsonl", "ledger.jsonl")}
    code, shown, _ = fedexperts("run", run_file, "--out", out, "--resume")
    assert code == 0
    assert "3 of 3 rounds are done already" in shown
    assert {name: (out / name).read_bytes() for name in logs} == logs


def test_a_folder_that_holds_a_run_is_not_written_without_resume(fedexperts, finished):
    run_file, out = finished
    code, _, said = fedexperts("run", run_file, "--out", out)
    assert code == 2
    assert "holds a run already; continue it with --resume" in said


def test_resuming_with_a_changed_run_file_names_the_settings_that_changed(fedexperts, finished):
    run_file, out = finished
    changes = ("--set", "training.lr=0.5", "--set", "federation.clients_per_round=1", "--set", "federation.workers=2")
    code, _, said = fedexperts("run", run_file, "--out", out, "--resume", *changes)
    assert code == 2
    assert "other settings: federation.clients_per_round, training.lr changed" in said
    assert "workers" not in said


def test_resuming_with_other_data_under_the_same_name_is_refused(fedexperts, run_file, tmp_path):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    pairs = [json.dumps({"prompt": f"say {number}", "response": "a"}) for number in range(41)]
    rows.write_text("\n".join(pairs[:40]))
    settings = (f"data.sources=['{rows}']", "data.limit=30", "federation.rounds=1")
    command = ("run", run_file, *(word for setting in settings for word in ("--set", setting)), "--out", out, "--quiet")
    assert fedexperts(*command)[0] == 0
    assert fedexperts(*command, "--resume")[0] == 0
    rows.write_text("\n".join(pairs))
    code, _, said = fedexperts(*command, "--resume")
    assert code == 2
    assert "the data changed" in said
    assert "model_hash" not in said


def test_a_comparison_is_not_put_into_the_folder_of_a_run(fedexperts, finished):
    run_file, out = finished
    code, _, said = fedexperts("compare", run_file, "--methods", "fedavg", "--out", out)
    assert code == 2
    assert "holds a single run" in said


def test_a_folder_with_files_of_others_is_left_alone(fedexperts, run_file, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    for options in ([], ["--resume"]):
        code, _, said = fedexperts("run", run_file, "--out", out, *options)
        assert code == 2
        assert "is not empty and holds no run of ours" in said
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


def test_a_folder_that_is_a_file_is_left_alone(fedexperts, run_file, tmp_path):
    (tmp_path / "out").write_text("precious")
    assert fedexperts("run", run_file, "--out", tmp_path / "out")[0] == 2
    assert (tmp_path / "out").read_text() == "precious"


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("training.learning_rate=1", ["training.learning_rate", "did you mean training.lr?"]),
        ("method.name=fedmoee", ["'fedmoee'", "did you mean fedmoe?"]),
        ("method.patience=1", ["method.patience", "fedavg"]),
        ("training.lr", ["'training.lr' is not of the form", "a.b=c"]),
        ("devices.memory_gb=0.00001", ["client c01 has 0.0 MB", "takes", "MB to train", "give it more memory"]),
        ("devices.memory_gb=[1, 1]", ["2 numbers for 4 clients"]),
        ("data.clients=100", ["50 clients", "there are 12", "use at most 3 clients"]),
        ("model.name=/no/such/folder", ["/no/such/folder", "does not exist"]),
        ('data.sources=["none.jsonl"]', ["none.jsonl"]),
        ('data.sources=["ag_nwes"]', ["ag_nwes", "did you mean ag_news?"]),
        ('data.sources=["synthetic/dubble"]', ["dubble", "did you mean double?"]),
    ],
)
def test_a_mistake_gets_one_sentence_and_leaves_nothing(fedexperts, run_file, tmp_path, setting, parts):
    method = ("--set", "method.name=random_moe") if "memory" in setting else ()
    said = refused(fedexperts("run", run_file, "--set", setting, *method, "--out", tmp_path / "out"), tmp_path / "out")
    assert [part for part in parts if part not in said] == []


@pytest.mark.parametrize("method", ["fedmoe", "random_moe", "seer_moe"])
def test_a_client_too_small_for_any_sub_model_is_named_before_anything_runs(fedexperts, run_file, tmp_path, method):
    settings = ("--set", "devices.memory_gb=[1, 1, 0.0001, 1]", "--set", f"method.name={method}")
    said = refused(fedexperts("run", run_file, *settings, "--out", tmp_path / "out"), tmp_path / "out")
    assert "client c03 has 0.1 MB" in said


def test_a_run_file_that_is_not_there_or_no_toml_gets_one_sentence(fedexperts, tmp_path):
    out = tmp_path / "out"
    assert "cannot be read" in refused(fedexperts("run", tmp_path / "none.toml", "--out", out), out)
    (tmp_path / "bad.toml").write_text("seed = = 3\n")
    assert "bad.toml is not TOML" in refused(fedexperts("run", tmp_path / "bad.toml", "--out", out), out)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", "rows.jsonl"),
        ("\n\n", "rows.jsonl"),
        (f'{ROW}\n{{"prompt": "a", "resp\n', "rows.jsonl, line 2"),
        (f'{ROW}\n{ROW}\n{{"prompt": "a"}}\n{ROW}\n', "rows.jsonl, line 3"),
        (f"{ROW}\n[1]\n", "rows.jsonl, line 2"),
    ],
)
def test_a_data_file_that_is_empty_or_broken_is_named_with_its_line(fedexperts, run_file, tmp_path, text, place):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    rows.write_text(text)
    said = refused(fedexperts("run", run_file, "--set", f"data.sources=['{rows}']", "--out", out), out)
    assert place in said


def test_a_model_without_experts_is_refused(fedexperts, run_file, tiny_folder, tmp_path):
    folder = tmp_path / "dense"
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 300}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
    for file in tiny_folder.glob("token*"):
        shutil.copy(file, folder)
    said = refused(fedexperts("run", run_file, "--set", f"model.name={folder}", "--out", tmp_path / "out"), tmp_path / "out")
    assert "experts" in said.lower()


def test_a_model_whose_weights_are_broken_is_refused(fedexperts, run_file, tiny_folder, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(tiny_folder, folder)
    (folder / "model.safetensors").write_bytes(b"nonsense")
    said = refused(fedexperts("run", run_file, "--set", f"model.name={folder}", "--out", tmp_path / "out"), tmp_path / "out")
    assert "cannot be loaded" in said


def test_an_interrupt_ends_with_130_and_says_how_to_go_on(fedexperts, run_file, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "rounds_after", interrupted)
    code, _, said = fedexperts("run", run_file, "--out", tmp_path / "out")
    assert code == 130
    assert said.strip().startswith("fedexperts: interrupted; ")
    assert "--resume" in said


def poisoned(names, round=2):
    """FedAvg's train, but the named clients send NaN in `round`."""

    def train(self, job, context):
        update = FedAvg.honest(self, job, context)
        if job.client in names and job.round == round:
            next(iter(update.patch.tensors.values())).fill_(float("nan"))
        return update

    return train


def with_poison(monkeypatch, names):
    monkeypatch.setattr(FedAvg, "honest", FedAvg.train, raising=False)
    monkeypatch.setattr(FedAvg, "train", poisoned(names))


EVERYONE = ("--set", "federation.clients_per_round=4")


def test_a_client_that_sends_nan_is_left_out_named_and_counted_and_the_run_goes_on(fedexperts, run_file, tmp_path, monkeypatch):
    with_poison(monkeypatch, ["c02"])
    out = tmp_path / "out"
    code, shown, _ = fedexperts("run", run_file, *EVERYONE, "--out", out)
    assert code == 0
    assert "c02 failed in train and is left out: its update has NaN or infinity in" in " ".join(shown.split())
    failed = [entry for entry in lines(out / "ledger.jsonl") if entry["failed"]]
    assert [(entry["round"], entry["client"]) for entry in failed] == [(2, "c02")]
    assert failed[0]["bytes_up"] > 0
    assert [list(line["failed"]) for line in lines(out / "rounds.jsonl")] == [[], ["c02"], []]
    weights = checkpoint.latest(out) / "weights.safetensors"
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint.load_file(weights).values())


def test_a_round_in_which_all_clients_fail_ends_the_run_and_what_came_before_is_resumed(
    fedexperts, run_file, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    with monkeypatch.context() as sick:
        with_poison(sick, ["c01", "c02", "c03", "c04"])
        code, _, said = fedexperts("run", run_file, *EVERYONE, "--out", out, "--quiet")
    assert code == 2
    assert said.count("\n") == 1
    assert "round 2: all 4 clients failed, c0" in said
    assert "--resume" in said
    assert [line["round"] for line in lines(out / "rounds.jsonl")] == [1]
    assert fedexperts("run", run_file, *EVERYONE, "--out", out, "--resume", "--quiet")[0] == 0
    assert [line["round"] for line in lines(out / "rounds.jsonl")] == [1, 2, 3]


def test_a_comparison_runs_what_is_not_done_yet(fedexperts, run_file, tmp_path):
    out = tmp_path / "out"
    settings = ("--set", "federation.rounds=1", "--out", out, "--quiet")
    assert fedexperts("compare", run_file, "--methods", "fedavg", *settings)[0] == 0
    done = (out / "fedavg" / "seed-0" / "rounds.jsonl").read_bytes()
    code, shown, _ = fedexperts("compare", run_file, "--methods", "fedavg,random_moe:experts_per_layer=3", *settings)
    assert code == 0
    assert "random_moe" in shown
    assert (out / "fedavg" / "seed-0" / "rounds.jsonl").read_bytes() == done
    (line,) = lines(out / "random_moe,experts_per_layer=3" / "seed-0" / "rounds.jsonl")
    assert {len(ids) for held in line["holds"].values() for ids in held.values()} == {3}


def test_a_comparison_checks_every_method_before_the_first_runs(fedexperts, run_file, tmp_path):
    called = fedexperts("compare", run_file, "--methods", "fedavg,fedmoe:patient=3", "--out", tmp_path / "out")
    assert "did you mean patience?" in refused(called, tmp_path / "out")


def test_a_run_that_fails_does_not_stop_a_comparison_and_is_named_at_its_end(fedexperts, run_file, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with_poison(monkeypatch, ["c01", "c02", "c03", "c04"])
    code, shown, said = fedexperts("compare", run_file, "--methods", "fedavg,local", *EVERYONE, "--out", out, "--quiet")
    assert code == 1
    assert said.count("\n") == 1
    assert f"{out / 'fedavg' / 'seed-0'} failed: round 2: all 4 clients failed" in said
    assert [line["round"] for line in lines(out / "local" / "seed-0" / "rounds.jsonl")] == [1, 2, 3]
    assert "report.html" in shown


def test_a_comparison_says_which_runs_it_skips_since_another_process_executes_them(fedexperts, run_file, tmp_path):
    out = tmp_path / "out"
    with locked(out / "local" / "seed-0"):
        code, shown, _ = fedexperts("compare", run_file, "--methods", "local", "--out", out, "--quiet")
        assert (code, f"skipped, since another process is executing it: {out / 'local' / 'seed-0'}" in shown) == (0, True)
        assert not (out / "report.html").exists()  # there is nothing yet to report
        methods = ("--methods", "local,fedavg")
        code, shown, _ = fedexperts("compare", run_file, *methods, "--set", "federation.rounds=1", "--out", out, "--quiet")
    assert (code, "another process is executing it" in shown, "report.html" in shown) == (0, True, True)


def test_several_run_files_need_a_results_folder(fedexperts, run_file, tmp_path):
    other = tmp_path / "other.toml"
    shutil.copy(run_file, other)
    said = refused(fedexperts("compare", run_file, other, "--methods", "local"), tmp_path / "out")
    assert "give one with --out" in said


def test_clients_are_scored_on_their_validation_examples_where_that_is_asked(fedexperts, run_file, tmp_path):
    out = tmp_path / "out"
    settings = ("--set", "evaluation.split=validation", "--set", "federation.rounds=1", "--set", "data.validation=0.5")
    assert fedexperts("run", run_file, *settings, "--out", out, "--quiet")[0] == 0
    counts = {client["name"]: client["validation"] for client in json.loads((out / "plan.json").read_text())["clients"]}
    scored = {line["client"]: line["examples"] for line in lines(out / "evals.jsonl") if line["client"]}
    assert scored == counts
    assert set(counts.values()) != {2}  # the number of test examples


def test_a_plan_is_printed_and_nothing_is_written(fedexperts, run_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, shown, _ = fedexperts("plan", run_file, "--json")
    assert code == 0
    assert [client["name"] for client in json.loads(shown)["clients"]] == ["c01", "c02", "c03", "c04"]
    assert fedexperts("plan", run_file)[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.toml"]


def test_a_comparison_is_not_put_among_other_files(fedexperts, tiny_tree, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/report.md").write_text("my thesis")
    run_file = write(tiny_tree, tmp_path / "run.toml")
    code, _, said = fedexperts("compare", run_file, "--methods", "local", "--out", tmp_path / "mine")
    assert (code, said.count("\n"), "report.md" in said) == (2, 1, True)
    assert (tmp_path / "mine/report.md").read_text() == "my thesis"


def test_a_comparison_that_cannot_be_finished_does_not_begin(fedexperts, tiny_tree, tmp_path):
    run_file = write({**tiny_tree, "devices": {"memory_gb": 1e-6}}, tmp_path / "run.toml")
    code, _, said = fedexperts("compare", run_file, "--methods", "local,fedmoe", "--out", tmp_path / "out")
    assert (code, said.count("\n"), "memory" in said) == (2, 1, True)
    assert fedexperts("compare", run_file, "--methods", " ,", "--out", tmp_path / "out")[0] == 2
    assert not (tmp_path / "out").exists()


def test_square_brackets_in_a_tasks_name_are_text(fedexperts, tiny_tree, tmp_path):
    (tmp_path / "data.csv").write_text("prompt,response\n" + "".join(f"q{n},a{n}\n" for n in range(60)))
    source = {"name": str(tmp_path / "data.csv"), "task": "[/x]"}
    tree = {**tiny_tree, "data": {**tiny_tree["data"], "sources": [source], "limit": 24}}
    run_file = write(tree, tmp_path / "run.toml")
    code, shown, _ = fedexperts("plan", run_file)
    assert (code, "[/x]" in shown) == (0, True)
    code, shown, _ = fedexperts("run", run_file, "--out", tmp_path / "out", "--set", "federation.rounds=1")
    assert (code, "[/x]" in shown) == (0, True)


def test_plan_says_which_labels_no_answer_can_reach(fedexperts, tiny_tree, tmp_path):
    rows = [f"text {n},{'a rather long label' if n % 2 else 'b'}" for n in range(60)]
    (tmp_path / "data.csv").write_text("\n".join(["text,label", *rows]))
    data = {**tiny_tree["data"], "sources": [str(tmp_path / "data.csv")], "limit": 24}
    planned = fedexperts("plan", write({**tiny_tree, "data": data}, tmp_path / "run.toml"), "--json")[1]
    (warning,) = [each for each in json.loads(planned)["warnings"] if "labels" in each]
    assert warning.startswith("1 of the 2 labels of data are longer than evaluation.generate_tokens = 2")
