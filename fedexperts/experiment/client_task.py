"""How a client executes a job: a task of its method, or an evaluation."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedexperts.config import EvaluationSettings
from fedexperts.core import evaluation, predictions, score_errors
from fedexperts.core.evaluation import Judged
from fedexperts.engines.base import Report
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
    predictions: int = 0  # answers that a client sends with its scores, at most
    own_data: bool = False  # whether clients bring their own data, which the server does not see
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
        scores = self.scores(model, {job.client: self.scored_examples(context.data)}, context)
        return replace(update, metrics={**update.metrics, **scores})

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

    def reports(self, data: Mapping[str, Split], tasks: Mapping[str, str], job: Job) -> dict[str, Report]:
        """The metrics that the answer to `job` has in addition to those of the method.

        data: of each client; placeholders for clients with their own data. tasks: task → its main metric, for all tasks that
        clients are scored on.
        """
        reports: dict[str, Report] = {}
        clients = (job.client, *job.also)
        if self.scores_with(job):
            examples = {client: self.scored_examples(data[client]) for client in clients}
            reports["scores"] = Report(partial(each_error, partial(scores_error, tasks), examples))
            if self.predictions:  # not required: whether its examples are sent is the client's decision
                most = sum(min(self.predictions, len(own)) for own in examples.values())
                check = partial(each_error, partial(self.predictions_error, tasks), examples)
                reports["predictions"] = Report(check, required=False, characters=most * predictions.MOST_JSON)
        if job.task == "evaluate" and self.validates:
            held_out = {client: self.held_out(data[client]) for client in clients}
            reports["validation"] = Report(partial(each_error, partial(scores_error, tasks), held_out))
        if self.measures_with(job) and self.retained:
            reports["retained"] = Report(lambda value: score_errors.by_example_error(value, self.retained))
        if self.measures_with(job) and self.evaluation.drift:
            reports["drift"] = Report(lambda value: score_errors.drift_error(value, job.experts))
        return reports

    def predictions_error(self, tasks: Mapping[str, str], examples: Sequence[Example], value: object) -> str | None:
        """Why `value` is no sample of answers to `examples`; of a client with its own data these are placeholders."""
        shown = predictions.chosen(examples, self.predictions)
        return predictions.rows_error(value, tasks, len(shown), None if self.own_data else shown)

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
            metrics |= self.scores(model, {client: self.scored_examples(split) for client, split in data.items()}, context)
        if self.validates:
            held_out = {client: self.held_out(split) for client, split in data.items()}
            metrics["validation"] = self.scores(model, held_out, context)["scores"]
        if self.measures_with(job):
            metrics |= self.against_base(model, job, context)
        return Update(job.client, job.round, job.task, Patch({}), len(context.data.train), metrics=metrics)

    def scores(self, model: nn.Module, examples: Mapping[str, Sequence[Example]], context: ClientContext) -> dict[str, Any]:
        """`scores` on the clients' examples and, if the run keeps some, `predictions`, the answers to a few, as JSON values.

        Those of several clients are by client.
        """
        settings = self.evaluation
        judged = evaluation.judged_by_client(
            model, examples, context.encoder, settings.generate_tokens, settings.batch_size, settings.perplexity
        )
        metrics = {"scores": unless_single({client: merged(judged[client], own) for client, own in examples.items()})}
        if self.predictions:
            shown = {client: predictions.chosen(own, self.predictions) for client, own in examples.items()}
            metrics["predictions"] = unless_single(
                {client: predictions.rows(judged[client], own) for client, own in shown.items()}
            )
        return metrics

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


def merged(judged: Iterable[Judged], examples: Sequence[Example]) -> dict[str, Any]:
    """The scores of `examples`, as JSON values."""
    return evaluation.together(judged, examples).to_json()


def unless_single(by_client: Mapping[str, Any]) -> Any:
    """`by_client`; the value alone of a single client."""
    return by_client if len(by_client) > 1 else next(iter(by_client.values()))


def scores_error(tasks: Mapping[str, str], examples: Sequence[Example], value: object) -> str | None:
    return score_errors.scores_error(value, tasks, len(examples))


def each_error(
    error: Callable[[Sequence[Example], object], str | None], examples: Mapping[str, Sequence[Example]], value: object
) -> str | None:
    """Why `value` is not what each client sends of its `examples`, as the rest of a sentence; None where it is.

    error: the same for one client. What several clients send is by client.
    """
    if len(examples) == 1:
        return error(next(iter(examples.values())), value)
    if not isinstance(value, Mapping) or value.keys() != examples.keys():
        return f"is {quoted(value)}, and should hold a value of each of {len(examples)} clients, by client"
    errors = {client: error(own, value[client]) for client, own in examples.items()}
    return next((f"of client {client} {why}" for client, why in errors.items() if why), None)


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
