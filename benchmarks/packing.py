"""What packing saves: tokens of a batch with padding, and CPU time of a training step, packed over unpacked.

    python benchmarks/packing.py [SOURCE …]

Needs FEDEXPERTS_DATA. On `small` in float32, batches of 16 of at most 256 tokens; both kinds of steps alternate, medians of 7.
"""

import sys
from dataclasses import replace
from statistics import median
from time import process_time

import torch

from fedexperts.core.training import batches, cross_entropy
from fedexperts.data.encode import Encoder
from fedexperts.data.pool import load_pool
from fedexperts.data.settings import DataSettings
from fedexperts.models.load import load
from fedexperts.moe.tuning import Tuning, prepare

STEPS = 7


def main(sources: list[str]) -> None:
    torch.set_num_threads(1)
    base = load("assets/small", dtype="float32")
    model = prepare(base.model, Tuning(train="lora", parts=("attention",)), seed="0")
    encoder = Encoder(base.tokenizer, 256)
    print("source        tokens, padding included    CPU time of a step    loss differs by")
    for source in sources:
        examples = load_pool(DataSettings(sources=(source,), limit=2000)).train
        chosen = list(batches(examples, 16, STEPS, "packing"))
        sizes, seconds, losses = {}, {}, {}
        for batch in [chosen[0], *chosen]:  # the first warms up
            for name, encode in (("single", encoder.batch), ("packed", encoder.packed)):
                encoded = encode([replace(each) for each in batch])
                started = process_time()
                loss = cross_entropy(model, encoded)
                loss.backward()
                seconds.setdefault(name, []).append(process_time() - started)
                sizes.setdefault(name, []).append(encoded["input_ids"].numel())
                losses.setdefault(name, []).append(float(loss.detach()))
        tokens = sum(sizes["packed"]) / sum(sizes["single"])
        time = median(packed / single for packed, single in zip(seconds["packed"][1:], seconds["single"][1:], strict=True))
        apart = max(abs(one - other) for one, other in zip(losses["packed"], losses["single"], strict=True))
        print(f"{source:12}  {tokens:22.2f}    {time:18.2f}    {apart:15.1e}")


if __name__ == "__main__":
    main(sys.argv[1:] or ["banking77", "ag_news", "dolly", "trec6"])
