"""The parts that figures are drawn from, as plotly values; page.js gives them the colors of the reader's theme.

Text that comes from a run's files is escaped: plotly reads a few HTML tags in names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import plotly.graph_objects as go

from fedexperts.report import measures, progress, retention, scores
from fedexperts.report.read import RunResults
from fedexperts.report.stats import Interval

# Distinct for people with color vision deficiencies, and readable on a light and on a dark page.
PALETTE = ("#3b82d6", "#d9822b", "#2f9e6e", "#b5489a", "#8a6fd1", "#c8463a", "#7f8f1f", "#4a9fb0")
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "diamond", "square", "triangle-up")
INK = {"theme": "ink"}  # page.js draws what has this `meta` in the color of the text
FEW_ROUNDS = 10  # up to this many, every round gets a tick, so that no tick lies between two rounds
LINE_OF_A_ROW = 22  # pixels
DRIFT_CAPTION = "KL(routing of the base model ‖ routing of the client's model) per token, on the same text, after the last round."
MANY_CLIENTS = 60  # figures of single clients show no more than these; the tables list all
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Figure:
    """A drawing with its title and an explanation of how to read it."""

    title: str
    caption: str
    drawing: go.Figure


def safe(text: str) -> str:
    """`text` as plotly shows it literally."""
    return escape(text, quote=False)


def with_data(figures: Mapping[str, Sequence[Figure]]) -> dict[str, list[Figure]]:
    """`figures` without those that have nothing to draw."""
    return {name: [figure for figure in group if figure.drawing.data] for name, group in figures.items()}


def clients_drawn(clients: Sequence[str], all_of_them: str) -> str:
    """`all_of_them`, or how many clients of all a figure shows."""
    return all_of_them if len(clients) <= MANY_CLIENTS else f"the first {MANY_CLIENTS} of {len(clients)} clients"


def tick_rounds(drawing: go.Figure, over: str, runs: Sequence[RunResults]) -> None:
    """Gives every round its tick if the axis is rounds and there are few."""
    if over == "rounds" and max(map(progress.rounds_done, runs)) <= FEW_ROUNDS:
        drawing.update_xaxes(dtick=1)


def client_mean_note(runs: Sequence[RunResults]) -> str:
    """How clients with several tasks count; empty if there is a single task."""
    return "Each client counts with the mean over its tasks." if len(scores.tasks(runs)) > 1 else ""


def heatmap(
    z: Sequence[Sequence[float | None]],
    clients: Sequence[str],
    columns: Sequence[str],
    what: str,
    digits: str | None,
    most: float | None = None,
) -> go.Figure:
    """A map with a row per client and a column per entry of `columns`; cells show their numbers unless `digits` is None."""
    drawing = blank("task", "client", height=110 + LINE_OF_A_ROW * len(clients))
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


def blank(x: str, y: str, height: int = 420) -> go.Figure:
    """A drawing without traces, with the titles `x` and `y` on its axes."""
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


def blank_bars(x: str, number: int) -> go.Figure:
    """A drawing for `number` horizontal bars, from top to bottom."""
    drawing = blank(x, "client", height=130 + LINE_OF_A_ROW * number)
    drawing.update_yaxes(autorange="reversed", type="category")
    return drawing


def bar_trace(name: str, values: Mapping[str, float], index: int) -> go.Bar:
    """A horizontal bar per client, in MB."""
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


def line_trace(
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
    """A curve in the `index`th color; traces of one `group` are shown and hidden together."""
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


def band_trace(points: Sequence[tuple[float, Interval]], index: int, method: str) -> go.Scatter:
    """The area between the lower and the upper ends of the intervals."""
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


def seed_dots(method: str, points: Points, index: int) -> go.Scatter:
    """A small dot per seed."""
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
    """Color and symbol of the `index`th method; the symbol changes when the colors start over."""
    return {"color": PALETTE[index % len(PALETTE)], "symbol": SYMBOLS[index // len(PALETTE) % len(SYMBOLS)]}


def mean_dot(method: str, x: Interval, y: Interval, index: int) -> go.Scatter:
    """A large dot for the mean over seeds, with its intervals on both axes."""
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


def blank_layers(blocks: Sequence[str]) -> go.Figure:
    """A drawing of router drift with a tick per MoE layer."""
    drawing = blank("layer", measures.DRIFT.label)
    labels = retention.block_labels(blocks).values()
    ticks = [safe(label.removeprefix("layer ")) for label in labels]
    drawing.update_xaxes(tickmode="array", tickvals=list(range(len(ticks))), ticktext=ticks)
    drawing.update_yaxes(rangemode="tozero")
    return drawing
