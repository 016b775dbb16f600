"""The settings of a pretraining run, read from TOML."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
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
from fedexperts.io.toml import checked, read_tree, with_new_names

Share = Annotated[float, Field(ge=0, le=1)]
Width = Annotated[int, Field(gt=0, multiple_of=8)]  # grouped_mm needs rows of a multiple of 16 bytes, in bf16 too


class Settings(BaseModel):
    """A table of settings, in which unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def check_tasks(tasks: Iterable[str]) -> None:
    """Raises ValueError for the first of `tasks` that is no generated task."""
    for task in tasks:
        if task not in SYNTHETIC:
            raise ValueError(f"{task!r} is not one of the generated tasks {', '.join(SYNTHETIC)}{nearest(task, SYNTHETIC)}")


class Shape(Settings):
    """The model: a small OLMoE."""

    hidden: Width = 96
    layers: PositiveInt = 4
    heads: PositiveInt = 4
    experts: PositiveInt = 16
    top_k: PositiveInt = 2
    expert_width: Width = 160
    max_positions: PositiveInt = 1024
    tied: bool = False  # one matrix for embeddings and output head

    @model_validator(mode="after")
    def fits(self) -> Self:
        if self.top_k > self.experts:
            raise ValueError(
                f"top_k = {self.top_k} of {self.experts} experts cannot be picked; set top_k to at most {self.experts}"
            )
        if self.hidden % (2 * self.heads):
            raise ValueError(f"hidden = {self.hidden} is no even multiple of heads = {self.heads}; change one of the two")
        return self


class Mixture(Settings):
    """Batches of generated examples, padded, with the loss on their responses: the training data of `tiny`.

    A batch has either tasks or text, since padding both to one width would cost more.
    """

    tasks: tuple[str, ...] = BASE_TASKS
    exposed: tuple[str, ...] = NEW_TASKS  # tasks that the model sees only rarely
    exposed_share: Share = 0.02  # of the examples in batches of tasks
    exposed_from: Share = 0.8  # part of the run after which they appear
    text_share: Share = 0.03  # of the batches

    @model_validator(mode="after")
    def exists(self) -> Self:
        check_tasks((*self.tasks, *self.exposed))
        if not self.tasks:
            raise ValueError(f"mixture.tasks is empty; name some of {', '.join(SYNTHETIC)}")
        if self.exposed_share and not self.exposed:
            raise ValueError("mixture.exposed is empty; name a task, or set mixture.exposed_share = 0")
        return self


class Texts(Settings):
    """Rows of plain text: a file, or a file stem in the data pack such as text/stories."""

    name: str = Field(min_length=1)
    without: tuple[str, ...] = ()  # rows whose `source` begins with one of these are left out


def _expand_names(texts: object) -> object:
    """Texts as tables: each may be a name alone."""
    if isinstance(texts, list | tuple):
        return tuple({"name": text} if isinstance(text, str) else text for text in texts)
    return texts


TextSources = Annotated[tuple[Texts, ...], BeforeValidator(_expand_names)]


