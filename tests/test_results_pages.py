"""The pages of results say what their CSVs give."""

import runpy
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def pages(tmp_path):
    """The module over a copy of docs/results, and the copy."""
    module = runpy.run_path(str(ROOT / "benchmarks/results_pages.py"))
    shutil.copytree(ROOT / "docs/results", tmp_path / "results")
    for function in (module["rendered"], module["main"], module["Table"].__init__):
        function.__globals__.update(RESULTS=tmp_path / "results", PAGES=tmp_path / "results/pages")
    return module, tmp_path / "results"


def status(module, monkeypatch):
    monkeypatch.setattr("sys.argv", ["results_pages.py", "--check"])
    return module["main"]()


def test_every_page_is_what_its_template_and_csvs_give(pages, monkeypatch, capsys):
    module, _ = pages
    assert status(module, monkeypatch) == 0, capsys.readouterr().out


def test_a_changed_figure_is_found(pages, monkeypatch, capsys):
    module, folder = pages
    page = folder / "flex.md"
    page.write_text(page.read_text().replace("41.6 ± 0.9", "42.6 ± 0.9", 1))
    assert status(module, monkeypatch) == 1
    assert "flex.md: says" in capsys.readouterr().out


def test_a_changed_csv_is_found(pages, monkeypatch):
    module, folder = pages
    file = folder / "hfedmoe/four.csv"
    file.write_text(file.read_text().replace("77.63888888888889", "67.63888888888889"))
    assert status(module, monkeypatch) == 1


def test_a_figure_without_a_source_is_found(pages, monkeypatch, capsys):
    module, folder = pages
    template = folder / "pages/flex.md.jinja"
    template.write_text(template.read_text() + "\nFLEx is 3.7 points ahead.\n")
    assert status(module, monkeypatch) == 1
    assert "a figure without a source: FLEx is 3.7 points ahead." in capsys.readouterr().out


def test_holm_is_less_generous_than_single_tests(pages):
    table = pages[0]["Table"]("flex/dirichlet-1.0")
    single, corrected = table.told_apart(corrected=False), table.told_apart()
    assert set(corrected) < set(single)
    ranked = sorted(each.p for each in table.differences().values())
    passed = next((i for i, p in enumerate(ranked) if p > 0.05 / (len(ranked) - i)), len(ranked))  # Holm 1979
    assert len(corrected) == passed
