"""What a base reaches on each data set, as it is and fine-tuned on all training rows in one place: the ceiling of federated runs.

    python benchmarks/ceilings.py [--model small] [--sets ag_news banking77 …] [--epochs 4] [--lr 1e-3] [--out results/ceilings]

Beside it, on the same rows: logistic regression on TF-IDF of words and pairs of words, where examples have labels, and the
most frequent answer, where there are choices. Answers are generated and judged as in federated runs; the loss is theirs too
(label smoothing, load balance). Batches hold examples of like length; the learning rate rises over the first tenth of the
steps and then falls to zero in a line.

A set that is finished is kept in --out: what was stopped goes on, and two processes can share the sets. With --validation a
tenth of the training rows is kept out of training and scored instead of the test rows: to choose --lr and --epochs by.
"""

import argparse
import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from torch import nn

from fedexperts.core import evaluation
from fedexperts.core.training import cross_entropy, optimizer_for
from fedexperts.data import sources
from fedexperts.data.encode import Encoder
from fedexperts.data.settings import DataSettings, SourceSettings
from fedexperts.errors import BadRun, FedExpertsError
from fedexperts.io.files import write_text
from fedexperts.models.files import location_of
from fedexperts.models.load import Base, load
from fedexperts.moe.anatomy import anatomy
from fedexperts.moe.precision import Precision, mixed_precision
from fedexperts.moe.routing import Recorder, balance_loss
from fedexperts.moe.shrink import shrink
from fedexperts.moe.tuning import prepare, trainable
from fedexperts.types import Example, Training

SETS = (
    *("ag_news", "banking77", "trec6", "superni/task363", "superni/task875"),
    *("piqa", "commonsenseqa", "mmlu", "dolly/closed_qa", "quoref", "xsum"),
)
WANTED = {"ag_news": 4.0, "banking77": 8.0}  # points that the base may stay below TF-IDF with logistic regression
WARM_UP = 0.1  # of the steps
POOL = 50  # batches whose examples are sorted by length together
ENCODED = 1000  # examples at a time, to learn their lengths
HELD_OUT = 0.1  # of the training rows, to choose C by, and what is scored with --validation
STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)  # C of the logistic regression
FREE_TOKENS = 64  # generated where the answer is none of several choices


@dataclass(frozen=True)
class Asked:
    """What the result of a set depends on, besides the set and the base."""

    epochs: int
    lr: float
    batch: int
    max_tokens: int
    limit: int | None  # test rows of each set, drawn at random
    validation: bool
    precision: Precision  # of products, in training and scoring


def ceiling(base: Base, name: str, asked: Asked) -> dict[str, Any]:
    """Everything that is measured on one set."""
    source = sources.load(SourceSettings(name=name, task=name), DataSettings(sources=(name,)))
    train, test = held_apart(source.train) if asked.validation else (source.train, source.test)
    if asked.limit is not None:
        test = Random(f"limit/{name}").sample(test, min(asked.limit, len(test)))
    encoder = Encoder(base.tokenizer, asked.max_tokens, base.encoder_decoder)
    room = answer_tokens(encoder, train[0].choices)

    started = perf_counter()
    mixed_precision(base.model, asked.precision)
    before = evaluation.score(base.model, test, encoder, room, asked.batch)
    scored = perf_counter()
    model = fine_tuned(base.model, train, encoder, asked, name)
    trained = perf_counter()
    after = evaluation.score(model, test, encoder, room, asked.batch)
    ended = perf_counter()
    return {
        "set": name,
        "data": source.hash,
        "train": len(train),
        "test": len(test),
        "metric": after.metric(name),
        "zero_shot": before.by_task()[name],
        "fine_tuned": after.by_task()[name],
        "tfidf": tfidf(train, test) if train[0].label is not None else None,
        "majority": majority(train, test) if train[0].choices else None,
        "seconds": {"training": round(trained - scored), "scoring": round(scored - started + ended - trained)},
    }


