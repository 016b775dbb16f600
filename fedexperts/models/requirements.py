"""The memory that training a model takes, by what it holds, from its configuration alone."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from rich.table import Table

from fedexperts.core.devices import held_by
from fedexperts.models.shapes import dtype_on_disk, stored_as
from fedexperts.models.summary import first_experts, read_config, skeleton
from fedexperts.moe.anatomy import anatomy
from fedexperts.moe.footprint import footprint
from fedexperts.moe.kernel import choose_kernel
from fedexperts.moe.memory_by_part import PARTS, memory_by_part
from fedexperts.moe.shrink import shrink
from fedexperts.moe.tuning import Tuning


@dataclass(frozen=True)
class Requirement:
    """Bytes of memory that training takes in one way."""

    stored_as: str  # dtype of the weights that are not trained, or nf4
    gradient_checkpointing: bool
    parts: dict[str, int]  # see moe.memory_by_part.PARTS
    held_by: tuple[str, ...]  # presets of devices with this much memory, the smallest first

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def requirements(
    model: str | Path, tuning: Tuning, batch: tuple[int, int], keep: int | None = None, keep_total: int | None = None
) -> Iterator[Requirement]:
    """What training the model of a config, a folder or a hub id takes with AdamW, as it is stored and in 4 bits.

    batch: (examples, tokens of each). keep, keep_total: of the sub-model with so many experts, see `summary.inspect`.

    Raises:
        BadValue, NoExperts: as `summary.inspect`.
    """
    config = read_config(str(model))
    dtype = dtype_on_disk(str(model), config)
    experts = first_experts(anatomy(skeleton(config)), keep, keep_total)
    for quantize, checkpointing in product((None, "nf4"), (False, True)):
        trained = stored_as(skeleton(config), dtype, quantize)
        choose_kernel(trained)
        trained = shrink(trained, experts) if experts else trained
        if checkpointing and not getattr(trained, "supports_gradient_checkpointing", False):
            continue
        activations = footprint(trained, tuning, batch, gradient_checkpointing=checkpointing).activation_bytes
        parts = memory_by_part(trained, tuning, "adamw", activations).of(anatomy(trained).all_experts)
        name = quantize or str(dtype).removeprefix("torch.")
        yield Requirement(name, checkpointing, parts, tuple(held_by(sum(parts.values()))))


def to_json(rows: Sequence[Requirement]) -> str:
    """All numbers, under the names of the fields."""
    return json.dumps([{**asdict(row), "total": row.total} for row in rows], indent=2)


def render(rows: Sequence[Requirement], tuning: Tuning, batch: tuple[int, int]) -> Table:
    """`rows` as a table, in GB (10⁹ bytes)."""
    trained = f"LoRA of rank {tuning.rank} on" if tuning.train == "lora" else "all of"
    title = f"Memory to train {trained} {', '.join(tuning.trained)}; {batch[0]} × {batch[1]} tokens; estimated, in GB (10⁹)"
    table = Table(title=title, title_justify="left")
    table.add_column("of")
    for row in rows:
        table.add_column(row.stored_as + (", checkpointing" if row.gradient_checkpointing else ""), justify="right")
    for part in PARTS:
        if any(row.parts[part] for row in rows):
            table.add_row(part.replace("_", " "), *(f"{row.parts[part] / 1e9:,.3f}" for row in rows))
    table.add_row("total", *(f"{row.total / 1e9:,.3f}" for row in rows))
    table.add_row("smallest preset that holds it", *(row.held_by[0] if row.held_by else "none" for row in rows))
    return table
