"""Continued training, from the settings to a folder that is complete or absent, with a report and a model card.

Until it is finished, its state is in a folder beside it, `.<name>.partial`; the same settings continue from there with the same
bits as without an interruption.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fedexperts.errors import BadRun, BadValue, listed
from fedexperts.io.files import atomic_folder, locked, require_empty, write_text
from fedexperts.io.toml import different
from fedexperts.models.continued import report as reports
from fedexperts.models.continued.corpus import read_windows
from fedexperts.models.continued.measure import HeldOut, bits_per_byte
from fedexperts.models.continued.models import control_hash, load_control, load_start, save_model
from fedexperts.models.continued.settings import ContinueSettings
from fedexperts.models.continued.training import Point, Trained, steps_for, train

PLAN = "plan.json"
NOT_IN_PLAN = {"out", "save_every", "threads"}
"""Settings that do not influence the model, or (threads) may be changed on the way."""
ON_THE_WAY = 2  # windows of each held-out text that are measured at each point of the curve


def continue_training(
    settings: ContinueSettings, on_point: Callable[[int, Point], None] = lambda steps, point: None
) -> reports.Report:
    """Trains and writes the folder `settings.out`; returns the report. on_point: gets the number of all steps too.

    Raises:
        BadValue: `settings.out` is not empty, or a model cannot be read.
        BadRun: the partial folder holds a run with other settings, or the loss is not finite.
        Busy: another process is training it.
        BadData: a text is missing, empty or damaged.
    """
    require_empty(settings.out)
    settings = settings.with_precision()
    torch.set_num_threads(settings.threads)
    model, tokenizer, dtype, hashed = load_start(settings.start)
    vocabulary = model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]  # transformers' method
    require_positions(model, settings)
    control = None if settings.control is None else load_control(settings.control, vocabulary)
    windows = read_windows(settings.corpus, tokenizer, settings.measured, settings.seed)
    held_out = HeldOut.of(windows.held_out, tokenizer, settings.precision == "bf16")
    trained = Trained.of(model, control, settings)
    counts = settings.corpus.counts(settings.batch_size)

    partial = partial_folder(settings)
    with locked(partial):
        wanted = {**settings.model_dump(mode="json", exclude=NOT_IN_PLAN), "model": hashed, "data": dict(windows.hashes)}
        wanted |= {} if settings.control is None else {"control model": control_hash(settings.control)}
        plan = read_plan(partial, wanted)
        if plan is None:
            with removed_if_interrupted(partial):
                steps = steps_for(trained, windows.batch(counts, 0, settings.seed), settings)
                plan = {"settings": wanted, "steps": steps, "before": reports.measured(trained, held_out, settings.seed)}
                write_text(partial / PLAN, json.dumps(plan))
        few = held_out.part(ON_THE_WAY, tokenizer)
        steps = int(plan["steps"])
        curve = train(
            trained,
            lambda step: windows.batch(counts, step, settings.seed),
            settings,
            steps,
            partial,
            lambda each: bits_per_byte(each, few)["mean"],
            lambda point: on_point(steps, point),
        )
        with atomic_folder(settings.out) as folder:
            save_model(model, tokenizer, dtype, folder)
            after = reports.measured(trained, held_out, settings.seed)
            report = reports.report(settings, plan, after, curve, trained, held_out.tokens)
            reports.write(report, curve, folder)
        shutil.rmtree(partial)
    return report


def require_positions(model: nn.Module, settings: ContinueSettings) -> None:
    """Raises BadValue if windows are longer than the model can read."""
    positions = cast("Any", model).config.to_dict().get("max_position_embeddings")
    if positions is not None and settings.corpus.window > positions:
        raise BadValue(
            f"corpus.window = {settings.corpus.window} is longer than the {positions} positions of the model; lower corpus.window"
        )


@contextmanager
def removed_if_interrupted(folder: Path) -> Iterator[None]:
    """After an exception in the block `folder` is removed."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder)
        raise


def partial_folder(settings: ContinueSettings) -> Path:
    """The folder with the state of an unfinished model."""
    out = settings.out.absolute()
    return out.parent / f".{out.name}.partial"


def read_plan(partial: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The plan of the partial folder; None if it has none.

    Raises:
        BadRun: it was begun with other settings, models or texts.
    """
    path = partial / PLAN
    if not path.exists():
        return None
    plan: dict[str, Any] = json.loads(path.read_text())
    if changed := different(plan["settings"], wanted):
        raise BadRun(f"{partial} was begun with another {listed(changed)}; set the old value again, or remove that folder")
    return plan
