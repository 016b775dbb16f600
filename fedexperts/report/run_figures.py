"""The figures of a single run."""

from collections.abc import Callable
from statistics import fmean

import plotly.graph_objects as go

from fedexperts.report import axes, expert_sets, measures, resources, retention, scores
from fedexperts.report.axes import Axis
from fedexperts.report.read import RunResults
from fedexperts.report.resources import MB
from fedexperts.report.traces import (
    DASHES,
    DRIFT_CAPTION,
    INK,
    LINE_OF_A_ROW,
    MANY_CLIENTS,
    PALETTE,
    Figure,
    Points,
    bar_trace,
    blank,
    blank_bars,
    blank_layers,
    client_mean_note,
    clients_drawn,
    heatmap,
    line_trace,
    safe,
    tick_rounds,
    with_data,
)

SPREAD = {
    "best": "best client",
    "upper": "upper quartile",
    "median": "median client",
    "lower": "lower quartile",
    "worst": "worst client",
}


def one_run(run: RunResults) -> dict[str, list[Figure]]:
    """All figures of a single run, by what they are about; those without data are left out."""
    return with_data(
        {
            "quality": [curves(run, over, unit) for unit in ("%", "") for over in axes.AXES],
            "clients": [spread_over_rounds(run), quality_by_client(run)],
            "experts": [experts_over_rounds(run), overlap(run)],
            "costs": [bytes_by_client(run), memory_by_client(run)],
            "data": [partition(run)],
            "retained": [retained_by_client(run, unit) for unit in ("%", "")],
            "drift": [drift(run)],
        }
    )


def curves(run: RunResults, over: str, unit: str) -> Figure:
    """Quality of each task measured in `unit`, of each of its clients, and the mean over tasks."""
    axis = axes.AXES[over]
    drawing = blank(axis.label, f"quality ({unit})" if unit else "perplexity (lower is better)")
    tasks = [task for task in scores.tasks([run]) if scores.unit([run], task) == unit] if axis.of(run) else []
    every = run.client_names
    drawn = set(every[:MANY_CLIENTS])
    for index, task in enumerate(tasks):
        for client in (name for name in scores.clients_of(run, task) if name in drawn):
            points = _points(run, client, task, axis)
            drawing.add_trace(line_trace(f"{client}: {task}", points, index, width=1, opacity=0.5, legend=False, group=task))
    for index, task in enumerate(tasks):
        name = f"{task} ({scores.metric([run], task)})"
        drawing.add_trace(line_trace(name, _points(run, None, task, axis), index, width=2, group=task))
    if len(tasks) > 1 and scores.unit([run], None) == unit:
        drawing.add_trace(line_trace("mean over tasks", _points(run, None, None, axis), 0, width=4, meta=INK))
    tick_rounds(drawing, over, [run])
    what = "Quality" if unit else "Perplexity"
    caption = f"Thick: the mean over tasks. Middle: each task. Thin: {clients_drawn(every, 'each client')} on its task."
    return Figure(f"{what} over {over}", f"{caption} {axis.note}".strip(), drawing)


def spread_over_rounds(run: RunResults) -> Figure:
    """The worst, the quartiles and the best of the clients at each evaluation."""
    unit = scores.unit([run], None)
    drawing = blank("round", f"quality of a client ({unit})" if unit else "perplexity of a client (lower is better)")
    found = {
        round: scores.spread(list(each.values()), unit) for round, each in scores.quality_of_clients(run).items() if len(each) > 1
    }
    for index, name in enumerate(SPREAD if found else ()):
        points = [(float(round), getattr(each, name)) for round, each in found.items()]
        line = {"width": 4.0, "meta": INK} if name == "median" else {"width": 2.0}
        drawing.add_trace(line_trace(SPREAD[name], points, index, dash=DASHES[(index - 2) % 2], **line))
    tick_rounds(drawing, "rounds", [run])
    caption = "Of the clients that were scored in a round. Dashed: the quartiles, between which half of them lie."
    return Figure("Spread across clients", f"{caption} {client_mean_note([run])}", drawing)


def quality_by_client(run: RunResults) -> Figure:
    """What each client reaches on each of its tasks at the last evaluation; nothing where there is a single task."""
    tasks, every = [task for task in scores.tasks([run]) if scores.unit([run], task) == "%"], run.client_names
    scored = [client for client in every if any(scores.last(run, client, task) for task in tasks)]
    ends = {client: [scores.last(run, client, task) for task in tasks] for client in scored[:MANY_CLIENTS]}
    cells = [[scores.shown(row.value, "%") if row and row.value is not None else None for row in rows] for rows in ends.values()]
    drawing = heatmap(cells if len(tasks) > 1 else [], list(ends), tasks, "quality (%)", ".0f")
    caption = f"The main metric of each task at the last evaluation, in %, of {clients_drawn(scored, 'each client')}."
    return Figure("Quality: clients × tasks", f"{caption} An empty cell: it has none of that task.", drawing)


def overlap(run: RunResults) -> Figure:
    """How alike the experts are that two clients trained the last time; nothing where all are the same."""
    found = expert_sets.worked_with(run)
    chosen = dict(list(found.items())[:MANY_CLIENTS])
    cells = [[expert_sets.alike(one, other) for other in chosen.values()] for one in chosen.values()]
    differ = any(value < 1 for row in cells for value in row)
    drawing = heatmap(cells if differ else [], list(chosen), list(chosen), "overlap", None, most=1.0)
    drawing.update_xaxes(title={"text": "client"}, tickangle=-90)
    drawing.update_layout(height=150 + LINE_OF_A_ROW * len(chosen) if len(chosen) > 10 else 340)
    caption = "Experts that both trained the last time, of those that either did, over all layers."
    which = clients_drawn(list(found), "Clients")
    return Figure("Overlap between clients", f"{caption} {which[0].upper()}{which[1:]} in order of their main tasks.", drawing)


