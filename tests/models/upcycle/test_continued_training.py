"""Continued training: what it learns and leaves alone, that it can be killed, and what it reports."""

import hashlib
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedexperts.data.chat import ChatTemplate
from fedexperts.errors import BadData, BadRun, BadValue
from fedexperts.models.continued import report
from fedexperts.models.continued import settings as settings_module
from fedexperts.models.continued.corpus import conversation_rows, read_windows
from fedexperts.models.continued.measure import HeldOut, bits_per_byte, chosen, expert_outputs, layer_errors, loads, routes
from fedexperts.models.continued.models import load_start
from fedexperts.models.continued.run import continue_training, partial_folder
from fedexperts.models.continued.settings import ContinueSettings, Corpus
from fedexperts.models.continued.training import Trained, gradients, kl, steps_for
from fedexperts.models.upcycle.recipes import Copy, Split
from fedexperts.models.upcycle.run import Sources, upcycle
from fedexperts.moe.anatomy import blocks
from fedexperts.moe.together import IMPLEMENTATION, compute_together
from fedexperts.testing import tiny_examples, tiny_model

WINDOW = 32


class Killed(Exception):
    pass


@pytest.fixture
def moe(saved, text, tmp_path):
    """Makes an MoE folder of a dense one; gives both, and a text."""

    def make(recipe=None):
        _, dense = saved("llama")
        folder, file = tmp_path / "moe", text()
        upcycle(Sources(str(dense), texts=[file], tokens=1024), recipe or Split(4, 2, 32), folder)
        return folder, dense, file

    return make


@pytest.fixture
def settings(moe, tmp_path):
    """Settings of four steps on a text, with changes."""

    def of(made=None, corpus=None, **changes):
        folder, _, file = made or moe()
        texts = {"window": WINDOW, "texts": [str(file)], **(corpus or {})}
        small = {"tokens": 4 * 4 * WINDOW, "batch_size": 4, "save_every": 2, "measured": 2, "lr": 1e-2}
        return ContinueSettings(**{"start": str(folder), "out": tmp_path / "out", "corpus": texts, **small, **changes})

    return of


