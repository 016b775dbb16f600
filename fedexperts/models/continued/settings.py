"""The settings of continued training, read from TOML."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from fedexperts.io.toml import Tree, checked
from fedexperts.models.settings import Settings, Share, TextSources
from fedexperts.moe.packed import has_half_kernels


class Corpus(Settings):
    """What is trained on: windows of texts, and windows of conversations in the chat template of the tokenizer."""

    window: int = Field(default=256, ge=8)  # tokens
    texts: TextSources = ()
    instructions: tuple[str, ...] = ()  # sources as a run file's data table names them
    instruction_share: Share = 0.0  # of the windows of a batch, rounded
    separator: str | None = None  # a token of the tokenizer, before each document and window of text; None: its first or last one

    @model_validator(mode="after")
    def has_sources(self) -> Self:
        if not self.texts and not self.instructions:
            raise ValueError(
                "corpus has neither texts nor instructions; name files, or stems of the data pack such as text/stories"
            )
        if bool(self.instructions) != bool(self.instruction_share):
            raise ValueError("corpus.instructions and corpus.instruction_share go together; set both or neither")
        if not self.texts and self.instruction_share < 1:
            raise ValueError(f"corpus has no texts, and instruction_share = {self.instruction_share}; add texts, or set it to 1")
        return self

    def counts(self, windows: int) -> dict[str, int]:
        """Part → number of its windows in a batch of `windows`.

        Raises:
            ValueError: a part would have none.
        """
        instructions = round(self.instruction_share * windows)
        counts = {"texts": windows - instructions, "instructions": instructions}
        wanted = {part: counts[part] for part in ("texts", "instructions") if getattr(self, part)}
        if (sum(wanted.values()) != windows) or not all(wanted.values()):
            raise ValueError(
                f"a batch of {windows} windows has no room for all of {', '.join(wanted)}; raise batch_size or change "
                "corpus.instruction_share"
            )
        return wanted


class ContinueSettings(Settings):
    """The settings of continued training; equal settings and models give equal bits on the same kind of machine."""

    seed: int = 0
    start: str = Field(min_length=1)  # the model: a folder, a bundled base, or an id on the hub
    control: str | None = None  # a dense model, trained beside it on the same batches with the same schedule
    distill: Share = 0.0  # part of the loss that is the divergence from the control's predictions; the rest is cross-entropy
    out: Path
    corpus: Corpus
    tokens: PositiveInt | None = None  # to train on; or else
    minutes: PositiveFloat | None = None  # from which the number of steps is set, after a batch was timed
    batch_size: PositiveInt = 8  # windows of a step
    gradient_accumulation_steps: PositiveInt = 1  # parts of a batch, one in memory at a time
    frozen: tuple[str, ...] = ()  # parameters with one of these in their names are not trained
    lr: PositiveFloat = 3e-4
    warmup: Share = 0.05  # part of the steps, the first ones, in which the learning rate rises
    decay: Share = 1.0  # part of the steps, the last ones, in which it falls along a cosine; before, it is constant
    final_lr: Share = 0.1  # part of lr, at the end of the cosine
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0
    router_aux_loss_coef: NonNegativeFloat = 0.01  # weight of the load-balance loss
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of matrix products; auto: bf16 where the processor has products of it
    threads: PositiveInt = 1
    save_every: PositiveInt = 50  # steps; an interrupted run continues from there
    measured: PositiveInt = 8  # windows of each held-out text

    @model_validator(mode="after")
    def has_one_budget(self) -> Self:
        if (self.tokens is None) == (self.minutes is None):
            raise ValueError("give exactly one of tokens and minutes: how long to train")
        return self

    @model_validator(mode="after")
    def divides(self) -> Self:
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"batch_size = {self.batch_size} is no multiple of gradient_accumulation_steps = "
                f"{self.gradient_accumulation_steps}; change one of the two"
            )
        self.corpus.counts(self.batch_size)
        if self.tokens is not None and self.tokens < self.step_tokens:
            raise ValueError(
                f"tokens = {self.tokens} is less than one step of {self.step_tokens} tokens (batch_size · corpus.window); "
                "raise it, or lower batch_size"
            )
        return self

    @model_validator(mode="after")
    def has_a_teacher(self) -> Self:
        if self.distill and self.control is None:
            raise ValueError(f"distill = {self.distill} needs a model to learn from; set control, or distill = 0")
        return self

    def with_precision(self) -> "ContinueSettings":
        """These settings with the precision that "auto" means on this processor: bf16 is many times slower without AVX-512."""
        automatic: Literal["fp32", "bf16"] = "bf16" if has_half_kernels() else "fp32"
        return self if self.precision != "auto" else self.model_copy(update={"precision": automatic})

    @property
    def step_tokens(self) -> int:
        """Tokens of a step."""
        return self.batch_size * self.corpus.window


def read_settings(tree: Tree) -> ContinueSettings:
    """The settings in a TOML tree.

    Raises:
        BadValue: a name or value is not allowed.
    """
    return checked(ContinueSettings, tree)
