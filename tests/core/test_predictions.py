"""Which examples are shown, as what rows, and what is refused in place of such rows."""

import json
import math
from random import Random

import pytest

from fedexperts.core.evaluation import Scores, TaskScores
from fedexperts.core.predictions import FIELDS, LONGEST, MOST_JSON, chosen, fitted, rows, rows_error
from fedexperts.types import Example

TASKS = {"sort": "exact_match", "quiz": "likelihood", "text": "perplexity"}


def example(task, number, **fields):
    return Example(f"{task} {number}", str(number), task, TASKS[task], **fields)


EXAMPLES = [example(task, number) for task in TASKS for number in range(4)]


def judged(each, answer, score):
    sums = {} if each.metric == "perplexity" else {each.metric: score}
    return each, answer, Scores({each.task: TaskScores(each.metric, 1, sums, nll=math.log(score or 1), tokens=1)})


def test_the_order_of_a_clients_examples_does_not_matter_and_fewer_are_the_first_of_more():
    shuffled = Random(0).sample(EXAMPLES, len(EXAMPLES))
    assert chosen(shuffled, 7) == chosen(EXAMPLES, 7) == chosen(EXAMPLES, 100)[:7]
    assert sorted(chosen(EXAMPLES, 100), key=EXAMPLES.index) == EXAMPLES
    assert chosen(EXAMPLES, 0) == chosen([], 5) == []


def test_each_task_has_its_turn_and_one_with_few_examples_runs_out():
    assert [each.task for each in chosen(EXAMPLES[:5], 100)] == ["quiz", "sort", "sort", "sort", "sort"]
    assert [each.task for each in chosen(EXAMPLES, 6)] == ["quiz", "sort", "text"] * 2


def test_a_row_holds_what_was_asked_wanted_and_answered_in_the_order_of_the_chosen_examples():
    one, two = EXAMPLES[0], EXAMPLES[8]
    assert rows([judged(two, None, 4.0), judged(one, "7", 1.0)], [one, two]) == [
        {"task": "sort", "prompt": "sort 0", "reference": "0", "answer": "7", "score": 1.0},
        {"task": "text", "prompt": "text 0", "reference": "0", "answer": None, "score": pytest.approx(4.0)},
    ]
    assert rows([judged(one, "", math.nan)], [one])[0]["score"] is None


def test_a_long_text_loses_its_middle_and_says_how_much_and_no_other_changes():
    assert fitted("short ä 😀\n") == "short ä 😀\n"
    long = "a" * 3_000 + "b" * 30_000 + "c" * 3_000
    shown = fitted(long)
    head, cut, tail = shown.split(" […")[0], *shown.split(" […")[1].split("…] ")
    assert long.startswith(head) and long.endswith(tail) and len(head) > 2_000 and len(tail) > 2_000
    assert int(cut.removesuffix(" characters").replace(",", "")) == len(long) - len(head) - len(tail)
    for text in (long, "😀" * 20_000, '"\\\n' * 9_000):
        assert len(json.dumps(fitted(text))) <= LONGEST
    assert fitted("half \ud800") == "half ?"  # which no file can hold
    assert fitted("\x1b[31mred\x07\r\n\t") == "�[31mred�\r\n\t"  # which a terminal would obey
    full = {"task": "sort", "prompt": long, "reference": long, "answer": long, "score": 1.0}
    assert len(json.dumps({name: fitted(each) if each == long else each for name, each in full.items()})) < MOST_JSON


GOOD = {"task": "sort", "prompt": "sort 0", "reference": "0", "answer": "1", "score": 0.0}


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("rows", "should be a list of at most 2 answers"),
        ([GOOD] * 3, "should be a list of at most 2 answers"),
        ([GOOD, "row"], "as answer 2 'row', which should hold answer, prompt, reference, score, task"),
        ([{**GOOD, "more": 1}], "which should hold"),
        ([{**GOOD, "task": "swim"}], "one of task 'swim', and the tasks of the run are sort, quiz, text"),
        ([{**GOOD, "task": ["sort"]}], "one of task"),
        ([{**GOOD, "answer": None}], "None, and it should be a text"),
        ([{**GOOD, "answer": 3}], "3, and it should be a text"),
        ([{**GOOD, "prompt": "x" * LONGEST}], "should be a text of at most 5,000 characters"),
        ([{**GOOD, "answer": "half \ud800"}], "should be a text"),
        ([{**GOOD, "answer": "\x1b[2J"}], "without control characters"),
        ([{**GOOD, "score": 1.5}], "one with the score 1.5, and it should be from 0 to 1.001"),
        ([{**GOOD, "score": math.nan}], "one with the score nan"),
        ([{**GOOD, "score": True}], "one with the score True"),
        ([{**GOOD, "task": "text"}], "scored by perplexity, without answers"),
    ],
)
def test_what_is_no_sample_of_answers_is_refused(value, why):
    assert why in rows_error(value, TASKS, 2, None)


def test_rows_of_other_examples_are_refused_where_the_examples_are_known():
    known = EXAMPLES[:2]
    assert GOOD.keys() == FIELDS
    assert rows_error([GOOD], TASKS, 2, known) is None  # a client may show fewer
    assert rows_error([], TASKS, 2, known) is None
    assert "one to 'sort 0', which is not the example to show" in rows_error([GOOD, GOOD], TASKS, 2, known)
    assert "not the example to show" in rows_error([{**GOOD, "reference": "9"}], TASKS, 2, known)
    assert rows_error([{**GOOD, "prompt": "anything"}], TASKS, 2, None) is None
