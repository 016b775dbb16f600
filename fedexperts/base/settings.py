"""What a pretraining run is, read from TOML."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from fedexperts.data.synthetic import BASE_TASKS, NEW_TASKS, SYNTHETIC
from fedexperts.errors import nearest
from fedexperts.settings import checked, read_tree

Share = Annotated[float, Field(ge=0, le=1)]
Width = Annotated[int, Field(gt=0, multiple_of=8)]  # grouped_mm wants rows of whole 16 bytes, in bf16 too


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Shape(Settings):
    """The model: OLMoE's classes in small."""

    hidden: Width = 96
    layers: PositiveInt = 4
    heads: PositiveInt = 4
    experts: PositiveInt = 16
    top_k: PositiveInt = 2
    expert_width: Width = 160
    max_positions: PositiveInt = 1024

    @model_validator(mode="after")
    def fits(self) -> Self:
        if self.top_k > self.experts:
            raise ValueError(f"top_k = {self.top_k} of {self.experts} experts cannot be chosen; lower top_k")
        if self.hidden % (2 * self.heads):
            raise ValueError(f"hidden = {self.hidden} is no even multiple of heads = {self.heads}; change one of them")
        return self


class Mixture(Settings):
    """What the batches hold; a batch is of tasks, of generated text or of sources, since padding to one width would cost more."""

    tasks: tuple[str, ...] = BASE_TASKS
    exposed: tuple[str, ...] = NEW_TASKS  # tasks whose instructions the model shall have met, no more
    exposed_share: Share = 0.02  # of the examples in batches of tasks
    exposed_from: Share = 0.8  # part of the run after which they come in
    text_share: Share = 0.03  # of the batches
    sources: tuple[str, ...] = ()  # files of plain text: a path, or a stem in FEDEXPERTS_DATA such as text/stories
    source_share: Share = 0.0  # of the batches
    source_characters: PositiveInt = 400  # of a piece drawn from a source

    @model_validator(mode="after")
    def exists(self) -> Self:
        for task in (*self.tasks, *self.exposed):
            if task not in SYNTHETIC:
                raise ValueError(f"{task!r} is not one of {', '.join(SYNTHETIC)}{nearest(task, SYNTHETIC)}")
        if not self.tasks:
            raise ValueError(f"mixture.tasks is empty; name some of {', '.join(SYNTHETIC)}")
        if self.exposed_share and not self.exposed:
            raise ValueError("mixture.exposed is empty; name a task, or set mixture.exposed_share = 0")
        if self.text_share + self.source_share > 1:
            raise ValueError("text_share and source_share add up to more than 1; lower one of them")
        if bool(self.sources) != bool(self.source_share):
            raise ValueError("sources and source_share go together; set both or neither")
        return self


class PretrainSettings(Settings):
    """A pretraining run; the same settings give the same bits on the same kind of machine."""

    seed: int = 0
    out: Path
    model: Shape = Shape()
    mixture: Mixture = Mixture()
    merges: NonNegativeInt = 0  # byte pairs the tokenizer learns from the sources; 0: bytes and instruction words alone
    steps: PositiveInt = 3000
    batch_size: PositiveInt = 128  # of all workers together
    lr: PositiveFloat = 2e-3
    warmup: Share = 0.03  # part of the steps
    final_lr: Share = 0.05  # part of lr, at the end of the cosine
    weight_decay: NonNegativeFloat = 0.01
    clip: PositiveFloat = 1.0
    balance: NonNegativeFloat = 0.01  # weight of the load-balance loss
    workers: PositiveInt = 1  # processes, each with its part of every batch
    threads: PositiveInt = 1  # of each
    measured: NonNegativeInt = 200  # test examples per task for the recipe

    @model_validator(mode="after")
    def divides(self) -> Self:
        if self.batch_size % self.workers:
            raise ValueError(f"batch_size = {self.batch_size} does not divide by workers = {self.workers}; change one of them")
        return self


def read_settings(path: Path, changes: Sequence[str] = ()) -> PretrainSettings:
    """The pretraining run in a TOML file, with each `a.b=c` of `changes` in place of what the file says.

    Raises:
        BadValue: it cannot be read, or a name or value is not allowed.
    """
    return checked(PretrainSettings, read_tree(path, "runs/pretrain-tiny.toml", changes))
