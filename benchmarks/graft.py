"""What personal experts cost: a training step of a grafted model, and the selection of the experts, in one process.

    python benchmarks/graft.py [--repeats 9]

step        CPU seconds of forward, backward and AdamW with one, two, three personal experts a layer, over those of the same
            model with LoRA on attention alone; the experts and gates have adapters too, as FLEx trains them
peak MiB    the most bytes of tensors alive in a step (MemoryMeter, in a step that is not timed), and its ratio
selection   CPU seconds of by_reconstruction, with FLEx's default stride and with all tokens, over those of a plain forward
            pass, logits included, over the same text

Medians; each repeat takes every way in turn, so that all meet the same noise. Models: the shipped `small` (top-2 of 24), and
a random OLMoE with top-2 of 16.
"""

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median
from time import process_time

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from fedexperts.core.training import optimizer_for
from fedexperts.methods.flex import FLEx
from fedexperts.models.load import load
from fedexperts.moe import graft
from fedexperts.moe.anatomy import anatomy, blocks
from fedexperts.moe.footprint import next_token_loss
from fedexperts.moe.kernel import choose_kernel
from fedexperts.moe.memory import MemoryMeter
from fedexperts.moe.reconstruction import by_reconstruction
from fedexperts.moe.shrink import shrink
from fedexperts.moe.tuning import Tuning, prepare
from fedexperts.types import Training

TUNING = Tuning("lora", ("attention",), rank=8, attention_modules=("q_proj", "k_proj", "v_proj"))
SIZE = (8, 128)  # examples, tokens each
CALIBRATION = 4  # batches
STRIDE = FLEx().calibration_stride
MIB = 2**20

Batch = dict[str, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    table = Table(
        "model",
        "personal experts",
        "step",
        "each",
        "peak MiB",
        "of none",
        "selection",
        "of all tokens",
        title=f"Medians of {repeats}",
    )
    for name, model in (("small, top-2 of 24", small()), ("h256 I256, top-2 of 16", random_olmoe())):
        for row in measured(model, repeats):
            table.add_row(name, *row)
    Console(width=150).print(table)
    Console().print("wanted at top-2 of 16: a step with one at most 1.35; selection at most 3")


def small() -> nn.Module:
    return load("small").model


def random_olmoe() -> nn.Module:
    """Shapes of OLMoE with 16 experts; torch's generator is seeded."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 4, "num_experts": 16, "num_experts_per_tok": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 4096, "eos_token_id": 2, "pad_token_id": 0}
    model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model("olmoe", **sizes, **heads)).eval()
    choose_kernel(model)
    return model


def measured(base: nn.Module, repeats: int) -> list[tuple[str, ...]]:
    """A row for each number of personal experts, none first."""
    chance = torch.Generator().manual_seed(0)
    batches = [batch_of(torch.randint(3, 4000, SIZE, generator=chance)) for _ in range(CALIBRATION)]
    ways = {grafts: step_of(base, grafts) for grafts in range(4)}
    peaks = {grafts: peak_of(way, batches[0]) for grafts, way in ways.items()}
    steps: dict[int, list[float]] = {grafts: [] for grafts in ways}
    selections: dict[tuple[int, int], list[float]] = {(grafts, s): [] for grafts in (1, 2, 3) for s in (STRIDE, 1)}
    forwards: list[float] = []
    for repeat in range(repeats):
        for grafts, (step, _) in ways.items():
            steps[grafts].append(timed(partial(step, batches[repeat % CALIBRATION])))
        forwards.append(timed(partial(forward, base, batches)))
        for (grafts, stride), times in selections.items():
            times.append(timed(partial(by_reconstruction, base, batches, grafts, stride)))
    rows = []
    for grafts in ways:
        ratios = [time / none for time, none in zip(steps[grafts], steps[0], strict=True)]
        selected = [
            f"{median(time / plain for time, plain in zip(selections[grafts, stride], forwards, strict=True)):.2f}"
            if grafts
            else ""
            for stride in (STRIDE, 1)
        ]
        each = " ".join(f"{ratio:.2f}" for ratio in ratios)
        peak = f"{peaks[grafts] / MIB:.1f}", f"{peaks[grafts] / peaks[0]:.2f}"
        rows.append((str(grafts), f"{median(ratios):.2f}", each, *peak, *selected))
    return rows


def step_of(base: nn.Module, grafts: int) -> tuple[Callable[[Batch], None], tuple[nn.Module, torch.optim.Optimizer]]:
    """A training step of the base with LoRA on attention and so many personal experts a layer, and what it holds."""
    shape = anatomy(base)
    model = prepare(shrink(base, shape.all_experts), TUNING, seed="0")
    if grafts:
        graft.attach(model, dict.fromkeys(blocks(model), tuple(range(grafts))), TUNING, seed="0")
    optimizer = optimizer_for([each for each in model.parameters() if each.requires_grad], Training(**vars(TUNING)))
    model.train()

    def step(batch: Batch) -> None:
        next_token_loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, (model, optimizer)


def peak_of(way: tuple[Callable[[Batch], None], tuple[nn.Module, torch.optim.Optimizer]], batch: Batch) -> int:
    """Of the second step: the optimizer's state is there."""
    step, held = way
    step(batch)
    with MemoryMeter(*held) as meter:
        step(batch)
    return meter.peak_bytes


@torch.no_grad()
def forward(model: nn.Module, batches: list[Batch]) -> None:
    for batch in batches:
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)


def batch_of(ids: Tensor) -> Batch:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def timed(run: Callable[[], object]) -> float:
    """CPU seconds."""
    start = process_time()
    run()
    return process_time() - start


if __name__ == "__main__":
    main()
