"""The figures of the data of a run's clients: their classes, and the lengths of their prompts and answers."""

from collections import Counter

import plotly.graph_objects as go

from fedexperts.report.read import RunResults
from fedexperts.report.traces import MANY_CLIENTS, PALETTE, Figure, blank, clients_drawn, heatmap, safe

MANY_CLASSES = 30  # a figure shows no more of them; they are the most frequent
UNKNOWN = "Classes and lengths are not known of data that clients bring themselves."


def labels(run: RunResults) -> list[Figure]:
    """For each task with classes, the training examples of each class at each client."""
    return [_labels(run, task) for task in dict.fromkeys(task for client in run.plan.clients for task in client.labels)]


def _labels(run: RunResults, task: str) -> Figure:
    with_task = [client for client in run.plan.clients if task in client.labels]
    totals = sum((Counter(client.labels[task]) for client in with_task), Counter[str]())
    names = [name for name, _ in totals.most_common(MANY_CLASSES)]
    shown = with_task[:MANY_CLIENTS]
    cells = [[client.labels[task].get(name) for name in names] for client in shown]
    drawing = heatmap(cells, [client.name for client in shown], names, "examples", "")
    drawing.update_xaxes(title={"text": "class"})
    which = clients_drawn([client.name for client in with_task], "each client with the task")
    few = f" The {MANY_CLASSES} most frequent of {len(totals)} classes." if len(totals) > MANY_CLASSES else ""
    return Figure(f"Classes of {task}: clients × classes", f"Training examples of {which}.{few} Empty cell: none.", drawing)


def lengths(run: RunResults) -> list[Figure]:
    """The lengths of prompts and of answers at each client; figures without data if they are not known."""
    return [_lengths(run, "prompt"), _lengths(run, "answer")]


def _lengths(run: RunResults, part: str) -> Figure:
    """A box per client over its training examples."""
    known = [client for client in run.plan.clients if len(client.lengths.get(part, ())) == 5 and client.lengths[part][-1] > 0]
    drawing = blank("client", "characters")
    drawing.update_xaxes(type="category")
    drawing.update_yaxes(rangemode="tozero")
    for client in known[:MANY_CLIENTS]:
        ends = ("lowerfence", "q1", "median", "q3", "upperfence")
        five = {end: [value] for end, value in zip(ends, client.lengths[part], strict=True)}
        name = safe(client.name)
        drawing.add_trace(go.Box(x=[name], **five, name=name, marker={"color": PALETTE[0]}, showlegend=False))
    which = clients_drawn([client.name for client in known], "each client")
    return Figure(
        f"Length of {part}s",
        f"Training examples of {which}, in characters. Box: quartiles; line: median; whiskers: shortest and longest.",
        drawing,
    )
