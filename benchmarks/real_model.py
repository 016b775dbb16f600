"""A client's training on a model of real size, against plain transformers and peft: one process, the two alternating.

    python benchmarks/real_model.py [CONFIG.json | FOLDER] [--repeats 3] [--steps 20] [--batch 1] [--tokens 64] [--wall]
        [--adapters "attention and experts"]

The model of a config has random weights. The run's side is all of a client's job in a run of FedIT: build the model, load the
weights, train `--steps` steps with their bookkeeping, read the weights. The plain side is a loop over the same batches, loss,
clipping and AdamW, on a model that peft has wrapped before. LoRA of rank 8, on attention, and on attention and all experts.

tokens/s    of the run's job over those of the plain loop (medians; CPU time, or on a card wall time)
step        the same of the steps alone, without building and reading
peak        the most bytes of tensors alive in a step, weights included, of the run's over the plain one's
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fedexperts.core.training import batches, cross_entropy, fit, optimizer_for
from fedexperts.data.encode import Encoder
from fedexperts.methods.base import answer
from fedexperts.methods.fedit import FedIT
from fedexperts.models.load import load
from fedexperts.moe import rows
from fedexperts.moe.anatomy import anatomy, blocks
from fedexperts.moe.memory import MemoryMeter
from fedexperts.moe.tuning import projections
from fedexperts.types import Client, ClientContext, Example, Job, Patch, Split, Training

ROOT = Path(__file__).parents[1]
GRANITE = ROOT / "configs" / "granite-3.0-1b-a400m.json"
PARTS = {"attention": ("attention",), "attention and experts": ("attention", "experts")}
WANTED = {"attention": 0.97, "attention and experts": 1.5}


def random_model(config: Path, folder: Path, dtype: str) -> str:
    """Writes a model of `config` with random weights and the tokenizer of `small`."""
    settings = json.loads(config.read_text())
    torch.manual_seed(0)
    kept = {key: value for key, value in settings.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings["model_type"], **kept), dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "assets" / "small").save_pretrained(folder)
    return str(folder)


def context_of(folder: str, training: Training, tokens: int) -> ClientContext:
    """A client with examples that fill the batches."""
    base = load(folder, dtype="auto")
    examples = [Example(f"{number} " + "a river of stones " * tokens, "the sea", "t") for number in range(64)]
    encoder = Encoder(base.tokenizer, tokens)
    return ClientContext(Client("c1", 64), base.model, Split(examples, examples[:2], ()), encoder, training, {})


def plain_model(context: ClientContext) -> nn.Module:
    """The base of `context`, wrapped by peft with the same adapters; it shares the base's weights."""
    training, base = context.training, context.model
    experts = [f"{name}.experts.{matrix}" for name in blocks(base) for matrix in ("gate_up_proj", "down_proj")]
    config = peft.LoraConfig(
        r=training.rank,
        lora_alpha=int(training.alpha),
        target_modules=sorted(projections(base, training.attention_modules)),
        target_parameters=experts if "experts" in training.trained else None,
    )
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    return peft.get_peft_model(deepcopy(base, memo), config)


def plain_steps(model: nn.Module, drawn: list[Mapping[str, Tensor]], training: Training, meter: bool = False) -> int:
    """A training loop as people write it; the peak of bytes in its last step if `meter`."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, peak = optimizer_for(trained, training), 0
    model.train()
    for number, batch in enumerate(drawn):
        watched = MemoryMeter(model, optimizer) if meter and number == len(drawn) - 1 else None
        if watched:
            watched.__enter__()
        inner: Any = model
        loss = cross_entropy(inner.get_base_model(), batch, training.label_smoothing)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if watched:
            watched.__exit__(None, None, None)
            peak = watched.peak_bytes
    return peak


def timed(clock: Callable[[], float], work: Callable[..., Any], *arguments: Any, **named: Any) -> tuple[float, Any]:
    started = clock()
    result = work(*arguments, **named)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - started, result


def compare(folder: str, parts: str, options: argparse.Namespace) -> None:
    training = Training(
        "lora",
        PARTS[parts],
        rank=8,
        batch_size=options.batch,
        local_steps=options.steps,
        router_aux_loss_coef=0.0,
        threads=options.threads,
    )
    context = context_of(folder, training, options.tokens)
    method, clock = FedIT(), perf_counter if options.wall else process_time
    experts = anatomy(context.model).all_experts
    start = method.build_model(Job("c1", 1, "train", "s", experts, Patch({})), context)
    job = Job("c1", 1, "train", "s", experts, Patch(rows.read(start)))
    plain = plain_model(context)
    del start  # its adapters are in the job
    jobs, steps, bare = [], [], []
    for repeat in range(options.repeats + 1):
        drawn = [context.encoder.batch(each) for each in batches(context.data.train, options.batch, options.steps, "s")]
        of_plain, _ = timed(clock, plain_steps, plain, drawn, training)
        building, model = timed(clock, method.build_model, job, context)
        of_steps, fitted = timed(clock, fit, model, context, seed="s")
        reading, _ = timed(clock, answer, job, context, model, fitted)
        if repeat:  # the first warms up
            bare.append(of_plain)
            steps.append(of_steps)
            jobs.append(building + of_steps + reading)
    peak = fitted.cost.peak_bytes / plain_steps(plain, drawn[:2], training, meter=True)
    whole, alone = (statistics.median(p / o for p, o in zip(bare, each, strict=True)) for each in (jobs, steps))
    seconds = statistics.median(bare) / options.steps
    print(
        f"{parts:22} job {whole:.3f}  step {alone:.3f} (wanted {WANTED[parts]})  peak {peak:.3f}  plain step {seconds:.2f} s  "
        f"each step {[round(p / o, 2) for p, o in zip(bare, steps, strict=True)]}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(GRANITE))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--adapters", choices=PARTS, help="only these")
    parser.add_argument("--wall", action="store_true", help="wall time in place of CPU time")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        is_config = options.model.endswith(".json")
        folder = random_model(Path(options.model), Path(temporary), options.dtype) if is_config else options.model
        for parts in [options.adapters] if options.adapters else PARTS:
            compare(folder, parts, options)


if __name__ == "__main__":
    main()
