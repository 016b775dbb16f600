"""Metrics: greedy answers against references, multiple choice by likelihood, perplexity.

Scores are sums and counts, so that the scores of many clients merge into those of all their examples.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any, Self, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationConfig

from fedexperts.errors import BadData, BadValue, nearest
from fedexperts.moe.device import device_of, to_device
from fedexperts.moe.logits import IGNORED, is_encoder_decoder, predictions
from fedexperts.types import Encoder, Example

METRICS = {
    "accuracy": "share of answers that are the right label; an answer that is no label is wrong",
    "macro_f1": "F1 of each label that occurs, averaged over labels",
    "exact_match": "share of answers equal to the reference after SQuAD's normalization; of sums, the number after ####",
    "token_f1": "F1 of the words shared with the reference after SQuAD's normalization",
    "verbatim": "share of answers equal to the reference, letter by letter",
    "rouge1": "ROUGE-1 F, stemmed",
    "rouge2": "ROUGE-2 F, stemmed",
    "rougeL": "ROUGE-L F, stemmed",
    "likelihood": "share of examples whose right choice is the likeliest per character; nothing is generated",
    "perplexity": "of a token of the reference, given the prompt and the tokens before; less is better",
}
LABELED = ("accuracy", "macro_f1")
Verdict = tuple[dict[str, float], dict[str, tuple[int, int, int]]]  # metrics of one example, and the labels it touches


@dataclass(frozen=True)
class TaskScores:
    """Sums over the examples of one task."""

    metric: str  # the main one
    examples: int
    sums: Mapping[str, float]  # of each metric that is a mean over examples
    labels: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)  # true positives, false positives, false negatives
    nll: float = 0.0  # of all reference tokens, in nats
    tokens: int = 0

    def values(self) -> dict[str, float]:
        """All metrics of the task, in the order of METRICS."""
        found = {name: total / self.examples for name, total in self.sums.items()}
        if self.labels:
            found["macro_f1"] = macro_f1(self.labels)
        if self.tokens:
            found["perplexity"] = math.exp(min(self.nll / self.tokens, 700.0))
        return {name: found[name] for name in METRICS if name in found}


@dataclass(frozen=True)
class Scores:
    """Scores of a model, by task."""

    tasks: Mapping[str, TaskScores]

    def by_task(self) -> dict[str, dict[str, float]]:
        """Task → metric → value."""
        return {task: scores.values() for task, scores in self.tasks.items()}

    def metric(self, task: str) -> str:
        """The task's main metric."""
        return self.tasks[task].metric

    def main(self, task: str) -> float:
        """The value of the task's main metric."""
        return self.tasks[task].values()[self.metric(task)]

    def overall(self) -> float:
        """The mean over tasks of their main metric.

        Tasks scored by perplexity are left out, unless all tasks are: then it is their mean perplexity.
        """
        rising = [task for task in self.tasks if self.metric(task) != "perplexity"]
        counted = rising or list(self.tasks)
        return sum(self.main(task) for task in counted) / len(counted) if counted else math.nan

    def to_json(self) -> dict[str, Any]:
        """All sums and counts as JSON values; the inverse of `from_json`."""
        return {task: asdict(scores) for task, scores in self.tasks.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls({task: task_from_json(**fields) for task, fields in data.items()})


Judged = tuple[Example, str | None, Scores]  # an example, the answer to it (None: judged by perplexity), and its scores


def task_from_json(labels: Mapping[str, tuple[int, int, int]], **fields: Any) -> TaskScores:
    return TaskScores(labels={label: (tp, fp, fn) for label, (tp, fp, fn) in labels.items()}, **fields)


def merge(several: Iterable[Scores]) -> Scores:
    """Merges scores of disjoint examples.

    Raises:
        BadData: two of them score the same task by different metrics.
    """
    merged: dict[str, TaskScores] = {}
    for scores in several:
        for task, part in scores.tasks.items():
            merged[task] = joined(task, merged[task], part) if task in merged else part
    return Scores(merged)


def joined(task: str, a: TaskScores, b: TaskScores) -> TaskScores:
    if a.metric != b.metric:
        raise BadData(f"task {task!r} is judged by {a.metric} and by {b.metric}; give all its examples one metric")
    labels = dict(a.labels)
    for label, (tp, fp, fn) in b.labels.items():
        before = labels.get(label, (0, 0, 0))
        labels[label] = (before[0] + tp, before[1] + fp, before[2] + fn)
    sums = {name: a.sums.get(name, 0.0) + b.sums.get(name, 0.0) for name in {**a.sums, **b.sums}}
    return TaskScores(a.metric, a.examples + b.examples, sums, labels, a.nll + b.nll, a.tokens + b.tokens)


def score(
    model: nn.Module, examples: Sequence[Example], encoder: Encoder, generate_tokens: int = 48, batch_size: int = 32
) -> Scores:
    """Scores of `model` on `examples`.

    Answers are decoded greedily and end at the end token or after `generate_tokens`; nothing is generated for examples scored
    by likelihood or perplexity. Tasks are in the order of their first examples.

    Raises:
        BadValue: an unknown metric, or an example scored by likelihood whose response is not among its choices.
    """
    return together(one_by_one(model, examples, encoder, generate_tokens, batch_size), examples)


def by_example(
    model: nn.Module, examples: Sequence[Example], encoder: Encoder, generate_tokens: int, batch_size: int
) -> dict[str, dict[str, Any]]:
    """Task → its main metric, number of examples, value, and the value of each example, as JSON values.

    The values of two models on the same examples are in the same order. `values` is empty if the metric is not a mean over
    examples.
    """
    judged = judged_by_client(model, {"": examples}, encoder, generate_tokens, batch_size, perplexity=False)[""]
    parts = [scores.tasks for _, _, scores in judged]
    return {
        task: {
            "metric": scores.metric,
            "examples": scores.examples,
            "value": scores.values()[scores.metric],
            "values": [part[task].sums[scores.metric] for part in parts if task in part and scores.metric in scores.sums],
        }
        for task, scores in together(judged, examples).tasks.items()
    }


def together(judged: Iterable[Judged], examples: Sequence[Example]) -> Scores:
    """The scores of all `examples`, which are those of `judged`, with tasks in the order of their first examples."""
    scores = merge(part for _, _, part in judged)
    return Scores({task: scores.tasks[task] for task in dict.fromkeys(example.task for example in examples)})


def one_by_one(
    model: nn.Module, examples: Sequence[Example], encoder: Encoder, generate_tokens: int, batch_size: int
) -> list[Judged]:
    """Each example with its answer and scores, in an order that depends only on the examples."""
    return judged_by_client(model, {"": examples}, encoder, generate_tokens, batch_size)[""]


def judged_by_client(
    model: nn.Module,
    examples: Mapping[str, Sequence[Example]],
    encoder: Encoder,
    generate_tokens: int,
    batch_size: int,
    perplexity: bool = True,
) -> dict[str, list[Judged]]:
    """Client → `one_by_one` on its examples, in batches of the examples of all clients.

    The padding, and so the last bits of the losses, depend on the other clients' examples.
    perplexity: whether it is also computed of examples whose metric it is not, in one more forward pass.
    """
    union = [example for own in examples.values() for example in own]
    clients = [client for client, own in examples.items() for _ in own]
    judged: dict[str, list[Judged]] = {client: [] for client in examples}
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for places in batches(union, batch_size):
            parts = scored(model, [union[place] for place in places], encoder, generate_tokens, perplexity)
            for place, part in zip(places, parts, strict=True):
                judged[clients[place]].append(part)
    model.train(was_training)
    return judged


def batches(examples: Sequence[Example], batch_size: int) -> Iterator[list[int]]:
    """Batches, as places in `examples`, of those that are scored in the same way, sorted by length to limit padding.

    Raises:
        BadValue: an unknown metric, or an example scored by likelihood whose response is not among its choices.
    """
    for example in examples:
        if example.metric not in METRICS:
            near = nearest(example.metric, METRICS)
            raise BadValue(f"metric {example.metric!r} of task {example.task!r} is not one of {', '.join(METRICS)}{near}")
        if example.metric == "likelihood" and example.response not in example.choices:
            raise BadValue(
                f"task {example.task!r} is judged by likelihood, but the answer {example.response[:40]!r} is none of its "
                f"{len(example.choices)} choices; give examples with choices, or another metric"
            )
    for way in ("answer", "likelihood", "perplexity"):
        alike = sorted(
            (place for place, example in enumerate(examples) if way_of(example) == way),
            key=lambda place: len(examples[place].prompt) + len(examples[place].response),
        )
        yield from (alike[start : start + batch_size] for start in range(0, len(alike), batch_size))


def way_of(example: Example) -> str:
    """How an example is scored: by likelihood, by perplexity, or by a generated answer."""
    return example.metric if example.metric in ("likelihood", "perplexity") else "answer"


def scored(model: nn.Module, batch: list[Example], encoder: Encoder, generate_tokens: int, perplexity: bool) -> list[Judged]:
    """Each example of `batch` with its answer and scores."""
    answers: Sequence[str | None] = [None] * len(batch)
    verdicts: list[Verdict] = [({}, {})] * len(batch)
    if way_of(batch[0]) == "answer":
        answers = answer(model, encoder.prompts(batch), encoder, generate_tokens)
        verdicts = [judge(given, example) for given, example in zip(answers, batch, strict=True)]
    elif way_of(batch[0]) == "likelihood":
        answers = likeliest(model, batch, encoder)
        verdicts = [({"likelihood": float(one == example.response)}, {}) for one, example in zip(answers, batch, strict=True)]
    losses = tokens = torch.zeros(len(batch))
    if perplexity or way_of(batch[0]) == "perplexity":
        losses, tokens = reference_losses(model, encoder.batch(batch))
    parts = []
    for index, (example, given, (sums, labels)) in enumerate(zip(batch, answers, verdicts, strict=True)):
        part = TaskScores(example.metric, 1, sums, labels, float(losses[index]), int(tokens[index]))
        parts.append((example, given, Scores({example.task: part})))
    return parts


def answer(model: nn.Module, prompts: Mapping[str, Tensor], encoder: Encoder, generate_tokens: int) -> list[str]:
    """Greedy answers, with a KV cache."""
    lm = cast("Any", model)
    known = lm.generation_config
    end = known.eos_token_id
    if others := sorted({*encoder.ends} - {*(end if isinstance(end, list) else [end])}):
        end = [*(end if isinstance(end, list) else [end] if end is not None else []), *others]
    first = end[0] if isinstance(end, list) else end
    greedy = cast("Any", GenerationConfig)(
        max_new_tokens=generate_tokens,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=first if known.pad_token_id is None else known.pad_token_id,
        bos_token_id=known.bos_token_id,
        decoder_start_token_id=known.decoder_start_token_id,
    )
    ids = lm.generate(**to_device(prompts, device_of(model)), generation_config=greedy)
    start = 0 if is_encoder_decoder(model) else prompts["input_ids"].shape[1]
    return encoder.decode(ids[:, start:])


@torch.inference_mode()
def likeliest(model: nn.Module, batch: list[Example], encoder: Encoder) -> list[str]:
    """For each example, the choice c with the highest log p(c | prompt) / characters of c (without outer white space).

    Of equal ones it is the first.

    p covers the tokens of the choice, without an end token. This is acc_norm of lm-evaluation-harness
    (https://github.com/EleutherAI/lm-evaluation-harness, lm_eval/api/task.py); for choices of equal length, such as
    letters, it is also its acc.
    """
    pairs = [replace(example, response=choice) for example in batch for choice in example.choices]
    chunks = [own_labels(encoder, pairs[start : start + len(batch)]) for start in range(0, len(pairs), len(batch))]
    if all(((chunk["labels"] != IGNORED).sum(1) == 1).all() for chunk in chunks):  # letters: one look says it for all of them
        tokens = torch.cat([chunk["labels"].amax(1) for chunk in chunks]).tolist()
        logits, targets = predictions(model, own_labels(encoder, [replace(each, response=each.choices[0]) for each in batch]))
        at = (targets != IGNORED).int().argmax(1)
        likely = functional.log_softmax(logits[torch.arange(len(at), device=at.device), at].float(), dim=-1)
        rows = [row for row, example in enumerate(batch) for _ in example.choices]
        scores = likely[rows, tokens].tolist()
    else:
        scores = [-float(loss) for chunk in chunks for loss in reference_losses(model, chunk)[0]]
    waiting = iter(scores)
    found = [{choice: next(waiting) / max(len(choice.strip()), 1) for choice in example.choices} for example in batch]
    return [max(each, key=each.__getitem__) for each in found]


def own_labels(encoder: Encoder, examples: Sequence[Example]) -> dict[str, Tensor]:
    """`examples` as a batch whose end tokens are not targets."""
    encoded = encoder.batch(examples)
    ended = torch.isin(encoded["labels"], torch.tensor(sorted(encoder.ends)))
    return {**encoded, "labels": encoded["labels"].masked_fill(ended, IGNORED)}


def reference_losses(
    model: nn.Module, batch: Mapping[str, Tensor]
) -> tuple[Float[Tensor, " examples"], Int[Tensor, " examples"]]:
    """Negative log-likelihood of each example's response in nats, and its number of tokens."""
    logits, targets = predictions(model, batch)
    losses = functional.cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    return losses.cpu().double().sum(1), (targets != IGNORED).sum(1).cpu()


def judge(given: str, example: Example) -> Verdict:
    """The per-example metrics of one answer, and the counts of each label that occurs in it or in the reference."""
    wanted = example.response
    rouge = rouge_scorer().score(wanted, given)
    sums = {
        "exact_match": float(normal(final(given)) == normal(final(wanted))),
        "token_f1": token_f1(given, wanted),
        "verbatim": float(given.strip() == wanted.strip()),
        **{name: float(rouge[name].fmeasure) for name in ("rouge1", "rouge2", "rougeL")},
    }
    if not example.choices and example.metric not in LABELED:
        return sums, {}
    right, labels = judge_label(given, wanted, example.choices)
    return {"accuracy": right, **sums}, labels


@cache
def rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # takes seconds to import, and only a run that generates needs it

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


def judge_label(given: str, wanted: str, choices: Sequence[str]) -> tuple[float, dict[str, tuple[int, int, int]]]:
    """Accuracy (1 or 0), and label → (true positives, false positives, false negatives) of the labels in answer and reference.

    An answer that is not a label is a false negative of the right label and a false positive of none.
    """
    said, right = label(given), label(wanted)
    if said == right:
        return 1.0, {right: (1, 0, 0)}
    missed = {right: (0, 0, 1)}
    return 0.0, {**missed, said: (0, 1, 0)} if said in map(label, choices) else missed


def label(text: str) -> str:
    """A label normalized for comparison: lower case, no surrounding spaces or punctuation (articles count, unlike in SQuAD)."""
    return " ".join(text.lower().split()).strip(string.punctuation + " ")


def final(text: str) -> str:
    """The text after the last `####`, which marks the result in GSM8K's answers; the whole text without one."""
    return text.rpartition("####")[2]


def normal(text: str) -> str:
    """SQuAD's normalization: lower case, no punctuation, no articles, single spaces."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def token_f1(given: str, wanted: str) -> float:
    """SQuAD's F1 of two bags of words; 1 if both are empty."""
    said, right = normal(given).split(), normal(wanted).split()
    if not said or not right:
        return float(said == right)
    shared = (Counter(said) & Counter(right)).total()
    return 2 * shared / (len(said) + len(right))


def macro_f1(labels: Mapping[str, tuple[int, int, int]]) -> float:
    """The mean F1 of the labels that occur in answers or references."""
    return sum(2 * tp / (2 * tp + fp + fn) for tp, fp, fn in labels.values()) / len(labels)
