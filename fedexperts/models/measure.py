"""Measures a pretrained base: answers to generated tasks, bits per byte of held-out text, and the load of its experts."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fedexperts.core import evaluation
from fedexperts.core.training import cross_entropy
from fedexperts.data import synthetic
from fedexperts.data.encode import Encoder
from fedexperts.data.pack import PACKS, data_folder
from fedexperts.data.readers import read
from fedexperts.models.load import Base
from fedexperts.models.settings import PretrainSettings, Stream, Texts
from fedexperts.models.stream import Windows, as_example, texts_of, token_ids
from fedexperts.moe.routing import Recorder, Routing
from fedexperts.types import Example

WINDOWS = 16  # of held-out text, measured at a time
BATCHES = 8  # number of batches in which the load of the experts is counted

Measured = dict[str, dict[str, Any]]
"""Group → measured quantity → value: a number, or a list with one for each expert."""


def measure(base: Base, settings: PretrainSettings, tokens: Path) -> Measured:
    """All measurements of the recipe; `tokens` is the file with the stream's tokens, from which the n-gram models are made."""
    encoder = Encoder(base.tokenizer, settings.model.max_positions)
    groups = held_out_examples(settings).items()
    answers = {group: verbatim(base.model, encoder, examples) for group, examples in groups if examples}
    if settings.stream is None:
        return answers
    parts = load_file(tokens)
    bigram = Bigram(parts["texts"], len(base.tokenizer))
    bits = held_out_bits(base, bigram, settings.stream, settings.measured)
    return {**bits, **loads(routing(base.model, Windows(parts, settings, settings.stream), settings)), **answers}


def held_out_examples(settings: PretrainSettings) -> dict[str, list[Example]]:
    """Group → test examples of its generated tasks: those trained on and, in a mixture, those hardly seen.

    Raises:
        BadData: a task has fewer different test prompts than `settings.measured`.
    """
    mixture, stream = settings.mixture, settings.stream
    groups = {"tasks": stream.generated} if stream else {"tasks": mixture.tasks, "exposed": mixture.exposed}
    return {
        group: [example for task in tasks for example in synthetic.examples(task, settings.measured, settings.seed, "test")]
        for group, tasks in groups.items()
    }


def verbatim(model: nn.Module, encoder: Encoder, examples: Sequence[Example]) -> dict[str, float]:
    """Task → share of prompts whose answer equals the response letter by letter; and the mean over tasks."""
    scores = evaluation.score(model, examples, encoder, generate_tokens=16, batch_size=100).by_task()
    scores_by_task = {task: round(values["verbatim"], 3) for task, values in scores.items()}
    return {**scores_by_task, "mean": round(sum(scores_by_task.values()) / len(scores_by_task), 3)}


def held_out_bits(base: Base, bigram: "Bigram", stream: Stream, number: int) -> Measured:
    """Bits per byte of `number` held-out texts of each file, evenly spread over it."""
    files = {file: texts for texts in stream.texts if (file := held_out_file(texts.name)) is not None}
    samples = {file.name.partition(".")[0]: held_out_texts(file, texts, number) for file, texts in files.items()}
    return {
        f"bits per byte, {name}": bits_per_byte(base, bigram, texts, stream.window) for name, texts in samples.items() if texts
    }


def held_out_file(name: str) -> Path | None:
    """The file with the test rows that belong to a file or to a stem of the data pack, if it exists."""
    path = Path(name)
    if path.is_file():
        beside = path.with_name(path.name.replace(".train.", ".test."))
        return beside if beside != path and beside.is_file() else None
    stem = next((pack.test for pack in PACKS.values() if name in pack.train and pack.test), name)
    beside = data_folder() / f"{stem}.test.jsonl.gz"
    return beside if beside.is_file() else None


def held_out_texts(file: Path, texts: Texts, number: int) -> list[str]:
    """At most `number` texts of a file, at equal distances."""
    all_texts = texts_of(read(file), texts)
    return all_texts[:: math.ceil(len(all_texts) / number)] if all_texts and number else []