def experts_over_rounds(run: RunResults) -> Figure:
    """How many experts the clients of each round held."""
    drawing = blank("round", f"experts held, of {expert_sets.experts_of(run)}")
    counts = {
        row.round: [expert_sets.count(holds) for holds in row.holds.values()]
        for row in run.rounds
        if row.task == "train" and row.holds
    }
    shown: dict[str, Callable[[list[int]], float]] = {"most": max, "mean": fmean, "least": min}
    for index, (name, of) in enumerate(shown.items() if counts else ()):
        points = [(float(round), float(of(each))) for round, each in sorted(counts.items())]
        drawing.add_trace(line_trace(name, points, index, width=3 if name == "mean" else 1.5))
    drawing.update_yaxes(rangemode="tozero")
    tick_rounds(drawing, "rounds", [run])
    return Figure("Experts held by the clients of each round", "Over all layers; each round shows who took part in it.", drawing)


def bytes_by_client(run: RunResults) -> Figure:
    """Bytes each client got and sent."""
    every = run.client_names
    work = {name: resources.counted(run, name) for name in every[:MANY_CLIENTS]}
    drawing = blank_bars("MB of the whole run (10^6 bytes)", len(work))
    down = {name: sum(row.bytes_down for row in rows) / MB for name, rows in work.items()}
    up = {name: sum(row.bytes_up for row in rows) / MB for name, rows in work.items()}
    for index, (name, values) in enumerate((("down", down), ("up", up)) if run.ledger else ()):
        drawing.add_trace(bar_trace(name, values, index))
    drawing.update_layout(barmode="stack", legend={"traceorder": "normal"})
    which = clients_drawn(every, "each client")
    return Figure(
        "Bytes of each client", f"For {which}: down from the server and up to it; evaluations are not counted.", drawing
    )


def memory_by_client(run: RunResults) -> Figure:
    """Each client's largest measured peak against the memory it has."""
    every, measured = run.client_names, resources.peak_by_client(run)
    peak = {name: measured[name] / MB for name in every[:MANY_CLIENTS] if name in measured}
    limits = {
        client.name: client.memory_bytes / MB
        for client in run.plan.clients
        if client.memory_bytes is not None and client.name in peak
    }
    drawing = blank_bars("MB (10^6 bytes)", len(peak))
    if peak:
        drawing.add_trace(bar_trace("largest peak", peak, 0))
    if limits:
        names = [safe(name) for name in limits]
        marker = {"symbol": "line-ns-open", "size": 12, "line": {"width": 3}}
        trace = go.Scatter(x=list(limits.values()), y=names, mode="markers", name="memory it has", marker=marker, meta=INK)
        drawing.add_trace(trace)
    if peak and run.plan.full_bytes is not None:
        drawing.add_vline(x=(run.plan.full_bytes + run.plan.personal_bytes) / MB, line={"dash": "dot", "color": PALETTE[5]})
    if peak:
        drawing.update_yaxes(range=[len(peak) - 0.5, -0.5], autorange=False)  # dots would make room above and below
    note = (
        " Dotted: what training with all experts, and personal ones, was planned to take."
        if run.plan.full_bytes is not None
        else ""
    )
    return Figure(
        "Memory of each client",
        f"Of {clients_drawn(every, 'each client')}. Bar: the largest measured peak. Mark: the memory it has.{note}",
        drawing,
    )


def partition(run: RunResults) -> Figure:
    """Training examples of each task at each client."""
    clients = run.plan.clients[:MANY_CLIENTS]
    names = list(dict.fromkeys(task for client in clients for task in client.tasks or (client.task,)))
    counts = [[(client.tasks or {client.task: client.examples}).get(name) for name in names] for client in clients]
    drawing = heatmap(counts, [client.name for client in clients], names, "examples", "")
    which = clients_drawn([client.name for client in run.plan.clients], "each client")
    return Figure("Training examples: clients × tasks", f"Of {which}. An empty cell: none of that task.", drawing)


def retained_by_client(run: RunResults, unit: str) -> Figure:
    """What each client's model scored on the retained tasks that are measured in `unit`, and the base."""
    drawing = blank("client", f"score ({unit})" if unit else "perplexity (lower is better)")
    drawing.update_xaxes(type="category")
    tasks = [task for task in retention.retained_tasks([run]) if retention.retained_unit([run], task) == unit]
    for index, task in enumerate(tasks):
        found, known = retention.retained_by_client(run, task), measures.base([run], task).of(run)
        values = {safe(client): scores.shown(each.value, unit) for client, each in found.items() if each.value is not None}
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
    found = retention.drift(run)
    drawing = blank_layers(list(found))
    for number, client in enumerate(list(retention.at_the_end(run))[:MANY_CLIENTS] if found else ()):
        values = [(float(layer), each[number]) for layer, each in enumerate(found.values()) if number < len(each)]
        drawing.add_trace(line_trace(client, values, number, width=1, opacity=0.5, legend=False))
    if found:
        mean = [(float(layer), fmean(each)) for layer, each in enumerate(found.values())]
        drawing.add_trace(line_trace("mean over clients", mean, 0, width=4, meta=INK))
    text = retention.drift_text([run])
    return Figure(
        "Router drift by layer", f"{DRIFT_CAPTION} Text: {text}. Thick: the mean over clients. Thin: each client.", drawing
    )


def _points(run: RunResults, client: str | None, task: str | None, axis: Axis) -> Points:
    place, unit = axis.of(run), scores.unit([run], task)
    rows = scores.evaluated(run, client, task)
    return [(place(row.round), scores.shown(row.value, unit)) for row in rows if row.value is not None] if place else []
