import gzip
import json
import math
from pathlib import Path

import pytest
import torch

from fedexperts.base.load import load
from fedexperts.base.pretrain import RECIPE, mixed, pretrain, read_sources, schedule
from fedexperts.base.settings import Mixture, PretrainSettings, Shape, read_settings
from fedexperts.base.tokenizer import make_tokenizer
from fedexperts.data.encode import Encoder
from fedexperts.data.synthetic import BASE_TASKS, INSTRUCTIONS, NEW_TASKS, SEPARATOR, side
from fedexperts.errors import BadData, BadRun, BadValue
from fedexperts.moe.routing import Recorder, balance_loss

SMALL = Shape(hidden=16, layers=1, heads=2, experts=4, top_k=2, expert_width=8, max_positions=64)


def small(out: Path, **changes) -> PretrainSettings:
    return PretrainSettings(**{"out": out, "model": SMALL, "steps": 3, "batch_size": 8, "measured": 2, **changes})


def test_a_pretrained_folder_loads_and_tells_how_it_was_made(tmp_path):
    folder = pretrain(small(tmp_path / "base"))
    base, recipe = load(str(folder)), json.loads((folder / RECIPE).read_text())
    assert recipe["parameters"] == sum(parameter.numel() for parameter in base.model.parameters())
    assert set(recipe["measured"]["tasks"]) == {*BASE_TASKS, "mean"}
    assert set(recipe["measured"]["exposed"]) == {*NEW_TASKS, "mean"}
    assert recipe["settings"]["steps"] == 3
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


def test_the_same_settings_give_the_same_bits_and_leave_the_global_generator_alone(tmp_path):
    before = torch.get_rng_state()
    hashes = [load(str(pretrain(small(tmp_path / name, seed=seed)))).hash for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert hashes[0] == hashes[1] != hashes[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_two_workers_make_one_base(tmp_path):
    folder = pretrain(small(tmp_path / "base", workers=2, measured=0))
    assert load(str(folder)).hash != load(str(pretrain(small(tmp_path / "alone", measured=0)))).hash


def test_a_finished_base_is_replaced_but_nothing_else_is(tmp_path):
    first = load(str(pretrain(small(tmp_path / "base", measured=0)))).hash
    assert load(str(pretrain(small(tmp_path / "base", measured=0, seed=1)))).hash != first
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.md").write_text("precious")
    with pytest.raises(BadRun, match="thesis holds something other than a pretrained base"):
        pretrain(small(tmp_path / "thesis"))
    assert (tmp_path / "thesis" / "chapter.md").read_text() == "precious"


def test_batches_hold_training_prompts_only_and_new_tasks_only_late_and_rarely(tmp_path):
    settings = small(tmp_path, steps=100, batch_size=40)
    early = [example for step in range(80) for example in mixed(step, 0, settings, [])]
    late = [example for step in range(80, 100) for example in mixed(step, 0, settings, [])]
    assert len(early) == 3200 and len(late) == 800
    assert all(side(example.prompt) == "train" for example in early + late if example.task != "text")
    assert {example.task for example in early} == {*BASE_TASKS, "text"}
    assert 2 <= sum(example.task in NEW_TASKS for example in late) <= 40


def test_workers_draw_different_examples_of_the_same_kind(tmp_path):
    settings = small(tmp_path, workers=2, mixture=Mixture(text_share=0.5))
    pairs = [(mixed(step, 0, settings, []), mixed(step, 1, settings, [])) for step in range(20)]
    assert all(len(one) == len(other) == 4 and one != other for one, other in pairs)
    kinds = [{example.task == "text" for example in one + other} for one, other in pairs]
    assert all(len(kind) == 1 for kind in kinds) and {True} in kinds and {False} in kinds


def test_sources_of_plain_text_are_read_from_a_path_and_from_the_data_folder(tmp_path, monkeypatch):
    (tmp_path / "text").mkdir()
    with gzip.open(tmp_path / "text" / "tales.train.jsonl.gz", "wt") as file:
        file.write('{"text": "once upon a time"}\n{"text": "the end"}\n')
    (tmp_path / "more.jsonl").write_text('{"text": "and more"}\n')
    monkeypatch.setenv("FEDEXPERTS_DATA", str(tmp_path))
    mixture = Mixture(sources=("text/tales", str(tmp_path / "more.jsonl")), source_share=1.0, text_share=0.0, source_characters=5)
    texts = read_sources(mixture)
    assert texts == ["once upon a time", "the end", "and more"]
    settings = small(tmp_path / "base", mixture=mixture, merges=12, measured=0)
    drawn = mixed(0, 0, settings, texts)
    assert len(drawn) == 8 and all(any(example.response in text for text in texts) for example in drawn)
    assert load(str(pretrain(settings))).tokenizer("the end")["input_ids"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b'{"text": "cut off', "not JSON"),
        (b'{"words": "none"}', "it has no field text, only words"),
        (b'{"text": ""}', "its field text is empty"),
        (b"[1]", "a list where an object of fields was expected"),
        ('{"text": "caf\u00e9"}'.encode("latin-1"), "not UTF-8"),
    ],
)
def test_a_broken_line_of_a_source_is_told_by_file_and_number(tmp_path, line, sentence):
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(BadData, match=rf"bad\.jsonl, line 2: {sentence}") as refused:
        pretrain(small(tmp_path / "base", mixture=of_sources(tmp_path / "bad.jsonl")))
    assert "\n" not in str(refused.value) and not (tmp_path / "base").exists()


