"""Which learning rate trains adapters on a base: Banking77, TREC, AG News and sst2 by turns, in one place.

    python benchmarks/smol_rates.py [--model smol] [--lr 1e-3] [--rank 8] [--modules q_proj,v_proj] [--experts] [--steps 60]

One thread. Batches of four examples of one task; a rise of the rate over five steps, then a line to 0. Every 20 steps it prints
the mean loss of each task since then, in nats, and CPU seconds a step; at the end the answers that are right of 20 test examples.
"""

import argparse
from itertools import cycle, islice
from random import Random
from statistics import fmean
from time import process_time

import torch
from torch import nn

from fedexperts.core import evaluation
from fedexperts.core.training import cross_entropy, optimizer_for
from fedexperts.data import sources
from fedexperts.data.encode import Encoder
from fedexperts.data.settings import DataSettings, SourceSettings
from fedexperts.models.load import load
from fedexperts.moe.anatomy import anatomy
from fedexperts.moe.shrink import shrink
from fedexperts.moe.tuning import prepare, trainable
from fedexperts.types import Example, Training

TASKS = ("banking77", "trec6", "ag_news", "superni/task363_sst2_polarity_classification")
TOKENS, ANSWER_TOKENS, TESTED, SHOWN, WARM_UP = 128, 16, 20, 20, 5


def rows(name: str) -> tuple[list[Example], list[Example]]:
    """Training rows and TESTED test rows of a task, mixed."""
    source, rng = sources.load(SourceSettings(name=name, task=name), DataSettings(sources=(name,))), Random(name)
    train, test = list(source.train), list(source.test)
    rng.shuffle(train)
    rng.shuffle(test)
    return train, test[:TESTED]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smol")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--modules", default="q_proj,k_proj,v_proj,o_proj")
    parser.add_argument("--experts", action="store_true")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts = ("attention", "experts") if options.experts else ("attention",)
    modules = tuple(options.modules.split(","))
    training = Training(
        train="lora",
        parts=parts,
        attention_modules=modules,
        rank=options.rank,
        alpha=2.0 * options.rank,
        lr=options.lr,
        batch_size=4,
    )
    base = load(options.model, dtype="float32")
    encoder = Encoder(base.tokenizer, TOKENS, base.encoder_decoder)
    model = prepare(shrink(base.model, anatomy(base.model).all_experts), training.tuning, seed="0").train()
    optimizer = optimizer_for(trainable(model), training)
    data = {name: rows(name) for name in TASKS}
    streams = {name: cycle(train) for name, (train, _) in data.items()}

    losses: dict[str, list[float]] = {name: [] for name in TASKS}
    started = process_time()
    for step, name in enumerate(islice(cycle(TASKS), options.steps)):
        for group in optimizer.param_groups:
            group["lr"] = options.lr * min(1, (step + 1) / WARM_UP) * (1 - step / options.steps)
        loss = cross_entropy(model, encoder.batch([*islice(streams[name], training.batch_size)]), 0)
        loss.backward()
        nn.utils.clip_grad_norm_(trainable(model), training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses[name].append(loss.item())
        if (step + 1) % SHOWN == 0:
            means = ", ".join(f"{task} {fmean(found):.2f}" for task, found in losses.items())
            print(f"{step + 1} steps: {means}; {(process_time() - started) / (step + 1):.2f} s", flush=True)
            losses = {task: [] for task in TASKS}
    model.eval()
    for name, (_, test) in data.items():
        score = evaluation.score(model, test, encoder, ANSWER_TOKENS, TESTED).by_task()[name]["accuracy"]
        print(f"{name}: {score * len(test):.0f} of {len(test)} right", flush=True)


if __name__ == "__main__":
    main()
