import gzip
import io
import json
import math
from itertools import count
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from fedexperts.data.encode import Encoder
from fedexperts.data.synthetic import BASE_TASKS, INSTRUCTIONS, NEW_TASKS, SEPARATOR, split_of
from fedexperts.errors import BadData, BadRun, BadValue, Busy
from fedexperts.io.files import locked
from fedexperts.io.toml import RenamedSetting, with_new_names
from fedexperts.models import pretrain as pretraining
from fedexperts.models.load import load
from fedexperts.models.pretrain import RECIPE, finished, mixture_batch, pretrain, recipe_settings, schedule
from fedexperts.models.settings import RENAMED, Mixture, PretrainSettings, Shape, read_settings
from fedexperts.models.tokenizer import learn_tokenizer, make_tokenizer
from fedexperts.moe.routing import Recorder, balance_loss

SMALL = Shape(hidden=16, layers=1, heads=2, experts=4, top_k=2, expert_width=8, max_positions=64)
TIED = SMALL.model_copy(update={"tied": True})


class Killed(Exception):
    pass


def small(out: Path, **changes) -> PretrainSettings:
    return PretrainSettings(**{"out": out, "model": SMALL, "steps": 3, "batch_size": 8, "measured": 2, **changes})


def test_a_pretrained_folder_loads_and_its_recipe_says_how_it_was_made(tmp_path):
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


def test_nothing_that_lies_there_is_replaced(tmp_path):
    first = load(str(pretrain(small(tmp_path / "base", measured=0)))).hash
    with pytest.raises(BadRun, match=r"base holds a base made with another lr, seed; remove that folder, or give another one"):
        pretrain(small(tmp_path / "base", measured=0, seed=1, lr=0.5))
    assert load(str(tmp_path / "base")).hash == first
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.md").write_text("precious")
    with pytest.raises(BadRun, match="thesis holds something other than a pretrained base"):
        pretrain(small(tmp_path / "thesis"))
    assert (tmp_path / "thesis" / "chapter.md").read_text() == "precious"
    assert {path.name for path in tmp_path.iterdir()} == {"base", "thesis"}


def test_a_base_that_is_finished_with_the_same_settings_stays_and_the_command_says_how_to_make_it_anew(tmp_path, monkeypatch):
    run_file = tmp_path / "run.toml"
    run_file.write_text("steps = 1\nbatch_size = 2\nmeasured = 0\nmodel = { hidden = 16, layers = 1, heads = 2, experts = 4 }\n")
    last_lines = []
    for patched in (False, True):
        console = Console(file=io.StringIO(), width=80)
        with monkeypatch.context() as patch:
            if patched:
                patch.setattr(pretraining, "prepare_or_continue", raising(Killed))
            folder = pretraining.run_file(run_file, ["save_every=7"] * patched, tmp_path / "base", console)
        last_lines.append(console.file.getvalue().splitlines()[-1])
        assert {path.name for path in tmp_path.iterdir()} == {"base", "run.toml"}
    note = "already finished with the same settings; to make it anew, remove it or give another folder with --out"
    assert last_lines == [f"written: {folder}", f"{note}: {folder}"]


def test_a_base_whose_recipe_has_former_names_of_settings_is_recognized(tmp_path):
    settings = small(tmp_path / "base", steps=1, measured=0)
    path = pretrain(settings) / RECIPE
    recipe = json.loads(path.read_text())
    former = {new: old for old, new in RENAMED.items()}
    recipe["settings"] = {former.get(name, name): value for name, value in recipe["settings"].items()}
    assert "balance" in recipe["settings"]
    path.write_text(json.dumps(recipe))
    assert finished(settings)
    with pytest.raises(BadRun, match="made with another router_aux_loss_coef; remove that folder"):
        finished(settings.model_copy(update={"router_aux_loss_coef": 0.5}))


def test_the_partial_folder_of_a_run_that_was_killed_after_its_last_move_is_removed(tmp_path, monkeypatch):
    settings = small(tmp_path / "base", measured=0)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        finished_base = settings.out / RECIPE
        patch.setattr(pretraining, "partial_settings", lambda _: raising(Killed)() if finished_base.exists() else None)
        pretrain(settings)
    assert {path.name for path in tmp_path.iterdir()} == {"base", ".base.partial"}
    recipe = (tmp_path / "base" / RECIPE).read_bytes()
    pretrain(settings)
    assert {path.name for path in tmp_path.iterdir()} == {"base"}
    assert (tmp_path / "base" / RECIPE).read_bytes() == recipe