def test_an_empty_a_damaged_and_an_unknown_file_of_a_source_are_each_told_in_a_sentence(tmp_path):
    packed = gzip.compress(b'{"text": "once upon a time"}\n')
    files = {"empty.jsonl": b"", "damaged.jsonl.gz": packed[:-12], "notes.txt": b"once upon a time"}
    sentences = (
        r"empty\.jsonl, line 1: the file is empty",
        r"damaged\.jsonl\.gz, line 1: .*damaged",
        r"notes\.txt ends in none of",
    )
    for (name, written), sentence in zip(files.items(), sentences, strict=True):
        (tmp_path / name).write_bytes(written)
        with pytest.raises(BadData, match=sentence) as refused:
            pretrain(small(tmp_path / "base", mixture=of_sources(tmp_path / name)))
        assert "\n" not in str(refused.value)


def of_sources(*sources: str | Path) -> Mixture:
    return Mixture(sources=tuple(map(str, sources)), source_share=0.5)


def test_a_missing_source_is_told_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDEXPERTS_DATA", str(tmp_path))
    with pytest.raises(BadData, match="neither text/none nor"):
        read_sources(of_sources("text/none"))


def test_without_exposed_tasks_none_are_measured(tmp_path):
    folder = pretrain(small(tmp_path / "base", mixture=Mixture(exposed=(), exposed_share=0)))
    assert set(json.loads((folder / RECIPE).read_text())["measured"]) == {"tasks"}


def test_training_keeps_the_load_of_experts_more_even_with_the_balance_loss_than_without(tmp_path):
    uneven = {}
    for balance in (0.0, 1.0):
        model = load(str(pretrain(small(tmp_path / "base", steps=60, measured=0, balance=balance)))).model
        batch = Encoder(make_tokenizer(64), 64).batch(mixed(0, 0, small(tmp_path), []))
        with torch.no_grad(), Recorder(model, keep_logits=True) as recorder:
            model(**batch)
        uneven[balance] = balance_loss(recorder).item()
    assert uneven[1.0] < uneven[0.0]


def test_the_learning_rate_rises_and_then_follows_a_cosine(tmp_path):
    settings = small(tmp_path, steps=110, warmup=0.0, final_lr=0.1)
    assert [schedule(step, settings) for step in (0, 55, 110)] == pytest.approx([1.0, 0.55, 0.1])
    warm = small(tmp_path, steps=100, warmup=0.09)
    assert [schedule(step, warm) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert all(math.isfinite(schedule(step, warm)) for step in range(101))


@pytest.mark.parametrize("merges", [0, 30])
def test_the_tokenizer_gives_any_text_back_and_reads_instructions_as_one_token(merges):
    tokenizer = make_tokenizer(64, merges, ["the rain in Spain falls on the plain"] * 3)
    for text in ("Reverse it: naïve ☂\n\ttwo  spaces", "plain => text", ""):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
    for word in (SEPARATOR, *INSTRUCTIONS):
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    assert (len(tokenizer("plain")["input_ids"]) < 6) == bool(merges)


def test_a_run_file_is_read_with_changes_from_the_shell(tmp_path):
    (tmp_path / "run.toml").write_text('out = "base"\nsteps = 7\nmodel = { hidden = 32 }\n')
    settings = read_settings(tmp_path / "run.toml", ["model.experts=8", "seed=3"])
    assert (settings.steps, settings.model.hidden, settings.model.experts, settings.seed) == (7, 32, 8, 3)


def test_the_run_file_of_the_shipped_base_is_what_its_recipe_says():
    recipe = json.loads(Path("fedexperts/base/tiny", RECIPE).read_text())
    settings = read_settings(Path("runs/pretrain-tiny.toml"))
    assert settings.model_dump(mode="json", exclude={"out"}) == recipe["settings"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("model.hiden=32", r"model\.hiden is not a setting; did you mean model\.hidden\?"),
        ("model.top_k=17", "top_k = 17 of 16 experts cannot be chosen"),
        ("model.hidden=24", "hidden = 24 is no even multiple of heads = 16"),
        ("steps=0", "steps = 0 should be greater than 0"),
        ("workers=3", "batch_size = 128 does not divide by workers = 3"),
        ('mixture.tasks=["revers"]', "'revers' is not one of .*; did you mean reverse"),
        ("mixture.tasks=[]", r"mixture\.tasks is empty; name some of "),
        ("mixture.exposed=[]", r"mixture\.exposed is empty; .*set mixture\.exposed_share = 0"),
        ("mixture.source_share=0.5", "sources and source_share go together"),
        ("mixture.text_share=2", r"mixture\.text_share = 2 should be less than or equal to 1"),
    ],
)
def test_a_bad_setting_is_one_sentence(tmp_path, change, sentence):
    (tmp_path / "run.toml").write_text('out = "base"\n')
    with pytest.raises(BadValue, match=sentence):
        read_settings(tmp_path / "run.toml", [change, *(["model.heads=16"] if "hidden=24" in change else [])])
