"""Reports warn of clients that were assigned experts and sent none, in runs of older versions too."""

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from fedexperts import report
from fedexperts.report import empty_updates
from fedexperts.report.empty_updates import EmptyUpdates
from fedexperts.report.read import ModelPlan, Plan, Round, RunResults

from .fake import write_run

ALL, SOME, NONE = {"a": (0, 1), "b": (0, 1)}, {"a": (1,), "b": ()}, {"a": (), "b": ()}


def run(*rounds: Round, seed: int = 0) -> RunResults:
    return RunResults(Path("results"), Plan("selective", seed, ModelPlan("tiny")), rounds)


def silence(folder: Path, client: str) -> Path:
    """The run in `folder` as if `client` had sent no expert in any round."""
    path = folder / "rounds.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in (line for line in lines if line["task"] == "train" and client in line["holds"]):
        line["sends"] = {client: {block: [] for block in line["holds"][client]}}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def terminal(folder: Path) -> str:
    console = Console(width=1000, record=True, file=StringIO())
    console.print(report.table([folder], width=1000))
    return console.export_text()


def test_an_update_is_empty_if_its_client_was_assigned_experts_and_sent_none():
    rounds = (
        Round(0, "count", holds={"x": ALL}, sends={"x": NONE}),  # a setup task
        Round(1, holds={"x": ALL, "y": ALL}, sends={"x": NONE, "y": SOME}),
        Round(2, holds={"x": ALL, "y": ALL, "z": NONE}, sends={"x": NONE, "y": NONE, "z": NONE}, failed={"y": "killed"}),
        Round(3, holds={"x": ALL, "y": ALL}),
    )
    assert empty_updates.count([run(*rounds)]) == EmptyUpdates(updates=2, of_updates=5, clients=1, rounds=2, of_rounds=3)


def test_clients_are_counted_by_name_and_rounds_by_run():
    seeds = [run(Round(1, holds={"x": ALL}, sends={"x": NONE}), seed=seed) for seed in (0, 1)]
    assert empty_updates.count(seeds) == EmptyUpdates(updates=2, of_updates=2, clients=1, rounds=2, of_rounds=2)


def test_one_sentence_names_every_method_with_empty_updates():
    some = run(Round(1, holds={"x": ALL, "y": ALL, "z": ALL}, sends={"x": NONE}))
    every = run(Round(1, holds={"x": ALL, "y": ALL}, sends={"x": NONE, "y": NONE}))
    silent = run(Round(1, holds={"x": ALL}))
    sentence = empty_updates.warning({"some": [some], "every": [every], "none": [silent]})
    assert sentence == (
        "Warning: clients sent no expert at all, so their training of experts did not reach the server: some in 1 of 3 updates "
        "(33.3 %), from 1 client in 1 of 1 rounds; every in 2 of 2 updates (100 %), from 2 clients in 1 of 1 rounds."
    )
    assert empty_updates.warning({"none": [silent], "begun": [run()]}) == ""


def test_the_table_in_the_terminal_the_page_and_the_markdown_of_a_run_warn(tmp_path: Path):
    folder = silence(write_run(tmp_path / "run", "fedavg", rounds=4), "c00")
    result = report.write([folder], tmp_path / "r.html", markdown=tmp_path / "r.md")
    (sentence,) = result.warnings
    assert "fedavg in " in sentence and " of 16 updates (" in sentence and ", from 1 client in " in sentence
    assert f'<p class="warning">{sentence}</p>' in (tmp_path / "r.html").read_text()
    assert sentence in (tmp_path / "r.md").read_text()
    assert sentence in " ".join(terminal(folder).split())


@pytest.mark.parametrize("settings", [("",), ("one", "two")])
def test_reports_of_several_methods_and_settings_name_the_method_that_sent_nothing(tmp_path: Path, settings: tuple[str, ...]):
    for setting in settings:
        for method in ("fedavg", "fedmoe"):
            write_run(tmp_path / "runs" / setting / method, method, rounds=4, setting=setting)
    silence(tmp_path / "runs" / settings[-1] / "fedmoe", "c01")
    result = report.write([tmp_path / "runs"], tmp_path / "r.html", markdown=tmp_path / "r.md")
    (sentence,) = result.warnings
    assert f"the server: {settings[-1]}{': ' if settings[-1] else ''}fedmoe in " in sentence
    assert f'<p class="warning">{sentence}</p>' in (tmp_path / "r.html").read_text()
    assert sentence in (tmp_path / "r.md").read_text()
    assert sentence in " ".join(terminal(tmp_path / "runs").split())


def test_a_run_in_which_all_clients_sent_experts_has_no_warning(tmp_path: Path):
    folder = write_run(tmp_path / "run", rounds=4)
    assert report.write([folder], tmp_path / "r.html").warnings == ()
    assert 'class="warning"' not in (tmp_path / "r.html").read_text()
    assert "Warning" not in terminal(folder)


def test_the_name_of_a_method_is_no_markup_in_the_warning(tmp_path: Path):
    folder = silence(write_run(tmp_path / "run", "<b>*[red]*</b>", rounds=4), "c00")
    report.write([folder], tmp_path / "r.html", markdown=tmp_path / "r.md")
    assert "the server: &lt;b&gt;*[red]*&lt;/b&gt; in" in (tmp_path / "r.html").read_text()
    assert r"the server: &lt;b&gt;\*\[red\]\*&lt;/b&gt; in" in (tmp_path / "r.md").read_text()
    assert "the server: <b>*[red]*</b> in" in " ".join(terminal(folder).split())
