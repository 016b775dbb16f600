import base64
import json
import re
from hashlib import sha256
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from fedexperts import report
from fedexperts.errors import BadRun
from fedexperts.report import comparison_figures, page, read

from .fake import write_comparison, write_run

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


class Elements(HTMLParser):
    """All elements of a page with their attributes, and the text of those that are scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.in_script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.in_script = tag == "script"
        if self.in_script:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.in_script = False

    def handle_data(self, data: str) -> None:
        if self.in_script:
            self.scripts[-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(folder: Path, out: Path) -> str:
    report.write([folder], html=out)
    return out.read_text(encoding="utf-8")


def policy_of(text: str) -> str:
    metas = Elements(text).all("meta")
    return next(meta["content"] or "" for meta in metas if meta.get("http-equiv") == "Content-Security-Policy")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("single")
    return page_of(write_run(folder / "run", rounds=4, planned_rounds=10), folder / "report.html")


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("several")
    return page_of(write_comparison(folder / "runs", seeds=2), folder / "report.html")


@pytest.mark.parametrize("which", ["single", "several"])
def test_a_page_loads_nothing_from_anywhere(which: str, request: pytest.FixtureRequest):
    elements = Elements(request.getfixturevalue(which))
    assert [script.get("src") for script in elements.all("script")] == [None, None, page.LIBRARY, None]  # figures, maps, page.js
    assert elements.all("link") == elements.all("iframe") == elements.all("img") == []
    assert all((link["href"] or "").startswith("#") for link in elements.all("a"))


def test_only_the_scripts_of_the_page_may_run(single: str):
    elements, policy = Elements(single), policy_of(single)
    assert f"default-src 'none'; script-src 'self' file: {' '.join(hashes_of(elements, 1))};" in policy
    assert "connect-src" not in policy


def hashes_of(elements: Elements, number: int) -> list[str]:
    """Those of the `number` scripts within the page that are code."""
    scripts = zip(elements.scripts, elements.all("script"), strict=True)
    own = [script for script, attributes in scripts if not attributes.keys() & {"type", "src"}]
    assert len(own) == number
    return [f"'sha256-{base64.b64encode(sha256(script.encode()).digest()).decode()}'" for script in own]


def test_a_page_is_small_since_what_draws_lies_beside_it_once(several: str, single: str, tmp_path: Path):
    assert max(len(single.encode()), len(several.encode())) < 1_500_000
    run = write_run(tmp_path / "run", rounds=2)
    first = report.write([run], html=tmp_path / "out" / "one.html").written
    assert first == (tmp_path / "out" / "one.html", tmp_path / "out" / page.LIBRARY)
    report.write([run], html=tmp_path / "out" / "two.html")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["one.html", page.LIBRARY, "two.html"]
    assert f'id="no-drawings" hidden>No figure can be drawn without {page.LIBRARY}' in (tmp_path / "out" / "one.html").read_text()


def test_a_page_in_a_single_file_allows_no_script_but_its_own(tmp_path: Path):
    written = report.write([write_run(tmp_path / "run", rounds=2)], html=tmp_path / "r.html", single_file=True)
    text = (tmp_path / "r.html").read_text()
    assert written.written == (tmp_path / "r.html",)
    assert f"script-src {' '.join(hashes_of(Elements(text), 2))};" in policy_of(text)
    assert page.LIBRARY not in text


def test_plotly_offers_no_upload(single: str):
    assert 'showSendToCloud: false, plotlyServerURL: ""' in single
    assert "form-action 'none'" in policy_of(single)


@pytest.mark.parametrize("which", ["single", "several"])
def test_every_figure_of_the_page_has_its_place(which: str, request: pytest.FixtureRequest):
    elements = Elements(request.getfixturevalue(which))
    drawn = [figure["id"] for figure in json.loads(elements.scripts[0])]
    places = [element["id"] for element in elements.all("div") if element.get("class") == "drawing"]
    assert len(drawn) == len(set(drawn)) >= 6
    assert sorted(places) == sorted([*drawn, "map"])


@pytest.mark.parametrize("which", ["single", "several"])
def test_every_table_has_a_caption_and_heads_with_a_scope(which: str, request: pytest.FixtureRequest):
    elements = Elements(request.getfixturevalue(which))
    tables = [table for table in elements.all("table") if table.get("id") != "map-numbers"]  # page.js fills it
    assert len(tables) == len(elements.all("caption")) >= 10
    assert {head.get("scope") for head in elements.all("th")} == {"col", "row"}


def test_every_link_within_the_page_has_its_target(single: str):
    elements = Elements(single)
    targets = {element.get("id") for element in elements.all("section")}
    links = [(link["href"] or "").removeprefix("#") for link in elements.all("a")]
    assert links == [
        "quality",
        "quality-across-clients",
        "training",
        "experts",
        "bytes-and-memory",
        "failures",
        "data",
        "clients",
        "run-file",
    ]
    assert set(links) <= targets


def test_a_run_in_progress_says_how_far_it_is(single: str):
    assert "4 of 10 done so far" in single


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path):
    folder = write_run(tmp_path / "run")
    for name in ("rounds.jsonl", "ledger.jsonl", "evals.jsonl", "run.toml"):
        (folder / name).unlink()
    assert "<h1>fedmoe on tiny</h1>" in page_of(folder, tmp_path / "report.html")


def test_a_comparison_of_finished_and_just_begun_runs_has_a_page(tmp_path: Path):
    runs = write_comparison(tmp_path / "runs", methods=("fedmoe", "fedavg"), seeds=2)
    for path in [*runs.glob("fedavg/*/*.jsonl"), *runs.glob("fedmoe/seed-1/*.jsonl")]:
        path.write_text("")
    text = page_of(runs, tmp_path / "report.html")
    assert "fedavg, seed 0 (0 of 12 rounds); fedavg, seed 1 (0 of 12 rounds); fedmoe, seed 1 (0 of 12 rounds)" in text


def test_text_from_the_files_is_text_on_the_page(tmp_path: Path):
    names = [EVIL, "</script><b>", "c"]
    folder = write_run(tmp_path / "run", method=EVIL, rounds=6, clients=names)
    text = page_of(folder, tmp_path / "report.html")
    elements = Elements(text)
    assert len(elements.all("script")) == 4
    assert elements.all("img") == elements.all("b") == []
    assert not any(name.startswith("on") for _, attributes in elements.elements for name in attributes)
    clients = json.loads(elements.scripts[1])[0]["clients"]
    assert {client["name"] for client in clients} == set(names)


def test_the_same_runs_give_the_same_page(tmp_path: Path):
    folder = write_run(tmp_path / "run", rounds=2)
    assert page_of(folder, tmp_path / "one.html") == page_of(folder, tmp_path / "two.html")


def test_a_comparison_writes_all_it_was_asked_for(tmp_path: Path):
    runs = write_comparison(tmp_path / "runs", seeds=2)
    result = report.write([runs], tmp_path / "out/r.html", tmp_path / "out/r.csv", tmp_path / "out/r.md")
    names = ("r.html", page.LIBRARY, "r.csv", "r.md")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)
    assert result.written == tuple(tmp_path / "out" / name for name in names)
    assert [table.title for table in result.tables] == [
        "Results",
        "Comparison",
        "Overall quality: told apart or not",
        "Quality of each task against fedavg: told apart or not",
        "Difference from fedavg",
        "Rounds to 90 % and 99 % of the target",
        "Sent (MB) to 90 % and 99 % of the target",
        "Cost to the target relative to fedavg",
    ]
    assert re.findall("^### (.*)$", (tmp_path / "out/r.md").read_text(), re.M) == [table.title for table in result.tables]


def test_nothing_is_written_when_a_folder_holds_no_run(tmp_path: Path):
    write_run(tmp_path / "run", rounds=1)
    with pytest.raises(BadRun):
        report.write([tmp_path / "run", tmp_path / "gone"], html=tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(("width", "turned"), [(200, False), (80, True)])
def test_the_final_table_turns_where_the_terminal_is_narrow(tmp_path: Path, width: int, turned: bool):
    runs = write_comparison(tmp_path, seeds=2)
    console = Console(width=width, record=True, file=StringIO())
    console.print(report.table([runs], width=width))
    text = console.export_text()
    for name in ("fedmoe", "fedavg", "local", "random_moe", "overall", "experts held", "failures"):
        assert name in text
    heads = next(line for line in text.splitlines() if "method" in line)
    assert ("fedavg" in heads) == turned


def test_what_was_retained_and_drift_have_their_places_in_every_kind_of_report(tmp_path: Path):
    single = write_run(tmp_path / "single", rounds=4, retained=True)
    runs = write_comparison(tmp_path / "runs", methods=("fedmoe", "fedavg"), seeds=2, retained=True)
    for name in ("one", "two"):
        write_comparison(tmp_path / "settings" / name, methods=("fedmoe", "fedavg"), retained=True, setting=name)
    for folder, sections in ((single, 1), (runs, 1), (tmp_path / "settings", 2)):
        result = report.write([folder], tmp_path / "r.html", tmp_path / "r.csv")
        titles = [table.title for table in result.tables]
        assert len([title for title in titles if "Retained knowledge" in title]) == sections
        assert len([title for title in titles if "Router drift" in title]) == sections
        elements = Elements((tmp_path / "r.html").read_text(encoding="utf-8"))
        captions = [figure["layout"]["yaxis"]["title"]["text"] for figure in json.loads(elements.scripts[0])]
        assert captions.count("router drift (10^-3 nats)") == sections
        text = (tmp_path / "r.html").read_text(encoding="utf-8")
        assert text.count("<figcaption>") - 1 == len(captions)
        assert "retained − base,mmlu,%" in (tmp_path / "r.csv").read_text()
        assert '"router drift, layer 3"' in (tmp_path / "r.csv").read_text()


def test_the_first_screen_names_the_optimizer_and_its_schedule(tmp_path: Path):
    folder = write_run(tmp_path / "run", rounds=2)
    assert "optimizer" not in page_of(folder, tmp_path / "r.html")
    training = '[training]\ntrain = "lora"\nrank = 8\nlr = 2e-4\nlocal_steps = 6\nbatch_size = 4\noptimizer = "adamw"\n'
    before = (folder / "run.toml").read_text()
    (folder / "run.toml").write_text(f'{before}{training}schedule = "cosine"\nfinal_lr = 1e-6\n')
    text = page_of(folder, tmp_path / "r.html")
    assert "<dt>training</dt><dd>lora of rank 8, 6 steps of 4 examples per client and round</dd>" in text
    assert "<dt>optimizer</dt><dd>adamw, learning rate 0.0002, cosine to 1e-06 over the rounds</dd>" in text


def test_the_first_screen_says_when_the_runs_began_how_long_they_took_and_on_what(tmp_path: Path):
    runs = write_comparison(tmp_path / "runs", methods=("fedmoe", "fedavg"), seeds=2)
    for number, path in enumerate(sorted(runs.rglob("versions.json"))):
        path.write_text(
            json.dumps({"torch": "2.13.0", "fedexperts": "0.1.0", "begun": f"2026-12-0{number + 1}T21:0{number}:15+00:00"})
        )
    text = page_of(runs, tmp_path / "r.html")
    assert "<dt>begun (UTC)</dt><dd>2026-12-01 21:00 to 2026-12-04 21:03</dd>" in text
    assert "<dt>duration</dt><dd>55.5 s a run on average: wall time of the rounds, without evaluations</dd>" in text
    assert "<dt>versions</dt><dd>fedexperts 0.1.0, torch 2.13.0</dd>" in text
    alone = page_of(runs / "fedmoe" / "seed-0", tmp_path / "one.html")
    assert (
        "<dt>duration</dt><dd>57.0 s: wall time of the rounds, without evaluations</dd>" in alone
    )  # 3 s, and 12 rounds of 4.5 s


def test_sample_answers_stand_beside_their_references_and_those_of_other_methods(tmp_path: Path):
    runs = write_comparison(tmp_path / "runs", methods=("fedmoe", "fedavg"), seeds=1)
    for path in sorted(runs.glob("*/seed-0")):
        rows = [
            {"round": round, "client": "c01", "task": task, "source": "s", "metric": "exact_match", "score": 0.5}
            | {"prompt": f"{task} {number}", "reference": EVIL, "answer": f"{path.parent.name} in round {round}"}
            for round in (2, 12)
            for task in ("sort", "reverse")
            for number in range(40)
        ]
        (path / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = page_of(runs, tmp_path / "r.html")
    assert '<th scope="row">sort</th><td class="text">sort 0</td>' in text
    assert "fedmoe in round 12 [0.50]" in text and "fedavg in round 12 [0.50]" in text and "in round 2" not in text
    assert len(re.findall('<th scope="row">(?:sort|reverse)</th><td class="text">(?:sort|reverse) ', text)) == 12
    assert Elements(text).all("img") == []
    alone = page_of(runs / "fedmoe" / "seed-0", tmp_path / "one.html")
    assert '<td class="text">c01</td><td class="text">reverse 0</td>' in alone


def test_classes_and_lengths_of_the_clients_data_are_shown_where_they_are_known(tmp_path: Path):
    folder = write_run(tmp_path / "run", rounds=2)
    assert "Length of prompts" not in page_of(folder, tmp_path / "r.html")
    plan = json.loads((folder / "plan.json").read_text())
    for number, client in enumerate(plan["clients"]):
        client["labels"] = {"ag_news": {"World": number, "Sports": 3}}
        client["lengths"] = {"prompt": [1, 2, 3, 4, 5.5], "answer": [1, 1, 2, 2, 9]}
    (folder / "plan.json").write_text(json.dumps(plan))
    elements = Elements(page_of(folder, tmp_path / "r.html"))
    drawn = {figure["layout"]["xaxis"]["title"]["text"]: figure for figure in json.loads(elements.scripts[0])}
    assert drawn["class"]["data"][0]["z"][7] == [7, 3] and drawn["class"]["data"][0]["x"] == ["World", "Sports"]
    text = (tmp_path / "r.html").read_text()
    assert "Length of prompts" in text and "Length of answers" in text and "Classes of ag_news: clients × classes" in text
    with (folder / "run.toml").open("a") as file:
        file.write("data = { own = true }\n")
    assert "not known of data that clients bring themselves" in page_of(folder, tmp_path / "r.html")


def test_a_figure_of_the_training_loss_has_the_rounds_of_all_seeds(tmp_path: Path):
    runs = write_comparison(tmp_path / "runs", methods=("fedmoe", "fedavg"), seeds=2)
    (figure,) = comparison_figures.several(read.grouped(read.read_all([runs])))["training"]
    lines = {trace.name: trace for trace in figure.drawing.data if trace.showlegend is not False}
    assert set(lines) == {"fedmoe", "fedavg"}
    assert list(lines["fedmoe"].x) == list(range(1, 13)) and list(lines["fedmoe"].y)[:2] == [2.0, 1.0]  # 2 / round
