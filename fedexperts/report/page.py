"""One HTML file with everything in it: no network, light and dark, wide and narrow.

Every text from a run's files is escaped. Beside that, the page allows only the two scripts it was written with, by their
hashes, and no connection at all, so nothing in a results folder can run in the reader's browser.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from html import escape
from importlib.resources import files
from typing import Any

from plotly.offline import get_plotlyjs

from fedexperts.report import (
    axes,
    comparison_figures,
    comparison_tables,
    expert_sets,
    experts_map,
    figure_numbers,
    progress,
    resources,
    run_cost_tables,
    run_figures,
    run_tables,
    scores,
    settings_tables,
)
from fedexperts.report.expert_sets import Held
from fedexperts.report.read import Groups, RunResults, Settings, all_runs
from fedexperts.report.table_format import NONE, Table, megabytes, number, quality_value, whole
from fedexperts.report.traces import Figure

POLICY = "style-src 'unsafe-inline'; img-src data: blob:; form-action 'none'; base-uri 'none'"
LONG_TABLE = 25  # rows; longer ones are folded
LONG_HEAD = 20  # characters
UNFINISHED = "Such runs are in tables and figures only while no run is finished."


def one_run(run: RunResults) -> str:
    """The page of a single run."""
    title = f"{run.plan.method} on {run.plan.model.name}"
    drawn = run_figures.one_run(run)
    maps = _maps({run.plan.method: [run]})
    costs = [_table(run_cost_tables.costs(run)), _table(run_cost_tables.floors(run)), _table(run_cost_tables.over_memory(run))]
    experts = [_table(run_cost_tables.held(run)), _table(run_cost_tables.overlap(run)), _table(run_cost_tables.chosen(run))]
    sections = {
        "Quality": [_figures(drawn["quality"]), _table(run_tables.all_metrics(run))],
        "Quality across clients": [_figures(drawn["clients"]), _table(run_tables.by_client(run))],
        "Retained knowledge": [_figures(drawn["retained"]), _table(run_tables.retained(run))],
        "Router drift": [_figures(drawn["drift"]), _table(run_tables.drift(run))],
        "Experts": [_map(maps), _figures(drawn["experts"]), *experts],
        "Bytes and memory": [*costs, _figures(drawn["costs"])],
        "Failures": [_table(run_cost_tables.failures(run)) or "<p>None.</p>"],
        "Data": [_figures(drawn["data"]), _table(run_tables.partition(run))],
        "Clients": [_table(run_tables.clients(run))],
        "Run file": [_files(run)],
    }
    intro = [_asked(_what_was_asked(run)), _cards(_what_came_out(run)), _table(run_tables.quality(run))]
    return _page(title, intro, sections, drawn, maps)


def several(groups: Groups, baseline: str, unfinished: Sequence[str] = ()) -> str:
    """The page of several runs side by side; `unfinished` names those that are not finished."""
    title = f"{len(groups)} methods compared" if len(groups) > 1 else f"{next(iter(groups))} over several seeds"
    drawn = comparison_figures.several(groups)
    maps = _maps(groups)
    sections = {
        "Against each other": [_figures(drawn["overall"])],
        "To the target": [*map(_table, settings_tables.to_target({"": groups}))],
        "Each task": [_figures(drawn["each task"])],
        "All measures": [_table(comparison_tables.comparison(groups)), _table(comparison_tables.differences(groups, baseline))],
        "Retained knowledge": [_figures(drawn["retained"]), _table(comparison_tables.retained_compared(groups))],
        "Router drift": [_figures(drawn["drift"]), _table(comparison_tables.drift_compared(groups))],
        "Experts": [_map(maps)],
        **_of_runs(groups),
    }
    facts = _what_was_compared(list(groups), all_runs(groups), unfinished)
    intro = [_asked(facts), _table(comparison_tables.final(groups))]
    return _page(title, intro, sections, drawn, maps)


def several_settings(settings: Settings, baseline: str, unfinished: Sequence[str] = ()) -> str:
    """The page of several settings; `unfinished` names the runs that are not finished."""
    methods = settings_tables.methods(settings)
    title = f"{len(methods)} methods in {len(settings)} settings"
    drawn = comparison_figures.several_settings(settings)
    every = {f"{name}: {label}": runs for name, groups in settings.items() for label, runs in groups.items() if runs}
    maps = _maps(every)
    sections = {
        "Over the settings": [*(_figures(drawn[over]) for over in axes.AXES), *map(_table, settings_tables.by_task(settings))],
        "To the target": [*map(_table, settings_tables.to_target(settings))],
        "Experts": [_table(settings_tables.held(settings)), _map(maps)],
        **{
            f"Setting {name}": [
                *map(_table, settings_tables.of_setting(settings, name, baseline)),
                _figures(drawn[f"setting {name}"]),
            ]
            for name in settings
        },
        **_of_runs(every),
    }
    facts = _what_was_compared(methods, all_runs(every), unfinished)
    intro = [_asked(facts), _table(settings_tables.overall(settings))]
    return _page(title, intro, sections, drawn, maps)


def _of_runs(groups: Groups) -> dict[str, list[str]]:
    """The sections that name each run: failures, and run files."""
    return {
        "Failures": [_table(_all_failures(groups)) or "<p>None.</p>"],
        "Run files": [_files(run, label) for label, runs in groups.items() for run in runs],
    }


def _page(
    title: str,
    intro: Sequence[str],
    sections: Mapping[str, Sequence[str]],
    drawn: Mapping[str, Sequence[Figure]],
    maps: Sequence[Mapping[str, Any]],
) -> str:
    scripts = [get_plotlyjs(), _own("page.js")]
    allowed = " ".join(f"'sha256-{base64.b64encode(sha256(script.encode()).digest()).decode()}'" for script in scripts)
    policy = f"default-src 'none'; script-src {allowed}; {POLICY}"
    shown = {name: [part for part in parts if part] for name, parts in sections.items()}
    shown = {name: parts for name, parts in shown.items() if parts}
    links = "".join(f'<a href="#{escape(_anchor(name))}">{escape(name)}</a>' for name in shown)
    values = [{"id": _id(figure), **json.loads(figure.drawing.to_json())} for group in drawn.values() for figure in group]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{_own('page.css')}</style></head><body>",
            f"<header><h1>{escape(title)}</h1></header><main>",
            *intro,
            f'<nav aria-label="Sections">{links}</nav>',
            *(_section(name, parts) for name, parts in shown.items()),
            "</main>",
            _data("figures", values),
            _data("maps", maps),
            *(f"<script>{script}</script>" for script in scripts),
            "</body></html>\n",
        ]
    )


def _what_was_asked(run: RunResults) -> dict[str, str]:
    asked, done = progress.rounds_asked(run), progress.rounds_done(run)
    each = progress.settings(run).get("federation", {}).get("clients_per_round")
    so_far = f"{done} done" if asked is None else str(asked) if done >= asked else f"{done} of {asked} done so far"
    method = {key: value for key, value in progress.settings(run).get("method", {}).items() if key != "name"}
    memory = [client.memory_bytes for client in run.plan.clients if client.memory_bytes is not None]
    return {
        "method": run.plan.method + (f", {_inline(method)}" if method else ""),
        "model": f"{run.plan.model.name}: {run.plan.model.parameters:,} parameters, {_shape(run)}",
        "clients": f"{len(run.plan.clients)}" + (f", {each} in each round" if each is not None else ""),
        **_how_they_train(run),
        "their memory": f"{megabytes(min(memory))} to {megabytes(max(memory))} MB" if memory else "not limited",
        "data": ", ".join(scores.tasks([run]) or dict.fromkeys(client.task for client in run.plan.clients)),
        "scored on": f"the clients' {scores.scored_on([run])} examples",
        "scored when": scores.scored_when([run]),
        "divided": _inline(run.plan.partition) or "as given",
        "rounds": so_far,
        "seed": str(run.plan.seed),
        **({"warned of": "; ".join(run.plan.warnings)} if run.plan.warnings else {}),
    }


def _how_they_train(run: RunResults) -> dict[str, str]:
    """What is trained, the optimiser and its schedule, and the server's where it has one; nothing without a run file."""
    asked, server = (
        progress.settings(run).get("training", {}),
        progress.settings(run).get("federation", {}).get("server_optimizer"),
    )
    if not asked:
        return {}
    rank = f" of rank {asked.get('rank')}" if asked.get("train") == "lora" else ""
    rate, schedule = asked.get("lr"), asked.get("schedule", "constant")
    over = "constant" if schedule == "constant" else f"{schedule} to {asked.get('final_lr')} over the rounds"
    steps = f"{asked['local_steps']} steps" if asked.get("local_steps") else f"{asked.get('local_epochs')} epochs"
    return {
        "trained": f"{asked.get('train')}{rank}, {steps} of {asked.get('batch_size')} examples in a client's round",
        "optimiser": f"{asked.get('optimizer')}, learning rate {rate}, {over}",
        **({"server's optimiser": _inline(server)} if server else {}),
    }


