"""What it saves to reach only some experts in backward: time, gradient and optimizer bytes, peak memory, in one process.

    python benchmarks/selective_backward.py [--repeats 9] [--shape small]

Each repeat takes, in turn, one training step (AdamW, everything trained) of each way, so that all ways meet the same noise:

full        the ordinary backward
mask        the ordinary backward; then the gradients of all experts but those chosen are taken away, row by row
selective   SelectiveBackward (HFedMoE); its line at 100 % shows what it costs itself: a client without a limit trains plainly
through all the same with gradients through all experts to the layers below (gradient_through = "all")

The experts are chosen by (14) and (15) on the batch itself, as many as the budget says, over all layers. Columns, medians:

backward    CPU seconds from the loss to the gradients (mask: and of the masking), over the full way's
experts     those of them within the experts, over the full way's: from the gradient of the experts' outputs to those of their
            inputs, weights included. An identity on either side of each block's experts notes the time when backward passes;
            torch runs the later of two nodes first, so nothing else of the model lies between
step        forward, selection, backward and optimizer, over the full way's
update MiB  gradients and optimizer state of the experts, after a step; and their ratio to the full way's
peak MiB    the most bytes of tensors alive in a step (MemoryMeter, in a step that is not timed); and its ratio
selection   CPU seconds of (3) to (15), over the step's own
pairs       share of the (token, expert) pairs whose expert was chosen
of pairs    experts over pairs
router      cosine of the gradient of the first layer's router with that of the full way, in the first step, from the same weights
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from fedexperts.core.training import forget, optimizer_for
from fedexperts.models.load import load
from fedexperts.moe.anatomy import Experts, anatomy, blocks
from fedexperts.moe.backward import SelectiveBackward, Through
from fedexperts.moe.footprint import next_token_loss
from fedexperts.moe.importance import importance, select
from fedexperts.moe.memory import MemoryMeter
from fedexperts.moe.routing import Recorder
from fedexperts.moe.shrink import shrink
from fedexperts.moe.tuning import Tuning, prepare
from fedexperts.types import Training

SHAPES = {"h256 I256 E32": (256, 32), "h256 I256 E64": (256, 64)}
BATCH = (8, 128)
BUDGETS = (1.0, 0.5, 0.25)
MIB = 2**20
PARTS = ("forward", "selection", "backward", "optimizer")


class Marked(torch.autograd.Function):
    """Its inputs; backward calls `note`."""

    @staticmethod
    def forward(ctx: Any, note: Callable[[], None], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.note = note
        return tuple(each.view_as(each) for each in inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ctx.note()
        return None, *gradients


class ExpertsClock:
    """CPU seconds of backward within the experts of `model`."""

    def __init__(self, model: nn.Module) -> None:
        self.seconds = 0.0
        for block in blocks(model).values():
            block.experts.register_forward_pre_hook(self.before)
            block.experts.register_forward_hook(self.after)

    def before(self, experts: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, ids, weights = args
        hidden, weights = Marked.apply(self.end, hidden, weights)
        return hidden, ids, weights

    def after(self, experts: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return Marked.apply(self.start, out)[0]

    def start(self) -> None:
        self.seconds -= process_time()

    def end(self) -> None:
        self.seconds += process_time()


@dataclass
class Way:
    """One way to train: its own copy of the model, its optimizer, and what was measured."""

    model: nn.Module
    kind: str
    budget: float
    seconds: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})
    experts_seconds: list[float] = field(default_factory=list)
    pairs: list[float] = field(default_factory=list)
    router: Tensor | None = None  # its gradient in the first step
    update_bytes: int = 0
    peak_bytes: int = 0

    def __post_init__(self) -> None:
        self.stacks = [(name, each) for name, block in blocks(self.model).items() for each in block.experts.parameters()]
        self.clock = ExpertsClock(self.model)
        through: Through = "all" if self.kind == "through all" else "chosen"
        self.selective = SelectiveBackward(self.model, through) if self.kind in ("selective", "through all") else None
        parameters = self.selective.parameters if self.selective else list(self.model.parameters())
        self.optimizer = optimizer_for(parameters, Training())
        stacks = {each.untyped_storage().data_ptr() for _, each in self.stacks}
        self.own = [each for each in parameters if each.untyped_storage().data_ptr() in stacks]

    def step(self, batch: dict[str, Tensor], timed: bool) -> None:
        with self.selective or nullcontext(), nullcontext() if timed else MemoryMeter(self.model, self.optimizer) as meter:
            marks = [process_time()]
            with Recorder(self.model, keep_logits=True) as recorder:
                loss = next_token_loss(self.model, batch)
            marks.append(process_time())
            chosen = self.chosen(recorder) if self.kind != "full" else {}
            marks.append(process_time())
            if self.selective:
                self.selective.choose(chosen)
                forget(self.optimizer, self.selective.left_out())
            self.clock.seconds = 0.0
            loss.backward()
            if self.kind == "mask":
                self.mask(chosen)
            marks.append(process_time())
            if self.router is None:
                self.router = next(each.grad.clone() for name, each in self.model.named_parameters() if "gate.weight" in name)
            self.optimizer.step()
            if not timed:
                self.update_bytes = sum(map(self.held_for, self.own))
            self.optimizer.zero_grad(set_to_none=True)
            marks.append(process_time())
        if meter:
            self.peak_bytes = meter.peak_bytes
        if timed:
            for part, (start, end) in zip(PARTS, pairwise(marks), strict=True):
                self.seconds[part].append(end - start)
            self.experts_seconds.append(self.clock.seconds)
            shares = [float(n[list(chosen[block])].sum() / n.sum()) for block, n in recorder.picks.items()] if chosen else [1.0]
            self.pairs.append(sum(shares) / len(shares))

    def chosen(self, recorder: Recorder) -> Experts:
        """(15), as many as the budget says of all experts."""
        sizes = [block.shape.num_experts for block in recorder.blocks.values()]
        found = importance(recorder)
        parts = select(found.bottleneck, found.picked, sizes, round(self.budget * sum(sizes))).split(sizes)
        return {name: tuple(part.nonzero().flatten().tolist()) for name, part in zip(recorder.blocks, parts, strict=True)}

    def mask(self, chosen: Experts) -> None:
        for block, each in self.stacks:
            rest = sorted(set(range(len(each))) - set(chosen[block]))
            each.grad[rest] = 0.0  # type: ignore[index]  # there is one after backward

    def held_for(self, parameter: nn.Parameter) -> int:
        """Bytes of its gradient and its two moments."""
        state = self.optimizer.state.get(parameter, {})
        gradient = parameter.grad.nbytes if parameter.grad is not None else 0
        return gradient + sum(each.nbytes for name, each in state.items() if name.startswith("exp_avg"))

    def of(self, *kinds: str) -> float:
        return median(map(sum, zip(*(self.seconds[kind] for kind in kinds), strict=True)))


def base_of(shape: str) -> nn.Module:
    if shape == "small":
        return load("small").model
    size, experts = SHAPES[shape]
    config = AutoConfig.for_model(
        "olmoe", hidden_size=size, intermediate_size=size, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        num_experts=experts, num_experts_per_tok=2, vocab_size=1024, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def batch_of(shape: str) -> dict[str, Tensor]:
    """Random tokens; for the trained base, whose routers know language, the words of this project's own guide."""
    ids = torch.randint(3, 1000, BATCH, generator=torch.Generator().manual_seed(0))
    if shape == "small":
        text = (Path(__file__).parents[1] / "docs/guide.md").read_text()
        ids = torch.tensor(load("small").tokenizer(text)["input_ids"][: ids.numel()]).view(BATCH)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def compare(shape: str, repeats: int, table: Table) -> None:
    """Adds the lines of one model."""
    batch, model = batch_of(shape), base_of(shape)
    kinds = [("full", 1.0), *(("mask", share) for share in BUDGETS[1:]), *(("selective", share) for share in BUDGETS)]
    kinds += [("through all", share) for share in BUDGETS[1:]]
    ways = [Way(prepare(shrink(model, anatomy(model).all_experts), Tuning(), seed="0").train(), *kind) for kind in kinds]
    for way in ways:
        way.step(batch, timed=False)
        way.step(batch, timed=False)  # the second has the optimizer's state from its start
    for _ in range(repeats):
        for way in ways:
            way.step(batch, timed=True)
    full = ways[0]
    for way in ways:
        backward, step = way.of("backward") / full.of("backward"), way.of(*PARTS) / full.of(*PARTS)
        update = f"{way.update_bytes / MIB:.1f}", f"{way.update_bytes / full.update_bytes:.2f}"
        peak = f"{way.peak_bytes / MIB:.1f}", f"{way.peak_bytes / full.peak_bytes:.2f}"
        selection = f"{way.of('selection') / way.of(*PARTS):.1%}" if way.kind != "full" else ""
        experts, pairs = median(way.experts_seconds) / median(full.experts_seconds), median(way.pairs)
        ratios = f"{backward:.2f}", f"{experts:.2f}", f"{step:.2f}"
        of_pairs = f"{experts / pairs:.2f}" if way.kind == "selective" else ""
        row = *ratios, *update, *peak, selection, f"{pairs:.0%}", of_pairs
        cosine = torch.cosine_similarity(way.router.flatten(), full.router.flatten(), dim=0)
        table.add_row(shape, way.kind, f"{way.budget:.0%}", *row, f"{cosine:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--shape", choices=(*SHAPES, "small"), help="only this model")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(title=f"Training step of {BATCH[0]} × {BATCH[1]} tokens, one thread, medians of {asked.repeats}")
    columns = "model,way,budget,backward,experts,step,update MiB,of full,peak MiB,of full,selection,pairs,of pairs,router"
    for column in columns.split(","):
        table.add_column(column, justify="right")
    for shape in [asked.shape] if asked.shape else (*SHAPES, "small"):
        compare(shape, asked.repeats, table)
    Console(width=150).print(table)
    print(
        "wanted at 25 %: experts at most 1.10 of pairs; from 32 experts on, backward at most 0.80, update at most 0.30; "
        "selection at most 3 %"
    )


if __name__ == "__main__":
    main()
