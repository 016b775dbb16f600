"""The report of a real comparison in a real browser: it draws, sorts by click and by key, makes no request, and passes axe-core's
checks of accessibility.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedexperts import report
from fedexperts.config import RunConfig
from fedexperts.experiment.sweep import compare, read_variants
from fedexperts.io.toml import checked
from fedexperts.report import page as library

pytest.importorskip("playwright", reason="playwright, which drives the browser, is not installed: pip install 'fedexperts[dev]'")

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

METHODS = "fedmoe,hfedmoe,fedavg,local"
SEEDS = 2
WIDTHS = {"desk": (1440, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None and not os.environ.get("CI"):
        pytest.skip("no chromium is installed here, so no report can be opened: apt-get install chromium")
    assert path, "CI has no chromium: .ci/run installs it"
    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])  # root has no sandbox in a container
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def compared(tiny_tree: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds of four methods with two seeds, and what their reports show besides."""
    out = tmp_path_factory.mktemp("compared")
    tree = {
        **tiny_tree,
        "federation": {"rounds": 2, "clients_per_round": 3},
        "evaluation": {**tiny_tree["evaluation"], "every": 1, "drift": True},
        "devices": {"memory_share": {"uniform": [0.85, 1.0]}},
    }
    comparison = compare({"": checked(RunConfig, tree)}, read_variants(METHODS), SEEDS, out)
    assert (len(comparison.folders), comparison.failed) == (len(METHODS.split(",")) * SEEDS, {})
    return out


@pytest.fixture(scope="module")
def pages(compared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("pages")
    report.write([compared], html=out / "several.html")
    report.write([compared / "hfedmoe" / "seed-0"], html=out / "one.html")
    return {path.stem: path for path in out.glob("*.html")}


class Visit:
    """An open page, with its console messages and its requests."""

    def __init__(self, browser: Browser, path: Path, size: str = "desk", scheme: str = "light") -> None:
        width, height = WIDTHS[size]
        phone = size == "phone"
        self.context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, is_mobile=phone, has_touch=phone
        )
        self.page: Page = self.context.new_page()
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def __enter__(self) -> "Visit":
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


def column(page: Page, table: str, number: int) -> list[str]:
    """The cells of a column of the table with this caption, from its body."""
    rows = page.locator("table", has=page.locator("caption", has_text=table)).first.locator("tbody tr")
    return [row.locator("th, td").nth(number).inner_text() for row in rows.all()]


@pytest.mark.parametrize(
    ("size", "scheme", "which"),
    [("desk", "light", "one"), ("desk", "dark", "several"), ("phone", "light", "several"), ("phone", "dark", "one")],
)  # each with each of another kind
def test_a_page_draws_every_figure_and_is_readable_by_everybody(browser, pages, which, scheme, size):
    with Visit(browser, pages[which], size, scheme) as visit:
        page = visit.page
        drawings = page.locator(".drawing").all()
        assert len(drawings) > 8
        for drawing in drawings:
            drawn = "svg .trace, svg .hm, svg .heatmaplayer image"
            assert drawing.locator(drawn).count(), f"{drawing.get_attribute('data-description')} is not drawn"
            picture = drawing.locator("svg[role=img]")
            assert (picture.get_attribute("aria-label") or "").endswith("The numbers are in the table below.")
            box = picture.bounding_box()
            assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= WIDTHS[size][0] and box["height"] > 150
        page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") == WIDTHS[size][0], "the page is wider than the screen"
        axe = Axe().run(page)
        assert not axe.violations_count, axe.generate_report()
        assert visit.messages == []
        assert [url for url in visit.requests if not url.startswith(("file:", "data:", "blob:"))] == []
        beside = pages[which].with_name(library.LIBRARY)
        assert [url for url in visit.requests if url.startswith("file:")] == [pages[which].as_uri(), beside.as_uri()]


def test_a_table_is_sorted_by_click_and_by_key_and_says_so(browser, pages):
    with Visit(browser, pages["several"]) as visit:
        head = visit.page.get_by_role("columnheader", name="sent per client and round (MB)").first
        before = column(visit.page, "Results", 0)
        number = [each.inner_text() for each in visit.page.locator("table").first.locator("thead th").all()].index(
            head.inner_text()
        )
        sent = {name: float(cell.split()[0]) for name, cell in zip(before, column(visit.page, "Results", number), strict=True)}
        upwards = sorted(before, key=lambda name: sent[name])
        assert len(set(sent.values())) > 2
        assert head.get_attribute("aria-sort") == "none"
        head.get_by_role("button").click()
        assert (head.get_attribute("aria-sort"), column(visit.page, "Results", 0)) == ("ascending", upwards)
        head.get_by_role("button").focus()
        visit.page.keyboard.press("Enter")
        assert head.get_attribute("aria-sort") == "descending"
        assert [sent[name] for name in column(visit.page, "Results", 0)] == sorted(sent.values(), reverse=True)
        visit.page.keyboard.press("Space")
        assert (head.get_attribute("aria-sort"), column(visit.page, "Results", 0)) == ("none", before)
        by_name = visit.page.get_by_role("columnheader", name="method").first
        by_name.get_by_role("button").click()
        assert column(visit.page, "Results", 0) == sorted(before)
        assert head.get_attribute("aria-sort") == "none"


