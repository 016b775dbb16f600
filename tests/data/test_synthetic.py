from random import Random

import pytest

from fedexperts.data.synthetic import (
    BASE_TASKS,
    FEELINGS,
    KINDS,
    LABELS,
    NEW_TASKS,
    ROOMS,
    SEPARATOR,
    SYNTHETIC,
    draw_example,
    examples,
    sentences,
    split_of,
)
from fedexperts.errors import BadData, BadValue


def body(prompt: str) -> str:
    return prompt.partition(": ")[2].removesuffix(SEPARATOR)


def label(x: str, words: dict[str, tuple[str, ...]]) -> str:
    (kind,) = (kind for kind, names in words.items() if set(names) & set(x.split()))
    return kind


SOLVERS = {
    "copy": lambda x: x,
    "reverse": lambda x: "".join(reversed(x)),
    "sort": lambda x: "".join(sorted(x)),
    "uppercase": lambda x: x.upper(),
    "add": lambda x: str(sum(map(int, x.split("+")))),
    "classify": lambda x: label(x, KINDS),
    "extract": lambda x: dict(pair.split("=") for pair in x.split(" ")[1].split(";"))[x.split(" ")[0]],
    "count": lambda x: str(x.split(" ")[1].count(x[0])),
    "first": lambda x: x[:1],
    "last": lambda x: x[-1:],
    "descend": lambda x: "".join(sorted(x, reverse=True)),
    "double": lambda x: "".join(c + c for c in x),
    "novowels": lambda x: x.translate(str.maketrans("", "", "aeiou")) or "-",
    "shout": lambda x: "".join(reversed(x)).upper(),
    "mirror": lambda x: x + "".join(reversed(x)),
    "next": lambda x: "".join("a" if c == "z" else chr(ord(c) + 1) for c in x),
    "room": lambda x: label(x, ROOMS),
    "feeling": lambda x: label(x, FEELINGS),
}


@pytest.mark.parametrize("task", SYNTHETIC)
def test_answers_are_what_the_instruction_asks_for(task):
    made = examples(task, 50, 0)
    assert len(made) == 50
    for example in made:
        assert example.prompt.startswith(f"{task.capitalize()}: ") and example.prompt.endswith(SEPARATOR)
        assert example.response == SOLVERS[task](body(example.prompt)), example.prompt


def test_there_are_eight_tasks_the_base_knows_and_at_least_eight_it_does_not():
    assert len(BASE_TASKS) == 8 and len(NEW_TASKS) >= 8
    assert not set(BASE_TASKS) & set(NEW_TASKS)


@pytest.mark.parametrize("task", SYNTHETIC)
def test_prompts_differ_and_no_seed_puts_a_test_prompt_into_training(task):
    train = {example.prompt for example in examples(task, 300, "one", "train")}
    test = {example.prompt for example in examples(task, 30, "another", "test")}
    assert len(train) == 300 and len(test) == 30
    assert not train & test


def test_the_same_seed_gives_the_same_examples_and_another_gives_others():
    assert examples("sort", 20, 1) == examples("sort", 20, 1)
    assert examples("sort", 20, 1) != examples("sort", 20, 2)


def test_about_one_prompt_in_five_is_a_test_prompt():
    splits = [split_of(draw_example("reverse", Random(seed)).prompt) for seed in range(1000)]
    assert 150 < splits.count("test") < 250


@pytest.mark.parametrize("task", LABELS)
def test_a_classification_carries_its_label_and_all_its_choices(task):
    made = examples(task, 100, 0)
    assert {example.label for example in made} == set(range(len(LABELS[task])))
    assert all(example.choices[example.label] == example.response and example.metric == "accuracy" for example in made)


def test_a_new_task_is_a_classification_with_five_labels():
    assert len(LABELS["room"]) == 5 and "room" in NEW_TASKS


def test_too_few_different_prompts_are_refused_with_their_number():
    with pytest.raises(
        BadData, match=r"'add' cannot give 10001 different prompts, only [0-9]+ were drawn; set a limit of at most [0-9]+$"
    ):
        examples("add", 10_001, 0)


def test_an_unknown_task_is_an_error_that_names_the_nearest():
    with pytest.raises(BadValue, match="did you mean reverse"):
        examples("revers", 1, 0)


def test_text_has_no_prompt_and_is_judged_by_perplexity():
    made = sentences(5, 0)
    assert made == sentences(5, 0) and made != sentences(5, 1)
    assert [(example.prompt, example.metric) for example in made] == [("", "perplexity")] * 5
    assert all(example.response.endswith(".") for example in made)
