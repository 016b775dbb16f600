"""How each kind of task asks."""

import pytest

from fedexperts.core.evaluation import judge
from fedexperts.data import templates
from fedexperts.data.settings import SourceSettings, with_templates
from fedexperts.data.templates import TEMPLATES, Hints, asked, frame, kind_of, names_of
from fedexperts.errors import BadData
from fedexperts.types import Example

NEWS = Hints("ag_news", question="What is this news about?", names=("World", "Sports"))
QUIZ = {"instruction": "Choose.", "input": "Goal: eat\nA. fork\nB. spade", "output": "A", "choices": ["fork", "spade"], "gold": 0}


def test_a_class_is_answered_by_its_name():
    assert templates.classification({"text": "They won.", "label": 1}, NEWS) == Example(
        prompt="What is this news about?\nThey won.\nAnswer:\n",
        response="Sports",
        task="ag_news",
        metric="accuracy",
        label=1,
        choices=("World", "Sports"),
    )


def test_a_choice_is_answered_by_its_letter_and_has_no_label():
    example = templates.multiple_choice(QUIZ, Hints("piqa"))
    assert example == Example("Choose.\nGoal: eat\nA. fork\nB. spade\nAnswer:\n", "A", "piqa", "accuracy", None, ("A", "B"))


def test_a_cloze_shows_no_options_and_is_answered_by_the_text_of_one():
    example = templates.cloze(QUIZ, Hints("piqa"))
    assert example == Example("Goal: eat\nAnswer:\n", "fork", "piqa", "likelihood", None, ("fork", "spade"))


def test_a_closed_set_of_answers_gives_labels():
    example = templates.closed({"instruction": "Good?", "input": "Meh.", "output": "NEG"}, Hints("sst2", names=("NEG", "POS")))
    assert example == Example("Good?\nMeh.\nAnswer:\n", "NEG", "sst2", "accuracy", 0, ("NEG", "POS"))


def test_instructions_take_the_form_of_alpaca_with_input_or_without():
    row = {"instruction": "Say hello.", "input": "", "output": "Hello"}
    assert templates.instruction(row, Hints("dolly")).prompt == "### Instruction:\nSay hello.\n\n### Response:\n"
    with_input = templates.instruction(row | {"input": "to {Ann}"}, Hints("dolly"))
    assert with_input.prompt == "### Instruction:\nSay hello.\n\n### Input:\nto {Ann}\n\n### Response:\n"
    assert (with_input.response, with_input.metric) == ("Hello", "rougeL")


@pytest.mark.parametrize(("kind", "metric"), [("short_answer", "token_f1"), ("summary", "rouge2"), ("exact", "exact_match")])
def test_kinds_are_judged_by_their_own_metric_unless_another_is_set(kind, metric):
    row = {"instruction": "Do it.", "input": "text", "output": "answer"}
    assert TEMPLATES[kind](row, Hints("any")) == Example("Do it.\ntext\nAnswer:\n", "answer", "any", metric)
    assert TEMPLATES[kind](row, Hints("any", metric="rouge1")).metric == "rouge1"


def test_calculator_marks_are_taken_out_of_sums():
    row = {"instruction": "How many?", "input": "", "output": "She sold 48/2 = <<48/2=24>>24 clips.\n#### 24"}
    assert templates.exact(row, Hints("gsm8k")).response == "She sold 48/2 = 24 clips.\n#### 24"


def test_plain_text_has_no_prompt_and_its_domain_for_a_label():
    example = templates.plain_text({"text": "Once.", "domain": "novel"}, Hints("books", names=("memoir", "novel")))
    assert example == Example("", "Once.", "books", "perplexity", 1)


def test_named_fields_may_be_whole_sentences():
    row = {"q": "2 + 2", "a": 4, "kind": "sum"}
    hints = Hints("maths", prompt="Question: {q}\n", response="a", label="kind", names=("riddle", "sum"))
    assert templates.fields(row, hints) == Example("Question: 2 + 2\n", "4", "maths", "rougeL", 1)


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (QUIZ, "multiple_choice"),
        ({"instruction": "a", "output": "b"}, "instruction"),
        ({"prompt": "a", "response": "b"}, "fields"),
        ({"text": "a", "label": 0}, "classification"),
        ({"text": "a"}, "plain_text"),
    ],
)
def test_rows_are_recognized_by_their_fields(row, kind):
    assert kind_of(row) == kind


def test_unknown_fields_are_refused_with_what_can_be_done():
    with pytest.raises(BadData, match=r"its fields are a, q, but known are only .*name them"):
        kind_of({"q": 1, "a": 2})