def test_a_base_that_another_process_is_pretraining_is_refused(tmp_path):
    with locked(tmp_path / ".base.partial"):
        with pytest.raises(Busy, match=r"another process is running in .*\.base\.partial; wait for it, or give another folder"):
            pretrain(small(tmp_path / "base", measured=0))
        assert (tmp_path / ".base.partial").exists() and not (tmp_path / "base").exists()
    pretrain(small(tmp_path / "base", measured=0))
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


def test_batches_hold_training_prompts_only_and_new_tasks_only_late_and_rarely(tmp_path):
    settings = small(tmp_path, steps=100, batch_size=40)
    early = [example for step in range(80) for example in mixture_batch(step, 0, settings)]
    late = [example for step in range(80, 100) for example in mixture_batch(step, 0, settings)]
    assert len(early) == 3200 and len(late) == 800
    assert all(split_of(example.prompt) == "train" for example in early + late if example.task != "text")
    assert {example.task for example in early} == {*BASE_TASKS, "text"}
    assert 2 <= sum(example.task in NEW_TASKS for example in late) <= 40


def test_workers_draw_different_examples_of_the_same_kind(tmp_path):
    settings = small(tmp_path, workers=2, mixture=Mixture(text_share=0.5))
    pairs = [(mixture_batch(step, 0, settings), mixture_batch(step, 1, settings)) for step in range(20)]
    assert all(len(one) == len(other) == 4 and one != other for one, other in pairs)
    kinds = [{example.task == "text" for example in one + other} for one, other in pairs]
    assert all(len(kind) == 1 for kind in kinds) and {True} in kinds and {False} in kinds


@pytest.fixture
def tales(tmp_path):
    """The settings of a stream of generated examples and of a file of texts, which has held-out texts beside it."""
    lines = [f"once upon a time there were {number} bears in a wood, and they had porridge" for number in range(40)]
    for name, texts in (("tales.train.jsonl", lines[:36]), ("tales.test.jsonl", lines[36:])):
        (tmp_path / name).write_text("".join(json.dumps({"text": line}) + "\n" for line in texts))
    return {
        "window": 16,
        "merges": 20,
        "texts": (str(tmp_path / "tales.train.jsonl"),),
        "generated": ("copy",),
        "generated_share": 0.25,
        "generated_examples": 40,
    }


def test_the_recipe_of_a_base_made_from_a_stream_has_its_sources_and_measurements(tmp_path, tales):
    folder = pretrain(small(tmp_path / "base", stream=tales, precision="bf16", model=TIED))
    base, recipe = load(str(folder)), json.loads((folder / RECIPE).read_text())
    bits = recipe["measured"]["bits per byte, tales"]
    assert 0 < bits["bigram"] < bits["unigram"] and bits["model"] > 0
    assert set(recipe["measured"]["tasks"]) == {"copy", "mean"}
    [shares] = recipe["measured"]["each expert, of a fair share"].values()
    assert sum(shares) == pytest.approx(4, abs=0.01)
    assert list(recipe["data"]) == list(tales["texts"])
    assert base.model.lm_head.weight is base.model.model.embed_tokens.weight
    assert len(base.tokenizer("porridge")["input_ids"]) < 1 + len("porridge")
    points = [line.split(",") for line in (folder / "loss.csv").read_text().splitlines()]
    assert points[0] == ["step", "loss", "balance", "seconds"]
    assert [point[0] for point in points[1:]] == ["1", "2", "3"]
    assert recipe["loss"] == pytest.approx(float(points[-1][1]), abs=1e-4)
    card = (folder / "README.md").read_text()
    assert all(part in card for part in (*recipe["data"].values(), "bits per byte, tales", str(bits["model"])))
    assert {path.name for path in tmp_path.iterdir()} == {"base", "tales.train.jsonl", "tales.test.jsonl"}


def test_products_in_bf16_give_nearly_the_loss_of_fp32(tmp_path, tales):
    recipes = {}
    for precision in ("fp32", "bf16"):
        folder = pretrain(small(tmp_path / precision, stream=tales, precision=precision, measured=0, steps=10))
        recipes[precision] = json.loads((folder / RECIPE).read_text())["loss"]
    assert recipes["bf16"] == pytest.approx(recipes["fp32"], rel=0.01)
    assert load(str(tmp_path / "bf16")).hash != load(str(tmp_path / "fp32")).hash


