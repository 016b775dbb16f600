"""A few answers of the models beside the references, from predictions.jsonl."""

from collections.abc import Sequence

from fedexperts.report.read import Groups, Prediction, RunResults
from fedexperts.report.table_format import NONE, Table, number

SAMPLES = 12  # examples of a table
LONGEST = 400  # characters of a cell


def of_run(run: RunResults) -> Table:
    """Examples of each task at the last round with predictions, with the client's answer and its score."""
    rows = [
        (row.task, row.client, clipped(row.prompt), clipped(row.reference), *_answer(row)) for row in samples(last_round(run))
    ]
    return Table(
        "Sample answers",
        ("task", "client", "prompt", "reference", "answer", "its score"),
        tuple(rows),
        note=_note([run]),
        text_columns=(0, 1, 2, 3, 4),
    )


def of_groups(groups: Groups) -> Table:
    """The same examples, with the answers of each method, in the first seed in which any method has predictions."""
    seeds = sorted({run.plan.seed for runs in groups.values() for run in runs if run.predictions})
    chosen = {label: run for label, runs in groups.items() for run in runs if seeds and run.plan.seed == seeds[0]}
    answers = {label: {_key(row): row for row in last_round(run)} for label, run in chosen.items()}
    answers = {label: rows for label, rows in answers.items() if rows}
    shared = [row for key, row in next(iter(answers.values()), {}).items() if all(key in each for each in answers.values())]
    rows = [
        (row.task, clipped(row.prompt), clipped(row.reference), *(_with_score(each[_key(row)]) for each in answers.values()))
        for row in samples(shared)
    ]
    return Table(
        f"Sample answers of each method, seed {seeds[0]}" if seeds else "Sample answers",
        ("task", "prompt", "reference", *answers),
        tuple(rows),
        note=f"The score in brackets. {_note(list(chosen.values()))}" if rows else "",
        text_columns=tuple(range(3 + len(answers))),
    )


def samples(rows: Sequence[Prediction]) -> list[Prediction]:
    """At most SAMPLES of `rows`, evenly spread over those of each task, the same number of each task as far as there are."""
    by_task: dict[str, list[Prediction]] = {}
    for row in rows:
        by_task.setdefault(row.task, []).append(row)
    share = max(1, SAMPLES // max(len(by_task), 1))
    numbers = {task: min(share, len(each)) for task, each in by_task.items()}
    return [each[place * len(each) // numbers[task]] for task, each in by_task.items() for place in range(numbers[task])]


def last_round(run: RunResults) -> list[Prediction]:
    """The predictions of the last round that has any."""
    last = max((row.round for row in run.predictions), default=None)
    return [row for row in run.predictions if row.round == last]


def clipped(text: str | None) -> str:
    """`text` without its end if it is long."""
    if text is None:
        return NONE
    return text if len(text) <= LONGEST else f"{text[:LONGEST].rstrip()} …"


def _key(row: Prediction) -> tuple[str, str, str]:
    return row.task, row.prompt, row.reference


def _answer(row: Prediction) -> tuple[str, str]:
    return clipped(row.answer), number(row.score)


def _with_score(row: Prediction) -> str:
    answer, score = _answer(row)
    return f"{answer} [{score}]"


def _note(runs: Sequence[RunResults]) -> str:
    number_of = sum(len(last_round(run)) for run in runs)
    return (
        f"At the last evaluation; evenly spread over the {number_of:,} answers in predictions.jsonl, not chosen by their score."
    )
