"""The numbers behind a figure, as a table."""

from html import unescape

from fedexperts.report.table_format import NONE, Table
from fedexperts.report.traces import Figure


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
