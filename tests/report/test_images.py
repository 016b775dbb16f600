import csv
import struct
import sys
from pathlib import Path

import pytest

from fedexperts import report
from fedexperts.errors import BadValue
from fedexperts.report import axes, images, run_figures
from fedexperts.report.read import read
from fedexperts.report.table_format import NONE, Table, cells_csv

from .fake import write_run, write_settings


def sizes(paths: tuple[Path, ...]) -> list[tuple[int, int]]:
    """Width and height of each PNG file, as its header says them."""
    heads = [path.read_bytes()[:24] for path in paths]
    assert [head for head in heads if not head.startswith(b"\x89PNG\r\n\x1a\n")] == []
    return [struct.unpack(">II", head[16:]) for head in heads]


def pictures_of(folder: Path, out: Path) -> tuple[Path, ...]:
    try:
        return report.write([folder], pictures=out).written
    except BadValue as missing:
        pytest.skip(f"no figure can be drawn here: {missing}")


def pngs_of(folder: Path, out: Path) -> tuple[Path, ...]:
    return tuple(path for path in pictures_of(folder, out) if path.suffix == ".png")


def test_every_figure_becomes_a_png_under_its_title(tmp_path: Path):
    folder = write_run(tmp_path / "run", rounds=2)
    drawn = [figure for group in run_figures.one_run(read(folder)).values() for figure in group]
    written = pngs_of(folder, tmp_path / "png")
    assert [path.name for path in written] == [images.file_name(figure.title) for figure in drawn]
    assert "quality-over-rounds.png" in {path.name for path in written}
    heights = [figure.drawing.layout.height for figure in drawn]
    assert sizes(written) == [(images.WIDTH * images.SCALE, height * images.SCALE) for height in heights]


def test_the_numbers_of_every_figure_lie_beside_it(tmp_path: Path):
    written = pictures_of(write_run(tmp_path / "run", rounds=2), tmp_path / "png")
    assert {path.stem for path in written if path.suffix == ".csv"} == {path.stem for path in written if path.suffix == ".png"}
    rows = list(csv.reader((tmp_path / "png" / "bytes-of-each-client.csv").read_text().splitlines()))
    assert rows[0] == ["client", "down", "up"]
    assert [row[0] for row in rows[1:]] == [f"c{number:02}" for number in range(8)]
    assert sum(float(number) for row in rows[1:] for number in row[1:]) > 1


def test_numbers_lose_the_commas_that_part_thousands_and_names_keep_theirs():
    table = Table("t", ("method", "MB"), (("a, b", "1,234.5"), ("c", NONE)))
    assert cells_csv(table) == 'method,MB\n"a, b",1234.5\nc,\n'


def test_figures_of_settings_have_files_of_their_own(tmp_path: Path):
    written = pngs_of(write_settings(tmp_path / "runs", seeds=1, clock=True), tmp_path / "png")
    names = [path.name for path in written]
    assert len(set(names)) == len(names) == len(sizes(written)) > 10
    over = [axis.replace(" ", "-") for axis in axes.AXES]
    assert {f"{name}-overall-quality-over-{axis}.png" for name in ("standard", "enforced") for axis in over} <= set(names)


@pytest.mark.parametrize(("kind", "start"), [("svg", b"<svg"), ("pdf", b"%PDF-")])
def test_figures_are_also_vectors_with_the_same_names(tmp_path: Path, kind: str, start: bytes):
    folder = write_run(tmp_path / "run", rounds=2)
    try:
        written = report.write([folder], **{kind: tmp_path / "out"}).written
    except BadValue as missing:
        pytest.skip(f"no figure can be drawn here: {missing}")
    files = [path for path in written if path.suffix == f".{kind}"]
    drawn = [figure for group in run_figures.one_run(read(folder)).values() for figure in group]
    assert [path.name for path in files] == [images.file_name(figure.title, kind) for figure in drawn]
    assert len(files) == len([path for path in written if path.suffix == ".csv"]) > 5
    assert all(path.read_bytes().startswith(start) for path in files)


def test_a_file_name_takes_no_path_from_a_title():
    assert images.file_name("../a b: Quality (%)/x") == "a-b-quality-x.png"


def test_without_kaleido_the_error_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "kaleido", None)
    with pytest.raises(BadValue, match=r"pip install 'fedexperts\[png\]'"):
        report.write([write_run(tmp_path / "run", rounds=2)], html=tmp_path / "r.html", pictures=tmp_path / "png")
    assert not (tmp_path / "r.html").exists()


def test_without_a_browser_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("kaleido", reason="kaleido, which looks for the browser, is not installed")
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "none"))
    with pytest.raises(BadValue, match="need a browser, and there is none"):
        report.write([write_run(tmp_path / "run", rounds=2)], pictures=tmp_path / "png")
