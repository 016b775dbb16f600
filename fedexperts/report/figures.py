"""Figures of one run and of several, as plotly values; page.js gives them the colours of the reader's theme.

Text that comes from a run's files is escaped: plotly reads a few HTML tags in names.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from html import escape, unescape
from typing import Any

import plotly.graph_objects as go

from fedexperts.report import measures as m
from fedexperts.report.across import Settings
from fedexperts.report.read import Holds, Round, RunResults
from fedexperts.report.stats import Interval, interval
from fedexperts.report.tables import NONE, Groups, Table, all_runs

# Told apart by people who see colours differently, and readable on a white and on a dark page.
PALETTE = ("#3b82d6", "#d9822b", "#2f9e6e", "#b5489a", "#8a6fd1", "#c8463a", "#7f8f1f", "#4a9fb0")
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "diamond", "square", "triangle-up")
INK = {"theme": "ink"}  # page.js draws what has this `meta` in the colour of the text
FEW_ROUNDS = 10  # up to here each has its tick, so that none lies between two rounds
LINE_OF_A_ROW = 22  # pixels
DRIFT = "KL(the base's routing ‖ the client's model's) per token, on the same text, after the last round."
MANY_CLIENTS = 60  # more are not drawn one by one; the tables name all

SPREAD = {
    "best": "best client",
    "upper": "upper quartile",
    "median": "median client",
    "lower": "lower quartile",
    "worst": "worst client",
}

Points = list[tuple[float, float]]
AXES: Mapping[str, m.Axis] = {axis.name: axis for axis in m.AXES}


@dataclass(frozen=True)
class Figure:
    """A drawing, what it shows in one line, and what one must know to read it."""

    title: str
    caption: str
    drawing: go.Figure


def one_run(run: RunResults) -> dict[str, list[Figure]]:
    """All figures of a single run, by what they are about; those without data are left out."""
    return _with_data(
        {
            "quality": [curves(run, over, unit) for unit in ("%", "") for over in AXES],
            "clients": [spread_over_rounds(run), quality_by_client(run)],
            "experts": [experts_over_rounds(run), overlap(run)],
            "costs": [bytes_by_client(run), memory_by_client(run)],
            "data": [partition(run)],
            "retained": [retained_by_client(run, unit) for unit in ("%", "")],
            "drift": [drift(run)],
        }
    )


def several(groups: Groups) -> dict[str, list[Figure]]:
    """All figures of several runs, by what they are about; those without data are left out."""
    overall = [*(compared(groups, None, over) for over in AXES), *tradeoffs(groups), spread(groups)]
    drawn = {"overall": overall, "each task": each_task(groups)}
    return _with_data({**drawn, "retained": retained_minus_base(groups), "drift": [drift_compared(groups)]})


def several_settings(settings: Settings) -> dict[str, list[Figure]]:
    """The overall quality in each setting over `AXES`, on one scale; then what else there is of each setting, by its name."""
    side_by_side = {
        over: _on_one_scale([_titled(name, compared(groups, None, over)) for name, groups in settings.items()]) for over in AXES
    }
    within = {
        f"setting {name}": [
            _titled(name, each) for each in [*tradeoffs(groups), spread(groups), *each_task(groups), *against_base(groups)]
        ]
        for name, groups in settings.items()
    }
    return _with_data(side_by_side | within)


def tradeoffs(groups: Groups) -> list[Figure]:
    """Overall quality against bytes, against memory and against time: the virtual one, where there is a clock."""
    return [tradeoff(groups, cost) for cost in (m.SENT, m.PEAK, *(m.times(all_runs(groups)) or [m.SECONDS]))]


def each_task(groups: Groups) -> list[Figure]:
    """Each task's quality over rounds."""
    return [compared(groups, task, "rounds") for task in m.tasks(all_runs(groups))]


def against_base(groups: Groups) -> list[Figure]:
    """What was retained, and how far routers drifted."""
    return [*retained_minus_base(groups), drift_compared(groups)]


def _titled(setting: str, figure: Figure) -> Figure:
    return replace(figure, title=f"{setting}: {figure.title}")


