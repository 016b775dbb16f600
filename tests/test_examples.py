"""The examples run as they stand, and do what their first lines say."""

import csv
import re
import runpy
import statistics
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
from transformers import AutoModelForCausalLM

from fedexperts import METHODS, api
from fedexperts.report.read import read

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Runs an example in an empty folder and gives its variables; methods it enters are gone afterwards."""
    monkeypatch.chdir(tmp_path)
    before = dict(METHODS)
    yield lambda name: runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    METHODS.clear()
    METHODS.update(before)


def quality(run):
    """Overall, at each evaluation."""
    return [line.value for line in run.evaluations_of[None, None]]


def test_every_example_is_executed_here():
    executed = set(re.findall(r'execute\("(\w+\.py)"\)', Path(__file__).read_text()))
    assert executed == {path.name for path in EXAMPLES.glob("*.py")}
    assert len(executed) == 6


def test_a_method_with_a_model_of_its_own_is_compared_and_its_clients_models_are_taken_home(execute):
    ran = execute("flame.py")
    assert len(ran["compared"].folders) == 2 and not ran["compared"].failed
    assert sorted(path.name for path in (ran["out"] / "models").iterdir()) == ["c01", "c02"]
    source = (EXAMPLES / "flame.py").read_text()
    assert source.count("\n") < 110


def test_a_method_of_ones_own_is_compared_with_ours(execute):
    compared = execute("own_method.py")["compared"]
    assert not compared.failed and not compared.left
    half, quarter, fedmoe, fedavg = map(read, compared.folders)
    assert [run.plan.method for run in (half, quarter, fedmoe, fedavg)] == [
        "rotating",
        "rotating:share=0.25",
        "fedmoe:profile_rounds=1",
        "fedavg",
    ]
    sent = [sum(row.bytes_up for row in run.ledger if row.task == "train") for run in (quarter, half, fedavg)]
    assert sent == sorted(sent) and len(set(sent)) == 3
    for run, number in ((half, 8), (quarter, 4), (fedavg, 16)):
        assert {len(ids) for round in run.rounds for held in round.holds.values() for ids in held.values()} == {number}
    parts = [tuple(tuple(ids) for ids in round.holds["c01"].values()) for round in half.rounds]
    assert len(set(parts)) == len(parts) == 4  # another part in each round
    assert len({(run.folder / "partition.json").read_text() for run in (half, fedmoe, fedavg)}) == 1
    assert Path("results/own-method/report.html").stat().st_size > 0


def test_data_of_ones_own_are_divided_and_learnt(execute):
    variables = execute("own_data.py")
    rows = list(csv.DictReader(Path("results/own-data/messages.csv").read_text().splitlines()))
    assert set(rows[0]) == {"message", "department"}
    splits = list(variables["prepared"].clients.values())
    department = {row["message"]: row["department"] for row in rows}
    mine = Counter(example.prompt for split in splits for example in (*split.train, *split.validation))
    assert max(mine.values()) == 1  # nobody shares what he trains on, and nobody is tested with it
    assert not mine.keys() & {example.prompt for split in splits for example in split.test}
    for example in splits[0].train:
        assert department[example.prompt.removesuffix("\nAnswer:\n")] == example.response
    shares = [max(Counter(e.response for e in split.train).values()) / len(split.train) for split in splits]
    assert max(shares) > 0.5  # lopsided: four departments would be a quarter each
    before, *_, after = quality(read(variables["folder"]))
    assert before < 0.25 + 0.1 < after  # four departments


def test_a_model_of_ones_own_is_found_trained_and_given_back(execute):
    variables = execute("own_model.py")
    run = read(variables["folder"])
    assert [(block.num_experts, block.top_k) for block in run.plan.model.blocks.values()] == [(8, 2)] * 2
    before, *_, after = quality(run)
    assert before == 0 and after > 0.5
    given = AutoModelForCausalLM.from_pretrained(variables["taken"])
    assert type(given) is type(variables["model"]) and type(given).__name__ == "MixtralForCausalLM"
    assert not list(variables["taken"].glob("*.py"))  # nothing of ours
    assert min(row.experts for row in run.ledger if row.task == "train") < 16  # clients hold a part of it


def test_the_walk_goes_from_a_run_to_an_answer_and_can_be_walked_again(execute):
    variables = execute("walkthrough.py")
    assert variables["answer"] == "n"
    assert variables["own"].value > 0.5
    whole = sum(block.num_experts for block in read(variables["folder"]).plan.model.blocks.values())
    assert 0 < variables["trained"].experts.max() < whole
    assert variables["model"].num_parameters() < 3_158_112  # those of tiny
    lines = (variables["folder"] / "evals.jsonl").read_text()
    again = execute("walkthrough.py")
    assert (again["folder"] / "evals.jsonl").read_text() == lines and again["answer"] == "n"


def test_a_table_and_a_figure_are_made_of_a_results_folder_alone(execute, tiny_tree):
    compared = api.compare(tiny_tree, ["fedavg", "random_moe:experts_per_layer=3"], seeds=2, out="results/quickstart")
    assert not compared.failed
    execute("paper.py")
    runs = [read(folder) for folder in compared.folders]
    paper = Path("results/paper")
    head, _, *rows = [line.strip("| ").split(" | ") for line in (paper / "table.md").read_text().splitlines()]
    assert head == ["Method", "Quality (%)", "Sent (MB)"]
    assert [row[0] for row in rows] == ["fedavg", "random_moe:experts_per_layer=3"]
    for method, shown, sent in rows:
        mine = [run for run in runs if run.plan.method == method]
        assert shown == "{:.1f} ± {:.1f}".format(*mean_and_deviation([100 * quality(run)[-1] for run in mine]))
        trained = [[row for row in run.ledger if row.task == "train"] for run in mine]
        megabytes = [sum(row.bytes_down + row.bytes_up for row in some) / 1e6 for some in trained]
        assert sent == "{:.1f} ± {:.1f}".format(*mean_and_deviation(megabytes))
    latex = (paper / "table.tex").read_text()
    assert [latex.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 1, 1]
    assert rows[1][0].replace("_", r"\_") in latex and rows[0][1].replace("±", r"$\pm$") in latex
    figure = ElementTree.parse(paper / "figure.svg").getroot()
    lines = [each.get("points").split() for each in figure if each.tag.endswith("polyline")]
    assert len(lines) == 2 and {len(line) for line in lines} == {3}  # evaluated in rounds 0, 2 and 3
    mean, _ = mean_and_deviation([100 * quality(run)[-1] for run in runs[:1] + runs[2:3]])
    assert lines[0][-1] == f"460.0,{round(340 - 3 * mean, 1)}"


def mean_and_deviation(values):
    return statistics.fmean(values), statistics.stdev(values)


def test_a_comparison_takes_what_a_run_takes():
    run = {"data": {"sources": ["synthetic/last"]}}
    assert api.by_name(run) == {"run": run}
    assert api.by_name("runs/mine.toml") == {"mine": "runs/mine.toml"}
    assert api.by_name({"a": run, "b": "b.toml"}) == {"a": run, "b": "b.toml"}
    settings = api.settings_of(run, ())
    assert api.by_name(settings) == {"run": settings}
