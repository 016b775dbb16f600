"""What a client does with a job: what its method says, or an evaluation."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from fedexperts.config import EvaluationSettings, TrainingSettings
from fedexperts.core import evaluation
from fedexperts.core.training import install
from fedexperts.moe.routing import router_drift
from fedexperts.moe.shrink import shrink
from fedexperts.types import Bench, Example, Job, Method, Patch, Update


@dataclass(frozen=True)
class Work:
    """What every client of a run does.

    known: what was measured at the end of models that have been seen, by their bits: where all clients have one model, a
    process measures it once.
    """

    method: Method
    evaluation: EvaluationSettings
    rounds: int  # of the whole run
    retained: Sequence[Example] = ()
    training: TrainingSettings = TrainingSettings()  # for its schedule; the rest is in the bench
    known: dict[str, Mapping[str, Any]] = field(default_factory=dict, compare=False, repr=False)

    def __call__(self, job: Job, bench: Bench) -> Update:
        if job.task == "evaluate":
            return self.evaluate(job, bench)
        lr = self.training.lr_in(job.round, self.rounds)
        update = self.method.train(job, replace(bench, training=replace(bench.training, lr=lr)))
        if not (job.task == "train" and self.scores_after_training and falls_due(job.round, self.evaluation, self.rounds)):
            return update
        model = install(laid_over(job, update), bench)
        return replace(update, metrics={**update.metrics, "scores": self.scores(model, bench)})

    @property
    def scores_after_training(self) -> bool:
        """Whether clients are scored before the server merges; one place with all data is scored as its clients ever are."""
        return self.evaluation.score == "before_aggregation" and not self.method.pooled

    def evaluates(self, round: int) -> bool:
        """Whether clients are asked for anything in an evaluation after `round`."""
        measured = bool(self.retained) or self.evaluation.drift
        return not self.scores_after_training or round == 0 or (round == self.rounds and measured)

    def evaluate(self, job: Job, bench: Bench) -> Update:
        """The client's model, under what the server sent and what the client keeps, on its own examples; at the end also
        what it retained, and how far its routers drifted.
        """
        model = install(job, bench)
        metrics: dict[str, Any] = {}
        if job.round == 0 or not self.scores_after_training:
            metrics["scores"] = self.scores(model, bench)
        if job.round == self.rounds:
            metrics |= self.against_base(model, job, bench)
        return Update(job.client, job.round, job.task, Patch({}), len(bench.data.train), metrics=metrics)

    def scores(self, model: nn.Module, bench: Bench) -> dict[str, Any]:
        """On the client's own examples, as JSON."""
        asked = self.evaluation
        return evaluation.score(model, self.own(bench), bench.encoder, asked.generate_tokens, asked.batch_size).to_json()

    def own(self, bench: Bench) -> Sequence[Example]:
        """The client's examples that are scored."""
        return bench.data.validation if self.evaluation.split == "validation" else bench.data.test

    def against_base(self, model: nn.Module, job: Job, bench: Bench) -> Mapping[str, Any]:
        """`retained`: the scores on the retained examples; `drift`: of the routers, on their text, or where there are none
        on the client's own examples, answers included. Held against are the base's routers among the experts of the job.
        """
        asked = self.evaluation
        if not (self.retained or asked.drift):
            return {}
        key = f"{bits(model)}/{'' if self.retained else job.client}"
        if key not in self.known:
            found: dict[str, Any] = {}
            if self.retained:
                size = (asked.generate_tokens, asked.batch_size)
                found["retained"] = evaluation.by_example(model, self.retained, bench.encoder, *size)
            if asked.drift:
                texts = self.retained or self.own(bench)
                base = shrink(bench.model, job.experts)
                found["drift"] = router_drift(base, model, batches(texts, bench, asked.batch_size))
            self.known[key] = found
        return self.known[key]


def falls_due(round: int, evaluation: EvaluationSettings, rounds: int) -> bool:
    """Whether models are scored after `round`, which is not 0."""
    return round % evaluation.every == 0 or round == rounds


def laid_over(job: Job, update: Update) -> Job:
    """An evaluation of what `update` would send, weights and else, laid over what `job` brought."""
    tensors = dict(job.patch.tensors)
    for name, sent in update.patch.tensors.items():
        had, ids = job.patch.rows.get(name), update.patch.rows.get(name)
        if ids is None or (had is not None and torch.equal(had, ids)):
            tensors[name] = sent
        else:  # of the rows that came, perhaps only some go back
            places = ids if had is None else torch.searchsorted(had, ids)
            tensors[name] = tensors[name].index_copy(0, places, sent)
    return replace(job, task="evaluate", patch=Patch(tensors, job.patch.rows), extra={**job.extra, **update.extra})


def batches(examples: Sequence[Example], bench: Bench, size: int) -> Iterator[Mapping[str, Tensor]]:
    """Prompts with their reference answers, `size` at a time."""
    return (bench.encoder.batch(examples[start : start + size]) for start in range(0, len(examples), size))


def bits(model: nn.Module) -> str:
    """sha256 of all that `model` holds."""
    digest = sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
