"""Figures as PNG, SVG and PDF files: drawn by kaleido in a browser on this machine, without network access."""

import asyncio
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import plotly.graph_objects as go

from fedexperts.errors import BadValue
from fedexperts.io.files import write_bytes
from fedexperts.report.traces import INK, Figure, safe

WIDTH, SCALE = 760, 2  # pixels of the layout, and of the file for each of them
TEXT, LINE = "#1d2530", "#d5dae1"  # these and those of maps are the colors of the light page
MAPS = {"heat": "#14508f", "cells": "#8fbbe8"}


KINDS = ("png", "svg", "pdf")


def write(figures: Iterable[Figure], folder: Path, kind: str = "png") -> tuple[Path, ...]:
    """Writes each figure to `folder` as a file of a `kind` of KINDS, named after its title, and returns the files.

    Raises:
        BadValue: kaleido is not installed, or does not find a browser.
    """
    every = list(figures)
    images = asyncio.run(images_of([still(figure) for figure in every], kind))
    paths = tuple(folder / file_name(figure.title, kind) for figure in every)
    for path, image in zip(paths, images, strict=True):
        write_bytes(path, image)
    return paths


def file_name(title: str, kind: str = "png") -> str:
    """`title` in lower case, with hyphens for all but letters and digits, and the ending of a `kind`."""
    return re.sub(r"\W+", "-", title.lower()).strip("-") + f".{kind}"


async def images_of(drawings: Sequence[go.Figure], kind: str) -> list[bytes]:
    """Each drawing as the content of a file of a `kind` of KINDS; a PNG has SCALE pixels for each pixel of the layout."""
    try:
        from kaleido import Kaleido
        from kaleido.errors import BrowserFailedError, ChromeNotFoundError
    except ImportError:
        raise BadValue("image files need kaleido, which is not installed: pip install 'fedexperts[png]'") from None
    try:
        browser = Kaleido(mathjax=False)  # mathjax would be loaded from the network
    except ChromeNotFoundError:
        raise BadValue(
            "image files need a browser, and there is none: install Chromium or Chrome, or name one in BROWSER_PATH"
        ) from None
    scale = SCALE if kind == "png" else 1
    try:
        async with browser:
            return [await browser.calc_fig(each, {"format": kind, "width": WIDTH, "scale": scale}) for each in drawings]
    except BrowserFailedError:
        raise BadValue(
            "image files need a browser, and the one that was found ended at once; name another in BROWSER_PATH"
        ) from None


def still(figure: Figure) -> go.Figure:
    """The drawing in the colors of the light page, under its title."""
    drawing = go.Figure(figure.drawing)
    title = {"text": safe(figure.title), "x": 0, "xref": "paper", "font": {"size": 16}}
    drawing.update_layout(title=title, margin_t=56, paper_bgcolor="white", plot_bgcolor="white", font={"color": TEXT, "size": 13})
    drawing.update_xaxes(gridcolor=LINE, linecolor=LINE, tickcolor=LINE)
    drawing.update_yaxes(gridcolor=LINE, linecolor=LINE, tickcolor=LINE)
    for trace in drawing.data:
        if trace.meta == INK:
            trace.update(line={"color": TEXT}, marker={"color": TEXT})
        elif trace.meta:
            trace.update(colorscale=((0.0, "#eef2f7"), (1.0, MAPS[trace.meta["theme"]])))
    return drawing