def _on_one_scale(figures: list[Figure]) -> list[Figure]:
    """`figures`, those with the same words on the vertical axis with the same range there."""
    for label in {figure.drawing.layout.yaxis.title.text for figure in figures}:
        alike = [figure.drawing for figure in figures if figure.drawing.layout.yaxis.title.text == label]
        values = [value for drawing in alike for trace in drawing.data for value in trace.y]
        if values:
            low, high = min(values), max(values)
            room = 0.05 * (high - low) or 1.0
            for drawing in alike:
                drawing.update_yaxes(range=[low - room, high + room])
    return figures


def _with_data(figures: Mapping[str, Sequence[Figure]]) -> dict[str, list[Figure]]:
    return {name: [figure for figure in group if figure.drawing.data] for name, group in figures.items()}


def curves(run: RunResults, over: str, unit: str) -> Figure:
    """Quality of each task measured in `unit`, of each of its clients, and the mean over tasks."""
    axis = AXES[over]
    drawing = _drawing(axis.label, f"quality ({unit})" if unit else "perplexity (lower is better)")
    tasks = [task for task in m.tasks([run]) if m.unit([run], task) == unit] if axis.of(run) else []
    every = list(m.walk_clients(run))
    drawn = set(every[:MANY_CLIENTS])
    for index, task in enumerate(tasks):
        for client in (name for name in m.clients_of(run, task) if name in drawn):
            points = _points(run, client, task, axis)
            drawing.add_trace(_line(f"{client}: {task}", points, index, width=1, opacity=0.5, legend=False, group=task))
    for index, task in enumerate(tasks):
        name = f"{task} ({m.metric([run], task)})"
        drawing.add_trace(_line(name, _points(run, None, task, axis), index, width=2, group=task))
    if len(tasks) > 1 and m.unit([run], None) == unit:
        drawing.add_trace(_line("mean over tasks", _points(run, None, None, axis), 0, width=4, meta=INK))
    _tick_rounds(drawing, over, [run])
    what = "Quality" if unit else "Perplexity"
    caption = f"Thick: the mean over tasks. Middle: each task. Thin: {_clients_drawn(every, 'each client')} on its task."
    return Figure(f"{what} over {over}", f"{caption} {axis.note}".strip(), drawing)


def spread_over_rounds(run: RunResults) -> Figure:
    """The worst, the quartiles and the best of the clients at each evaluation."""
    unit = m.unit([run], None)
    drawing = _drawing("round", f"quality of a client ({unit})" if unit else "perplexity of a client (lower is better)")
    found = {round: m.spread(list(each.values()), unit) for round, each in m.quality_of_clients(run).items() if len(each) > 1}
    for index, name in enumerate(SPREAD if found else ()):
        points = [(float(round), getattr(each, name)) for round, each in found.items()]
        line = {"width": 4.0, "meta": INK} if name == "median" else {"width": 2.0}
        drawing.add_trace(_line(SPREAD[name], points, index, dash=DASHES[(index - 2) % 2], **line))
    _tick_rounds(drawing, "rounds", [run])
    caption = "Of the clients that were scored in a round. Dashed: the quartiles, between which half of them lie."
    return Figure("Spread across clients", f"{caption} {_each_client([run])}", drawing)


def quality_by_client(run: RunResults) -> Figure:
    """What each client reaches on each of its tasks at the last evaluation; nothing where there is a single task."""
    tasks, every = [task for task in m.tasks([run]) if m.unit([run], task) == "%"], list(m.walk_clients(run))
    scored = [client for client in every if any(m.last(run, client, task) for task in tasks)]
    ends = {client: [m.last(run, client, task) for task in tasks] for client in scored[:MANY_CLIENTS]}
    cells = [[m.shown(row.value, "%") if row and row.value is not None else None for row in rows] for rows in ends.values()]
    drawing = _cells(cells if len(tasks) > 1 else [], list(ends), tasks, "quality (%)", ".0f")
    caption = f"The main metric of each task at the last evaluation, in %, of {_clients_drawn(scored, 'each client')}."
    return Figure("Quality: clients × tasks", f"{caption} An empty cell: it has none of that task.", drawing)


