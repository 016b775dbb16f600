"""From the names of dense models to the folder of a Mixture of Experts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedexperts.errors import BadValue
from fedexperts.io.files import atomic_folder
from fedexperts.models.load import DTYPES
from fedexperts.models.upcycle import report as reports
from fedexperts.models.upcycle import texts
from fedexperts.models.upcycle.checkpoint import Dense, open_dense
from fedexperts.models.upcycle.families import target_for
from fedexperts.models.upcycle.parts import Window
from fedexperts.models.upcycle.recipes import Copy, Recipe
from fedexperts.models.upcycle.stream import OnLayer, convert

ALIKE = ("model_type", "hidden_size", "num_hidden_layers", "intermediate_size", "hidden_act")
"""Settings in which expert models are like their base model."""


@dataclass(frozen=True)
class Sources:
    """What a Mixture of Experts is made of."""

    model: str
    experts: Sequence[str] = ()
    texts: Sequence[Path] = ()
    prompts: Path | None = None
    tokens: int = 8192
    dtype: str | None = None  # of the weights; None: that of the model
    seed: int = 0


def upcycle(sources: Sources, recipe: Recipe, to: Path, on_layer: OnLayer = lambda done, total: None) -> reports.Report:
    """Writes the Mixture of Experts that `recipe` makes to the folder `to`, which is complete or absent; returns the report.

    Raises:
        BadValue: `to` is not empty, a model cannot be read, or none of the MoE classes fits it.
        BadData: a text cannot be read, or is too short.
    """
    dense = open_dense(sources.model)
    target_for(dense.name, dense.config, recipe)  # raises before anything large is read
    experts = [open_dense(name) for name in sources.experts]
    for expert in experts:
        require_alike(dense, expert)
    text, windows = windows_of(dense, sources, recipe)
    with atomic_folder(to) as folder:
        upcycled = convert(
            dense, experts, recipe, windows, folder, DTYPES[sources.dtype] if sources.dtype else None, sources.seed, on_layer
        )
        report = reports.report(sources.model, list(sources.experts), text, recipe, upcycled, sources.seed)
        reports.write(report, folder)
    return report


def require_alike(base: Dense, expert: Dense) -> None:
    """Raises BadValue if `expert` is no fine-tuned model of `base`, by its shapes."""
    for setting in ALIKE:
        ours, other = (model.config.to_dict().get(setting) for model in (base, expert))
        if ours != other:
            raise BadValue(
                f"{expert.name} has {setting} = {other}, and {base.name} has {ours}; give fine-tuned models of one base model"
            )


def windows_of(dense: Dense, sources: Sources, recipe: Recipe) -> tuple[str, list[Window]]:
    """The windows to calibrate and measure on, and what their text is called.

    Raises:
        BadValue: expert models without texts or prompts to tell them apart.
        BadData: a text cannot be read, or is too short.
    """
    window = dense.config.to_dict().get("sliding_window")
    size = min(texts.WINDOW, dense.config.max_position_embeddings, window or texts.WINDOW)
    read = [texts.read_text(file) for file in sources.texts]
    name = ", ".join(file.name for file in sources.texts)
    if sources.experts and sources.prompts is None:
        if len(read) != len(sources.experts):
            raise BadValue(
                f"{len(read)} texts were given for {len(sources.experts)} experts; give one --text for each, in their order, "
                "or --prompts, from which the router learns which tokens are whose"
            )
        tokens = sources.tokens // len(read)
        return name, [each for i, text in enumerate(read) for each in texts.windows(dense.tokenizer, [text], tokens, size, i)]
    if not read:
        name, read = texts.default_texts()
    windows = texts.windows(dense.tokenizer, read, sources.tokens, size)
    if isinstance(recipe, Copy) or sources.experts:
        windows = [each for each in windows if each.held_out]
    prompts = texts.read_prompts(sources.prompts, len(sources.experts)) if sources.prompts else []
    return name, [*windows, *texts.prompt_windows(dense.tokenizer, prompts, size)]