def held_apart(rows: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """All but a tenth of `rows`, and that tenth; always the same."""
    mixed = Random("held out").sample(list(rows), len(rows))
    number = max(1, round(HELD_OUT * len(rows)))
    return mixed[number:], mixed[:number]


def answer_tokens(encoder: Encoder, choices: Sequence[str]) -> int:
    """Enough for the longest choice and its end token."""
    if not choices:
        return FREE_TOKENS
    return 1 + max(len(ids) for ids in encoder.tokenizer(list(choices), add_special_tokens=False)["input_ids"])


def fine_tuned(base: nn.Module, train: Sequence[Example], encoder: Encoder, asked: Asked, name: str) -> nn.Module:
    """A copy of `base`, all of it trained on `train`."""
    training = Training(lr=asked.lr, batch_size=asked.batch)
    model = prepare(shrink(base, anatomy(base).all_experts), training.tuning, seed="0").train()
    mixed_precision(model, asked.precision)
    optimizer = optimizer_for(trainable(model), training)
    steps, step, started = asked.epochs * math.ceil(len(train) / asked.batch), 0, perf_counter()
    sizes = lengths(train, encoder)
    for epoch in range(asked.epochs):
        losses = []
        for places in batches(sizes, asked.batch, seed=f"{name}/{epoch}"):
            for group in optimizer.param_groups:
                group["lr"] = asked.lr * rate(step, steps)
            with Recorder(model, keep_logits=True) as recorder:
                loss = cross_entropy(model, encoder.batch([train[place] for place in places]), training.label_smoothing)
            (loss + training.router_aux_loss_coef * balance_loss(recorder)).backward()
            nn.utils.clip_grad_norm_(trainable(model), training.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            step += 1
        took = perf_counter() - started
        print(f"{name}: epoch {epoch + 1} of {asked.epochs}, loss {statistics.fmean(losses):.4f}, {took:.0f} s", file=sys.stderr)
    return model.eval()


def rate(step: int, steps: int) -> float:
    """Part of the full learning rate: a rise over the first tenth of the steps, then a line down to zero."""
    warm_up = WARM_UP * steps
    return min((step + 1) / (warm_up + 1), (steps - step) / (steps - warm_up))


def lengths(rows: Sequence[Example], encoder: Encoder) -> list[int]:
    """Tokens of each example, as it is trained on."""
    parts = (rows[start : start + ENCODED] for start in range(0, len(rows), ENCODED))
    return [number for part in parts for number in encoder.batch(part)["attention_mask"].sum(1).tolist()]


def batches(lengths: Sequence[int], size: int, seed: str) -> list[list[int]]:
    """The places of all examples, each beside others of like length, in an order drawn from `seed`."""
    rng = Random(seed)
    mixed = rng.sample(range(len(lengths)), len(lengths))
    pools = [mixed[start : start + POOL * size] for start in range(0, len(mixed), POOL * size)]
    alike = [sorted(pool, key=lambda place: lengths[place]) for pool in pools]
    found = [pool[start : start + size] for pool in alike for start in range(0, len(pool), size)]
    rng.shuffle(found)
    return found


def tfidf(train: Sequence[Example], test: Sequence[Example]) -> dict[str, float]:
    """Accuracy of logistic regression on TF-IDF of words and pairs of words, its C chosen on a tenth of the training rows."""
    prompts = [example.prompt for example in (*train, *test)]
    head = shared(prompts)  # the question, which is no part of the text
    tail = shared([prompt[head:][::-1] for prompt in prompts])  # the call for an answer

    def accuracies(strengths: Sequence[float], fitted: Sequence[Example], judged: Sequence[Example]) -> dict[float, float]:
        (texts, labels), (others, expected) = (
            ([each.prompt[head : len(each.prompt) - tail] for each in rows], [each.label for each in rows])
            for rows in (fitted, judged)
        )
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit(texts)
        known, unknown = words.transform(texts), words.transform(others)
        models = {strength: LogisticRegression(C=strength, max_iter=2000).fit(known, labels) for strength in strengths}
        return {strength: float(model.score(unknown, expected)) for strength, model in models.items()}

    on_held = accuracies(STRENGTHS, *held_apart(train))
    best = max(on_held, key=lambda strength: on_held[strength])
    return {"accuracy": accuracies([best], train, test)[best], "C": best}


def shared(texts: Sequence[str]) -> int:
    """How many letters all of them begin with."""
    first, last = min(texts), max(texts)
    return next((place for place, pair in enumerate(zip(first, last, strict=False)) if len(set(pair)) > 1), len(first))


def majority(train: Sequence[Example], test: Sequence[Example]) -> float:
    """Accuracy of the answer that is most frequent in training."""
    [(answer, _)] = Counter(example.response for example in train).most_common(1)
    return statistics.fmean(example.response == answer for example in test)


def read_before(model: str) -> tuple[str, ...]:
    """The instruction sets of whose training rows the base was made; its answers to these are no 0-shot answers."""
    recipe = Path(location_of(model)) / "recipe.json"
    stream = json.loads(recipe.read_text())["settings"]["stream"] if recipe.is_file() else None
    return tuple(stream["instructions"]) if stream else ()


def table(found: Sequence[dict[str, Any]], known: Sequence[str]) -> list[list[str]]:
    """A heading and a row for each set; shares in percent."""
    rows = [
        ["set", "train / test", "metric", "0-shot", "fine-tuned", "TF-IDF + LR", "gap", "majority", "gap", "perplexity", "min"],
    ]
    for each in found:
        metric, tuned = each["metric"], each["fine_tuned"]
        others = (each["tfidf"] and each["tfidf"]["accuracy"], each["majority"])
        compared = [cell for other in others for cell in (percent(other), percent(gap(tuned, other), "+.1f"))]
        rows.append(
            [
                each["set"] + (" *" if each["set"].partition("/")[0] in known else ""),
                f"{each['train']:,} / {each['test']:,}",
                metric,
                percent(each["zero_shot"][metric]),
                percent(tuned[metric]),
                *compared,
                f"{each['zero_shot']['perplexity']:.3g} → {tuned['perplexity']:.3g}",
                f"{sum(each['seconds'].values()) / 60:.1f}",
            ]
        )
    return rows


def gap(tuned: dict[str, float], other: float | None) -> float | None:
    return None if other is None else tuned["accuracy"] - other


def percent(share: float | None, form: str = ".1f") -> str:
    return "-" if share is None else f"{100 * share:{form}}"


def wanted(found: Sequence[dict[str, Any]]) -> list[str]:
    """What the base had to reach, and whether it did."""
    notes = []
    for each in found:
        if (most := WANTED.get(each["set"])) is not None:
            points = 100 * (each["tfidf"]["accuracy"] - each["fine_tuned"]["accuracy"])
            reached = "reached" if points <= most else "MISSED"
            notes.append(f"{each['set']}: {points:.1f} points below TF-IDF + LR; at most {most:g} wanted: {reached}")
    return notes


def markdown(rows: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:], "", *(f"- {note}" for note in notes)]) + "\n"