def overlap(run: RunResults) -> Figure:
    """How alike the experts are that two clients trained the last time; nothing where all are the same."""
    found = m.worked_with(run)
    chosen = dict(list(found.items())[:MANY_CLIENTS])
    cells = [[m.alike(one, other) for other in chosen.values()] for one in chosen.values()]
    differ = any(value < 1 for row in cells for value in row)
    drawing = _cells(cells if differ else [], list(chosen), list(chosen), "overlap", None, most=1.0)
    drawing.update_xaxes(title={"text": "client"}, tickangle=-90)
    drawing.update_layout(height=150 + LINE_OF_A_ROW * len(chosen) if len(chosen) > 10 else 340)
    caption = "Experts that both trained the last time, of those that either did, over all layers."
    which = _clients_drawn(list(found), "Clients")
    return Figure("Overlap between clients", f"{caption} {which[0].upper()}{which[1:]} in order of their main tasks.", drawing)


def experts_over_rounds(run: RunResults) -> Figure:
    """How many experts the clients of each round held."""
    drawing = _drawing("round", f"experts held, of {m.experts_of(run)}")
    counts = {
        row.round: [m.count(holds) for holds in row.holds.values()] for row in run.rounds if row.task == "train" and row.holds
    }
    shown: dict[str, Callable[[list[int]], float]] = {"most": max, "mean": _mean, "least": min}
    for index, (name, of) in enumerate(shown.items() if counts else ()):
        points = [(float(round), float(of(each))) for round, each in sorted(counts.items())]
        drawing.add_trace(_line(name, points, index, width=3 if name == "mean" else 1.5))
    drawing.update_yaxes(rangemode="tozero")
    _tick_rounds(drawing, "rounds", [run])
    return Figure("Experts held by the clients of each round", "Over all layers; each round shows who took part in it.", drawing)


def bytes_by_client(run: RunResults) -> Figure:
    """Bytes each client got and sent."""
    every = list(m.walk_clients(run))
    work = {name: m.counted(run, name) for name in every[:MANY_CLIENTS]}
    drawing = _bars("MB of the whole run (10^6 bytes)", len(work))
    down = {name: sum(row.bytes_down for row in rows) / m.MB for name, rows in work.items()}
    up = {name: sum(row.bytes_up for row in rows) / m.MB for name, rows in work.items()}
    for index, (name, values) in enumerate((("down", down), ("up", up)) if run.ledger else ()):
        drawing.add_trace(_bar(name, values, index))
    drawing.update_layout(barmode="stack", legend={"traceorder": "normal"})
    which = _clients_drawn(every, "each client")
    return Figure(
        "Bytes of each client", f"For {which}: down from the server and up to it; evaluations are not counted.", drawing
    )


def memory_by_client(run: RunResults) -> Figure:
    """Each client's largest measured peak against the memory it has."""
    every, measured = list(m.walk_clients(run)), m.peak_by_client(run)
    peak = {name: measured[name] / m.MB for name in every[:MANY_CLIENTS] if name in measured}
    limits = {
        client.name: client.memory_bytes / m.MB
        for client in run.plan.clients
        if client.memory_bytes is not None and client.name in peak
    }
    drawing = _bars("MB (10^6 bytes)", len(peak))
    if peak:
        drawing.add_trace(_bar("largest peak", peak, 0))
    if limits:
        names = [safe(name) for name in limits]
        marker = {"symbol": "line-ns-open", "size": 12, "line": {"width": 3}}
        trace = go.Scatter(x=list(limits.values()), y=names, mode="markers", name="memory it has", marker=marker, meta=INK)
        drawing.add_trace(trace)
    if peak and run.plan.full_bytes is not None:
        drawing.add_vline(x=(run.plan.full_bytes + run.plan.personal_bytes) / m.MB, line={"dash": "dot", "color": PALETTE[5]})
    if peak:
        drawing.update_yaxes(range=[len(peak) - 0.5, -0.5], autorange=False)  # dots would make room above and below
    note = (
        " Dotted: what training with all experts, and personal ones, was planned to take."
        if run.plan.full_bytes is not None
        else ""
    )
    return Figure(
        "Memory of each client",
        f"Of {_clients_drawn(every, 'each client')}. Bar: the largest measured peak. Mark: the memory it has.{note}",
        drawing,
    )