def _what_came_out(run: RunResults) -> dict[str, str]:
    rows, unit = scores.evaluated(run, None, None), scores.unit([run], None)
    ends = [quality_value(row.value, unit) for row in (rows[0], rows[-1])] if rows else []
    held = expert_sets.held_last(run)
    over = resources.over_memory(run)
    return {
        f"overall quality ({unit})" if unit else "overall quality": " → ".join(ends) or NONE,
        "sent per client and round, down and up": f"{megabytes(resources.bytes_per_client_round(run))} MB",
        "sent in total": f"{megabytes(resources.carried(resources.counted(run)))} MB",
        **({"virtual time": f"{number(axes.virtual_seconds(run))} s"} if axes.has_clock(run) else {}),
        "largest peak memory of a client": f"{megabytes(resources.largest_peak(run))} MB",
        f"experts held by a client, of {expert_sets.experts_of(run)} (mean, least–most)": _held(held),
        "clients over their memory": str(len(over)),
        "failures": str(len(resources.failures(run))),
    }


def _what_was_compared(methods: Sequence[str], runs: Sequence[RunResults], unfinished: Sequence[str]) -> dict[str, str]:
    named = dict.fromkeys(run.plan.setting for run in runs if run.plan.setting)
    return {
        **({"settings" if len(named) > 1 else "setting": ", ".join(named)} if named else {}),
        "methods": ", ".join(methods),
        "models": ", ".join(dict.fromkeys(run.plan.model.name for run in runs)),
        "data": ", ".join(scores.tasks(runs)),
        "scored on": f"the clients' {scores.scored_on(runs)} examples",
        "scored when": scores.scored_when(runs),
        "clients": ", ".join(dict.fromkeys(str(len(run.plan.clients)) for run in runs)),
        "rounds": ", ".join(dict.fromkeys(str(progress.rounds_done(run)) for run in runs)),
        "seeds": ", ".join(map(str, sorted({run.plan.seed for run in runs}))),
        **({"not finished": f"{'; '.join(unfinished)}. {UNFINISHED}"} if unfinished else {}),
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


def _shape(run: RunResults) -> str:
    blocks = list(run.plan.model.blocks.values())
    sizes = " or ".join(dict.fromkeys(str(block.num_experts) for block in blocks))
    chosen = " or ".join(dict.fromkeys(str(block.top_k) for block in blocks))
    return f"{len(blocks)} MoE layers of {sizes} experts, {chosen} for each token"


def _held(held: Held | None) -> str:
    return f"{whole(held.mean)} ({held.least}–{held.most})" if held else NONE


def _inline(values: Mapping[str, Any]) -> str:
    """A small table of settings on one line, without the empty ones."""
    given = {key: value for key, value in values.items() if value not in (None, "", [], {})}
    return ", ".join(f"{key} {_inline(value) if isinstance(value, Mapping) else _one(value)}" for key, value in given.items())


def _one(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _asked(facts: Mapping[str, str]) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return f'<dl class="asked">{rows}</dl>'


def _cards(facts: Mapping[str, str]) -> str:
    cards = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return f'<dl class="cards">{cards}</dl>'


def _section(name: str, parts: Sequence[str]) -> str:
    return f'<section id="{escape(_anchor(name))}"><h2>{escape(name)}</h2>\n' + "\n".join(parts) + "</section>"


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _table(table: Table) -> str:
    """Accessible markup: a caption, heads with their scope, a frame that scrolls by keyboard too. Nothing without rows.

    page.js makes its heads buttons that sort it; rows at the end that sum up stay there.
    """
    if not table.rows:
        return ""
    frame = _frame(table)
    if len(table.rows) <= LONG_TABLE:
        return frame
    return f'<details class="long"><summary>{escape(table.title)}: {len(table.rows)} rows</summary>{frame}</details>'


def _frame(table: Table) -> str:
    kinds = ["text" if index in table.text_columns else "" for index in range(len(table.columns))]
    heads = "".join(
        f'<th scope="col" class="{_kind(kind, text)}">{escape(text)}</th>'
        for kind, text in zip(kinds, table.columns, strict=True)
    )
    rows = [_row(kinds, row) for row in table.rows]
    split = len(rows) - table.sums
    foot = f"<tfoot>{''.join(rows[split:])}</tfoot>" if table.sums else ""
    body = "\n".join(rows[:split])
    caption = f"<caption><span>{escape(table.title)}</span></caption>"
    markup = f"<table>{caption}<thead><tr>{heads}</tr></thead>\n<tbody>{body}</tbody>{foot}</table>"
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    wide = f'<div class="wide" tabindex="0" role="group" aria-label="{escape(table.title)}">{markup}</div>'
    return f'<div class="table">{wide}{note}</div>'


def _kind(kind: str, head: str) -> str:
    """The class of a head: one of many words gets a wider column, not many lines."""
    return f"{kind} long".strip() if len(head) > LONG_HEAD else kind


def _row(kinds: Sequence[str], row: Sequence[str]) -> str:
    cells = "".join(f'<td class="{kind}">{escape(text)}</td>' for kind, text in zip(kinds[1:], row[1:], strict=True))
    return f'<tr><th scope="row">{escape(row[0])}</th>{cells}</tr>'


def _figures(drawn: Sequence[Figure]) -> str:
    return f'<div class="figures">{"".join(map(_figure, drawn))}</div>' if drawn else ""


def _figure(figure: Figure) -> str:
    caption = f"<figcaption>{escape(figure.title)}<span>{escape(figure.caption)}</span></figcaption>"
    told = escape(f"{figure.title}. {figure.caption} Its numbers stand in the table below it.")
    return f'<figure>{caption}<div class="drawing" id="{_id(figure)}" data-told="{told}"></div>{_numbers(figure)}</figure>'


def _numbers(figure: Figure) -> str:
    of = f'<span class="hidden"> of {escape(figure.title)}</span>'
    return f'<details class="numbers"><summary>Numbers{of}</summary>{_frame(figure_numbers.numbers(figure))}</details>'


def _id(figure: Figure) -> str:
    """The same for the same title, and safe as an id whatever stands in it."""
    return f"figure-{sha256(figure.title.encode()).hexdigest()[:12]}"


def _maps(groups: Groups) -> list[dict[str, Any]]:
    runs = [(f"{label}, seed {run.plan.seed}", run) for label, members in groups.items() for run in members]
    every = [experts_map.experts_map(label, run) for label, run in runs]
    return [each for each in every if each["rounds"] and each["blocks"]]


def _map(maps: Sequence[Mapping[str, Any]]) -> str:
    if not maps:
        return ""
    options = "".join(f'<option value="{index}">{escape(each["run"])}</option>' for index, each in enumerate(maps))
    return (
        '<figure><figcaption>Experts × layers<span id="map-told"></span></figcaption>'
        '<div class="controls">'
        f'<label>run <select id="map-run">{options}</select></label>'
        '<label>show <select id="map-what"><option value="held">who holds an expert</option>'
        '<option value="used">who uses it</option><option value="trained">who trained it</option>'
        '<option value="moved">how it moved</option><option value="shifted">how its use moved</option></select></label>'
        '<label>client <select id="map-client"></select></label>'
        '<label>until <input type="range" id="map-round" min="0" value="0"><output id="map-shown"></output></label></div>'
        '<p class="note" id="map-note" aria-live="polite"></p><div class="drawing" id="map"></div>'
        '<details class="numbers"><summary>Numbers<span class="hidden"> of the map</span></summary>'
        '<div class="wide" tabindex="0" role="group" aria-label="Experts × layers"><table class="plain" id="map-numbers"></table>'
        "</div></details></figure>"
    )


def _files(run: RunResults, label: str | None = None) -> str:
    name = f"{label}, seed {run.plan.seed}" if label else "run.toml, as resolved"
    versions = f"<p>{escape(_inline(run.versions))}</p>" if run.versions else ""
    folder = f'<p class="soft">{escape(str(run.folder))}</p>'
    text = f'<pre tabindex="0" role="group" aria-label="{escape(name)}">{escape(run.run_file)}</pre>'
    return f"<details><summary>{escape(name)}</summary>{folder}{versions}{text}</details>"


def _data(name: str, value: object) -> str:
    """JSON that no text in it can end; NaN is no JSON, so it is refused."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'


def _own(name: str) -> str:
    return (files("fedexperts.report") / name).read_text(encoding="utf-8")
