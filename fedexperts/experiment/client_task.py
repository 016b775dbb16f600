"""How a client executes a job: a task of its method, or an evaluation."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedexperts.config import EvaluationSettings
from fedexperts.core import evaluation
from fedexperts.engines.base import Check
from fedexperts.errors import quoted
from fedexperts.methods.contract import Method
from fedexperts.moe.packed import stored
from fedexperts.moe.routing import router_drift
from fedexperts.moe.shrink import shrink
from fedexperts.types import ClientContext, Example, Job, Patch, Split, Update


@dataclass(frozen=True)
class ClientTask:
    """How the clients of a run execute a job: a task of the method, or an evaluation.

    known: cache of the comparisons with the base model, by the hash of the client's model: a process evaluates a model that
    several clients share once.
    """

    method: Method
    evaluation: EvaluationSettings
    rounds: int  # of the whole run
    retained: Sequence[Example] = ()
    validates: bool = False  # whether evaluations score the validation examples, too
    evaluated: frozenset[str] | None = None  # clients that are scored; None: all
    known: dict[str, Mapping[str, Any]] = field(default_factory=dict, compare=False, repr=False)

    def scheduled(self, job: Job, context: ClientContext) -> ClientContext:
        """`context` with the learning rate of the job's round."""
        lr = context.training.lr_in(job.round, self.rounds)
        return replace(context, training=replace(context.training, lr=lr))

    def scored(self, job: Job, update: Update, context: ClientContext) -> Update:
        """`update` with scores of the weights that it sends, in rounds in which clients are scored before aggregation."""
        if not self.scores_with(job):
            return update
        model = self.method.build_model(apply_update(job, update), context)
        scores = self.scores(model, context, {job.client: self.scored_examples(context.data)})
        return replace(update, metrics={**update.metrics, "scores": scores})

    def scores_with(self, job: Job) -> bool:
        """Whether the answer to `job` contains scores."""
        due = is_eval_round(job.round, self.evaluation, self.rounds)
        if job.task == "evaluate":
            return job.round == 0 or (due and not self.scores_after_training)
        return (
            job.task == "train"
            and due
            and self.scores_after_training
            and (self.evaluated is None or job.client in self.evaluated)
        )

    def measures_with(self, job: Job) -> bool:
        """Whether the answer to `job` contains the comparison of the client's model with the base model."""
        return job.task == "evaluate" and job.round == self.rounds

    def reports(self, data: Mapping[str, Split], tasks: Mapping[str, str], job: Job) -> dict[str, Check]:
        """The metrics that the answer to `job` has in addition to those of the method.

        data: of each client; placeholders for clients with their own data. tasks: task → its main metric, for all tasks that
        clients are scored on.
        """
        checks: dict[str, Check] = {}
        clients = (job.client, *job.also)
        if self.scores_with(job):
            numbers = {client: len(self.scored_examples(data[client])) for client in clients}
            checks["scores"] = lambda value: each_scores_error(value, tasks, numbers)
        if job.task == "evaluate" and self.validates:
            held_out = {client: len(self.held_out(data[client])) for client in clients}
            checks["validation"] = lambda value: each_scores_error(value, tasks, held_out)
        if self.measures_with(job) and self.retained:
            checks["retained"] = lambda value: evaluation.by_example_error(value, self.retained)
        if self.measures_with(job) and self.evaluation.drift:
            checks["drift"] = lambda value: evaluation.drift_error(value, job.experts)
        return checks

    @property
    def scores_after_training(self) -> bool:
        """Whether clients are scored before aggregation; centralized training is always scored after it."""
        return self.evaluation.score == "before_aggregation" and not self.method.centralized

    def evaluates(self, round: int) -> bool:
        """Whether clients evaluate after `round`."""
        measured = bool(self.retained) or self.evaluation.drift
        return not self.scores_after_training or round == 0 or (round == self.rounds and measured)

    def evaluate(self, job: Job, context: ClientContext, others: Mapping[str, Split]) -> Update:
        """Scores the client's model, built from the job's weights and the client state, on the client's examples.

        others: the data of the clients of `job.also`, which are scored in the same passes: the scores are then by client.
        After the last round also compares the model with the base model (`against_base`).
        """
        model = self.method.build_model(job, context)
        metrics: dict[str, Any] = {}
        data = {job.client: context.data, **others}
        if self.scores_with(job):
            metrics["scores"] = self.scores(model, context, {name: self.scored_examples(each) for name, each in data.items()})
        if self.validates:
            metrics["validation"] = self.scores(model, context, {name: self.held_out(each) for name, each in data.items()})
        if self.measures_with(job):
            metrics |= self.against_base(model, job, context)
        return Update(job.client, job.round, job.task, Patch({}), len(context.data.train), metrics=metrics)

    def scores(self, model: nn.Module, context: ClientContext, examples: Mapping[str, Sequence[Example]]) -> dict[str, Any]:
        """Scores on each client's examples, as JSON values; those of one client alone are not by client."""
        size = (self.evaluation.generate_tokens, self.evaluation.batch_size)
        scores = evaluation.score_several(model, examples, context.encoder, *size)
        by_client = {client: each.to_json() for client, each in scores.items()}
        return by_client if len(by_client) > 1 else by_client[context.client.name]

    def held_out(self, data: Split) -> Sequence[Example]:
        """The validation examples that are scored beside test examples: all of the client's."""
        return data.validation

    def scored_examples(self, data: Split) -> Sequence[Example]:
        """The client's examples that are scored."""
        return data.validation if self.evaluation.split == "validation" else data.test

    def against_base(self, model: nn.Module, job: Job, context: ClientContext) -> Mapping[str, Any]:
        """`retained`: scores on the retained examples. `drift`: of the routers, compared with the base model's.

        Drift is measured on the text of the retained examples or, without them, of the client's, answers included. The base's
        routers choose among the experts of the job.
        """
        settings = self.evaluation
        if not (self.retained or settings.drift):
            return {}
        key = f"{bits(model)}/{'' if self.retained else job.client}"
        if key not in self.known:
            comparison: dict[str, Any] = {}
            if self.retained:
                size = (settings.generate_tokens, settings.batch_size)
                comparison["retained"] = evaluation.by_example(model, self.retained, context.encoder, *size)
            if settings.drift:
                texts = self.retained or self.scored_examples(context.data)
                base = shrink(context.model, job.experts, share_stacks=True)
                comparison["drift"] = router_drift(base, model, batches(texts, context, settings.batch_size))
            self.known[key] = comparison
        return self.known[key]