class Stream(Settings):
    """Batches of windows of token sequences, with the loss on every token: the training data of `small`.

    There are up to three sequences: texts, instructions and generated examples. Each is read at its own pace, and after all its
    windows were read again in a new order.
    """

    window: int = Field(default=256, ge=2)  # tokens
    merges: PositiveInt = 3837  # byte pairs that the tokenizer learns from the texts and instructions
    texts: TextSources = Field(min_length=1)
    instructions: tuple[str, ...] = ()  # sources as a run file's data table names them
    generated: tuple[str, ...] = ()  # generated tasks
    generated_examples: PositiveInt = 10_000  # of each
    instruction_share: Share = 0.0  # of the windows of a batch, rounded
    generated_share: Share = 0.0  # likewise

    @model_validator(mode="after")
    def shares_have_sources(self) -> Self:
        check_tasks(self.generated)
        if bool(self.instructions) != bool(self.instruction_share):
            raise ValueError("stream.instructions and stream.instruction_share go together; set both or neither")
        if bool(self.generated) != bool(self.generated_share):
            raise ValueError("stream.generated and stream.generated_share go together; set both or neither")
        if self.instruction_share + self.generated_share >= 1:
            raise ValueError(
                "stream.instruction_share and generated_share leave nothing for the texts; lower them to a sum below 1"
            )
        return self

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the sequences that have sources."""
        sources = {"texts": self.texts, "instructions": self.instructions, "generated": self.generated}
        return tuple(part for part, names in sources.items() if names)

    def counts(self, windows: int) -> dict[str, int]:
        """Part → number of its windows in a batch of `windows`.

        Raises:
            ValueError: a part would have none.
        """
        shares = {"instructions": self.instruction_share, "generated": self.generated_share}
        others = {part: round(shares[part] * windows) for part in self.parts if part in shares}
        counts = {"texts": windows - sum(others.values()), **others}
        for part, count in counts.items():
            if not count:
                raise ValueError(
                    f"a worker's batch of {windows} windows has no room for stream.{part}; raise batch_size or change the shares"
                )
        return counts


RENAMED = {"balance": "router_aux_loss_coef", "clip": "max_grad_norm"}
"""Former name of a setting → its name now."""


class PretrainSettings(Settings):
    """The settings of a pretraining run; equal settings give equal bits on the same kind of machine."""

    seed: int = 0
    out: Path
    model: Shape = Shape()
    mixture: Mixture = Mixture()
    stream: Stream | None = None  # replaces the mixture
    steps: PositiveInt = 3000
    batch_size: PositiveInt = 128  # of all workers together
    lr: PositiveFloat = 2e-3
    warmup: Share = 0.03  # part of the steps, the first ones, in which the learning rate rises
    decay: Share = 1.0  # part of the steps, the last ones, in which it falls along a cosine; before, it is constant
    final_lr: Share = 0.05  # part of lr, at the end of the cosine
    weight_decay: NonNegativeFloat = 0.01
    max_grad_norm: PositiveFloat = 1.0
    router_aux_loss_coef: NonNegativeFloat = 0.01  # weight of the load-balance loss
    workers: PositiveInt = 1  # processes, each with its part of every batch
    threads: PositiveInt = 1  # of each worker
    precision: Literal["fp32", "bf16"] = "fp32"  # of matrix products; weights and optimizer state stay fp32
    save_every: PositiveInt = 200  # steps, but at least every twentieth of all steps; an interrupted run continues from there
    measured: NonNegativeInt = 200  # test examples of each task, or held-out texts of each file, measured for the recipe

    @model_validator(mode="before")
    @classmethod
    def former_names(cls, tree: Any) -> Any:
        """Run files and recipes of earlier versions have former names of settings."""
        return with_new_names(tree, RENAMED) if isinstance(tree, dict) else tree

    @model_validator(mode="after")
    def divides(self) -> Self:
        if self.batch_size % self.workers:
            raise ValueError(f"batch_size = {self.batch_size} is no multiple of workers = {self.workers}; change one of the two")
        return self

    @model_validator(mode="after")
    def stream_fits(self) -> Self:
        if self.stream is None:
            return self
        if "mixture" in self.model_fields_set:
            raise ValueError("mixture has no effect beside stream; remove one of them")
        if self.stream.window > self.model.max_positions:
            raise ValueError(
                f"stream.window = {self.stream.window} is longer than model.max_positions = {self.model.max_positions}; "
                "lower the one or raise the other"
            )
        self.stream.counts(self.batch_size // self.workers)
        return self


def read_settings(path: Path, changes: Sequence[str] = ()) -> PretrainSettings:
    """The settings in a TOML file, with each `a.b=c` of `changes` applied; former names of settings are warned of, once each.

    Raises:
        BadValue: the file cannot be read, or a name or value is not allowed.
    """
    tree = read_tree(path, "runs/pretrain-tiny.toml", changes)
    return checked(PretrainSettings, with_new_names(tree, RENAMED, warn=True))
