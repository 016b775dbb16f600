"""One HTML file: no network, light and dark, wide and narrow. The code that draws lies beside it, or in it.

The templates escape every text from a run's files. Besides, the page allows only the scripts it was written with, by their
hashes and in its own folder, and no connection at all, so nothing in a results folder can run in the reader's browser.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs, get_plotlyjs_version

from fedexperts.report import (
    axes,
    cautions,
    comparison_figures,
    comparison_tables,
    data_figures,
    experts_map,
    facts,
    figure_numbers,
    progress,
    run_cost_tables,
    run_figures,
    run_tables,
    sample_answers,
    settings_tables,
    target_ratios,
    told_apart,
)
from fedexperts.report.read import Groups, RunResults, Settings, all_runs, by_label
from fedexperts.report.table_format import Table
from fedexperts.report.traces import Figure

LIBRARY = f"plotly-{get_plotlyjs_version()}.min.js"
"""The file that pages without plotly in them load from their own folder."""
BESIDE = "'self' file: "  # of a page opened from disk, 'self' is nothing in some browsers
POLICY = "style-src 'unsafe-inline'; img-src data: blob:; form-action 'none'; base-uri 'none'"
LONG_TABLE = 25  # rows; longer ones are folded
LONG_HEAD = 20  # characters
LONG_CELL = 24  # characters; longer ones are broken into lines


@dataclass(frozen=True)
class Part:
    """A piece of a page, and the template that shows it."""

    template: str
    content: Any


@dataclass(frozen=True)
class Section:
    """A heading with its anchor, and what stands below it."""

    name: str
    anchor: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class ShownFigure:
    """A figure as the page has it; page.js draws it into the element with this id."""

    id: str
    title: str
    caption: str
    numbers: Table


@dataclass(frozen=True)
class RunFile:
    """A run's settings, and the versions of what it ran on."""

    name: str
    folder: str
    versions: str
    text: str


@dataclass(frozen=True)
class Form:
    """How a page is written.

    whole: with plotly in it, instead of `LIBRARY` beside it. seconds: between reloads of a page that follows runs under way.
    """

    whole: bool = False
    seconds: int | None = None


def library() -> str:
    """The content of `LIBRARY`."""
    return str(get_plotlyjs())


def one_run(run: RunResults, form: Form = Form()) -> str:
    """The page of a single run."""
    drawn = run_figures.one_run(run)
    maps = _maps({run.plan.method: [run]})
    costs = (run_cost_tables.costs(run), run_cost_tables.floors(run), run_cost_tables.over_memory(run))
    experts = (
        run_cost_tables.assigned_experts(run),
        run_cost_tables.overlap(run),
        run_cost_tables.trained_and_sent(run),
        run_cost_tables.reported_metrics(run),
    )
    sections = {
        "Quality": [*_figures(drawn["quality"]), *_tables(run_tables.all_metrics(run))],
        "Quality across clients": [*_figures(drawn["clients"]), *_tables(run_tables.by_client(run))],
        "Sample answers": _tables(sample_answers.of_run(run)),
        "Training": _figures(drawn["training"]),
        "Retained knowledge": [*_figures(drawn["retained"]), *_tables(run_tables.retained(run))],
        "Router drift": [*_figures(drawn["drift"]), *_tables(run_tables.drift(run))],
        "Experts": [*_map(maps), *_figures(drawn["experts"]), *_tables(*experts)],
        "Bytes and memory": [*_tables(*costs), *_figures(drawn["costs"])],
        "Failures": _failures(run_cost_tables.failures(run)),
        "Data": [*_figures(drawn["data"]), *_tables(run_tables.partition(run)), *_unknown_data(run)],
        "Clients": _tables(run_tables.clients(run)),
        "Run file": [_run_file(run, "run.toml, as resolved")],
    }
    return _page(
        title=f"{run.plan.method} on {run.plan.model.name}",
        facts=facts.of_run(run),
        warning=cautions.warning({run.plan.method: [run]}),
        cards=facts.headline(run),
        overview=_tables(run_tables.quality(run)),
        sections=sections,
        drawn=drawn,
        maps=maps,
        form=form,
    )


def several(groups: Groups, baseline: str, unfinished: Sequence[str] = (), form: Form = Form()) -> str:
    """The page of several runs side by side; `unfinished` names those that are not finished."""
    drawn = comparison_figures.several(groups)
    maps = _maps(groups)
    apart = told_apart.tables(groups, baseline) if len(groups) > 1 else []
    compared = (comparison_tables.comparison(groups), comparison_tables.differences(groups, baseline))
    sections = {
        "Against each other": _figures(drawn["overall"]),
        "Told apart or not": _tables(*apart),
        "To the target": _tables(*settings_tables.to_target({"": groups}), *target_ratios.tables({"": groups}, baseline)),
        "Each task": _figures(drawn["each task"]),
        "Sample answers": _tables(sample_answers.of_groups(groups)),
        "Training": _figures(drawn["training"]),
        "All measures": _tables(*compared),
        "Retained knowledge": [*_figures(drawn["retained"]), *_tables(comparison_tables.retained_compared(groups))],
        "Router drift": [*_figures(drawn["drift"]), *_tables(comparison_tables.drift_compared(groups))],
        "Experts": _map(maps),
        **_of_each_run(groups),
    }
    return _page(
        title=f"{len(groups)} methods compared" if len(groups) > 1 else f"{next(iter(groups))} over several seeds",
        facts=facts.of_comparison(list(groups), all_runs(groups), unfinished, under_way=form.seconds is not None),
        warning=cautions.warning(groups),
        cards={},
        overview=_tables(comparison_tables.final(groups)),
        sections=sections,
        drawn=drawn,
        maps=maps,
        form=form,
    )


