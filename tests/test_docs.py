"""The documentation holds together: links lead somewhere, every method and every public name has its place, its code runs."""

import ast
import inspect
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml

import fedexperts
from fedexperts import api, testing, types
from fedexperts.data import partition
from fedexperts.io.toml import to_toml
from fedexperts.methods import METHODS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]
FETCHING = {("link", "href"), ("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("video", "src")}


def prose(page):
    """Without code blocks and code in lines."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE))


def anchors(page):
    """What GitHub calls the headings of `page`."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def nav(entries):
    """(headings above it, page) of all pages in the navigation."""
    for entry in entries:
        for title, below in entry.items():
            if isinstance(below, str):
                yield (), below
            else:
                yield from (((title, *above), page) for above, page in nav(below))


def site():
    return list(nav(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def test_links_between_pages_lead_somewhere():
    seen, broken = 0, []
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
            if re.match(r"https?:", link):
                continue
            seen += 1
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if not target.is_file() or (anchor and anchor not in anchors(target)):
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert broken == []
    assert seen > 60


def test_every_page_and_every_method_is_in_the_navigation():
    found = site()
    pages = [page for _, page in found]
    assert sorted(pages) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))
    of_methods = {Path(page).stem: above for above, page in found if page.startswith("methods/")}
    assert of_methods.keys() >= METHODS.keys()
    assert {name for name, above in of_methods.items() if above[-1] == "References"} == {"local", "centralized"}
    overview = (DOCS / "methods" / "index.md").read_text()
    assert [name for name in METHODS if f"[`{name}`]({name}.md)" not in overview] == []


def test_the_code_that_pages_show_runs(tmp_path, monkeypatch, tiny_tree):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(METHODS, "median", raising=False)
    Path("my-run.toml").write_text(to_toml(tiny_tree))
    space = {}
    shown = blocks(DOCS / "extending.md", "python")
    assert len(shown) == 5
    try:
        for number, block in enumerate(shown):
            exec(compile(block, f"extending.md, block {number}", "exec"), space)
    finally:
        METHODS.pop("median", None)
    assert torch.isfinite(space["middle"]).all()
    rounds = (space["folder"] / "rounds.jsonl").read_text()
    assert "it did not answer" in rounds  # and the run went on
    assert rounds.count("\n") == 3


def test_the_run_that_the_first_page_shows_is_one():
    (shown,) = blocks(DOCS / "index.md", "python")
    run = next(node for node in ast.parse(shown).body if isinstance(node, ast.Assign))
    settings = api.settings_of(ast.literal_eval(run.value), ())
    assert settings.method["name"] == "fedmoe"


class Fetched(HTMLParser):
    """What a browser fetches with a page, and the names of places in it."""

    def __init__(self, text):
        super().__init__()
        self.fetched, self.places = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        known = dict(attrs)
        self.places.add(known.get("id"))
        self.fetched += [value for name, value in attrs if (tag, name) in FETCHING and known.get("rel") != "canonical"]


def public():
    """Every public function, class and value that has its place in the reference."""
    for name in set(fedexperts.__all__) - {"__version__", "partition"}:
        here = getattr(fedexperts, name)
        yield f"{'fedexperts.methods' if name == 'METHODS' else here.__module__}.{name}"
    for module in (types, partition, testing):
        tree = ast.parse(inspect.getsource(module))
        names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        yield from (f"{module.__name__}.{name}" for name in names if not name.startswith("_"))


@pytest.mark.skipif(not find_spec("mkdocs"), reason="the site needs the extra docs, which is not installed")
def test_the_site_builds_with_every_public_name_and_fetches_nothing_from_elsewhere(tmp_path):
    built = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(built)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    made = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    pages = {str(page.relative_to(built)): Fetched(page.read_text()) for page in built.rglob("*.html")}
    assert len(pages) == len(site()) + 1  # and 404.html
    outside = re.compile(r"^(?:\w+:)?//")
    assert [(page, url) for page, found in pages.items() for url in found.fetched if outside.match(url)] == []
    assert all(found.fetched for found in pages.values())
    styles = "".join(file.read_text() for file in built.rglob("*.css"))
    assert styles and not re.search(r"url\(\s*[\"']?(?:https?:)?//|@import\s", styles)
    places = set().union(*(found.places for name, found in pages.items() if name.startswith("reference/")))
    names = set(public())
    assert sorted(names - places) == []
    assert len(names) > 40