def killed_after(monkeypatch, steps, settings):
    """Pretrains until this number of steps were begun."""
    make = pretraining.batches

    def failing(*arguments):
        batches, begun = make(*arguments), count(1)

        def batch(step, rank):
            if next(begun) > steps:
                raise Killed
            return batches(step, rank)

        return batch

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(pretraining, "batches", failing)
        pretrain(settings)


def curve_of(folder):
    """The loss curve without its times."""
    return [line.rpartition(",")[0] for line in (folder / "loss.csv").read_text().splitlines()]


@pytest.mark.parametrize("streamed", [True, False], ids=["stream", "mixture"])
def test_a_run_that_was_killed_continues_to_the_same_bits(tmp_path, tales, monkeypatch, streamed):
    changes = {"steps": 40, "save_every": 2, "measured": 0, **({"stream": tales, "precision": "bf16"} if streamed else {})}
    killed_after(monkeypatch, 7, small(tmp_path / "killed", **changes))  # the sixth step is saved
    killed_after(monkeypatch, 1, small(tmp_path / "killed", **changes))
    killed_after(monkeypatch, 20, small(tmp_path / "killed", **changes))
    assert not (tmp_path / "killed").exists() and (tmp_path / ".killed.partial").exists()
    killed, whole = (pretrain(small(tmp_path / name, **changes)) for name in ("killed", "whole"))
    assert curve_of(killed) == curve_of(whole) and len(curve_of(whole)) == 21
    assert load(str(killed)).hash == load(str(whole)).hash
    assert not (tmp_path / ".killed.partial").exists()


def test_every_worker_continues_from_the_state_that_the_first_one_saved(tmp_path, monkeypatch):
    settings = small(tmp_path / "base", steps=40, save_every=2)
    killed_after(monkeypatch, 7, settings)
    partial, seen = tmp_path / ".base.partial", []
    state = load_file(partial / pretraining.STATE)
    model = pretraining.make_model(SMALL, make_tokenizer(64), seed=1)
    with pytest.raises(Killed):
        pretraining.train(model, lambda step, rank: seen.append((step, rank)) or raising(Killed)(), settings, 1, partial)
    assert seen == [(6, 1)]
    assert all(torch.equal(parameter, state[f"weight/{name}"]) for name, parameter in model.named_parameters())


def test_a_run_that_was_killed_while_it_wrote_the_tokens_reads_the_sources_again(tmp_path, tales, monkeypatch):
    settings = small(tmp_path / "killed", stream=tales, measured=0)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(pretraining, "write_tensors", raising(Killed))
        pretrain(settings)
    assert load(str(pretrain(settings))).hash == load(str(pretrain(small(tmp_path / "whole", stream=tales, measured=0)))).hash


def raising(error):
    def fail(*_):
        raise error

    return fail


def test_steps_may_change_while_the_learning_rate_is_flat_and_not_after(tmp_path, tales, monkeypatch):
    changes = {"stream": tales, "save_every": 2, "measured": 0, "decay": 0.5}
    killed_after(monkeypatch, 11, small(tmp_path / "base", steps=40, **changes))  # flat until step 20
    with pytest.raises(BadRun, match=r"is at step 10, where the learning rate of 18 steps has begun to fall; set steps = 40"):
        pretrain(small(tmp_path / "base", steps=18, **changes))
    killed_after(monkeypatch, 27, small(tmp_path / "base", steps=60, **changes))  # flat until step 30
    with pytest.raises(BadRun, match=r"is at step 36, where the learning rate of 60 steps has begun to fall; set steps = 60"):
        pretrain(small(tmp_path / "base", steps=80, **changes))
    folder = pretrain(small(tmp_path / "base", steps=60, **changes))
    assert json.loads((folder / RECIPE).read_text())["settings"]["steps"] == 60
    assert curve_of(folder)[-1].startswith("60,")


def test_a_run_does_not_continue_with_other_settings_but_may_be_saved_more_often(tmp_path, tales, monkeypatch):
    changes = {"stream": tales, "steps": 40, "save_every": 2, "measured": 0}
    killed_after(monkeypatch, 5, small(tmp_path / "base", **changes))
    with pytest.raises(
        BadRun, match=r"\.base\.partial was begun with another lr, stream\.window; set the old value again, or remove"
    ):
        pretrain(small(tmp_path / "base", **{**changes, "lr": 0.5, "stream": {**tales, "window": 8}}))
    curve = curve_of(pretrain(small(tmp_path / "base", **{**changes, "save_every": 1})))
    assert [point.split(",")[0] for point in (*curve[:4], curve[-1])] == ["step", "2", "4", "5", "40"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b'{"text": "cut off', "not JSON"),
        (b'{"words": "none"}', "it has no field text, only words"),
        (b'{"text": ""}', "its field text is empty"),
        (b"[1]", "a list, but a row is an object of fields"),
        ('{"text": "caf\u00e9"}'.encode("latin-1"), "not UTF-8"),
    ],
)
def test_a_broken_line_of_a_source_is_named_by_file_and_number_before_anything_is_written(tmp_path, tales, line, sentence):
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(BadData, match=rf"bad\.jsonl, line 2: {sentence}") as refused:
        pretrain(small(tmp_path / "base", stream={**tales, "texts": (*tales["texts"], str(bad))}))
    assert "\n" not in str(refused.value) and sorted(tmp_path.iterdir()) == before