def bits_per_byte(base: Base, bigram: "Bigram", texts: Sequence[str], window: int) -> dict[str, float]:
    """Bits per byte of the model, the bigram and the unigram model on the same tokens, in consecutive windows of `window` tokens.

    The bits of every token but the first of each window, which has no context, over the bytes that these tokens stand for.
    Start and end tokens cost bits and stand for no byte.
    """
    ids = torch.tensor(list(token_ids(base.tokenizer, [as_example(text) for text in texts])))
    windows = ids[: len(ids) // window * window].view(-1, window) if len(ids) >= window else ids[None]
    size = int(token_bytes(base.tokenizer)[windows[:, 1:]].sum())
    nats = {
        "model": sum(model_nats(base.model, chunk) for chunk in windows.split(WINDOWS)),
        "bigram": float(bigram.nats(windows).sum()),
        "unigram": float(bigram.unigram_nats(windows).sum()),
    }
    return {**{name: round(sum_of_nats / size / math.log(2), 4) for name, sum_of_nats in nats.items()}, "bytes": size}


@torch.inference_mode()
def model_nats(model: nn.Module, windows: Int[Tensor, "windows tokens"]) -> float:
    """The sum of -log p of all tokens but the first of each window, given those before."""
    batch = {"input_ids": windows, "attention_mask": torch.ones_like(windows), "labels": windows}
    return float(cross_entropy(model, batch)) * windows[:, 1:].numel()


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> Int[Tensor, " vocabulary"]:
    """The bytes of text that each token of our tokenizers stands for: one for each letter of its name, none if it is special."""
    letters = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return torch.tensor([0 if letter in tokenizer.all_special_tokens else len(letter) for letter in letters])


@torch.inference_mode()
def routing(model: nn.Module, windows: Windows, settings: PretrainSettings) -> Routing:
    """The experts that the routers pick in the batches that would follow the last step of training."""
    with Recorder(model) as recorder:
        for step in range(settings.steps, settings.steps + BATCHES):
            for rank in range(settings.workers):
                batch = windows.batch(step, rank)
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    return recorder.routing()


def loads(routing: Routing) -> Measured:
    """The tokens of each expert as a part of a fair share: the smallest, the largest and all, by MoE block."""
    relative = {name: counts.double() / counts.sum() * len(counts) for name, counts in routing.counts.items()}
    rounded = {name: [round(share, 3) for share in shares.tolist()] for name, shares in relative.items()}
    return {
        "least used expert, of a fair share": {name: min(shares) for name, shares in rounded.items()},
        "most used expert, of a fair share": {name: max(shares) for name, shares in rounded.items()},
        "each expert, of a fair share": dict(rounded),
    }


class Bigram:
    """Counts of tokens and of pairs of tokens: a baseline for language models.

    p(b | a) = (n(ab) + t(a) p(b)) / (n(a) + t(a)), with t(a) the number of different tokens seen after a: the interpolation of
    Witten and Bell ("The zero-frequency problem", IEEE Transactions on Information Theory 37(4), 1991, method C). One is added
    to each token's own count, so that no token is impossible.
    """

    def __init__(self, tokens: Int[Tensor, " tokens"], vocabulary: int) -> None:
        tokens = tokens.long()
        counts = torch.bincount(tokens, minlength=vocabulary).double() + 1
        self.unigram = counts / counts.sum()
        self.pairs = torch.bincount(tokens[:-1] * vocabulary + tokens[1:], minlength=vocabulary**2).view(vocabulary, vocabulary)
        self.seen = self.pairs.sum(1)
        self.kinds = (self.pairs > 0).sum(1).clamp(min=1)  # 1: after a token that was never followed, p(b) alone

    def nats(self, windows: Int[Tensor, "windows tokens"]) -> Float[Tensor, "windows tokens-1"]:
        """-log p of each token but the first, given the one before."""
        before, after = windows[:, :-1], windows[:, 1:]
        kinds = self.kinds[before]
        probability = (self.pairs[before, after] + kinds * self.unigram[after]) / (self.seen[before] + kinds)
        return -probability.log()

    def unigram_nats(self, windows: Int[Tensor, "windows tokens"]) -> Float[Tensor, "windows tokens-1"]:
        """-log p of each token but the first."""
        return -self.unigram[windows[:, 1:]].log()


def card(recipe: Mapping[str, Any], settings: PretrainSettings) -> str:
    """The model card, in Markdown."""
    titles = {"tasks": "unseen test prompts answered letter by letter", "exposed": "the same, of tasks hardly seen"}
    made_of = "generated tasks and text" if settings.stream is None else "plain text, instructions and generated tasks"
    lines = [
        "# A small Mixture-of-Experts language model",
        "",
        f"{recipe['parameters']:,} parameters, OLMoE classes, made by `fedexperts pretrain` from {made_of}",
        f"with seed {settings.seed} in {settings.steps} steps ({recipe['seconds']} s). All settings: `recipe.json`.",
    ]
    if recipe["data"]:
        lines += ["", "| read | sha256 |", "|---|---|", *(f"| {name} | `{hash}` |" for name, hash in recipe["data"].items())]
    for group, values in recipe["measured"].items():
        lines += ["", f"| {titles.get(group, group)} | |", "|---|---|"]
        lines += [
            f"| {name} | {' '.join(map(str, value)) if isinstance(value, list) else value} |" for name, value in values.items()
        ]
    return "\n".join(lines) + "\n"