def weights(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def digest(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.safetensors")}


def losses(folder):
    lines = [line.rpartition(",")[0] for line in (folder / "curve.csv").read_text().splitlines()]
    assert len(lines) == 3
    return lines


def test_a_run_that_is_killed_continues_to_the_same_bits(moe, settings, tmp_path):
    made = moe()
    options = {"control": str(made[1]), "distill": 0.5, "gradient_accumulation_steps": 2}
    continue_training(settings(made, **options, out=tmp_path / "whole"))

    def kill(steps, point):
        assert (steps, point.step) == (4, 2)
        raise Killed

    killed = settings(made, **options, out=tmp_path / "killed")
    with pytest.raises(Killed):
        continue_training(killed, kill)
    assert not killed.out.exists() and (partial_folder(killed) / "state.safetensors").exists()
    continue_training(killed)
    assert digest(killed.out) == digest(tmp_path / "whole") != {}
    assert losses(killed.out) == losses(tmp_path / "whole")
    assert not partial_folder(killed).exists()


def test_another_run_is_not_continued(moe, settings):
    made = moe()

    def kill(steps, point):
        raise Killed

    with pytest.raises(Killed):
        continue_training(settings(made), kill)
    with pytest.raises(BadRun, match=r"was begun with another lr; set the old value again"):
        continue_training(settings(made, lr=2e-2))
    continue_training(settings(made, save_every=1))


def test_training_that_diverges_stops_and_writes_no_model(moe, settings):
    of = settings(moe(), lr=1e30)
    with pytest.raises(BadRun, match=r"the gradient of the model is not finite in step \d; lower lr"):
        continue_training(of)
    assert not of.out.exists()


def test_what_is_interrupted_before_the_first_step_leaves_nothing(moe, settings, monkeypatch):
    def kill(*_):
        raise Killed

    of = settings(moe())
    monkeypatch.setattr(report, "measured", kill)
    with pytest.raises(Killed):
        continue_training(of)
    assert not of.out.exists() and not partial_folder(of).exists()


def test_an_moe_is_no_control(moe, settings):
    made = moe()
    with pytest.raises(BadValue, match=r"lacks the weight model\.layers\.0\.mlp\.experts.*give a dense model"):
        continue_training(settings(made, control=str(made[0])))


def test_frozen_parameters_keep_their_bits_and_all_others_change(moe, settings):
    made = moe()
    of = settings(made, frozen=("embed_tokens", "self_attn"))
    continue_training(of)
    before, after = weights(made[0]), weights(of.out)
    same = {name for name in after if torch.equal(before[name], after[name])}
    assert same == {name for name in after if "embed_tokens" in name or "self_attn" in name}
    assert 0 < len(same) < len(after)


def test_the_loss_falls_and_the_folder_loads_in_transformers(moe, settings):
    made = moe()
    of = settings(made, tokens=60 * 4 * WINDOW, save_every=10, control=str(made[1]))
    found = continue_training(of)
    curve = [line.split(",") for line in (of.out / "curve.csv").read_text().splitlines()]
    first, last = (dict(zip(curve[0], map(float, row), strict=True)) for row in (curve[1], curve[-1]))
    assert last["loss"] < first["loss"] - 0.1 and last["control_loss"] < first["control_loss"] - 0.1
    assert found["after"]["bits_per_byte"]["mean"] < found["before"]["bits_per_byte"]["mean"] - 0.1

    model = AutoModelForCausalLM.from_pretrained(of.out)
    ids = AutoTokenizer.from_pretrained(of.out)("abcde fghab", return_tensors="pt")
    assert torch.isfinite(model(**ids).logits).all()


def test_the_report_compares_with_the_control(moe, settings):
    made = moe()
    of = settings(made, control=str(made[1]))
    continue_training(of)
    found = json.loads((of.out / "training.json").read_text())
    for each in (found["before"], found["after"]):
        gap = each["bits_per_byte"]["mean"] - each["control_bits_per_byte"]["mean"]
        assert each["over_control"] == pytest.approx(gap, abs=2e-4) and each["kl"] > 0
        assert each["least_used"] == min(map(min, each["load"].values()))
        assert set(each["error_of_a_layer"]) == set(each["bits_by_choice"]) == {"routed", "random", "oracle"}
    assert (found["steps"], found["tokens"]) == (4, 4 * 4 * WINDOW)
    assert found["parameters"]["active"] < found["parameters"]["total"]
    readme = (of.out / "README.md").read_text()
    assert "routed, random, oracle" in readme and f"{found['after']['over_control']:+.4f}" in readme


def test_an_exact_copy_has_no_divergence_from_its_control(moe, settings):
    made = moe(Copy(2, 1))
    of = settings(made, control=str(made[1]), precision="fp32")
    assert continue_training(of)["before"]["kl"] == pytest.approx(0, abs=1e-6)


def test_the_divergence_is_that_of_torch_and_zero_for_equal_predictions():
    target, logits = (torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    old, new = (each.softmax(-1).flatten(0, 1) for each in (target, logits))
    assert kl(target, logits) == pytest.approx(float((old * (old / new).log()).sum(1).mean()), rel=1e-5)
    assert kl(target, target) == pytest.approx(0, abs=1e-6)
    assert kl(target, logits) == pytest.approx(float(kl_div(new.log(), old, reduction="batchmean")), rel=1e-5)


def test_parts_of_a_batch_add_up_to_the_gradients_of_the_whole(moe, settings):
    made = moe()
    found = []
    for parts in (1, 4):
        of = settings(made, gradient_accumulation_steps=parts, router_aux_loss_coef=0.0, precision="fp32")
        model, tokenizer, _, _ = load_start(of.start)
        windows = read_windows(of.corpus, tokenizer, of.measured, of.seed)
        gradients(Trained.of(model, None, of), windows.batch({"texts": 4}, 0, 0), of)
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert len(found[0]) > 10
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-6, rtol=1e-3)


def test_a_last_step_that_diverges_is_noticed_too(moe, settings, tmp_path):
    of = settings(moe(), lr=1e38, tokens=4 * WINDOW)
    with pytest.raises(BadRun, match=r"bits per byte of the model is not finite in step 1; lower lr"):
        continue_training(of)
    assert not of.out.exists()


def test_draws_of_dropout_depend_on_seed_and_step_alone(saved, text, settings, tmp_path):
    _, dense = saved("llama", attention_dropout=0.5)
    made = dense, None, text()

    def kill(steps, point):
        raise Killed

    whole, killed = (settings(made, out=tmp_path / name) for name in ("whole", "killed"))
    continue_training(whole)
    torch.rand(3)  # of the global generator
    with pytest.raises(Killed):
        continue_training(killed, kill)
    continue_training(killed)
    assert digest(killed.out) == digest(whole.out) != {}
    other = settings(made, out=tmp_path / "other", seed=1)
    continue_training(other)
    assert digest(other.out) != digest(whole.out)


def test_frozen_names_are_those_of_parameters_and_leave_some(moe, settings):
    made = moe()
    with pytest.raises(
        BadValue, match=r"frozen names 'embed_tokns', which is in no parameter's name; give a part of one, such as"
    ):
        continue_training(settings(made, frozen=("embed_tokns",)))
    with pytest.raises(BadValue, match=r"leaves nothing of the model to train"):
        continue_training(settings(made, frozen=("model", "lm_head")))


def test_a_start_that_lacks_a_weight_is_refused(saved):
    _, dense = saved("llama")
    tensors = load_file(dense / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadValue, match=r"lacks the weight model\.layers\.1\.mlp\.up_proj\.weight"):
        load_start(str(dense))


def test_a_control_or_a_tokenizer_that_changed_is_not_continued_with(moe, settings, saved):
    made = moe()
    of = settings(made, control=str(made[1]), distill=0.5)

    def kill(steps, point):
        raise Killed

    with pytest.raises(Killed):
        continue_training(of, kill)
    template = made[0] / "chat_template.jinja"
    template.write_text("{{ messages[0].content }}")
    with pytest.raises(BadRun, match="was begun with another model;"):
        continue_training(of)
    template.unlink()
    saved("llama", seed=5)  # in the place of the control
    with pytest.raises(BadRun, match="was begun with another control model;"):
        continue_training(of)


def test_instructions_alone_are_measured_on_windows_that_are_held_out(moe, settings):
    alone = {"texts": [], "instructions": ["synthetic/copy"], "instruction_share": 1.0}
    of = settings(moe(), corpus=alone)
    report = continue_training(of)
    assert set(report["after"]["bits_per_byte"]) == {"synthetic/copy", "mean"}
    _, tokenizer, _, _ = load_start(of.start)
    windows = read_windows(of.corpus, tokenizer, of.measured, of.seed)
    apart = {tuple(row.tolist()) for row in windows.held_out["synthetic/copy"]}
    assert apart and not apart & {tuple(row.tolist()) for row in windows.train["instructions"]}


def test_texts_of_one_name_are_measured_each_and_plain_text_may_have_its_own_test_file(moe, settings, text, tmp_path):
    folder, dense, file = moe()
    (tmp_path / "de").mkdir()
    for name in ("de/text.txt", "mine.train.txt", "mine.test.txt"):
        text(name)
    names = [str(file), str(tmp_path / "de" / "text.txt"), str(tmp_path / "mine.train.txt")]
    of = settings((folder, dense, file), corpus={"texts": names})
    _, tokenizer, _, _ = load_start(of.start)
    windows = read_windows(of.corpus, tokenizer, of.measured, of.seed)
    assert list(windows.held_out) == ["text", names[1], "mine"]
    assert "mine, held out" in windows.hashes
    with_rows = settings((folder, dense, file), corpus={"texts": [{"name": names[0], "without": ["zzz"]}]})
    with pytest.raises(BadData, match="is one text without rows"):
        read_windows(with_rows.corpus, tokenizer, 2, 0)


def test_counts_of_the_curve_keep_their_digits():
    assert report.written(1_048_577) == "1048577" and report.written(0.1234567891) == "0.123457"


@pytest.mark.parametrize(("kernels", "precision"), [(True, "bf16"), (False, "fp32")])
def test_products_are_in_bfloat16_where_the_processor_has_them(moe, settings, monkeypatch, kernels, precision):
    monkeypatch.setattr(settings_module, "has_half_kernels", lambda: kernels)
    made = moe()
    assert settings(made).with_precision().precision == precision
    assert settings(made, precision="bf16").with_precision().precision == "bf16"


def test_a_time_budget_sets_the_steps_and_leaves_no_trace(moe, settings, tmp_path):
    made = moe()
    of = settings(made, tokens=None, minutes=0.002)
    found = continue_training(of)
    assert found["steps"] >= 1
    same = settings(made, tokens=found["steps"] * of.step_tokens, out=tmp_path / "same")
    continue_training(same)
    assert digest(same.out) == digest(of.out)


def test_a_budget_of_tokens_is_whole_steps(settings):
    of = settings(tokens=1000)
    assert steps_for(Trained.of(tiny_model("qwen2_moe"), None, of), torch.zeros(4, WINDOW), of) == 1000 // (4 * WINDOW) == 7


def test_a_dense_model_is_trained_too(saved, text, settings):
    _, folder = saved("llama")
    found = continue_training(settings((folder, None, text())))
    assert found["parameters"]["active"] == found["parameters"]["total"]
    assert "load" not in found["after"]


def test_windows_of_text_begin_with_the_separator_and_held_out_ones_are_not_trained_on(moe):
    folder, _, file = moe()
    tokenizer = load_start(str(folder))[1]
    windows = read_windows(Corpus(window=WINDOW, texts=[str(file)]), tokenizer, 2, 0)
    train, held_out = windows.train["texts"], windows.held_out["text"]
    assert (train[:, 0] == tokenizer.bos_token_id).all() and (held_out[:, 0] == tokenizer.bos_token_id).all()
    kept = {tuple(row) for row in train.tolist()}
    assert len(held_out) == 2 and not any(tuple(row) in kept for row in held_out.tolist())
    other = read_windows(Corpus(window=WINDOW, texts=[str(file)], separator="z"), tokenizer, 2, 0)
    assert (other.train["texts"][:, 0] == tokenizer.convert_tokens_to_ids("z")).all()


def test_each_window_is_read_before_one_is_read_again(moe):
    folder, _, file = moe()
    windows = read_windows(Corpus(window=WINDOW, texts=[str(file)]), load_start(str(folder))[1], 2, 0)
    number = len(windows.train["texts"])
    rows = [tuple(windows.batch({"texts": 1}, step, 0)[0].tolist()) for step in range(2 * number)]
    assert set(rows[:number]) == set(rows[number:]) and len(set(rows[:number])) == number
    assert rows[:number] != rows[number:]


def test_windows_of_conversations_begin_with_one_in_the_chat_template(moe):
    tokenizer = load_start(str(moe()[0]))[1]
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    rows = conversation_rows(tokenizer, tiny_examples(20), WINDOW)
    start = tokenizer("<user>", add_special_tokens=False)["input_ids"]
    assert len(rows) >= 3 and all(row[: len(start)] == start for row in rows.tolist())
    assert ChatTemplate(tokenizer, None).end == tokenizer.eos_token_id
    assert (rows == tokenizer.eos_token_id).any()


@torch.no_grad()
def test_experts_computed_together_give_the_same(logits):
    model = tiny_model("qwen2_moe")
    model.set_experts_implementation("eager")
    apart = logits_of(model)
    assert compute_together(model)
    assert model.config._experts_implementation == IMPLEMENTATION
    torch.testing.assert_close(logits_of(model), apart, atol=1e-5, rtol=1e-4)
    assert not torch.equal(logits_of(tiny_model("qwen2_moe", seed=1)), apart)


@pytest.mark.parametrize(("shape", "together"), [({}, True), ({"top_k": 1}, False), ({"moe_intermediate_size": 136}, False)])
def test_experts_are_computed_together_only_where_that_is_faster(shape, together):
    assert compute_together(tiny_model("qwen2_moe", **shape)) is together
    assert not compute_together(tiny_model("gpt_oss"))


def logits_of(model):
    ids = torch.randint(3, 30, (2, 12), generator=torch.Generator().manual_seed(7))
    return model(input_ids=ids).logits


def held_out(tokenizer):
    rows = torch.randint(3, 30, (3, 16), generator=torch.Generator().manual_seed(3))
    return HeldOut.of({"text": rows}, tokenizer, bf16=False)


def test_if_all_experts_are_active_every_choice_is_the_same(moe):
    model, tokenizer, _, _ = load_start(str(moe(Split(4, 4, 32))[0]))
    rows = held_out(tokenizer)
    found = routes(model, rows, 0, bits_per_byte(model, rows)["mean"])
    bits = found["bits_by_choice"]
    assert bits["random"] == pytest.approx(bits["routed"], abs=1e-5) and bits["oracle"] == pytest.approx(bits["routed"], abs=1e-5)
    assert all(error == pytest.approx(0, abs=1e-5) for error in found["error_of_a_layer"].values())


def test_the_oracle_takes_the_experts_that_add_most_and_errs_least(moe):
    model, tokenizer, _, _ = load_start(str(moe()[0]))
    errors = layer_errors(model, held_out(tokenizer), 0)
    assert 0 < errors["oracle"] < errors["random"]

    block = next(iter(blocks(model).values()))
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    outputs = expert_outputs(block, hidden)
    picks = []
    with torch.no_grad(), chosen(model, "oracle", 0):
        _, given, picks = block.router(hidden)
    assert torch.equal(picks, outputs.norm(dim=2).topk(2, dim=1).indices)
    torch.testing.assert_close(given.sum(1), torch.ones(5))
    with torch.no_grad():
        alone = [block.experts(hidden, torch.full((5, 1), expert), torch.ones(5, 1)) for expert in range(4)]
    torch.testing.assert_close(outputs, torch.stack(alone, dim=1), atol=1e-5, rtol=1e-4)


def test_loads_are_parts_of_a_fair_share(moe):
    model, tokenizer, _, _ = load_start(str(moe()[0]))
    shares = loads(model, held_out(tokenizer))
    assert len(shares) == 2 and all(sum(values) == pytest.approx(4) for values in shares.values())


@torch.no_grad()
def test_bits_per_byte_are_those_of_the_definition(moe):
    model, tokenizer, _, _ = load_start(str(moe()[0]))
    text = "abcde fghij klmno"
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    rows = torch.tensor([ids])
    nats = float(model(input_ids=rows, labels=rows).loss) * (len(ids) - 1)
    found = bits_per_byte(model, HeldOut.of({"text": rows}, tokenizer, bf16=False))
    assert found["text"] == pytest.approx(nats / len(text.encode()) / math.log(2), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tokens": None}, "give exactly one of tokens and minutes"),
        ({"minutes": 1}, "give exactly one of tokens and minutes"),
        ({"tokens": 3}, "tokens = 3 is less than one step of 128 tokens"),
        ({"gradient_accumulation_steps": 3}, "batch_size = 4 is no multiple of gradient_accumulation_steps = 3"),
        ({"distill": 0.5}, "distill = 0.5 needs a model to learn from; set control"),
        ({"start": "./nowhere"}, "folder that does not exist"),
        ({"control": "/nowhere"}, "/nowhere is not a folder"),
        ({"corpus": {"texts": []}}, "corpus has neither texts nor instructions"),
        ({"corpus": {"texts": ["nowhere.txt"]}}, "neither nowhere.txt nor"),
        ({"corpus": {"instructions": ["gsm8k"]}}, "corpus.instructions and corpus.instruction_share go together"),
        ({"corpus": {"instructions": ["gsm8k"], "instruction_share": 0.01}}, "a batch of 4 windows has no room for all of"),
        ({"corpus": {"separator": "<nothing>"}}, "corpus.separator = '<nothing>' is no token of the tokenizer"),
        ({"corpus": {"windows": 3}}, "corpus.windows is not a setting; did you mean corpus.window?"),
        ({"corpus": {"window": 129}, "tokens": 2048}, "corpus.window = 129 is longer than the 128 positions of the model"),
        ({"corpus": {"texts": ["SHORT"]}}, "short.txt has less text than one window of 32 tokens"),
        ({"learning_rate": 1}, "learning_rate is not a setting"),
    ],
)
def test_a_mistake_is_explained_in_one_sentence_and_nothing_is_written(fedexperts, moe, tmp_path, changes, sentence):
    folder, _, file = moe()
    tree = {"start": str(folder), "tokens": 512, "batch_size": 4, **changes}
    corpus = {"window": WINDOW, "texts": [str(file)], **changes.get("corpus", {})}
    (tmp_path / "short.txt").write_text("short")
    corpus["texts"] = [str(tmp_path / "short.txt") if name == "SHORT" else name for name in corpus["texts"]]
    lines = [f"{key} = {json.dumps(value)}" for key, value in tree.items() if key != "corpus" and value is not None]
    lines += ["[corpus]", *(f"{key} = {json.dumps(value)}" for key, value in corpus.items())]
    run_file = tmp_path / "heal.toml"
    run_file.write_text("\n".join(lines))
    here = {path.name for path in tmp_path.iterdir()}
    code, out, err = fedexperts("pretrain", run_file, "--out", tmp_path / "new")
    assert (code, out) == (2, "")
    assert err.startswith("fedexperts: ") and sentence in err
    assert len(err.splitlines()) == 1 and len(err) < 320
    assert {path.name for path in tmp_path.iterdir()} == here


def test_the_command_shows_the_way_and_the_report(fedexperts, moe, tmp_path):
    folder, dense, file = moe()
    run_file = tmp_path / "heal.toml"
    corpus = f"[corpus]\nwindow = {WINDOW}\ntexts = ['{file}']"
    run_file.write_text(f"start = '{folder}'\ntokens = 512\nbatch_size = 4\nsave_every = 2\nmeasured = 2\n{corpus}")
    code, out, err = fedexperts("pretrain", run_file, "--out", tmp_path / "new", "--control", dense)
    assert (code, err) == (0, "")
    assert all(part in out for part in ("step 2 of 4: loss", "(control ", "KL from", "routed", "written: "))
    code, _, err = fedexperts("pretrain", run_file, "--out", tmp_path / "new")
    assert code == 2 and "exists and is not empty" in err


def test_a_control_needs_a_model_to_continue_from(fedexperts, tmp_path):
    run_file = tmp_path / "base.toml"
    run_file.write_text("out = 'base'")
    code, _, err = fedexperts("pretrain", run_file, "--control", "dense")
    assert code == 2 and "--control was given, but" in err and "add start to it" in err
