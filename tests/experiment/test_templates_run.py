"""Runs on conversations: what a run notes of its templates, and that an exported model is asked as it was trained."""

import json
from hashlib import sha256

import pytest
from older import without_hashes
from transformers import AutoTokenizer

from fedexperts.config import RunConfig
from fedexperts.core.evaluation import answer
from fedexperts.data.clients import make_clients
from fedexperts.data.encode import Encoder
from fedexperts.errors import BadRun
from fedexperts.experiment import runner
from fedexperts.experiment.setup import Parts
from fedexperts.export import export, load
from fedexperts.export.generate import encoded, generate
from fedexperts.models.tokenizer import make_tokenizer
from fedexperts.testing import tiny_model

CHATML = """\
{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny base with a chat template."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = make_tokenizer(max_tokens=128)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    ids = {f"{each}_token_id": getattr(tokenizer, f"{each}_token_id") for each in ("pad", "bos", "eos")}
    tiny_model("olmoe", vocab_size=len(tokenizer), **ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    turns = [("user", "Say {0}"), ("assistant", "{0}"), ("user", "Again {0}"), ("assistant", "{0}!")]
    chats = ([{"role": role, "content": text.format(number)} for role, text in turns] for number in range(20))
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return path


@pytest.fixture
def tree(base, rows):
    return {
        "model": {"name": str(base)},
        "method": {"name": "fedavg"},
        "training": {"batch_size": 2, "local_steps": 2, "lr": 0.01, "validation_examples": 2},
        "federation": {"rounds": 1},
        "evaluation": {"generate_tokens": 2},
        "data": {"sources": [str(rows)], "clients": 2, "test_examples": 2, "max_tokens": 128, "partition": "iid"},
    }


def with_data(tree, **changes):
    return {**tree, "data": {**tree["data"], **changes}}


def noted(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_an_exported_chat_model_is_asked_as_in_the_evaluation_and_by_its_own_chat_template(tree, rows, tmp_path):
    config = RunConfig.model_validate(tree)
    run = runner.run(config, tmp_path / "run")
    assert noted(run, "versions")["template_hashes"] == {str(rows): sha256(CHATML.encode()).hexdigest()}
    assert noted(run, "partition")["prompts"]["chats"]["chat"] == {"template": None, "system": None}

    export(run, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    encoder, form = Encoder(tokenizer, 128), noted(tmp_path / "out", "fedexperts")["prompts"]["chats"]
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "Say 3"}], add_generation_prompt=True, return_dict=False)
    prompts = encoded(encoder, form, "Say 3")
    assert prompts["input_ids"][0].tolist() == asked
    assert generate(tmp_path / "out", "Say 3") == answer(load(tmp_path / "out"), prompts, encoder, 2)[0]
    assert "- chats: the question as it is, through the base's chat template" in (tmp_path / "out" / "README.md").read_text()


def test_a_chat_base_that_was_trained_on_plain_prompts_is_exported_with_a_chat_template_that_writes_them(tree, rows, tmp_path):
    source = {"name": str(rows.with_name("pairs.jsonl")), "prompt": "Q: {q}\nA: ", "response": "a", "task": "pairs"}
    rows.with_name("pairs.jsonl").write_text("".join(json.dumps({"q": f"{n}?", "a": str(n)}) + "\n" for n in range(20)))
    run = runner.run(RunConfig.model_validate(with_data(tree, sources=[source], template="plain")), tmp_path / "run")
    assert noted(run, "versions")["template_hashes"] == {source["name"]: "plain-1"}
    export(run, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    form = noted(tmp_path / "out", "fedexperts")["prompts"]["pairs"]
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "3?"}], add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(asked) == "<s>Q: 3?\nA: "
    assert encoded(Encoder(tokenizer, 128), form, "3?")["input_ids"][0].tolist() == asked


def test_auto_is_chat_where_the_base_has_a_chat_template_and_else_the_plain_frame(tree, rows, tiny_tree):
    chat, plain = (RunConfig.model_validate({**tree, "model": each["model"]}) for each in (tree, tiny_tree))
    assert {example.template for example in Parts().clients(chat).pool.train} == {None}
    told = Parts().clients(plain).pool
    assert told == make_clients(plain.data, plain.seed).pool and all(example.template for example in told.train)
    ours = RunConfig.model_validate(tiny_tree)
    assert Parts().clients(ours).pool == make_clients(ours.data, ours.seed).pool
    assert not any(example.turns for example in Parts().clients(ours).pool.train)


def test_a_run_that_began_before_there_were_templates_goes_on_with_plain_prompts_alone(tree, tmp_path):
    def old(folder):
        without_hashes(runner.run(RunConfig.model_validate(with_data(tree, template="plain")), folder))
        for name, key in (("versions", "template_hashes"), ("resolved", "data")):
            content = noted(folder, name)
            dropped = content.pop(key)
            content |= {"data": {k: v for k, v in dropped.items() if k != "template"}} if key == "data" else {}
            (folder / f"{name}.json").write_text(json.dumps(content))
        return folder

    folder = old(tmp_path / "run")
    with pytest.raises(BadRun, match=r"how prompts are asked \(data.template"):
        runner.run(RunConfig.model_validate(tree), folder, resume=True)
    runner.run(RunConfig.model_validate(with_data(tree, template="plain-1")), folder, resume=True)
    export(old(tmp_path / "other"), tmp_path / "out", "c01")
