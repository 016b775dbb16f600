import json
import math
import random
from dataclasses import replace

import pytest
import torch
from sklearn.metrics import f1_score
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from fedexperts.core import evaluation
from fedexperts.core.evaluation import METRICS, Scores, judge, merge, score
from fedexperts.data.encode import Encoder
from fedexperts.errors import BadData, BadValue
from fedexperts.testing import FAMILIES, VOCABULARY, tiny_model
from fedexperts.types import Example

WORDS = [f"w{number}" for number in range(VOCABULARY - 4)]


def one(given: str, wanted: str, metric: str = "exact_match", choices: tuple[str, ...] = ()) -> Scores:
    """The scores of a single answer."""
    sums, labels = judge(given, Example("?", wanted, "t", metric, choices=choices))
    return Scores({"t": evaluation.TaskScores(metric, 1, sums, labels)})


def of_answers(pairs: list[tuple[str, str]], choices: tuple[str, ...] = ()) -> dict[str, float]:
    return merge(one(given, wanted, choices=choices) for given, wanted in pairs).by_task()["t"]


def tokenizer() -> PreTrainedTokenizerFast:
    """A token a word, so that a random model's answers are words."""
    vocabulary = {word: id for id, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def random_examples(number: int, seed: int = 0) -> list[Example]:
    rng = random.Random(seed)
    return [
        Example(" ".join(rng.choices(WORDS, k=rng.randint(1, 7))), " ".join(rng.choices(WORDS, k=rng.randint(1, 4))), task)
        for task in ("first", "second")
        for _ in range(number // 2)
    ]


def test_exact_match_and_token_f1_read_answers_as_squad_does():
    assert of_answers([("The Cat.", "cat"), ("dog", "cat")])["exact_match"] == 0.5
    # "big red cat" against "red cat sat down": 2 shared, precision 2/3, recall 2/4, F1 4/7
    assert of_answers([("the big red cat", "a red cat sat down")])["token_f1"] == pytest.approx(4 / 7)
    assert of_answers([("", "")])["token_f1"] == 1.0
    assert of_answers([("", "cat")])["token_f1"] == 0.0


def test_verbatim_minds_case_and_articles():
    assert of_answers([("ABC", "ABC"), ("abc", "ABC"), ("", "a")])["verbatim"] == pytest.approx(1 / 3)


def test_rouge_is_that_of_words_pairs_and_the_longest_common_subsequence():
    scores = of_answers([("the cat sat here", "the cat sat on mats")])
    assert scores["rouge1"] == pytest.approx(2 * 3 / (4 + 5))
    assert scores["rouge2"] == pytest.approx(2 * 2 / (3 + 4))
    assert scores["rougeL"] == pytest.approx(2 * 3 / (4 + 5))


def test_rouge_takes_words_of_one_stem_as_one():
    assert of_answers([("running cats", "run cat")])["rouge1"] == 1.0


def test_an_answer_that_is_no_label_is_wrong_and_is_no_false_positive():
    scores = of_answers([("Sports", "sports"), ("world", "sports"), ("nonsense", "world")], choices=("sports", "world"))
    assert scores["accuracy"] == pytest.approx(1 / 3)
    # sports: 1 right, 0 wrongly said, 1 missed: F1 2/3; world: 0 right, 1 wrongly said, 1 missed: F1 0
    assert scores["macro_f1"] == pytest.approx(1 / 3)


def test_a_label_in_an_answer_is_a_false_positive_however_the_choices_spell_it():
    pairs = [("Sports", "Sports"), ("world", "Sports"), ("World.", "World")]
    # sports: 1 right, 1 missed; world: 1 right, 1 wrongly said: F1 2/3 each
    assert of_answers(pairs, choices=("Sports", "World"))["macro_f1"] == pytest.approx(2 / 3)


def test_labels_that_are_articles_or_letters_stay_labels():
    assert of_answers([("A", "A"), ("", "A"), ("B.", "B")], choices=("A", "B"))["accuracy"] == pytest.approx(2 / 3)


def test_macro_f1_is_that_of_scikit_learn():
    rng = random.Random(0)
    labels = ["x", "y", "z"]
    pairs = [(rng.choice([*labels, "neither"]), rng.choice(labels)) for _ in range(200)]
    given, wanted = zip(*pairs, strict=True)
    expected = f1_score(wanted, given, labels=labels, average="macro")
    assert of_answers(pairs, choices=tuple(labels))["macro_f1"] == pytest.approx(expected)


def test_metrics_of_labels_are_told_only_where_there_are_labels():
    assert not {"accuracy", "macro_f1"} & set(of_answers([("x", "y")]))
    assert {"accuracy", "macro_f1"} <= set(of_answers([("x", "y")], choices=("x", "y")))


@pytest.mark.parametrize("family", ["olmoe", "switch_transformers"])
def test_the_scores_of_two_halves_merge_into_those_of_the_whole(family):
    model, examples = tiny_model(family), random_examples(12)
    encoder = Encoder(tokenizer(), 32, encoder_decoder=family == "switch_transformers")
    whole = score(model, examples, encoder, generate_tokens=6, batch_size=4).by_task()
    halves = merge(score(model, examples[start::2], encoder, generate_tokens=6, batch_size=4) for start in (0, 1)).by_task()
    assert list(whole) == ["first", "second"]
    for task, values in whole.items():
        assert list(values) == ["exact_match", "token_f1", "verbatim", "rouge1", "rouge2", "rougeL", "perplexity"]
        assert halves[task] == pytest.approx(values, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_right_on_its_own_greedy_answers_whatever_the_batch(family):
    model, prompts = tiny_model(family), random_examples(6, seed=1)
    encoder = Encoder(tokenizer(), 32, encoder_decoder=family == "switch_transformers")
    own = [Example(example.prompt, greedy(model, encoder, example), "own") for example in prompts]
    for batch_size in (1, 4):
        scores = score(model, own, encoder, generate_tokens=5, batch_size=batch_size)
        assert scores.tasks["own"].examples == 6
        assert scores.by_task()["own"]["verbatim"] == 1.0


def greedy(model: nn.Module, encoder: Encoder, example: Example) -> str:
    """The most likely token again and again, the whole sequence read anew each time."""
    ids = encoder.prompts([example])["input_ids"]
    said = torch.zeros(1, 1, dtype=torch.long) if encoder.encoder_decoder else ids[:, :0]
    for _ in range(5):
        with torch.no_grad():
            output = model(ids, decoder_input_ids=said) if encoder.encoder_decoder else model(torch.cat([ids, said], 1))
        said = torch.cat([said, output.logits[:, -1:].argmax(-1)], 1)
    return encoder.decode(said)[0]


def test_perplexity_is_that_of_response_and_end_token_whatever_the_batch():
    model, encoder = tiny_model("olmoe"), Encoder(tokenizer(), 32)
    examples = [Example("w1 w2 w3", "w4", "t"), Example("w5", "w6 w7 w8", "t")]
    losses = [token_losses(model, encoder, example) for example in examples]
    assert [len(loss) for loss in losses] == [2, 4]
    expected = math.exp(torch.cat(losses).mean())
    for batch_size in (1, 2):
        scores = score(model, examples, encoder, generate_tokens=1, batch_size=batch_size)
        assert scores.by_task()["t"]["perplexity"] == pytest.approx(expected, rel=1e-4)


def token_losses(model: nn.Module, encoder: Encoder, example: Example) -> Tensor:
    prompt, whole = (encoder.prompts([example])["input_ids"][0], encoder.batch([example])["input_ids"][0])
    with torch.no_grad():
        logits = model(whole[None]).logits[0]
    return functional.cross_entropy(logits[len(prompt) - 1 : -1], whole[len(prompt) :], reduction="none")


def test_perplexity_of_a_model_that_knows_nothing_is_the_size_of_its_vocabulary():
    model = tiny_model("olmoe")
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    scores = score(model, random_examples(4), Encoder(tokenizer(), 32), generate_tokens=1, batch_size=4)
    assert scores.by_task()["first"]["perplexity"] == pytest.approx(VOCABULARY)


def test_without_perplexity_no_reference_is_read_and_all_else_is_the_same(monkeypatch):
    model, encoder = tiny_model("olmoe"), Encoder(tokenizer(), 32)
    examples = [*random_examples(5), *[Example("w1", "w2 w3", "text", "perplexity") for _ in range(2)]]
    whole = evaluation.judged_by_client(model, {"": examples}, encoder, 4, 3)[""]
    read, original = [], evaluation.reference_losses
    monkeypatch.setattr(evaluation, "reference_losses", lambda _, batch: read.append(len(batch["labels"])) or original(_, batch))
    part = evaluation.judged_by_client(model, {"": examples}, encoder, 4, 3, perplexity=False)[""]
    assert read == [2]  # the texts alone, which are judged by it
    for (_, said, scores), (_, said_before, before) in zip(part, whole, strict=True):
        task = next(iter(scores.tasks))
        left_out = () if task == "text" else ("perplexity",)
        kept = {name: value for name, value in before.by_task()[task].items() if name not in left_out}
        assert said == said_before and scores.by_task()[task] == kept


def test_nothing_is_generated_for_a_task_judged_by_perplexity(monkeypatch):
    monkeypatch.setattr(evaluation, "answer", lambda *_: pytest.fail("an answer was generated"))
    texts = [Example("", "w1 w2", "text", "perplexity") for _ in range(3)]
    scores = score(tiny_model("olmoe"), texts, Encoder(tokenizer(), 32), generate_tokens=4, batch_size=2)
    assert list(scores.by_task()["text"]) == ["perplexity"] and scores.tasks["text"].examples == 3


def test_overall_is_the_mean_of_main_metrics_without_perplexities():
    parts = {"a": one("x", "x").tasks["t"], "b": one("y", "x").tasks["t"]}
    text = evaluation.TaskScores("perplexity", 2, {}, nll=math.log(9.0) * 4, tokens=4)
    assert Scores({**parts, "text": text}).overall() == 0.5
    assert Scores({"text": text}).overall() == pytest.approx(9.0)
    assert Scores({**parts, "text": text}).main("text") == pytest.approx(9.0)


def test_scores_are_restored_from_json_unchanged():
    scores = merge([one("x", "y", "accuracy", ("x", "y")), one("y", "y", "accuracy", ("x", "y"))])
    assert Scores.from_json(json.loads(json.dumps(scores.to_json()))).by_task() == scores.by_task()
    assert scores.metric("t") == "accuracy" and scores.main("t") == 0.5


def test_scores_that_are_merged_stay_as_they_were():
    first, second = one("x", "x", "accuracy", ("x", "y")), one("y", "x", "accuracy", ("x", "y"))
    assert merge([first, second]).tasks["t"].labels == {"x": (1, 0, 1), "y": (0, 1, 0)}
    assert first.tasks["t"].labels == {"x": (1, 0, 0)} and second.tasks["t"].labels == {"x": (0, 0, 1), "y": (0, 1, 0)}


def test_a_task_judged_by_two_metrics_is_an_error():
    with pytest.raises(BadData, match="judged by rouge1 and by verbatim"):
        merge([one("x", "x", "rouge1"), one("x", "x", "verbatim")])


def test_an_unknown_metric_is_an_error_that_names_the_nearest():
    with pytest.raises(BadValue, match="did you mean exact_match"):
        score(tiny_model("olmoe"), [Example("w1", "w2", "t", "exact_mach")], Encoder(tokenizer(), 32))


def test_scoring_leaves_a_training_model_in_training():
    model = tiny_model("olmoe").train()
    score(model, random_examples(2), Encoder(tokenizer(), 32), generate_tokens=2)
    assert model.training


def test_every_metric_has_a_description():
    assert len(METRICS) == 10 and all(METRICS.values())


def chosen(number: int, seed: int = 0, most_words: int = 3) -> list[Example]:
    """Prompts with two to four choices of as many words, one to `most_words`; the first is right."""
    rng = random.Random(seed)
    prompts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 7))) for _ in range(number)]
    sets = [tuple(" ".join(rng.sample(WORDS, k=1 + row % most_words)) for _ in range(rng.randint(2, 4))) for row in range(number)]
    return [
        Example(prompt, choices[0], "mc", "likelihood", choices=choices) for prompt, choices in zip(prompts, sets, strict=True)
    ]


