"""The figures of a single run."""

from collections.abc import Callable
from statistics import fmean

import plotly.graph_objects as go

from fedexperts.report import axes, data_figures, expert_sets, measures, resources, retention, scores
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
    """All figures of a single run that have data, by topic."""
    return with_data(
        {
            "quality": [curves(run, over, unit) for unit in ("%", "") for over in axes.AXES],
            "training": [training_loss(run)],
            "clients": [spread_over_rounds(run), quality_by_client(run)],
            "experts": [experts_over_rounds(run), overlap(run)],
            "costs": [bytes_by_client(run), memory_by_client(run)],
            "data": [partition(run), *data_figures.labels(run), *data_figures.lengths(run)],
            "retained": [retained_by_client(run, unit) for unit in ("%", "")],
            "drift": [drift(run)],
        }
    )


def curves(run: RunResults, over: str, unit: str) -> Figure:
    """The quality of each task with this `unit`, of each of its clients, and the mean over tasks."""
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
        name = f"{task} ({scores.main_metric([run], task)})"
        drawing.add_trace(line_trace(name, _points(run, None, task, axis), index, width=2, group=task))
    if len(tasks) > 1 and scores.unit([run], None) == unit:
        drawing.add_trace(line_trace("mean over tasks", _points(run, None, None, axis), 0, width=4, meta=INK))
    tick_rounds(drawing, over, [run])
    what = "Quality" if unit else "Perplexity"
    caption = f"Thick: the mean over tasks. Middle: each task. Thin: {clients_drawn(every, 'each client')} on its task."
    return Figure(f"{what} over {over}", f"{caption} {axis.note}".strip(), drawing)


def training_loss(run: RunResults) -> Figure:
    """The mean training loss of each round, and of each client in its rounds."""
    drawing, every = blank("round", "training loss"), run.client_names
    rows = [row for row in run.rounds if row.task == "train" and row.loss is not None]
    losses = {
        name: [(float(row.round), row.loss) for row in run.work_of.get(name, ()) if row.task == "train" and row.loss is not None]
        for name in every[:MANY_CLIENTS]
    }
    for index, (name, points) in enumerate(losses.items() if rows else ()):
        if points:
            drawing.add_trace(line_trace(name, points, index, width=1, opacity=0.5, legend=False))
    if rows:
        mean = [(float(row.round), row.loss) for row in rows if row.loss is not None]
        drawing.add_trace(line_trace("mean over clients", mean, 0, width=4, meta=INK))
    tick_rounds(drawing, "rounds", [run])
    caption = (
        f"Mean over local steps, as clients report it. Thick: the mean of a round. Thin: {clients_drawn(every, 'each client')}."
    )
    return Figure("Training loss over rounds", caption, drawing)


def spread_over_rounds(run: RunResults) -> Figure:
    """The worst client, the quartiles and the best client at each evaluation."""
    unit = scores.unit([run], None)
    drawing = blank("round", f"quality of a client ({unit})" if unit else "perplexity of a client (lower is better)")
    by_round = scores.quality_of_clients(run).items()
    spreads = {round: scores.spread(list(clients.values()), unit) for round, clients in by_round if len(clients) > 1}
    for index, name in enumerate(SPREAD if spreads else ()):
        points = [(float(round), getattr(each, name)) for round, each in spreads.items()]
        line = {"width": 4.0, "meta": INK} if name == "median" else {"width": 2.0}
        drawing.add_trace(line_trace(SPREAD[name], points, index, dash=DASHES[(index - 2) % 2], **line))
    tick_rounds(drawing, "rounds", [run])
    caption = "Over the clients that were scored in a round. Dashed: the quartiles; half of the clients lie between them."
    return Figure("Spread across clients", f"{caption} {client_mean_note([run])}", drawing)


def quality_by_client(run: RunResults) -> Figure:
    """The quality of each client on each of its tasks at the last evaluation; no data if there is a single task."""
    tasks, every = [task for task in scores.tasks([run]) if scores.unit([run], task) == "%"], run.client_names
    scored = [client for client in every if any(scores.last_evaluation(run, client, task) for task in tasks)]
    ends = {client: [scores.last_evaluation(run, client, task) for task in tasks] for client in scored[:MANY_CLIENTS]}
    cells = [
        [scores.to_unit(row.value, "%") if row and row.value is not None else None for row in rows] for rows in ends.values()
    ]
    drawing = heatmap(cells if len(tasks) > 1 else [], list(ends), tasks, "quality (%)", ".0f")
    caption = f"The main metric of each task at the last evaluation, in %, of {clients_drawn(scored, 'each client')}."
    return Figure("Quality: clients × tasks", f"{caption} Empty cell: the client does not have that task.", drawing)


def overlap(run: RunResults) -> Figure:
    """The Jaccard index of the experts of each two clients in their last round; no data if all train the same experts."""
    every = expert_sets.trained_experts(run)
    clients = dict(list(every.items())[:MANY_CLIENTS])
    cells = [[expert_sets.jaccard(one, other) for other in clients.values()] for one in clients.values()]
    differ = any(value < 1 for row in cells for value in row)
    drawing = heatmap(cells if differ else [], list(clients), list(clients), "overlap", None, most=1.0)
    drawing.update_xaxes(title={"text": "client"}, tickangle=-90)
    drawing.update_layout(height=150 + LINE_OF_A_ROW * len(clients) if len(clients) > 10 else 340)
    caption = "Jaccard index of the experts that two clients trained in their last rounds, over all layers."
    which = clients_drawn(list(every), "Clients")
    return Figure("Overlap between clients", f"{caption} {which[0].upper()}{which[1:]} sorted by main task.", drawing)


