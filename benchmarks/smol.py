"""What a base model can do without fine-tuning: bits per byte of nine texts, and five tasks by likelihood, in its chat template.

    python benchmarks/smol.py MODEL … [--items 500] [--out results/smol]

A model is what model.name takes, or a dense model: a folder or a GGUF file. Each result is kept in --out as soon as it is there,
so that a benchmark that is stopped goes on; abilities.csv has those of all models. A model without chat template is asked in
the plain frames ("plain-1"). Weights and products are in bfloat16. The answer is the choice with the highest log-likelihood per
character (acc_norm of lm-evaluation-harness); intervals are Wilson's, 95 %, and hold for a new draw of items.
Bits per byte: ten texts of each set, their first 1000 characters; the first token of a text counts too, after
<|endoftext|> or the token that begins a text.
"""

import argparse
import csv
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from io import StringIO
from pathlib import Path
from random import Random
from time import process_time
from typing import Any

import torch
from scipy.stats import binomtest
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from fedexperts.core import evaluation
from fedexperts.data import sources
from fedexperts.data.encode import Encoder, special_tokens
from fedexperts.data.fields import field_text
from fedexperts.data.pack import data_folder
from fedexperts.data.readers import at_location, read
from fedexperts.data.settings import DataSettings, SourceSettings
from fedexperts.errors import FedExpertsError, NoExperts
from fedexperts.io.files import write_text
from fedexperts.models.continued.models import prepared
from fedexperts.models.load import load
from fedexperts.models.upcycle.checkpoint import open_dense
from fedexperts.moe.logits import IGNORED
from fedexperts.types import Example

TEXTS = (
    *("books2", "openstax", "classic_books", "state_union", "stories", "tinyshakespeare", "wikitext2_valid"),
    *("encyclopedic", "dialogue"),
)
TASKS = {
    "piqa": "piqa_cloze",
    "commonsenseqa": "commonsenseqa_cloze",
    "sst2": "superni/task363_sst2_polarity_classification",
    "ag_news": "ag_news",
    "mmlu": "mmlu_cloze",
}
BOTH = {"sst2"}  # sets whose training rows are asked too, since they have few test rows and nothing is trained on them
PIECES, CHARACTERS = 10, 1000
MAX_TOKENS = 512


def model_of(name: str) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A base model, or a dense one, in bfloat16."""
    if not name.endswith(".gguf"):
        try:
            base = load(name, dtype="bfloat16")
            return prepared(base.model), base.tokenizer
        except NoExperts:
            pass
    dense = open_dense(name)
    model = AutoModelForCausalLM.from_config(dense.config, dtype=torch.bfloat16)
    model.load_state_dict({key: dense.read(key) for key in dense.tensors}, strict=False)
    model.tie_weights()
    return model.eval(), dense.tokenizer


def pieces(text: str) -> list[str]:
    """The beginnings of PIECES texts of a set, at equal distances; of few long ones several pieces each."""
    rows = [
        at_location(row, lambda fields: field_text(fields, "text")) for row in read(data_folder() / f"text/{text}.test.jsonl.gz")
    ]
    texts = rows[:: max(1, len(rows) // PIECES)][:PIECES]
    if len(texts) < PIECES:
        each = -(-PIECES // len(texts))
        texts = [row[index * len(row) // each :] for row in texts for index in range(each)][:PIECES]
    return [row[:CHARACTERS] for row in texts]


@torch.inference_mode()
def bits_per_byte(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Of each set, and their mean."""
    start = tokenizer.get_vocab().get("<|endoftext|>", [*special_tokens(tokenizer)[0], tokenizer.bos_token_id][0])
    bits = {}
    for text in TEXTS:
        nats, size = 0.0, 0
        for piece in pieces(text):
            ids = torch.tensor([[start, *tokenizer(piece, add_special_tokens=False)["input_ids"]]])
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            nats += float(cross_entropy(logits, ids[0, 1:], reduction="sum"))
            size += len(piece.encode())
        bits[text] = nats / size / math.log(2)
    return {**bits, "mean": statistics.fmean(bits.values())}


