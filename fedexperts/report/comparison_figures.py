"""The figures of several runs side by side, and of several settings."""

from collections.abc import Iterator, Sequence
from dataclasses import astuple, replace
from statistics import fmean
from typing import Any

import plotly.graph_objects as go

from fedexperts.report import axes, measures, reference_lines, retention, scores
from fedexperts.report.axes import Axis
from fedexperts.report.measures import Measure
from fedexperts.report.read import Groups, RunResults, Settings, all_runs
from fedexperts.report.stats import Interval, interval
from fedexperts.report.traces import (
    DASHES,
    DRIFT_CAPTION,
    INK,
    PALETTE,
    Figure,
    Points,
    band_trace,
    blank,
    blank_bars,
    blank_layers,
    client_mean_note,
    line_trace,
    mean_dot,
    safe,
    seed_dots,
    tick_rounds,
    with_data,
)


def several(groups: Groups) -> dict[str, list[Figure]]:
    """All figures of several runs that have data, by topic."""
    overall = [*(compared(groups, None, over) for over in axes.AXES), *tradeoffs(groups), spread(groups)]
    drawn = {"overall": overall, "each task": each_task(groups)}
    drawn["training"] = [training_loss(groups)]
    return with_data({**drawn, "retained": retained_minus_base(groups), "drift": [drift_compared(groups)]})


def several_settings(settings: Settings) -> dict[str, list[Figure]]:
    """The overall quality in each setting over each of `AXES`, on a common scale; then the other figures of each setting."""
    side_by_side = {
        over: _on_one_scale([_titled(name, compared(groups, None, over)) for name, groups in settings.items()])
        for over in axes.AXES
    }
    within = {
        f"setting {name}": [
            _titled(name, each)
            for each in [*tradeoffs(groups), spread(groups), *each_task(groups), training_loss(groups), *against_base(groups)]
        ]
        for name, groups in settings.items()
    }
    return with_data(side_by_side | within)


def tradeoffs(groups: Groups) -> list[Figure]:
    """Overall quality against bytes, memory and time (virtual time if there is a clock, else client seconds)."""
    return [
        tradeoff(groups, cost)
        for cost in (measures.SENT, measures.PEAK, *(measures.times(all_runs(groups)) or [measures.SECONDS]))
    ]


def each_task(groups: Groups) -> list[Figure]:
    """The quality of each task over rounds."""
    return [compared(groups, task, "rounds") for task in scores.tasks(all_runs(groups))]


def against_base(groups: Groups) -> list[Figure]:
    """Retained knowledge and router drift."""
    return [*retained_minus_base(groups), drift_compared(groups)]


def _titled(setting: str, figure: Figure) -> Figure:
    return replace(figure, title=f"{setting}: {figure.title}")


def _on_one_scale(figures: list[Figure]) -> list[Figure]:
    """`figures`, where those with the same title on the vertical axis get the same range there."""
    for label in {figure.drawing.layout.yaxis.title.text for figure in figures}:
        same = [figure.drawing for figure in figures if figure.drawing.layout.yaxis.title.text == label]
        values = [value for drawing in same for trace in drawing.data for value in trace.y]
        if values:
            low, high = min(values), max(values)
            margin = 0.05 * (high - low) or 1.0
            for drawing in same:
                drawing.update_yaxes(range=[low - margin, high + margin])
    return figures


def compared(groups: Groups, task: str | None, over: str) -> Figure:
    """A line per method: the mean over seeds, with the 95 % interval as a band if there are several seeds.

    A method with a run that lacks the axis (virtual time without a clock) has no line.
    """
    axis = axes.AXES[over]
    unit = scores.unit(all_runs(groups), task)
    what = "overall" if task is None else task
    drawing = blank(axis.label, f"{what} ({unit or 'lower is better'})")
    for index, (method, runs) in enumerate(groups.items()):
        points = list(_mean_points(runs, task, axis))
        if points and all(each.half is not None for _, each in points):
            drawing.add_trace(band_trace(points, index, method))
        if points:
            drawing.add_trace(line_trace(method, [(x, each.mean) for x, each in points], index, width=2.5, group=method))
    add_reference_lines(drawing, groups, task)
    tick_rounds(drawing, over, all_runs(groups))
    title = "Overall quality" if task is None else task
    band = "Line: mean over seeds. Band: 95 % Student t interval." if max(map(len, groups.values())) > 1 else "One seed each."
    return Figure(f"{title} over {over}", f"{band} {axis.note}".strip(), drawing)