def measure(base: Base, names: Sequence[str], asked: Asked, out: Path) -> list[dict[str, Any]]:
    """Measures each set of `names` that `out` lacks; the results of all sets that are there.

    Raises:
        BadRun: one was measured otherwise.
    """
    identity = {"model": base.name, "model_hash": base.hash, **asdict(asked)}
    check(out, identity)
    for name in names:
        file = out / f"{name.replace('/', '_')}.json"
        if not file.exists():
            write_text(file, json.dumps({**identity, **ceiling(base, name, asked)}, indent=2) + "\n")
    found = check(out, identity)
    order = {name: place for place, name in enumerate(SETS)}
    return sorted(found, key=lambda each: (order.get(each["set"], len(order)), each["set"]))


def check(out: Path, identity: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All results in `out`; raises BadRun where one is of another base or of other settings."""
    found = {file: json.loads(file.read_text()) for file in sorted(out.glob("*.json"))}
    for file, result in found.items():
        if other := [key for key, value in identity.items() if result.get(key) != value]:
            raise BadRun(f"{file} was measured with another {', '.join(other)}; give another --out, or remove that file")
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small")
    parser.add_argument("--sets", nargs="+", default=SETS, metavar="SET")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--limit", type=int, help="test rows of each set, drawn at random; default: all")
    parser.add_argument(
        "--precision", choices=["float32", "bfloat16"], default="float32", help="of products; weights stay in float32"
    )
    parser.add_argument("--validation", action="store_true", help="score rows kept out of training instead of the test rows")
    parser.add_argument("--out", type=Path, default=Path("results/ceilings"))
    given = parser.parse_args()

    torch.set_num_threads(1)
    asked = Asked(given.epochs, given.lr, given.batch, given.max_tokens, given.limit, given.validation, given.precision)
    try:
        base, known = load(given.model, dtype="float32"), read_before(given.model)
        found = measure(base, given.sets, asked, given.out)
    except FedExpertsError as error:
        sys.exit(f"ceilings: {error}")
    rows = table(found, known)
    notes = [
        f"{given.model} (weights {base.hash[:12]}): {asked.epochs} epochs, batches of {asked.batch}, lr {asked.lr:g}, "
        f"at most {asked.max_tokens} tokens",
        "shares in percent, gaps of the fine-tuned base in points, perplexity of a token of the reference before and after",
        *(["scored on rows kept out of training, not on the test rows"] if asked.validation else []),
        *([f"* the base was made of training rows of {', '.join(known)}, so these are no 0-shot answers"] if known else []),
        *wanted(found),
    ]
    write_text(given.out / "ceilings.md", markdown(rows, notes))
    shown = Table(*rows[0])
    for row in rows[1:]:
        shown.add_row(*row)
    Console(width=150).print(shown)
    for note in notes:
        print(note)


if __name__ == "__main__":
    main()