def partition(run: RunResults) -> Figure:
    """Training examples of each task at each client."""
    clients = run.plan.clients[:MANY_CLIENTS]
    names = list(dict.fromkeys(task for client in clients for task in client.tasks or (client.task,)))
    counts = [[(client.tasks or {client.task: client.examples}).get(name) for name in names] for client in clients]
    drawing = _cells(counts, [client.name for client in clients], names, "examples", "")
    which = _clients_drawn([client.name for client in run.plan.clients], "each client")
    return Figure("Training examples: clients × tasks", f"Of {which}. An empty cell: none of that task.", drawing)


def retained_by_client(run: RunResults, unit: str) -> Figure:
    """What each client's model scored on the retained tasks that are measured in `unit`, and the base."""
    drawing = _drawing("client", f"score ({unit})" if unit else "perplexity (lower is better)")
    drawing.update_xaxes(type="category")
    tasks = [task for task in m.retained_tasks([run]) if m.retained_unit([run], task) == unit]
    for index, task in enumerate(tasks):
        found, known = m.retained_by_client(run, task), m.base([run], task).of(run)
        values = {safe(client): m.shown(each.value, unit) for client, each in found.items() if each.value is not None}
        style = {"color": PALETTE[index % len(PALETTE)], "size": 9}
        if values:
            x, y = list(values), list(values.values())
            drawing.add_trace(go.Scatter(x=x, y=y, name=safe(task), mode="markers", marker=style))
            if known is not None:
                line = {"color": style["color"], "dash": "dot"}
                name = safe(f"{task}, the base")
                drawing.add_trace(go.Scatter(x=x, y=[known] * len(x), name=name, mode="lines", line=line))
    what = "Retained knowledge of each client" + ("" if unit else ": perplexity")
    return Figure(what, "Dots: each client's model after the last round. Dotted: the base before the first.", drawing)


def drift(run: RunResults) -> Figure:
    """How far the routers of each layer drifted, in each client's model and on average."""
    found = m.drift(run)
    drawing = _layers(list(found))
    for number, client in enumerate(list(m.at_the_end(run))[:MANY_CLIENTS] if found else ()):
        values = [(float(layer), each[number]) for layer, each in enumerate(found.values()) if number < len(each)]
        drawing.add_trace(_line(client, values, number, width=1, opacity=0.5, legend=False))
    if found:
        mean = [(float(layer), _mean(each)) for layer, each in enumerate(found.values())]
        drawing.add_trace(_line("mean over clients", mean, 0, width=4, meta=INK))
    text = m.drift_text([run])
    return Figure("Router drift by layer", f"{DRIFT} Text: {text}. Thick: the mean over clients. Thin: each client.", drawing)


def retained_minus_base(groups: Groups) -> list[Figure]:
    """Each method minus the base on the retained tasks, in one figure for each unit."""
    return [_minus_base(groups, unit) for unit in ("%", "")]


def _minus_base(groups: Groups, unit: str) -> Figure:
    runs = all_runs(groups)
    tasks = [task for task in m.retained_tasks(runs) if m.retained_unit(runs, task) == unit]
    drawing = _bars(f"method − base ({'percentage points' if unit else 'perplexity, lower is better'})", len(groups) * len(tasks))
    drawing.update_yaxes(title={"text": "method"})
    for index, task in enumerate(tasks):
        measure = m.retained_minus_base(runs, task)
        values = {label: list(m.by_seed(measure, members).values()) for label, members in groups.items()}
        means = {safe(label): interval(each) for label, each in values.items() if each}
        if means:
            error = {"type": "data", "array": [each.half or 0.0 for each in means.values()], "thickness": 1}
            marker = {"color": PALETTE[index % len(PALETTE)], "size": 10}
            x = [each.mean for each in means.values()]
            look: dict[str, Any] = {"mode": "markers", "marker": marker, "orientation": "h", "showlegend": True}
            drawing.add_trace(go.Scatter(x=x, y=list(means), error_x=error, name=safe(task), **look))
    if drawing.data:
        drawing.update_layout(scattermode="group")  # tasks of one method beside each other, not on each other
        drawing.add_vline(x=0, line={"dash": "dot", "color": PALETTE[6]})
    what = "Retained knowledge against the base" + ("" if unit else ": perplexity")
    caption = (
        "The mean over clients after the last round minus the untouched base. Bars: 95 % Student t interval over seeds, where"
    )
    return Figure(what, f"{caption} there are several. Left of 0 is forgotten{'' if unit else ' less'}.", drawing)