def several_settings(settings: Settings, baseline: str, unfinished: Sequence[str] = (), form: Form = Form()) -> str:
    """The page of several settings; `unfinished` names the runs that are not finished."""
    methods = settings_tables.methods(settings)
    drawn = comparison_figures.several_settings(settings)
    every = by_label(settings)
    maps = _maps(every)
    over_axes = [part for axis in axes.AXES for part in _figures(drawn[axis])]
    within = {
        f"Setting {name}": [
            *_tables(*settings_tables.of_setting(settings, name, baseline)),
            *_figures(drawn[f"setting {name}"]),
            *_tables(sample_answers.of_groups(settings_tables.with_runs(settings[name]))),
        ]
        for name in settings
    }
    sections = {
        "Over the settings": [*over_axes, *_tables(*settings_tables.by_task(settings))],
        "To the target": _tables(*settings_tables.to_target(settings), *target_ratios.tables(settings, baseline)),
        "Experts": [*_tables(settings_tables.assigned_experts(settings)), *_map(maps)],
        **within,
        **_of_each_run(every),
    }
    return _page(
        title=f"{len(methods)} methods in {len(settings)} settings",
        facts=facts.of_comparison(methods, all_runs(every), unfinished, under_way=form.seconds is not None),
        warning=cautions.warning(every),
        cards={},
        overview=_tables(settings_tables.overall(settings)),
        sections=sections,
        drawn=drawn,
        maps=maps,
        form=form,
    )


def _unknown_data(run: RunResults) -> list[Part]:
    """Says that classes and lengths are not known, if clients bring their own data."""
    own = progress.settings(run).get("data", {}).get("own")
    return [Part("paragraph.html.j2", data_figures.UNKNOWN)] if own else []


def waiting(reason: str, form: Form) -> str:
    """The page of runs that cannot be shown yet, for this `reason`."""
    sections = {"Waiting": [Part("paragraph.html.j2", reason)]}
    return _page("No report yet", {}, "", {}, (), sections, {}, (), form)


def _of_each_run(groups: Groups) -> dict[str, list[Part]]:
    """The sections that name each run: failures, and run files."""
    return {
        "Failures": _failures(_all_failures(groups)),
        "Run files": [_run_file(run, f"{label}, seed {run.plan.seed}") for label, runs in groups.items() for run in runs],
    }


def _all_failures(groups: Groups) -> Table:
    rows = tuple(
        (label, str(run.plan.seed), *row)
        for label, runs in groups.items()
        for run in runs
        for row in run_cost_tables.failures(run).rows
    )
    columns = ("method", "seed", "round", "client", "work", "reason")
    return Table("Failures", columns, rows, text_columns=(0, 3, 4, 5))


def _page(
    title: str,
    facts: Mapping[str, str],
    warning: str,
    cards: Mapping[str, str],
    overview: Sequence[Part],
    sections: Mapping[str, Sequence[Part]],
    drawn: Mapping[str, Sequence[Figure]],
    maps: Sequence[Mapping[str, Any]],
    form: Form,
) -> str:
    """The page, of the sections that have any part."""
    scripts = [*([library()] if form.whole else []), _text_of("page.js")]
    hashes = " ".join(f"'sha256-{base64.b64encode(sha256(script.encode()).digest()).decode()}'" for script in scripts)
    values = [{"id": _id(figure), **json.loads(figure.drawing.to_json())} for group in drawn.values() for figure in group]
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            title=title,
            policy=f"default-src 'none'; script-src {'' if form.whole else BESIDE}{hashes}; {POLICY}",
            library=None if form.whole else LIBRARY,
            seconds=form.seconds,
            style=_text_of("page.css"),
            facts=facts,
            warning=warning,
            cards=cards,
            overview=overview,
            sections=[Section(name, _anchor(name), parts) for name, parts in sections.items() if parts],
            figures=values,
            maps=maps,
            scripts=scripts,
            long_table=LONG_TABLE,
            long_head=LONG_HEAD,
            long_cell=LONG_CELL,
        )
    )


@cache
def _environment() -> Environment:
    """The templates, which escape all that is not marked safe, write no JSON that could end its script, and refuse NaN in it."""
    environment = Environment(
        loader=PackageLoader("fedexperts.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment


def _tables(*every: Table) -> list[Part]:
    """Those that have rows."""
    return [Part("table.html.j2", table) for table in every if table.rows]


def _figures(drawn: Sequence[Figure]) -> list[Part]:
    shown = [ShownFigure(_id(each), each.title, each.caption, figure_numbers.numbers_table(each)) for each in drawn]
    return [Part("figures.html.j2", shown)] if shown else []


def _map(maps: Sequence[Mapping[str, Any]]) -> list[Part]:
    return [Part("experts_map.html.j2", maps)] if maps else []


def _maps(groups: Groups) -> list[dict[str, Any]]:
    """The data of the map for each run that has any."""
    runs = [(f"{label}, seed {run.plan.seed}", run) for label, members in groups.items() for run in members]
    every = [experts_map.experts_map(label, run) for label, run in runs]
    return [each for each in every if each["rounds"] and each["blocks"]]


def _failures(table: Table) -> list[Part]:
    return _tables(table) or [Part("paragraph.html.j2", "None.")]


def _run_file(run: RunResults, name: str) -> Part:
    return Part("run_file.html.j2", RunFile(name, str(run.folder), facts.inline(run.versions), run.run_file))


def _id(figure: Figure) -> str:
    """The same for the same title, and safe as an id whatever stands in it."""
    return f"figure-{sha256(figure.title.encode()).hexdigest()[:12]}"


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _text_of(name: str) -> str:
    """A file of this package."""
    return (files("fedexperts.report") / name).read_text(encoding="utf-8")