def test_an_empty_a_damaged_an_unknown_and_a_missing_file_are_each_named_in_a_sentence(tmp_path, tales, monkeypatch):
    monkeypatch.setenv("FEDEXPERTS_DATA", str(tmp_path))
    compressed = gzip.compress(b'{"text": "once upon a time"}\n')
    files = {"empty.jsonl": b"", "damaged.jsonl.gz": compressed[:-12], "notes.txt": b"once upon a time", "none.jsonl": None}
    sentences = (
        r"empty\.jsonl, line 1: the file is empty",
        r"damaged\.jsonl\.gz, line 1: .*damaged",
        r"notes\.txt is no \.jsonl, ",
        r"neither .*none\.jsonl nor",
    )
    for (name, content), sentence in zip(files.items(), sentences, strict=True):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(BadData, match=sentence) as refused:
            pretrain(small(tmp_path / "base", stream={**tales, "texts": (str(tmp_path / name),)}))
        assert "\n" not in str(refused.value)
    assert not [path for path in tmp_path.iterdir() if "base" in path.name]


def test_without_exposed_tasks_none_are_measured(tmp_path):
    folder = pretrain(small(tmp_path / "base", mixture=Mixture(exposed=(), exposed_share=0)))
    assert set(json.loads((folder / RECIPE).read_text())["measured"]) == {"tasks"}


def test_training_keeps_the_load_of_experts_more_even_with_the_balance_loss_than_without(tmp_path):
    balance = {}
    for coefficient in (0.0, 1.0):
        settings = small(tmp_path / str(coefficient), steps=60, measured=0, router_aux_loss_coef=coefficient)
        model = load(str(pretrain(settings))).model
        batch = Encoder(make_tokenizer(64), 64).batch(mixture_batch(0, 0, small(tmp_path)))
        with torch.no_grad(), Recorder(model, keep_logits=True) as recorder:
            model(**batch)
        balance[coefficient] = balance_loss(recorder).item()
    assert balance[1.0] < balance[0.0]


