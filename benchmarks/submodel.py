"""What a client with a quarter of the experts costs, against the full model and against the analytic floor.

    python benchmarks/submodel.py [--repeats 5]

Each measurement is a fresh process that reads its experts from a checkpoint on disk and takes three training steps (AdamW,
everything trained). Columns, in MiB, medians of the processes:

peak        the most bytes of tensors alive in the last step (MemoryMeter)
plan        footprint(): 16 bytes a parameter (weight, gradient, two moments) and the activations, as if all were alive at once
floor       the same, but of gradients and activations only the larger: one comes as the other goes
process     how far the process's resident memory rose (VmHWM) above what it was before the model came; a cross-check, with
            whatever the allocator keeps and the kernels' scratch space
send        what the client sends: its Patch, row ids included; its floor is 4 bytes a parameter
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from fedexperts.moe import rows
from fedexperts.moe.anatomy import Experts, anatomy
from fedexperts.moe.footprint import footprint, next_token_loss
from fedexperts.moe.memory import MemoryMeter
from fedexperts.moe.parameters import parameters
from fedexperts.moe.shrink import load_part, shrink
from fedexperts.moe.tuning import Tuning, prepare, trainable
from fedexperts.types import Patch

SHAPES = {
    "h256 I256 E32": {"hidden_size": 256, "intermediate_size": 256, "num_experts": 32, "vocab_size": 1024},
    "tiny h128 I128 E16": {"hidden_size": 128, "intermediate_size": 128, "num_experts": 16, "vocab_size": 276},
}
WARM_UP = {"hidden_size": 32, "intermediate_size": 32, "num_experts": 4, "vocab_size": 256}
BATCH = (8, 128)
STEPS = 3


def base_of(shape: str) -> torch.nn.Module:
    common = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts_per_tok": 2}
    config = AutoConfig.for_model(
        "olmoe", **common, **{**SHAPES, "warm up": WARM_UP}[shape], pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def fit(folder: str | Path, experts: Experts) -> tuple[torch.nn.Module, int]:
    """The model in `folder` with `experts`, trained for some steps, and the peak of the last one."""
    ids = torch.randint(3, 200, BATCH, generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1:, -16:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    model = prepare(load_part(folder, experts), Tuning(), seed="0").train()
    optimizer = torch.optim.AdamW(trainable(model), fused=True)
    for _ in range(STEPS):
        with MemoryMeter(model, optimizer) as meter:
            next_token_loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model, meter.peak_bytes


def measure(folder: str, experts: Experts) -> dict[str, int]:
    """The costs of training the model in `folder` with `experts`, in this process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as other:  # so that all code is loaded before memory is looked at
        small = base_of("warm up")
        small.save_pretrained(other)
        fit(other, anatomy(small).all_experts)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = resident("VmRSS")
    model, peak = fit(folder, experts)
    highest = resident("VmHWM")
    kept = {name: torch.tensor(ids) for name, ids in experts.items()}
    sent = Patch(rows.read(model), {name: kept[block] for name, block in rows.layout(model).items() if block})
    return {"peak": peak, "process": highest - before, "send": sent.nbytes}


def in_a_process(folder: str, experts: Experts) -> dict[str, int]:
    command = [sys.executable, __file__, "--measure", folder, json.dumps(experts)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def compare(shape: str, repeats: int, table: Table) -> list[float]:
    """Adds a line for the full model and one for a quarter of the experts; gives their ratios to the floor."""
    model = base_of(shape)
    all_experts = anatomy(model).all_experts
    quarter = {name: ids[::4] for name, ids in all_experts.items()}
    costs, counted = footprint(model, Tuning(), BATCH), parameters(model)
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for label, experts in (("full", all_experts), ("25 %", quarter)):
            taken = [in_a_process(folder, experts) for _ in range(repeats)]
            peak, process, send = (median(each[key] for each in taken) for key in ("peak", "process", "send"))
            number = counted.of(experts)
            plan, spared = costs.of(experts), min(costs.activation_bytes, 4 * number)
            ratios.append(peak / (plan - spared))
            cells = [mib(peak), mib(plan), f"{peak / plan:.3f}", mib(plan - spared), f"{ratios[-1]:.3f}", mib(process)]
            table.add_row(shape, label, *cells, mib(send), f"{send / (4 * number):.4f}")
    assert sum(each.numel() for each in shrink(model, quarter).parameters()) == counted.of(quarter)
    return ratios


def mib(number: float) -> str:
    return f"{number / 2**20:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "EXPERTS"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        print(json.dumps(measure(asked.measure[0], {name: tuple(ids) for name, ids in json.loads(asked.measure[1]).items()})))
        return
    table = Table(title=f"Training step of {BATCH[0]} × {BATCH[1]} tokens, MiB, medians of {asked.repeats} processes")
    for column in ("model", "experts", "peak", "plan", "of plan", "floor", "of floor", "process", "send", "of floor"):
        table.add_column(column, justify="right")
    ratios = [ratio for shape in SHAPES for ratio in compare(shape, asked.repeats, table)]
    Console(width=120).print(table)
    print(f"largest peak of floor: {max(ratios):.3f} (at most 1.15 wanted)")


if __name__ == "__main__":
    main()
