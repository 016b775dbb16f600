"""The numbers of a figure as a table, for readers who cannot see the drawing."""

from html import unescape

from fedexperts.report.table_format import NONE, Table
from fedexperts.report.traces import Figure


def numbers_table(figure: Figure) -> Table:
    """The numbers of a drawing, without the bands of intervals."""
    drawing = figure.drawing
    across, up = (unescape(axis.title.text or "") for axis in (drawing.layout.xaxis, drawing.layout.yaxis))
    traces = [trace for trace in drawing.data if trace.hoverinfo != "skip"]
    if any(trace.type == "heatmap" for trace in traces):
        rows = [(_cell(name), *map(_cell, row)) for trace in traces for name, row in zip(trace.y, trace.z, strict=True)]
        return Table(figure.title, (up, *map(unescape, traces[0].x)), tuple(rows))
    if any(trace.type == "box" for trace in traces):
        ends = ("lowerfence", "q1", "median", "q3", "upperfence")
        rows = [(unescape(trace.name), *(_cell(trace[end][0]) for end in ends)) for trace in traces]
        return Table(
            figure.title, (across or "method", "lowest", "lower quartile", "median", "upper quartile", "highest"), tuple(rows)
        )
    horizontal = any(trace.orientation == "h" for trace in traces)
    points = [list(zip(*((t.y, t.x) if horizontal else (t.x, t.y)), strict=True)) for t in traces]
    lines = dict(zip((unescape(trace.name) for trace in traces), map(dict, points), strict=True))
    places = list(dict.fromkeys(place for each in points for place, _ in each))
    if not any(len(line) == len(places) for line in lines.values()):  # no trace has all positions: they have different ones
        rows = [(name, _cell(x), _cell(y)) for name, line in lines.items() for x, y in line.items()]
        return Table(figure.title, ("of", across, up), tuple(rows))
    along, values = (up, across) if horizontal else (across, up)
    cells = {place: [_cell(line.get(place)) for line in lines.values()] for place in places}
    by_place = Table(f"{figure.title}: {values}", (along, *lines), tuple((_cell(place), *row) for place, row in cells.items()))
    return by_place if len(places) > len(lines) else by_place.transposed()


def _cell(value: float | str | None) -> str:
    """A number or a name as a cell."""
    return unescape(value) if isinstance(value, str) else NONE if value is None else f"{value:,.6g}"