def test_the_learning_rate_rises_and_then_follows_a_cosine(tmp_path):
    settings = small(tmp_path, steps=110, warmup=0.0, final_lr=0.1)
    assert [schedule(step, settings) for step in (0, 55, 110)] == pytest.approx([1.0, 0.55, 0.1])
    warm = small(tmp_path, steps=100, warmup=0.09)
    assert [schedule(step, warm) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert all(math.isfinite(schedule(step, warm)) for step in range(101))


def test_the_learning_rate_may_stay_until_a_last_part_of_the_run(tmp_path):
    settings = small(tmp_path, steps=100, warmup=0.0, decay=0.5, final_lr=0.1)
    assert [schedule(step, settings) for step in (0, 25, 50, 75, 100)] == pytest.approx([1.0, 1.0, 1.0, 0.55, 0.1])
    flat = small(tmp_path, steps=10, warmup=0.0, decay=0.0)
    assert [schedule(step, flat) for step in range(10)] == [1.0] * 10


PLAIN = "the rain in Spain falls on the plain"


@pytest.mark.parametrize("tokenizer", [make_tokenizer(64), learn_tokenizer(64, 30, [PLAIN] * 3)], ids=["bytes", "pairs"])
def test_a_tokenizer_gives_any_text_back(tokenizer):
    for text in ("Reverse it: naïve ☂\n\ttwo  spaces", "plain => text", "", "<s>"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def test_the_tokenizer_of_the_mixture_reads_instructions_as_one_token():
    tokenizer = make_tokenizer(64)
    for word in (SEPARATOR, *INSTRUCTIONS):
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1


def test_a_learned_tokenizer_joins_what_is_frequent_and_keeps_digits_apart():
    tokenizer = learn_tokenizer(64, 20, [PLAIN, "in 1234 and 1234"] * 3)
    assert len(tokenizer) == 3 + 256 + 20
    assert len(tokenizer("plain", add_special_tokens=False)["input_ids"]) < 5
    assert len(tokenizer("1234", add_special_tokens=False)["input_ids"]) == 4


def test_a_run_file_is_read_with_changes_from_the_shell(tmp_path):
    (tmp_path / "run.toml").write_text('out = "base"\nsteps = 7\nmodel = { hidden = 32 }\n')
    settings = read_settings(tmp_path / "run.toml", ["model.experts=8", "seed=3"])
    assert (settings.steps, settings.model.hidden, settings.model.experts, settings.seed) == (7, 32, 8, 3)


def test_former_names_in_a_run_file_are_warned_of_and_read(tmp_path):
    (tmp_path / "run.toml").write_text('out = "base"\nclip = 0.5\n')
    with pytest.warns(RenamedSetting, match="clip is now called max_grad_norm"):
        assert read_settings(tmp_path / "run.toml").max_grad_norm == 0.5


def test_the_run_file_of_the_shipped_base_is_what_its_recipe_says():
    recipe = json.loads(Path("fedexperts/models/tiny", RECIPE).read_text())
    settings = read_settings(Path("runs/pretrain-tiny.toml"))
    assert recipe_settings(settings) == with_new_names(recipe["settings"], RENAMED)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("model.hiden=32", r"model\.hiden is not a setting; did you mean model\.hidden\?"),
        ("model.top_k=17", "top_k = 17 of 16 experts cannot be picked; set top_k to at most 16"),
        ("model.hidden=24", "hidden = 24 is no even multiple of heads = 16"),
        ("steps=0", "steps = 0 should be greater than 0"),
        ("workers=3", "batch_size = 128 is no multiple of workers = 3"),
        ('mixture.tasks=["revers"]', "'revers' is not one of .*; did you mean reverse"),
        ("mixture.tasks=[]", r"mixture\.tasks is empty; name some of "),
        ("mixture.exposed=[]", r"mixture\.exposed is empty; .*set mixture\.exposed_share = 0"),
        ("decay=1.5", "decay = 1.5 should be less than or equal to 1"),
        ('precision="fp16"', "precision = 'fp16' should be 'fp32' or 'bf16'"),
        ("stream.texts=[]", r"stream\.texts is empty; give at least 1"),
        ('stream.instructions=["mbpp"]', r"stream\.instructions and stream\.instruction_share go together"),
        ("stream.generated_share=0.5", r"stream\.generated and stream\.generated_share go together"),
        ('stream={texts=["a"], generated=["revers"], generated_share=0.5}', "'revers' is not one of .*; did you mean reverse"),
        ('stream={texts=["a"], generated=["copy"], generated_share=1}', "leave nothing for the texts"),
        ('stream={texts=["a"], generated=["copy"], generated_share=0.003}', r"128 windows has no room for stream\.generated"),
        ('stream={texts=["a"], generated=["copy"], generated_share=0.997}', r"128 windows has no room for stream\.texts"),
        ('stream={texts=["a"], window=1}', r"stream\.window = 1 should be greater than or equal to 2"),
        ('stream={texts=["a"], window=2000}', r"stream\.window = 2000 is longer than model\.max_positions = 1024"),
        ("mixture.text_share=2", r"mixture\.text_share = 2 should be less than or equal to 1"),
    ],
)
def test_a_bad_setting_is_one_sentence(tmp_path, change, sentence):
    beside = "\n[stream]\ntexts = ['a']\n" if change.startswith("stream.") else ""
    (tmp_path / "run.toml").write_text(f'out = "base"\n{beside}')
    with pytest.raises(BadValue, match=sentence):
        read_settings(tmp_path / "run.toml", [change, *(["model.heads=16"] if "hidden=24" in change else [])])


def test_a_mixture_beside_a_stream_has_no_effect_and_is_refused(tmp_path):
    (tmp_path / "run.toml").write_text('out = "base"\nmixture = { text_share = 0.5 }\nstream = { texts = ["a"] }\n')
    with pytest.raises(BadValue, match="mixture has no effect beside stream"):
        read_settings(tmp_path / "run.toml")


def test_a_text_of_a_stream_is_a_name_or_a_table(tmp_path):
    (tmp_path / "run.toml").write_text('out = "b"\n[stream]\ntexts = ["a", { name = "b", without = ["c"] }]\n')
    texts = read_settings(tmp_path / "run.toml").stream.texts
    assert [(text.name, text.without) for text in texts] == [("a", ()), ("b", ("c",))]
