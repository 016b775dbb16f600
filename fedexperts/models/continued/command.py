"""The `pretrain` command: a new small base, or continued training of a model. Heavy packages are imported when it runs."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedexperts.errors import BadValue
from fedexperts.io.toml import Tree, read_tree

if TYPE_CHECKING:
    from fedexperts.models.continued.training import Point

EXAMPLE = "runs/pretrain-tiny.toml"


def pretrain(
    run_file: Annotated[Path, typer.Argument(help="The run file (TOML).", show_default=False)],
    set: Annotated[list[str] | None, typer.Option("--set", help="Override a setting of the run file: a.b=c. Repeatable.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The model's folder.")] = None,
    control: Annotated[
        str | None,
        typer.Option(help="To continue from a model: train this dense model too, on the same batches.", show_default=False),
    ] = None,
) -> None:
    """Pretrain a small MoE base model, or continue the training of a model (a run file with `start`).

    Interrupted training continues where it stopped; a finished base is kept.
    """
    console = Console()
    changes = [*(set or []), *([f"out={json.dumps(str(out))}"] if out else [])]
    tree = read_tree(run_file, EXAMPLE, changes)
    if "start" in tree:
        continued({**tree, **({"control": control} if control is not None else {})}, console)
        return
    if control is not None:
        raise BadValue(
            f"--control was given, but {run_file} names no model to continue from; add start to it, or leave --control out"
        )
    from fedexperts.models.pretrain import run_file as new_base

    new_base(run_file, set or [], out, console)


def continued(tree: Tree, console: Console) -> None:
    """Continues the training of the model that `tree` names."""
    from fedexperts.models.continued import report, run
    from fedexperts.models.continued.settings import read_settings

    def show(steps: int, point: "Point") -> None:
        held_out = f"{point.bits_per_byte:.3f} bits per byte"
        if point.control_loss == point.control_loss:  # NaN: there is no control
            held_out += f" (control {point.control_bits_per_byte:.3f})"
        line = (
            f"step {point.step} of {steps}: loss {point.loss:.4f}, balance {point.balance:.3f}, {held_out}, {point.seconds:.0f} s"
        )
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    settings = read_settings(tree)
    console.print(report.table(run.continue_training(settings, show)))
    console.print(f"written: {settings.out} (for transformers; its README.md is the model card)", markup=False, soft_wrap=True)