def drift_compared(groups: Groups) -> Figure:
    """One line for each method: the drift of each layer's routers, as the mean over clients and seeds."""
    runs = all_runs(groups)
    layers = m.drift_layers(runs)
    drawing = _layers(list(dict.fromkeys(block for run in runs for block in m.drift(run))))
    for index, (method, members) in enumerate(groups.items()):
        found = [(float(layer), list(m.by_seed(measure, members).values())) for layer, measure in enumerate(layers)]
        points = [(layer, interval(values)) for layer, values in found if values]
        if points and all(each.half is not None for _, each in points):
            drawing.add_trace(_band(points, index, method))
        if points:
            drawing.add_trace(_line(method, [(x, each.mean) for x, each in points], index, width=2.5, group=method))
    band = " Band: 95 % Student t interval over seeds." if max(map(len, groups.values())) > 1 else ""
    caption = f"{DRIFT} Text: {m.drift_text(runs)}. Line: the mean over clients and seeds.{band}"
    return Figure("Router drift by layer", caption, drawing)


def _layers(blocks: Sequence[str]) -> go.Figure:
    """For a value of each MoE layer."""
    drawing = _drawing("layer", m.DRIFT.label)
    labels = m.block_labels(blocks).values()
    ticks = [safe(label.removeprefix("layer ")) for label in labels]
    drawing.update_xaxes(tickmode="array", tickvals=list(range(len(ticks))), ticktext=ticks)
    drawing.update_yaxes(rangemode="tozero")
    return drawing


def compared(groups: Groups, task: str | None, over: str) -> Figure:
    """One line for each method: the mean over seeds, with the 95 % interval as a band where there are seeds for one.

    Methods of which a run lacks the axis (virtual time, where it has no clock) have none.
    """
    axis = AXES[over]
    unit = m.unit(all_runs(groups), task)
    what = "overall" if task is None else task
    drawing = _drawing(axis.label, f"{what} ({unit or 'lower is better'})")
    for index, (method, runs) in enumerate(groups.items()):
        points = list(_mean_points(runs, task, axis))
        if points and all(each.half is not None for _, each in points):
            drawing.add_trace(_band(points, index, method))
        if points:
            drawing.add_trace(_line(method, [(x, each.mean) for x, each in points], index, width=2.5, group=method))
    _tick_rounds(drawing, over, all_runs(groups))
    title = "Overall quality" if task is None else task
    band = "Line: mean over seeds. Band: 95 % Student t interval." if max(map(len, groups.values())) > 1 else "One seed each."
    return Figure(f"{title} over {over}", f"{band} {axis.note}".strip(), drawing)


def spread(groups: Groups) -> Figure:
    """For each method a box of its clients, those of all seeds together."""
    unit = m.unit(all_runs(groups), None)
    drawing = _drawing("", f"quality of a client ({unit})" if unit else "perplexity of a client (lower is better)")
    drawing.update_xaxes(type="category")
    for index, (method, runs) in enumerate(groups.items()):
        ends = [m.client_quality(run, client) for run in runs for client in m.walk_clients(run)]
        values = [end for end in ends if end is not None]
        if len(values) > 1:
            low, lower, median, upper, high = sorted(astuple(m.spread(values, unit)))
            five = {"lowerfence": [low], "q1": [lower], "median": [median], "q3": [upper], "upperfence": [high]}
            color = PALETTE[index % len(PALETTE)]
            drawing.add_trace(go.Box(x=[safe(method)], **five, name=safe(method), marker={"color": color}, showlegend=False))
    seeds = " of all seeds" if max(map(len, groups.values())) > 1 else ""
    caption = f"The clients{seeds} at the last evaluation: box from quartile to quartile, line: median, whiskers: worst and best."
    return Figure("Spread across clients", f"{caption} {_each_client(all_runs(groups))}", drawing)