def experts_over_rounds(run: RunResults) -> Figure:
    """How many experts the clients of each round were assigned."""
    drawing = blank("round", f"experts held, of {expert_sets.total_experts(run)}")
    counts = {
        row.round: [expert_sets.num_experts(holds) for holds in row.holds.values()]
        for row in run.rounds
        if row.task == "train" and row.holds
    }
    summaries: dict[str, Callable[[list[int]], float]] = {"most": max, "mean": fmean, "least": min}
    for index, (name, of) in enumerate(summaries.items() if counts else ()):
        points = [(float(round), float(of(each))) for round, each in sorted(counts.items())]
        drawing.add_trace(line_trace(name, points, index, width=3 if name == "mean" else 1.5))
    drawing.update_yaxes(rangemode="tozero")
    tick_rounds(drawing, "rounds", [run])
    return Figure(
        "Experts held by the clients of each round",
        "Over all layers; each round shows the clients that took part in it.",
        drawing,
    )


def bytes_by_client(run: RunResults) -> Figure:
    """The bytes that each client received and sent."""
    every = run.client_names
    ledger = {name: resources.cost_rows(run, name) for name in every[:MANY_CLIENTS]}
    drawing = blank_bars("MB of the whole run (10^6 bytes)", len(ledger))
    down = {name: sum(row.bytes_down for row in rows) / MB for name, rows in ledger.items()}
    up = {name: sum(row.bytes_up for row in rows) / MB for name, rows in ledger.items()}
    for index, (name, values) in enumerate((("down", down), ("up", up)) if run.ledger else ()):
        drawing.add_trace(bar_trace(name, values, index))
    drawing.update_layout(barmode="stack", legend={"traceorder": "normal"})
    which = clients_drawn(every, "each client")
    return Figure("Bytes of each client", f"Of {which}: down from the server and up to it, without evaluations.", drawing)


def memory_by_client(run: RunResults) -> Figure:
    """Each client's largest measured peak beside its memory."""
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
        trace = go.Scatter(x=list(limits.values()), y=names, mode="markers", name="memory", marker=marker, meta=INK)
        drawing.add_trace(trace)
    if peak and run.plan.full_bytes is not None:
        drawing.add_vline(x=(run.plan.full_bytes + run.plan.personal_bytes) / MB, line={"dash": "dot", "color": PALETTE[5]})
    if peak:
        drawing.update_yaxes(range=[len(peak) - 0.5, -0.5], autorange=False)  # markers would add space above and below
    note = (
        " Dotted: the planned memory for training with all experts and personal ones." if run.plan.full_bytes is not None else ""
    )
    return Figure(
        "Memory of each client",
        f"Of {clients_drawn(every, 'each client')}. Bar: the largest measured peak. Mark: the client's memory.{note}",
        drawing,
    )


def partition(run: RunResults) -> Figure:
    """Training examples of each task at each client."""
    clients = run.plan.clients[:MANY_CLIENTS]
    names = list(dict.fromkeys(task for client in clients for task in client.tasks or (client.task,)))
    counts = [[(client.tasks or {client.task: client.examples}).get(name) for name in names] for client in clients]
    drawing = heatmap(counts, [client.name for client in clients], names, "examples", "")
    which = clients_drawn([client.name for client in run.plan.clients], "each client")
    return Figure("Training examples: clients × tasks", f"Of {which}. Empty cell: none of that task.", drawing)


def retained_by_client(run: RunResults, unit: str) -> Figure:
    """The scores of each client's model and of the base model on the retained tasks with this `unit`."""
    drawing = blank("client", f"score ({unit})" if unit else "perplexity (lower is better)")
    drawing.update_xaxes(type="category")
    tasks = [task for task in retention.retained_tasks([run]) if retention.retained_unit([run], task) == unit]
    for index, task in enumerate(tasks):
        by_client, base = retention.retained_by_client(run, task), measures.base([run], task).of(run)
        values = {safe(client): scores.to_unit(each.value, unit) for client, each in by_client.items() if each.value is not None}
        style = {"color": PALETTE[index % len(PALETTE)], "size": 9}
        if values:
            x, y = list(values), list(values.values())
            drawing.add_trace(go.Scatter(x=x, y=y, name=safe(task), mode="markers", marker=style))
            if base is not None:
                line = {"color": style["color"], "dash": "dot"}
                name = safe(f"{task}, base model")
                drawing.add_trace(go.Scatter(x=x, y=[base] * len(x), name=name, mode="lines", line=line))
    what = "Retained knowledge of each client" + ("" if unit else ": perplexity")
    return Figure(what, "Dots: each client's model after the last round. Dotted: the base model before the first.", drawing)


def drift(run: RunResults) -> Figure:
    """The router drift of each layer, in each client's model and on average."""
    by_block = retention.drift(run)
    drawing = blank_layers(list(by_block))
    for number, client in enumerate(list(retention.final_by_client(run))[:MANY_CLIENTS] if by_block else ()):
        values = [(float(layer), each[number]) for layer, each in enumerate(by_block.values()) if number < len(each)]
        drawing.add_trace(line_trace(client, values, number, width=1, opacity=0.5, legend=False))
    if by_block:
        mean = [(float(layer), fmean(each)) for layer, each in enumerate(by_block.values())]
        drawing.add_trace(line_trace("mean over clients", mean, 0, width=4, meta=INK))
    text = retention.drift_text([run])
    return Figure(
        "Router drift by layer", f"{DRIFT_CAPTION} Text: {text}. Thick: the mean over clients. Thin: each client.", drawing
    )


def _points(run: RunResults, client: str | None, task: str | None, axis: Axis) -> Points:
    place, unit = axis.of(run), scores.unit([run], task)
    rows = scores.evaluations(run, client, task)
    return [(place(row.round), scores.to_unit(row.value, unit)) for row in rows if row.value is not None] if place else []