def each_scores_error(value: object, tasks: Mapping[str, str], numbers: Mapping[str, int]) -> str | None:
    """Why `value` is no scores of clients with so many examples, as the rest of a sentence; None where it is.

    numbers: client → number of its examples. Scores of several clients are by client.
    """
    if len(numbers) == 1:
        return evaluation.scores_error(value, tasks, *numbers.values())
    if not isinstance(value, Mapping) or value.keys() != numbers.keys():
        return f"is {quoted(value)}, and should be scores of {len(numbers)} clients, by client"
    errors = {client: evaluation.scores_error(value[client], tasks, number) for client, number in numbers.items()}
    return next((f"of client {client} {error}" for client, error in errors.items() if error), None)


def is_eval_round(round: int, evaluation: EvaluationSettings, rounds: int) -> bool:
    """Whether models are scored after `round` (not for round 0)."""
    return round % evaluation.every == 0 or round == rounds


def apply_update(job: Job, update: Update) -> Job:
    """`job` as an evaluation with the weights and extra tensors of `update` in place of its own."""
    tensors = dict(job.patch.tensors)
    for name, sent_rows in update.patch.tensors.items():
        job_ids, sent_ids = job.patch.rows.get(name), update.patch.rows.get(name)
        if sent_ids is None or (job_ids is not None and torch.equal(job_ids, sent_ids)):
            tensors[name] = sent_rows
        else:  # a client may send only some of the rows of its job
            places = sent_ids if job_ids is None else torch.searchsorted(job_ids, sent_ids)
            tensors[name] = tensors[name].index_copy(0, places, sent_rows)
    return replace(job, task="evaluate", patch=Patch(tensors, job.patch.rows), extra={**job.extra, **update.extra})


def batches(examples: Sequence[Example], context: ClientContext, size: int) -> Iterator[Mapping[str, Tensor]]:
    """Prompts with their reference answers, `size` at a time."""
    return (context.encoder.batch(examples[start : start + size]) for start in range(0, len(examples), size))


def bits(model: nn.Module) -> str:
    """sha256 of the state dict of `model`."""
    digest = sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        for part in stored(tensor):
            digest.update(cast("Any", part.cpu().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()