def tradeoff(groups: Groups, cost: m.Measure) -> Figure:
    """Overall quality against a cost: each seed, each method's mean, and the methods nothing beats on both."""
    overall = m.quality(all_runs(groups), None)
    drawing = _drawing(cost.label, overall.label)
    means = {}
    for index, (method, members) in enumerate(groups.items()):
        pairs = [(cost.of(run), overall.of(run)) for run in members]
        points = [(x, y) for x, y in pairs if x is not None and y is not None]
        if points:
            means[method] = (interval([x for x, _ in points]), interval([y for _, y in points]))
            drawing.add_trace(_dots(method, points, index))
            drawing.add_trace(_mean_dot(method, *means[method], index))
    best = front([(x.mean, y.mean) for x, y in means.values()], higher_is_better=overall.unit == "%")
    if len(best) > 1:
        drawing.add_trace(_line("nothing better on both", best, 0, width=1, dash="dot", meta=INK))
    where = "Upper" if overall.unit == "%" else "Lower"
    caption = (
        f"Large: mean over seeds with its 95 % interval; small: each seed. {where} left is better. Axes need not begin at 0."
    )
    return Figure(f"Quality against {cost.label}", caption, drawing)


def front(points: Sequence[tuple[float, float]], higher_is_better: bool = True) -> Points:
    """The Pareto front of (cost, quality), by cost: each point that costs less than all of at least its quality."""
    sign = 1 if higher_is_better else -1
    best: Points = []
    for x, y in sorted(points, key=lambda point: (point[0], -sign * point[1])):
        if not best or sign * y > sign * best[-1][1]:
            best.append((x, y))
    return best


def experts_map(label: str, run: RunResults) -> dict[str, Any]:
    """What page.js draws the experts × layers map from: for each client, what it held from which round on.

    A layer's experts are a hexadecimal number whose bit e is expert e. What did not change is not repeated. `trained`: for each
    client the rounds of which something came back, and what it trained there, where that is not all that it held. `uses`: in
    thousandths, how a layer's picks were shared out among its experts while a client trained, in each round that tells.
    """
    blocks = run.plan.model.blocks
    sent = {(row.round, client): _masks(each, list(blocks)) for row in m.training(run) for client, each in row.sends.items()}
    trained = m.work(run)
    labels = m.block_labels(list(blocks))
    return {
        "run": label,
        "blocks": [{"label": labels[name], "experts": block.num_experts} for name, block in blocks.items()],
        "rounds": sorted({row.round for row in run.rounds if row.task == "train" and row.holds}),
        "planned": len(list(m.walk_clients(run))),
        "clients": [
            {
                "name": name,
                "holds": _changes(held, list(blocks)),
                "trained": [(round, sent.get((round, name))) for round, _ in trained.get(name, [])],
                "uses": [
                    (row.round, [_shares(row, name, block, plan.num_experts) for block, plan in blocks.items()])
                    for row in m.training(run)
                    if name in row.uses
                ],
            }
            for name, held in m.history(run).items()
        ],
    }


def safe(text: str) -> str:
    """`text` as plotly shows it literally."""
    return escape(text, quote=False)


def _changes(held: Sequence[tuple[int, Holds]], blocks: Sequence[str]) -> list[tuple[int, list[str]]]:
    """The rounds in which a client's experts were not those of the time before."""
    found: list[tuple[int, list[str]]] = []
    for round, holds in held:
        masks = _masks(holds, blocks)
        if not found or found[-1][1] != masks:
            found.append((round, masks))
    return found


def _masks(holds: Holds, blocks: Sequence[str]) -> list[str]:
    return [f"{sum(1 << expert for expert in set(holds.get(block, ()))):x}" for block in blocks]


def _shares(row: Round, client: str, block: str, experts: int) -> list[int]:
    """Of all picks in `block` while `client` trained, those of each expert, in thousandths."""
    picks = dict(zip(row.holds[client].get(block, ()), row.uses[client].get(block, ()), strict=True))
    return [round(1000 * picks.get(expert, 0) / max(sum(picks.values()), 1)) for expert in range(experts)]