def add_reference_lines(drawing: go.Figure, groups: Groups, task: str | None) -> None:
    """Adds a thin level line for each reference line, as wide as what is drawn; none where nothing is."""
    across = [x for trace in drawing.data for x in trace.x]
    measure = measures.quality(all_runs(groups), task)
    levels = {name: measures.over_seeds(measure, runs) for name, runs in reference_lines.of_groups(groups).items()}
    for index, (name, level) in enumerate(levels.items()):
        if across and level is not None:
            ends = [(min(across), level.mean), (max(across), level.mean)]
            drawing.add_trace(line_trace(name, ends, index, width=1, dash=DASHES[1 + index % 3], meta=INK))


def _mean_points(runs: Sequence[RunResults], task: str | None, axis: Axis) -> Iterator[tuple[float, Interval]]:
    """Of the rounds that were evaluated in all seeds, the mean position on the axis and the interval of the values."""
    places = [place for run in runs if (place := axis.of(run))]
    if len(places) < len(runs):
        return
    values = [{row.round: row.value for row in scores.evaluations(run, None, task)} for run in runs]
    unit = scores.unit(runs, task)
    for round in sorted(set.intersection(*(set(each) for each in values)) if values else ()):
        each = [scores.to_unit(value, unit) for value in (of[round] for of in values) if value is not None]
        yield fmean([place(round) for place in places]), interval(each)


def training_loss(groups: Groups) -> Figure:
    """A line per method: the mean training loss of each round that all its seeds have, as the mean over seeds."""
    drawing = blank("round", "training loss")
    for index, (method, runs) in enumerate(groups.items()):
        losses = [{row.round: row.loss for row in run.rounds if row.task == "train" and row.loss is not None} for run in runs]
        shared = sorted(set.intersection(*map(set, losses))) if losses else []
        points = [(float(round), interval([each[round] for each in losses])) for round in shared]
        if points and all(each.half is not None for _, each in points):
            drawing.add_trace(band_trace(points, index, method))
        if points:
            drawing.add_trace(line_trace(method, [(x, each.mean) for x, each in points], index, width=2.5, group=method))
    tick_rounds(drawing, "rounds", all_runs(groups))
    band = "Line: mean over seeds. Band: 95 % Student t interval." if max(map(len, groups.values())) > 1 else "One seed each."
    caption = f"The mean over the clients of each round of their mean over local steps. {band}"
    return Figure("Training loss over rounds", f"{caption} Methods may add terms of their own to the loss.", drawing)


def spread(groups: Groups) -> Figure:
    """A box per method over its clients, those of all seeds together."""
    unit = scores.unit(all_runs(groups), None)
    drawing = blank("", f"quality of a client ({unit})" if unit else "perplexity of a client (lower is better)")
    drawing.update_xaxes(type="category")
    for index, (method, runs) in enumerate(groups.items()):
        ends = [scores.client_quality(run, client) for run in runs for client in run.client_names]
        values = [end for end in ends if end is not None]
        if len(values) > 1:
            low, lower, median, upper, high = sorted(astuple(scores.spread(values, unit)))
            five = {"lowerfence": [low], "q1": [lower], "median": [median], "q3": [upper], "upperfence": [high]}
            color = PALETTE[index % len(PALETTE)]
            drawing.add_trace(go.Box(x=[safe(method)], **five, name=safe(method), marker={"color": color}, showlegend=False))
    seeds = " of all seeds" if max(map(len, groups.values())) > 1 else ""
    caption = f"The clients{seeds} at the last evaluation. Box: quartiles; line: median; whiskers: worst and best client."
    return Figure("Spread across clients", f"{caption} {client_mean_note(all_runs(groups))}", drawing)