def test_rows_that_sum_up_are_not_sorted_with_the_others(browser, pages):
    with Visit(browser, pages["one"]) as visit:
        table = visit.page.locator("table", has=visit.page.locator("caption", has_text="Quality")).first
        table.get_by_role("button", name="last").click()
        assert table.locator("tfoot th").inner_text() == "overall"
        assert "overall" not in column(visit.page, "Quality", 0)


def test_the_map_shows_who_trained_what_where_that_is_less_than_what_is_held(browser, pages):
    with Visit(browser, pages["one"]) as visit:
        page, cells = visit.page, visit.page.locator("#map-numbers td")
        numbers = lambda: [int(cell) for cell in cells.all_text_contents()]  # noqa: E731
        assigned = numbers()
        assert assigned == [max(assigned)] * 24  # HFedMoE's clients hold all eight experts of three layers
        page.locator("#map-what").select_option("trained")
        trained = numbers()
        assert sum(trained) > 0 and len(set(trained)) > 1
        page.locator("#map-round").focus()
        page.keyboard.press("ArrowLeft")
        assert page.locator("#map-shown").inner_text() == "round 1"
        assert sum(numbers()) < sum(trained)
        page.locator("#map-what").select_option("moved")
        assert numbers() == [0] * 24
        assert "more (blue) or fewer (orange)" in page.locator("#map-description").inner_text()


def test_the_map_shows_who_uses_an_expert_and_how_that_moved(browser, pages):
    with Visit(browser, pages["one"]) as visit:
        page, cells = visit.page, visit.page.locator("#map-numbers td")
        numbers = lambda: [float(cell) for cell in cells.all_text_contents()]  # noqa: E731
        page.locator("#map-what").select_option("used")
        used = numbers()
        assert len(used) == 24
        assert [sum(used[start : start + 8]) for start in (0, 8, 16)] == pytest.approx([100] * 3, abs=1)
        page.locator("#map-what").select_option("shifted")
        moved = numbers()
        assert [sum(moved[start : start + 8]) for start in (0, 8, 16)] == pytest.approx([0] * 3, abs=1)
        assert min(moved) < 0 < max(moved)


def test_on_paper_a_page_is_light_and_its_long_tables_are_whole(browser, pages, tmp_path):
    with Visit(browser, pages["several"], scheme="dark") as visit:
        background = "getComputedStyle(document.body).backgroundColor"
        dark = visit.page.evaluate(background)
        visit.page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert visit.page.evaluate(background) == "rgb(255, 255, 255)" != dark
        assert visit.page.locator("svg.main-svg").first.bounding_box()["width"] <= 640
        assert all(each.evaluate("long => long.open") for each in visit.page.locator("details.long").all())
        visit.page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert visit.page.evaluate(background) == dark


def test_a_table_that_is_wider_than_the_page_says_so_until_its_end_is_in_sight(browser, pages):
    with Visit(browser, pages["several"], "phone") as visit:
        frame = visit.page.locator(".table", has=visit.page.locator("caption", has_text="Results")).first
        hint = frame.locator(".hint")
        assert hint.is_visible() and "scroll sideways" in hint.inner_text()
        assert "at-end" not in (frame.get_attribute("class") or "")
        frame.locator(".wide").evaluate("each => { each.scrollLeft = each.scrollWidth; }")
        visit.page.wait_for_function("document.querySelector('.table.at-end.scrolls')")
    with Visit(browser, pages["one"]) as visit:
        narrow = visit.page.locator(".table", has=visit.page.locator("caption", has_text="Router drift")).first
        assert not narrow.locator(".hint").is_visible()


def test_the_toolbar_of_the_map_does_not_cover_it(browser, pages):
    with Visit(browser, pages["one"]) as visit:
        visit.page.locator("#map").hover()
        bar = visit.page.locator("#map .modebar-group").first.bounding_box()
        cells = visit.page.locator("#map .heatmaplayer image, #map .hm").first.bounding_box()
        assert bar["y"] + bar["height"] <= cells["y"]


def test_without_the_file_beside_it_a_page_says_what_is_missing_and_keeps_its_tables(browser, pages, tmp_path):
    alone = tmp_path / "alone.html"
    alone.write_text(pages["several"].read_text())
    with Visit(browser, alone) as visit:
        missing = visit.page.locator("#no-drawings")
        assert missing.is_visible() and library.LIBRARY in missing.inner_text()
        head = visit.page.get_by_role("columnheader", name="method").first
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == "ascending"
        assert [each for each in visit.messages if "ERR_FILE_NOT_FOUND" not in each] == []


def test_a_page_in_a_single_file_draws_without_any_other(browser, compared, tmp_path):
    report.write([compared / "fedavg" / "seed-0"], html=tmp_path / "one.html", single_file=True)
    with Visit(browser, tmp_path / "one.html") as visit:
        assert visit.page.locator(".drawing svg[role=img]").count() > 5
        assert visit.messages == []
        assert [url for url in visit.requests if url.startswith("file:")] == [(tmp_path / "one.html").as_uri()]