def numbers(figure: Figure) -> Table:
    """The numbers a drawing is made of: what one reads who cannot see it. Bands are left out."""
    drawing = figure.drawing
    across, up = (unescape(axis.title.text or "") for axis in (drawing.layout.xaxis, drawing.layout.yaxis))
    traces = [trace for trace in drawing.data if trace.hoverinfo != "skip"]
    if any(trace.type == "heatmap" for trace in traces):
        rows = [(_said(name), *map(_said, row)) for trace in traces for name, row in zip(trace.y, trace.z, strict=True)]
        return Table(figure.title, (up, *map(unescape, traces[0].x)), tuple(rows))
    if any(trace.type == "box" for trace in traces):
        ends = ("lowerfence", "q1", "median", "q3", "upperfence")
        rows = [(unescape(trace.name), *(_said(trace[end][0]) for end in ends)) for trace in traces]
        return Table(figure.title, ("method", "lowest", "lower quartile", "median", "upper quartile", "highest"), tuple(rows))
    lying = any(trace.orientation == "h" for trace in traces)
    points = [list(zip(*((t.y, t.x) if lying else (t.x, t.y)), strict=True)) for t in traces]
    lines = dict(zip((unescape(trace.name) for trace in traces), map(dict, points), strict=True))
    places = list(dict.fromkeys(place for each in points for place, _ in each))
    if not any(len(line) == len(places) for line in lines.values()):  # each has places of its own
        rows = [(name, _said(x), _said(y)) for name, line in lines.items() for x, y in line.items()]
        return Table(figure.title, ("of", across, up), tuple(rows))
    along, told = up if lying else across, across if lying else up
    cells = {place: [_said(line.get(place)) for line in lines.values()] for place in places}
    by_place = Table(f"{figure.title}: {told}", (along, *lines), tuple((_said(place), *row) for place, row in cells.items()))
    return by_place if len(places) > len(lines) else by_place.transposed()


def _said(value: float | str | None) -> str:
    """A number or name in a cell of `numbers`."""
    return unescape(value) if isinstance(value, str) else NONE if value is None else f"{value:,.6g}"


def _points(run: RunResults, client: str | None, task: str | None, axis: m.Axis) -> Points:
    place, unit = axis.of(run), m.unit([run], task)
    rows = m.evaluated(run, client, task)
    return [(place(row.round), m.shown(row.value, unit)) for row in rows if row.value is not None] if place else []


def _mean_points(runs: Sequence[RunResults], task: str | None, axis: m.Axis) -> Iterator[tuple[float, Interval]]:
    """The rounds that all seeds have evaluated: where they lie on average, and the interval of their values."""
    places = [place for run in runs if (place := axis.of(run))]
    if len(places) < len(runs):
        return
    values = [{row.round: row.value for row in m.evaluated(run, None, task)} for run in runs]
    unit = m.unit(runs, task)
    for round in sorted(set.intersection(*(set(each) for each in values)) if values else ()):
        each = [m.shown(value, unit) for value in (of[round] for of in values) if value is not None]
        yield _mean([place(round) for place in places]), interval(each)


def _clients_drawn(clients: Sequence[str], all_of_them: str) -> str:
    return all_of_them if len(clients) <= MANY_CLIENTS else f"the first {MANY_CLIENTS} of {len(clients)} clients"


def _tick_rounds(drawing: go.Figure, over: str, runs: Sequence[RunResults]) -> None:
    if over == "rounds" and max(map(m.rounds_done, runs)) <= FEW_ROUNDS:
        drawing.update_xaxes(dtick=1)


def _each_client(runs: Sequence[RunResults]) -> str:
    return "Each client counts as the mean over its tasks." if len(m.tasks(runs)) > 1 else ""


