"""The `upcycle` command. Heavy packages are imported when it runs."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedexperts.errors import BadValue

if TYPE_CHECKING:
    from fedexperts.models.upcycle.recipes import Recipe

DTYPES = ("float32", "bfloat16", "float16")


def upcycle(
    models: Annotated[
        list[str],
        typer.Argument(
            help="The dense model: a folder, a GGUF file, or a hub id; with --experts, after it the model of each expert.",
            show_default=False,
        ),
    ],
    to: Annotated[Path, typer.Option(help="The folder to write; it must be new or empty.", show_default=False)],
    copy: Annotated[int | None, typer.Option(help="Make this many experts, each a copy of the dense FFN.")] = None,
    split: Annotated[int | None, typer.Option(help="Divide the neurons of the dense FFN into this many experts.")] = None,
    experts: Annotated[bool, typer.Option("--experts", help="Take each expert's FFN from one of the further models.")] = False,
    top_k: Annotated[int | None, typer.Option(help="Active experts per token; by default 2, with --split half of them.")] = None,
    shared: Annotated[int | None, typer.Option(help="With --split: neurons that are always active.")] = None,
    noise: Annotated[float | None, typer.Option(help="With --copy: noise on each weight, in parts of its spread.")] = None,
    reinit: Annotated[float | None, typer.Option(help="With --copy: share of neurons that each expert draws anew.")] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", "--texts", help="A text to calibrate and measure on; with --experts one per expert. Repeatable."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="With --experts: a JSON list with a list of prompts for each expert, for the router.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to calibrate and measure on.")] = 8192,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; by default that of the model.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of all random draws.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Make a Mixture of Experts of a dense model, and report how far it is from the dense model."""
    modes = {"--copy": copy is not None, "--split": split is not None, "--experts": experts}
    if sum(modes.values()) != 1:
        given = " and ".join(mode for mode, chosen in modes.items() if chosen) or "none of --copy, --split and --experts"
        raise BadValue(f"{given} given; give exactly one of {', '.join(modes)}")
    only: dict[str, tuple[object, str]] = {
        "--shared": (shared, "--split"),
        "--noise": (noise, "--copy"),
        "--reinit": (reinit, "--copy"),
    }
    only["--prompts"] = (prompts, "--experts")
    for option, (value, mode) in only.items():
        if value is not None and not modes[mode]:
            raise BadValue(f"{option} was given without {mode}; add {mode}, or leave {option} out")
    if len(models) > 1 and not experts:
        raise BadValue(f"{len(models)} models were given without --experts; give one, or add --experts")
    if dtype is not None and dtype not in DTYPES:
        raise BadValue(f"--dtype {dtype} is not one of {', '.join(DTYPES)}")
    from fedexperts.io.files import require_empty
    from fedexperts.models.upcycle import report, run

    require_empty(to)
    recipe = recipe_of(copy, split, len(models) - 1, top_k, shared or 0, noise or 0.0, reinit or 0.0)
    sources = run.Sources(models[0], models[1:], text or [], prompts, tokens, dtype, seed)
    console = Console()
    console.print(report.table(run.upcycle(sources, recipe, to, shown(console, quiet))))
    console.print(f"written: {to} (for transformers; its README.md shows how to load it)", markup=False, soft_wrap=True)


def recipe_of(
    copy: int | None, split: int | None, merged: int, top_k: int | None, shared: int, noise: float, reinit: float
) -> "Recipe":
    """The recipe of the options, of which each is allowed.

    Raises:
        BadValue: a number is out of its range.
    """
    from fedexperts.models.upcycle.recipes import Copy, Merge, Split

    number = copy if copy is not None else split if split is not None else merged
    if number < 2:
        raise BadValue(f"{max(number, 0)} experts given; give at least 2")
    top_k = top_k if top_k is not None else max(1, number // 2) if split is not None else 2
    if not 1 <= top_k <= number:
        raise BadValue(f"--top-k {top_k} is not between 1 and the number of experts, {number}")
    for option, value, limit in (("--shared", shared, None), ("--noise", noise, None), ("--reinit", reinit, 1)):
        if value < 0 or (limit is not None and value > limit):
            raise BadValue(f"{option} {value} is not {'at least 0' if limit is None else f'between 0 and {limit}'}")
    if copy is not None:
        return Copy(number, top_k, noise, reinit)
    return Split(number, top_k, shared) if split is not None else Merge(number, top_k)


def shown(console: Console, quiet: bool) -> Callable[[int, int], None]:
    """Prints how many layers are done, unless `quiet`."""

    def on_layer(done: int, total: int) -> None:
        if not quiet:
            console.print(
                f"layer {done} of {total}", highlight=False, end="\n" if done == total or not console.is_terminal else "\r"
            )

    return on_layer