def test_missing_and_empty_fields_are_named():
    with pytest.raises(BadData, match="no field output, only instruction"):
        templates.summary({"instruction": "a"}, Hints("any"))
    with pytest.raises(BadData, match="field output is empty"):
        templates.summary({"instruction": "a", "output": " "}, Hints("any"))


def test_names_of_classes_are_readable_and_in_the_order_of_their_ids():
    rows = [{"label": 1, "label_name": "card_arrival"}, {"label": 0, "label_name": "NUM"}, {"label": 2}]
    assert names_of(rows, "classification") == ("number", "card arrival", "2")
    assert names_of([{"output": "POS"}, {"output": "NEG "}, {"output": "POS"}], "closed") == ("NEG", "POS")
    assert names_of(rows, "instruction") == ()


def test_a_sum_is_right_when_its_last_number_is():
    example = templates.exact({"instruction": "How many?", "input": "", "output": "Half of 48 is 24.\n#### 24"}, Hints("gsm8k"))
    assert [judge(answer, example)[0]["exact_match"] for answer in ("48 / 2\n#### 24", "Half of 48 is 24.\n#### 23")] == [
        1.0,
        0.0,
    ]


ASK = {"instruction": "Mood?", "output": "glad"}


@pytest.mark.parametrize(
    "kind, rows, hints, text",
    [
        ("classification", [{"text": "rain", "label": 0}, {"text": "sun", "label": 0}], Hints("t", names=("a",)), "sun"),
        (
            "classification",
            [{"q": "rain", "label": 0}, {"q": "sun", "label": 0}],
            Hints("t", question="What?", names=("a",), prompt="Say: {q}!"),
            "sun",
        ),
        ("closed", [{**ASK, "input": "rain"}, {**ASK, "input": "sun"}], Hints("t", names=("glad",)), "sun"),
        ("short_answer", [{"instruction": "Long words", "input": "sun", "output": "x"}], Hints("t", question="Short"), "sun"),
        ("exact", [{"instruction": "1+1", "output": "2"}, {"instruction": "2+2", "output": "4"}], Hints("t"), "2+2"),
        (
            "summary",
            [{"instruction": "A", "input": "x", "output": "o"}, {"instruction": "B", "input": "y", "output": "o"}],
            Hints("t"),
            "B\ny",
        ),
        ("instruction", [{**ASK, "input": "x"}, {"instruction": "Sing", "output": "la"}], Hints("t"), "Sing"),
        ("cloze", [{"instruction": "I", "input": "1+1?\nA. 2", "choices": ["2"], "gold": 0}], Hints("t"), "1+1?"),
        ("fields", [{"prompt": "rain", "response": "o"}, {"prompt": "sun", "response": "o"}], Hints("t"), "sun"),
        ("fields", [{"q": "sun", "response": "o"}], Hints("t", prompt="Q: {q}\nA:"), "sun"),
        ("fields", [{"c": "sky", "q": "sun", "response": "o"}], Hints("t", prompt="{c} {q}"), "sky sun"),
        ("fields", [{"q": "sun", "response": "o"}], Hints("t", prompt="{q}? {q}!"), "sun? sun!"),
    ],
)
def test_what_differs_between_the_frame_of_a_task_is_its_prompt(kind, rows, hints, text):
    before, after = frame(rows, kind, hints)
    assert before + text + after == TEMPLATES[kind](rows[-1], hints).prompt


def test_text_that_is_continued_has_no_frame():
    assert frame([{"text": "Once"}], "plain_text", Hints("t")) is None


def test_in_plain_2_the_answer_follows_in_the_line_of_the_prompts_end():
    row = {"text": "They won.", "label": 1}
    hints = Hints("news", question="What is this about?", names=("world", "sports"), template="plain-2")
    example = asked(TEMPLATES["classification"](row, hints), hints)
    assert example.prompt == "What is this about?\nThey won.\nAnswer:"
    assert (example.response, example.choices, example.label) == (" sports", (" world", " sports"), 1)
    alpaca = asked(TEMPLATES["instruction"]({"instruction": "Say hi.", "output": "hi"}, hints), hints)
    assert alpaca.response == "hi" and alpaca.prompt.endswith("### Response:\n")
    assert frame([row], "classification", hints) == ("What is this about?\n", "\nAnswer:")
    assert judge("Sports", example)[0]["accuracy"] == 1.0


def test_plain_is_plain_1():
    sources = (SourceSettings(name="mine.csv"), SourceSettings(name="chat.json", template="chat"))
    assert [each.template for each in with_templates(sources, "plain")] == ["plain-1", "chat"]
    assert [each.template for each in with_templates(sources, "auto", chat=True)] == ["chat", "chat"]
    assert [each.template for each in with_templates(sources, "plain-2")] == ["plain-2", "chat"]