def _cells(
    z: Sequence[Sequence[float | None]],
    clients: Sequence[str],
    columns: Sequence[str],
    what: str,
    digits: str | None,
    most: float | None = None,
) -> go.Figure:
    """A map of a row for each client, of numbers that are written into it unless `digits` is None."""
    drawing = _drawing("task", "client", height=110 + LINE_OF_A_ROW * len(clients))
    if z:
        drawing.add_trace(
            go.Heatmap(
                z=z,
                x=[safe(name) for name in columns],
                y=[safe(name) for name in clients],
                texttemplate=None if digits is None else f"%{{z:{digits}}}" if digits else "%{z}",
                colorbar={"title": {"text": what}, "thickness": 12},
                hovertemplate=f"%{{y}}, %{{x}}: %{{z:.3~g}}, {safe(what)}<extra></extra>",
                meta={"theme": "heat" if digits is None else "cells"},
                zmin=0,
                zmax=most or max((value for row in z for value in row if value is not None), default=1) or 1,
                xgap=1,
                ygap=1,
            )
        )
    drawing.update_yaxes(autorange="reversed", type="category", showgrid=False)
    drawing.update_xaxes(type="category", showgrid=False)
    return drawing


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _drawing(x: str, y: str, height: int = 420) -> go.Figure:
    drawing = go.Figure()
    drawing.update_layout(
        template="none",
        height=height,
        margin={"l": 56, "r": 16, "t": 32, "b": 48},
        legend={"orientation": "h", "yref": "container", "yanchor": "bottom", "y": 0, "xanchor": "left", "x": 0},
        hovermode="closest",
        hoverlabel={"namelength": -1},
    )
    drawing.update_xaxes(title={"text": safe(x)}, automargin=True, zeroline=False)
    drawing.update_yaxes(title={"text": safe(y)}, automargin=True, zeroline=False)
    return drawing


def _bars(x: str, number: int) -> go.Figure:
    drawing = _drawing(x, "client", height=130 + LINE_OF_A_ROW * number)
    drawing.update_yaxes(autorange="reversed", type="category")
    return drawing


def _bar(name: str, values: Mapping[str, float], index: int) -> go.Bar:
    names = [safe(client) for client in values]
    text = "%{y}: %{x:,.2f} MB<extra>" + name + "</extra>"
    return go.Bar(
        x=list(values.values()),
        y=names,
        orientation="h",
        name=name,
        marker={"color": PALETTE[index]},
        hovertemplate=text,
    )


def _line(
    name: str,
    points: Points,
    index: int,
    width: float,
    opacity: float = 1.0,
    legend: bool = True,
    group: str | None = None,
    dash: str | None = None,
    meta: Mapping[str, str] | None = None,
) -> go.Scatter:
    style = dash or DASHES[index // len(PALETTE) % len(DASHES)]
    return go.Scatter(
        x=[x for x, _ in points],
        y=[y for _, y in points],
        name=safe(name),
        mode="lines+markers" if width > 1 else "lines",
        line={"color": PALETTE[index % len(PALETTE)], "width": width, "dash": style},
        marker={"size": 5},
        opacity=opacity,
        showlegend=legend,
        legendgroup=safe(group or name),
        meta=meta,
    )


def _band(points: Sequence[tuple[float, Interval]], index: int, method: str) -> go.Scatter:
    """A closed area from all lower ends to all upper ends and back."""
    ends = [(x, each.mean - (each.half or 0.0), each.mean + (each.half or 0.0)) for x, each in points]
    return go.Scatter(
        x=[x for x, _, _ in ends] + [x for x, _, _ in reversed(ends)],
        y=[low for _, low, _ in ends] + [high for _, _, high in reversed(ends)],
        fill="toself",
        fillcolor=PALETTE[index % len(PALETTE)],
        opacity=0.12,
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
        legendgroup=safe(method),
    )


def _dots(method: str, points: Points, index: int) -> go.Scatter:
    return go.Scatter(
        x=[x for x, _ in points],
        y=[y for _, y in points],
        name=safe(f"{method}, each seed"),
        mode="markers",
        marker={**_mark(index), "size": 6},
        opacity=0.5,
        showlegend=False,
        legendgroup=safe(method),
    )


def _mark(index: int) -> dict[str, str]:
    """Colour and symbol of the `index`th of several: where colours begin again, symbols go on."""
    return {"color": PALETTE[index % len(PALETTE)], "symbol": SYMBOLS[index // len(PALETTE) % len(SYMBOLS)]}


def _mean_dot(method: str, x: Interval, y: Interval, index: int) -> go.Scatter:
    return go.Scatter(
        x=[x.mean],
        y=[y.mean],
        error_x=_error(x),
        error_y=_error(y),
        name=safe(method),
        mode="markers",
        marker={**_mark(index), "size": 13},
        cliponaxis=False,
        legendgroup=safe(method),
    )


def _error(value: Interval) -> dict[str, Any]:
    return {"visible": False} if value.half is None else {"type": "data", "array": [value.half], "thickness": 1}