def log_likelihood(model: nn.Module, encoder: Encoder, example: Example, choice: str) -> float:
    """Of the choice's own tokens after the prompt, alone in its batch."""
    prompt, said = encoder.prompts([example])["input_ids"], torch.tensor([encoder.tokenizer(choice)["input_ids"]])
    start = torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        if encoder.encoder_decoder:
            logits = model(prompt, decoder_input_ids=torch.cat([start, said[:, :-1]], 1)).logits
        else:
            logits = model(torch.cat([prompt, said], 1)).logits[:, prompt.shape[1] - 1 : -1]
    return float(logits.log_softmax(-1).gather(2, said[..., None]).sum())


@pytest.mark.parametrize("most_words", [1, 3])
@pytest.mark.parametrize("family", ["olmoe", "switch_transformers"])
def test_the_choice_is_the_one_with_the_highest_likelihood_per_character_whatever_the_batch(family, most_words):
    model, examples = tiny_model(family), chosen(9, most_words=most_words)
    encoder = Encoder(tokenizer(), 32, encoder_decoder=family == "switch_transformers")
    expected = [
        max(example.choices, key=lambda choice: log_likelihood(model, encoder, example, choice) / len(choice))
        for example in examples
    ]
    right = sum(choice == example.response for choice, example in zip(expected, examples, strict=True))
    assert 0 < right < 9
    for size in (1, 4, 9):
        parts = [evaluation.likeliest(model, examples[start : start + size], encoder) for start in range(0, 9, size)]
        assert [choice for part in parts for choice in part] == expected
        assert score(model, examples, encoder, batch_size=size).main("mc") == pytest.approx(right / 9)


