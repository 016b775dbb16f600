"""How a pretrained base is best asked: how often the right choice is the likeliest per character, under several frames.

Not greedy answers: a base that is not tuned to a frame goes on after its answer, and never ends it.

    python benchmarks/frames.py MODEL OUT.csv [ITEMS]

Needs FEDEXPERTS_DATA. The frames, for a question with a text (and options, where they are named):

    plain-1  question, text, "Answer:", and the answer in the next line
    line     question, text, and the answer in the same line: "Answer: world"
    named    as line, with "Options: world, sports, …" after the text
    chat     the tokenizer's chat template; chat named: with the options
"""

import csv
import sys
from dataclasses import replace
from math import sqrt
from pathlib import Path
from time import process_time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedexperts.core.evaluation import score
from fedexperts.data.encode import Encoder
from fedexperts.data.pool import load_pool
from fedexperts.data.settings import PLAIN, DataSettings, SourceSettings, with_templates
from fedexperts.types import Example, Turn

SOURCES = (
    "ag_news",
    "superni/task363_sst2_polarity_classification",
    "superni/task875_emotion_classification",
    "commonsenseqa",
)
END = "\nAnswer:\n"


def framed(example: Example, frame: str) -> Example:
    """`example`, which is asked in plain-1, asked in `frame`."""
    text = example.prompt.removesuffix(END)
    options = "" if not frame.endswith("named") else f"\nOptions: {', '.join(example.choices)}"
    if frame == "plain-1":
        return example
    if frame.startswith("chat"):
        return replace(example, prompt=text + options, turns=(Turn("user", text + options),))
    choices = tuple(f" {choice}" for choice in example.choices)
    return replace(example, prompt=f"{text}{options}\nAnswer:", response=f" {example.response}", choices=choices)


def main(name: str, out: Path, items: int) -> None:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()  # dense or MoE
    tokenizer = AutoTokenizer.from_pretrained(name)
    frames = ["plain-1", "line", "named", *(["chat", "chat named"] if tokenizer.chat_template else [])]
    encoder, rows = Encoder(tokenizer, 512), []
    for source in SOURCES:
        sources = with_templates((SourceSettings(name=source),), PLAIN)
        tests = load_pool(DataSettings(sources=sources, limit=50)).test
        chosen = tests[:: max(1, len(tests) // items)][:items]
        for frame in frames:
            started = process_time()
            asked = [replace(framed(example, frame), metric="likelihood") for example in chosen]
            accuracy = next(iter(score(model, asked, encoder, 8, 16).by_task().values()))["likelihood"]
            half = 1.96 * sqrt(accuracy * (1 - accuracy) / len(chosen))
            rows.append((source, frame, len(chosen), f"{100 * accuracy:.1f}", f"{100 * half:.1f}"))
            print(*rows[-1], f"{process_time() - started:.0f} s", flush=True)
            with out.open("w", newline="") as file:
                head = ("source", "frame", "examples", "accuracy", "half_of_95_percent_interval")
                csv.writer(file, lineterminator="\n").writerows([head, *rows])


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 100)
