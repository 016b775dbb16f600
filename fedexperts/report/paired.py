"""Paired differences of two methods: over the seeds that both have, and over the test examples where their scores are known."""

from collections.abc import Iterator, Mapping, Sequence
from math import isclose
from statistics import fmean

from fedexperts.report import measures, scores, stats
from fedexperts.report.measures import Measure
from fedexperts.report.read import ReferenceLine, RunResults
from fedexperts.report.stats import Difference, Paired

MEANS_OVER_EXAMPLES = frozenset({"accuracy", "exact_match", "token_f1", "verbatim", "rouge1", "rouge2", "rougeL", "likelihood"})
"""Metrics whose value on several examples is the mean of those on each."""
Example = tuple[str, str]  # prompt and reference, which no other example of its task has


def difference(measure: Measure, runs: Sequence[RunResults], baseline: Sequence[RunResults]) -> Difference | None:
    """The mean difference of a measure from `baseline`, in its unit, with its error; None if no seed has both.

    Of a quality the error is over seeds and test examples if predictions.jsonl of all runs has the scores of all examples; with
    a single seed it is over clients. Else, and of other measures, it is over seeds alone.
    """
    alone = stats.over_seeds(measures.by_seed(measure, runs), measures.by_seed(measure, baseline))
    if alone is None or measure.kind != "quality":
        return alone
    if alone.n > 1:
        both = stats.over_seeds_and_examples(_by_example(measure, runs, baseline))
    else:
        both = stats.over_clients(_by_client(measure, runs, baseline))
    return both if both and isclose(both.mean, alone.mean, rel_tol=1e-6, abs_tol=1e-6) else alone


def _by_example(measure: Measure, runs: Sequence[RunResults], baseline: Sequence[RunResults]) -> list[Paired]:
    """The differences of all examples of all seeds that both have; none if a seed lacks some."""
    found: list[Paired] = []
    for run, other in _pairs(runs, baseline):
        for task in _tasks(measure, [run, other]):
            one, two = _scores(run, task), _scores(other, task)
            counts = [{example: len(values) for example, values in each.items()} for each in (one, two)]
            if not one or counts[0] != counts[1]:
                return []
            for key, values in one.items():
                points = scores.to_unit(fmean(values) - fmean(two[key]), measure.unit)
                found.append(Paired(run.plan.seed, task, key, points, len(values)))
    return found


def _by_client(measure: Measure, runs: Sequence[RunResults], baseline: Sequence[RunResults]) -> list[Paired]:
    """The differences of the clients of all seeds that both have; none if a client of one is missing in the other."""
    found: list[Paired] = []
    for run, other in _pairs(runs, baseline):
        for task in _tasks(measure, [run, other]):
            clients = scores.clients_of(run, task)
            if sorted(clients) != sorted(scores.clients_of(other, task)):
                return []
            for client in clients:
                one, two = scores.last_evaluation(run, client, task), scores.last_evaluation(other, client, task)
                if one is None or two is None or one.value is None or two.value is None or one.examples != two.examples:
                    return []
                points = scores.to_unit(one.value - two.value, measure.unit)
                found.append(Paired(run.plan.seed, task, client, points, one.examples))
    return found


def _pairs(runs: Sequence[RunResults], baseline: Sequence[RunResults]) -> Iterator[tuple[RunResults, RunResults]]:
    """The runs of the seeds that both have."""
    others = {run.plan.seed: run for run in baseline}
    return ((run, others[run.plan.seed]) for run in runs if run.plan.seed in others)


def _tasks(measure: Measure, runs: Sequence[RunResults]) -> list[str]:
    """The tasks that the quality `measure` is of; none if one of them is scored by a metric that is no mean over examples."""
    every = scores.tasks(runs) if measure.task is None else [measure.task]
    counted = [task for task in every if scores.unit(runs, task) == measure.unit]
    return counted if all(scores.main_metric(runs, task) in MEANS_OVER_EXAMPLES for task in counted) else []


def _scores(run: RunResults, task: str) -> Mapping[Example, Sequence[float]]:
    """Example → its scores at the last evaluation, one of each client that has it; empty unless there are all that there were."""
    if any(isinstance(row, ReferenceLine) for row in run.evaluations):
        return {}
    last = {client: row for client in scores.clients_of(run, task) if (row := scores.last_evaluation(run, client, task))}
    found: dict[Example, list[float]] = {}
    for each in run.predictions:
        if each.task == task and each.score is not None and each.client in last and each.round == last[each.client].round:
            found.setdefault((each.prompt, each.reference), []).append(each.score)
    return found if sum(map(len, found.values())) == sum(row.examples for row in last.values()) else {}