def test_a_model_that_knows_nothing_takes_the_choice_with_the_fewest_tokens_per_character():
    model = tiny_model("olmoe")
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    # each token costs ln V: 1/2, 1/3 and 2/5 of it per character; with an end token the third would be the cheapest
    example = Example("w5", "w12", "mc", "likelihood", choices=("w1", "w12", "w1 w2"))
    assert evaluation.likeliest(model, [example], Encoder(tokenizer(), 32)) == ["w12"]


def test_nothing_is_generated_for_a_task_judged_by_likelihood(monkeypatch):
    monkeypatch.setattr(evaluation, "answer", lambda *_: pytest.fail("an answer was generated"))
    scores = score(tiny_model("olmoe"), chosen(3), Encoder(tokenizer(), 32), batch_size=2)
    assert list(scores.by_task()["mc"]) == ["likelihood", "perplexity"]


def test_likelihood_without_the_answer_among_choices_is_an_error():
    with pytest.raises(BadValue, match="judged by likelihood, but the answer 'w2' is none of its 0 choices"):
        score(tiny_model("olmoe"), [Example("w1", "w2", "t", "likelihood")], Encoder(tokenizer(), 32))


def test_the_values_of_examples_are_in_the_same_order_for_every_model_and_batch_and_their_mean_is_the_value():
    encoder, examples = Encoder(tokenizer(), 32), chosen(9)
    one, other = tiny_model("olmoe", seed=0), tiny_model("olmoe", seed=1)
    scores = [evaluation.by_example(model, examples, encoder, 4, size)["mc"] for model, size in ((one, 2), (one, 9), (other, 9))]
    assert scores[0] == scores[1] and set(scores[0]["values"]) == {0.0, 1.0}
    assert len(scores[2]["values"]) == scores[2]["examples"] == 9
    assert all(each["value"] == pytest.approx(sum(each["values"]) / 9) for each in scores)
    order = sorted(examples, key=lambda example: len(example.prompt) + len(example.response))
    expected = [float(evaluation.likeliest(other, [example], encoder) == [example.response]) for example in order]
    assert scores[2]["values"] == expected


def test_values_are_reported_by_task_in_the_order_of_the_examples():
    examples = [replace(example, task=task) for task, example in zip("bac", reversed(chosen(3)), strict=True)]
    assert list(evaluation.by_example(tiny_model("olmoe"), examples, Encoder(tokenizer(), 32), 4, 2)) == ["b", "a", "c"]


def test_a_metric_that_is_no_mean_over_examples_has_no_values_of_examples():
    texts = [Example("", "w1 w2", "text", "perplexity")]
    scores = evaluation.by_example(tiny_model("olmoe"), texts, Encoder(tokenizer(), 32), 4, 2)["text"]
    assert scores["values"] == [] and scores["value"] > 1