def items(name: str, number: int, template: str) -> list[Example]:
    """Items of a task, always the same ones."""
    asked = SourceSettings(name=TASKS[name], template=template, metric="likelihood")
    source = sources.load(asked, DataSettings(sources=(TASKS[name],)))
    rows = [*source.test, *(source.train if name in BOTH else ())]
    return Random(f"smol/{name}").sample(rows, min(number, len(rows)))


def likeliest(model: nn.Module, example: Example, encoder: Encoder) -> str:
    """As `evaluation.likeliest`, but the prompt is read once for all choices."""
    batch = evaluation.own_labels(encoder, [replace(example, response=choice) for choice in example.choices])
    number, first = len(example.choices), int((batch["labels"][0] != IGNORED).int().argmax())
    ids, counted = batch["input_ids"][:, first:], batch["labels"][:, first:] != IGNORED
    prompt = model(input_ids=batch["input_ids"][:1, :first], use_cache=True, logits_to_keep=1)
    prompt.past_key_values.batch_repeat_interleave(number)
    later = model(input_ids=ids, past_key_values=prompt.past_key_values, use_cache=True).logits[:, :-1]
    logits = torch.cat([prompt.logits.expand(number, -1, -1), later], dim=1).float().log_softmax(-1)
    found = (logits.gather(2, ids[..., None])[..., 0] * counted).sum(1) / torch.tensor([len(each) for each in example.choices])
    return example.choices[int(found.argmax())]


def accuracy(model: nn.Module, tokenizer: PreTrainedTokenizerBase, name: str, number: int) -> dict[str, Any]:
    """Share of items with the right answer, its interval, and the mean chance of a guess."""
    examples = items(name, number, "chat" if tokenizer.chat_template else "plain-1")
    encoder = Encoder(tokenizer, MAX_TOKENS)
    right = [float(likeliest(model, example, encoder) == example.response) for example in examples]
    interval = binomtest(round(sum(right)), len(right)).proportion_ci(method="wilson")
    guess = statistics.fmean(1 / len(example.choices) for example in examples)
    return {"accuracy": statistics.fmean(right), "low": interval.low, "high": interval.high, "items": len(right), "guess": guess}


def results(model: nn.Module, tokenizer: PreTrainedTokenizerBase, number: int, known: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Each result that is not known, with its name."""
    if "bits_per_byte" not in known:
        yield "bits_per_byte", bits_per_byte(model, tokenizer)
    with torch.inference_mode():
        for name in TASKS:
            if name not in known:
                yield name, accuracy(model, tokenizer, name, number)


def digest(model: nn.Module) -> str:
    """The first half of the sha256 of all weights."""
    found = sha256()
    for name, parameter in model.named_parameters():
        found.update(name.encode() + parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:32]


def write_table(out: Path) -> None:
    """Writes abilities.csv from the results in `out`: mean bits per byte, and of tasks the share of right answers."""
    text = StringIO()
    writer = csv.DictWriter(text, ["model", "task", "value", "low", "high", "items", "guess"], lineterminator="\n")
    writer.writeheader()
    for file in sorted(out.glob("*.json")):
        found = json.loads(file.read_text())
        for task in ("bits_per_byte", *TASKS):
            if task in found:
                result = found[task]
                of_task = {name: result.get(name) for name in ("low", "high", "items", "guess")}
                value = result.get("accuracy", result.get("mean"))
                writer.writerow({"model": file.stem, "task": task, "value": value, **of_task})
    write_text(out / "abilities.csv", text.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("results/smol"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for name in asked.models:
        file = asked.out / f"{Path(name).stem}.json"
        try:
            model, tokenizer = model_of(name)
        except FedExpertsError as error:
            parser.error(str(error))
        about = {"model": name, "weights": digest(model), "items asked": asked.items}
        found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else about
        if other := [key for key, value in about.items() if found.get(key) != value]:
            parser.error(f"{file} has results with another {', '.join(other)}; remove it, or give another folder with --out")
        started = process_time()
        for what, value in results(model, tokenizer, asked.items, list(found)):
            found[what] = value
            write_text(file, json.dumps(found, indent=2) + "\n")
            print(name, what, json.dumps(value), f"{process_time() - started:.0f} CPU s", flush=True)
        write_table(asked.out)


if __name__ == "__main__":
    main()