def tradeoff(groups: Groups, cost: Measure) -> Figure:
    """Overall quality against a cost: each seed, the mean of each method, and the Pareto front of the means."""
    overall = measures.quality(all_runs(groups), None)
    drawing = blank(cost.label, overall.label)
    means = {}
    for index, (method, members) in enumerate(groups.items()):
        pairs = [(cost.of(run), overall.of(run)) for run in members]
        points = [(x, y) for x, y in pairs if x is not None and y is not None]
        if points:
            means[method] = (interval([x for x, _ in points]), interval([y for _, y in points]))
            drawing.add_trace(seed_dots(method, points, index))
            drawing.add_trace(mean_dot(method, *means[method], index))
    best = front([(x.mean, y.mean) for x, y in means.values()], higher_is_better=overall.unit == "%")
    if len(best) > 1:
        drawing.add_trace(line_trace("Pareto front", best, 0, width=1, dash="dot", meta=INK))
    where = "Upper" if overall.unit == "%" else "Lower"
    caption = f"Large: mean over seeds with its 95 % interval; small: each seed. {where} left is better. Axes may not start at 0."
    return Figure(f"Quality against {cost.label}", caption, drawing)


def front(points: Sequence[tuple[float, float]], higher_is_better: bool = True) -> Points:
    """The Pareto front of (cost, quality), by cost: every point that is cheaper than all points of at least its quality."""
    sign = 1 if higher_is_better else -1
    best: Points = []
    for x, y in sorted(points, key=lambda point: (point[0], -sign * point[1])):
        if not best or sign * y > sign * best[-1][1]:
            best.append((x, y))
    return best


def retained_minus_base(groups: Groups) -> list[Figure]:
    """Each method minus the base model on the retained tasks, in a figure per unit."""
    return [_minus_base(groups, unit) for unit in ("%", "")]


def _minus_base(groups: Groups, unit: str) -> Figure:
    runs = all_runs(groups)
    tasks = [task for task in retention.retained_tasks(runs) if retention.retained_unit(runs, task) == unit]
    drawing = blank_bars(
        f"method − base ({'percentage points' if unit else 'perplexity, lower is better'})", len(groups) * len(tasks)
    )
    drawing.update_yaxes(title={"text": "method"})
    for index, task in enumerate(tasks):
        measure = measures.retained_minus_base(runs, task)
        values = {label: list(measures.by_seed(measure, members).values()) for label, members in groups.items()}
        means = {safe(label): interval(each) for label, each in values.items() if each}
        if means:
            error = {"type": "data", "array": [each.half or 0.0 for each in means.values()], "thickness": 1}
            marker = {"color": PALETTE[index % len(PALETTE)], "size": 10}
            x = [each.mean for each in means.values()]
            look: dict[str, Any] = {"mode": "markers", "marker": marker, "orientation": "h", "showlegend": True}
            drawing.add_trace(go.Scatter(x=x, y=list(means), error_x=error, name=safe(task), **look))
    if drawing.data:
        drawing.update_layout(scattermode="group")  # tasks of a method side by side instead of on top of each other
        drawing.add_vline(x=0, line={"dash": "dot", "color": PALETTE[6]})
    what = "Retained knowledge against the base" + ("" if unit else ": perplexity")
    caption = "The mean over clients after the last round minus the base model. Bars: 95 % Student t interval over seeds, where"
    return Figure(what, f"{caption} there are several. {'Negative: forgotten.' if unit else 'Positive: forgotten.'}", drawing)


def drift_compared(groups: Groups) -> Figure:
    """A line per method: the router drift of each layer, as the mean over clients and seeds."""
    runs = all_runs(groups)
    layers = measures.drift_layers(runs)
    drawing = blank_layers(list(dict.fromkeys(block for run in runs for block in retention.drift(run))))
    for index, (method, members) in enumerate(groups.items()):
        by_layer = [list(measures.by_seed(measure, members).values()) for measure in layers]
        points = [(float(layer), interval(values)) for layer, values in enumerate(by_layer) if values]
        if points and all(each.half is not None for _, each in points):
            drawing.add_trace(band_trace(points, index, method))
        if points:
            drawing.add_trace(line_trace(method, [(x, each.mean) for x, each in points], index, width=2.5, group=method))
    band = " Band: 95 % Student t interval over seeds." if max(map(len, groups.values())) > 1 else ""
    caption = f"{DRIFT_CAPTION} Text: {retention.drift_text(runs)}. Line: the mean over clients and seeds.{band}"
    return Figure("Router drift by layer", caption, drawing)
