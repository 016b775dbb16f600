"""Models exported and loaded again, bitwise equal to the scored ones, and one sentence per mistake."""

import ast
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import tomli_w
import torch
import transformers
from older import without_hashes
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

import fedexperts
from fedexperts.config import RunConfig
from fedexperts.data.encode import Encoder
from fedexperts.errors import BadRun, BadValue, Busy
from fedexperts.experiment import runner
from fedexperts.experiment.client_task import ClientTask
from fedexperts.export import card, export, load, modeling_fedexperts, write_changed
from fedexperts.export.generate import encoded, generate, prompt_form
from fedexperts.export.models import Exported
from fedexperts.export.plain import as_plain, is_plain
from fedexperts.io.files import align_tensors, atomic_folder, locked
from fedexperts.methods import METHODS
from fedexperts.methods.fedavg import FedAvg
from fedexperts.models.load import Base
from fedexperts.models.load import load as load_base
from fedexperts.models.tokenizer import make_tokenizer
from fedexperts.moe import graft
from fedexperts.moe.anatomy import anatomy, blocks
from fedexperts.moe.shrink import shrink
from fedexperts.moe.tuning import Tuning, prepare
from fedexperts.testing import FAMILIES, tiny_batch, tiny_experts, tiny_model, tiny_tokenizer
from fedexperts.types import Assignment, Example

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft 0.21 asks by that name
FOUR = ("olmoe", "mixtral", "qwen2_moe", "switch_transformers")
LORA = {"train": "lora", "rank": 4, "alpha": 8.0}
CASES = {
    "full": {"method": {"name": "fedavg"}, "training": {"train": "full"}},
    "cut": {"method": {"name": "uneven"}, "training": {"train": "full"}},
    "cut alike": {"method": {"name": "fedavg", "experts_per_layer": 4}, "training": {"train": "full"}},
    "cut alike lora": {"method": {"name": "fedavg", "experts_per_layer": 4}, "training": LORA},
    "lora": {"method": {"name": "fedit"}, "training": LORA},
    "grafted": {"method": {"name": "flex", "num_grafted": 2}, "training": {**LORA, "parts": ["attention"]}},
    "personal": {"method": {"name": "fedper"}, "training": {"train": "full"}},
    "cut lora": {"method": {"name": "uneven"}, "training": LORA},
    "one expert": {"method": {"name": "random_expert"}, "training": LORA},
    "stacked": {"method": {"name": "flora"}, "training": LORA},
    "own": {"method": {"name": "local"}, "training": {"train": "full"}},
    "own b": {"method": {"name": "fedsa_lora"}, "training": {**LORA, "parts": ["attention"]}},
    "own b, shared routers": {"method": {"name": "fedsa_lora"}, "training": LORA},
    "attention": {"method": {"name": "fedit"}, "training": {**LORA, "parts": ["attention"]}},
}


@dataclass(frozen=True)
class Uneven(FedAvg):
    """Every layer of a client has another number of experts, and no two clients have the same ones."""

    def assign(self, server, client):
        number = sorted(server.clients).index(client.name)
        return Assignment(
            {
                name: tuple(sorted((number + each) % shape.num_experts for each in range(shape.fewest + 1 + layer)))
                for layer, (name, shape) in enumerate(server.anatomy.blocks.items())
            }
        )


@dataclass(frozen=True)
class Ended:
    """A run that is done: its folder, and of each client the logits of the model it was last scored with."""

    folder: Path
    logits: dict[str, torch.Tensor]
    family: str
    base: Path


def logits(model, family):
    with torch.no_grad():
        return model.eval()(**tiny_batch(family)).logits


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = {}

    def base(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            tokenizer = make_tokenizer(max_tokens=48)
            ids = {f"{each}_token_id": getattr(tokenizer, f"{each}_token_id") for each in ("pad", "bos", "eos")}
            tiny_model(family, vocab_size=len(tokenizer), **ids).save_pretrained(made[family])
            tokenizer.save_pretrained(made[family])
        return made[family]

    return base


@pytest.fixture(scope="module")
def ended(bases, tmp_path_factory):
    """Runs a case on a family, once: two clients, one round."""
    done = {}

    def run(family, case):
        if (family, case) in done:
            return done[family, case]
        seen, scores = {}, ClientTask.scores

        def watched(self, model, examples, context):
            seen[context.client.name] = logits(model, family)
            return scores(self, model, examples, context)

        tree = {
            "model": {"name": str(bases(family))},
            "federation": {"rounds": 1},
            "evaluation": {"generate_tokens": 2},
            "data": {
                "sources": ["synthetic/double", "synthetic/first"],
                "clients": 2,
                "limit": 12,
                "test_examples": 2,
                "max_tokens": 24,
            },
            **CASES[case],
        }
        tree["training"] = {**tree["training"], "batch_size": 2, "local_steps": 2, "lr": 0.01}
        folder = tmp_path_factory.mktemp("run") / "out"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ClientTask, "scores", watched)
            runner.run(RunConfig.model_validate(tree), folder)
        done[family, case] = Ended(folder, seen, family, bases(family))
        return done[family, case]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "uneven", Uneven)
        yield run


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory):
    """Where transformers puts the code that travels with a model, instead of the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(sys, "path", list(sys.path))
        yield


def by_transformers(folder, family, **options):
    kind = AutoModelForSeq2SeqLM if family == "switch_transformers" else AutoModelForCausalLM
    return kind.from_pretrained(folder, **options)


@pytest.mark.parametrize("family", FOUR)
@pytest.mark.parametrize("case", ["full", "cut", "lora", "grafted"])
def test_a_client_s_folder_gives_the_logits_it_was_scored_with_bit_for_bit(ended, family, case, tmp_path):
    run = ended(family, case)
    for client, expected in run.logits.items():
        kind = export(run.folder, tmp_path / client, client)
        assert kind.needs_code == (case != "full")
        assert (tmp_path / client / "modeling_fedexperts.py").exists() == kind.needs_code
        ours = load(tmp_path / client)
        assert torch.equal(logits(ours, family), expected)
        theirs = by_transformers(tmp_path / client, family, trust_remote_code=kind.needs_code)
        assert torch.equal(logits(theirs, family), expected)
        assert len(AutoTokenizer.from_pretrained(tmp_path / client, trust_remote_code=True)) > 256
    of_base = logits(by_transformers(run.base, family), family)
    first, second = run.logits.values()
    assert not torch.equal(first, of_base)
    assert torch.equal(first, second) == (case in ("full", "lora"))
    if case == "cut":
        counts = [block.shape.num_experts for block in blocks(ours).values()]
        assert len(set(counts)) == len(counts)


@pytest.mark.parametrize("family", ["olmoe", "switch_transformers"])
@pytest.mark.parametrize("case", ["lora", "cut lora", "grafted", "own b"])
def test_a_client_s_adapters_are_merged_on_request(ended, family, case, tmp_path):
    run = ended(family, case)
    kind = export(run.folder, tmp_path / "c02", "c02", merge=True)
    assert kind.needs_code == (case in ("cut lora", "grafted"))
    exported = load_file(tmp_path / "c02" / "model.safetensors")
    assert not any("lora" in name or "base_layer" in name for name in exported)
    assert any("grafted" in name for name in exported) == (case == "grafted")
    for model in (load(tmp_path / "c02"), by_transformers(tmp_path / "c02", family, trust_remote_code=kind.needs_code)):
        assert (logits(model, family) - run.logits["c02"]).abs().max() <= 1e-4
    card_text = (tmp_path / "c02" / "README.md").read_text()
    assert "its adapters merged into its weights" in card_text
    assert ("**Personal.**" in card_text) == (case in ("grafted", "own b"))


@pytest.mark.parametrize("family", FOUR)
def test_the_global_model_of_full_training_is_a_plain_folder_bit_for_bit(ended, family, tmp_path):
    run = ended(family, "full")
    assert not export(run.folder, tmp_path / "out").needs_code
    plain = by_transformers(tmp_path / "out", family)
    assert torch.equal(logits(plain, family), next(iter(run.logits.values())))
    assert type(plain) is type(by_transformers(run.base, family))
    config_json, base = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", run.base))
    assert config_json.keys() - {"dtype"} == base.keys() - {"dtype"}


@pytest.mark.parametrize("family", FOUR)
def test_a_sub_model_with_as_many_experts_in_each_layer_is_a_plain_folder(ended, family, tmp_path):
    done, client = ended(family, "cut alike"), "c01"
    kind = export(done.folder, tmp_path / "plain", client)
    assert not kind.needs_code and not (tmp_path / "plain" / "modeling_fedexperts.py").exists()
    model = by_transformers(tmp_path / "plain", family)
    assert {block.shape.num_experts for block in blocks(model).values()} == {4}
    assert torch.equal(logits(load(tmp_path / "plain"), family), done.logits[client])
    assert torch.allclose(logits(model, family), done.logits[client], atol=1e-6)
    card = (tmp_path / "plain" / "README.md").read_text()
    assert "need nothing else" in card and "which ones may tell what its data is like" in card and "trust" not in card


def test_a_sub_model_with_merged_adapters_is_a_plain_folder_too(ended, tmp_path):
    done = ended("olmoe", "cut alike lora")
    assert export(done.folder, tmp_path / "exact", "c01").needs_code
    assert not export(done.folder, tmp_path / "merged", "c01", merge=True).needs_code
    assert torch.allclose(logits(load(tmp_path / "merged"), "olmoe"), done.logits["c01"], atol=1e-5)


@pytest.mark.parametrize("family", FOUR)
def test_the_global_model_of_sub_models_has_every_expert_that_a_client_trained(ended, family, tmp_path):
    run = ended(family, "cut")
    export(run.folder, tmp_path / "out")
    plain, base = by_transformers(tmp_path / "out", family), by_transformers(run.base, family)
    assert anatomy(plain) == anatomy(base)
    assert not torch.equal(logits(plain, family), logits(base, family))


@pytest.mark.parametrize("family", FOUR)
def test_the_global_model_of_lora_is_merged_into_a_plain_folder(ended, family, tmp_path):
    run = ended(family, "lora")
    export(run.folder, tmp_path / "out")
    plain = by_transformers(tmp_path / "out", family)
    assert not any("lora" in name for name, _ in plain.named_parameters())
    expected = next(iter(run.logits.values()))
    assert (logits(plain, family) - expected).abs().max() <= 1e-5
    assert (logits(by_transformers(run.base, family), family) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("family", FOUR)
@pytest.mark.parametrize("client", [None, "c01"], ids=["global", "client"])
@pytest.mark.parametrize("case", ["lora", "attention"])
def test_peft_puts_the_adapter_on_the_base(ended, family, case, client, tmp_path):
    run = ended(family, case)
    export(run.folder, tmp_path / "out", client, adapter=True)
    base = by_transformers(run.base, family)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "out")
    expected = run.logits["c01"]
    off = (logits(adapted, family) - expected).abs().max()
    assert off <= 1e-5
    assert case == "lora" or off == 0, "peft computes adapters of attention as we do"
    assert not list((tmp_path / "out").glob("model*.safetensors"))
    with pytest.raises(BadValue, match=r"is an adapter; put it on its base with peft"):
        load(tmp_path / "out")


@pytest.mark.parametrize("family", ["olmoe", "switch_transformers"])
@pytest.mark.parametrize("case", ["personal", "cut lora", "one expert", "stacked", "own", "own b"])
def test_a_client_s_personal_weights_are_exported_with_its_model(ended, family, case, tmp_path):
    run = ended(family, case)
    export(run.folder, tmp_path / "c02", "c02")
    assert torch.equal(logits(load(tmp_path / "c02"), family), run.logits["c02"])
    card_text = (tmp_path / "c02" / "README.md").read_text()
    assert ("**Personal.**" in card_text) == (case in ("personal", "own", "own b"))


def test_an_adapter_of_one_expert_is_one_of_all_with_zeros(ended, tmp_path):
    run = ended("olmoe", "one expert")
    export(run.folder, tmp_path / "out", "c01", adapter=True)
    adapted = peft.PeftModel.from_pretrained(by_transformers(run.base, "olmoe"), tmp_path / "out")
    assert (logits(adapted, "olmoe") - run.logits["c01"]).abs().max() <= 1e-5


def test_what_flora_added_to_the_base_is_in_the_global_model(ended, tmp_path):
    run = ended("olmoe", "stacked")
    export(run.folder, tmp_path / "out")
    plain = by_transformers(tmp_path / "out", "olmoe")
    assert (logits(plain, "olmoe") - run.logits["c01"]).abs().max() <= 1e-5
    with pytest.raises(BadValue, match="has in its weights what former rounds added"):
        export(run.folder, tmp_path / "adapter", adapter=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_with_fewer_experts_adapters_and_personal_experts_comes_back_to_the_bit(family, tmp_path):
    base = tiny_model(family)
    switch = (
        family == "switch_transformers"
    )  # its experts are not grafted with an adapter on them, and one is all that a layer keeps
    tuning = Tuning(**LORA, parts=("attention", "router") if switch else None)
    model = prepare(shrink(base, tiny_experts(base)), tuning, seed="0")
    graft.attach(model, dict.fromkeys(anatomy(model).blocks, (0,) if switch else (1, 0)), tuning, "0")
    chance = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=chance) / 4)
    exported = Exported(model.eval(), Base(base, tiny_tokenizer(), family == "switch_transformers", family, ""))
    assert {key for key, each in exported.changes.items() if each} >= {"cut", "grafted", "linears"}
    write_changed(exported, tmp_path / "out")
    expected = logits(model, family)
    again = load(tmp_path / "out")
    assert torch.equal(logits(again, family), expected)
    assert not torch.equal(logits(shrink(base, tiny_experts(base)), family), expected)

    again.save_pretrained(tmp_path / "saved again")
    assert torch.equal(logits(by_transformers(tmp_path / "saved again", family, trust_remote_code=True), family), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_with_fewer_experts_alike_comes_back_to_the_bit_as_a_plain_model(family, tmp_path):
    whole = tiny_model(family, **({"n_group": 1} if "deepseek" in family else {}))
    some = {name: tuple(range(1, 1 + shape.fewest + 2)) for name, shape in anatomy(whole).blocks.items()}
    exported = Exported(shrink(whole, some), Base(whole, tiny_tokenizer(), False, "tiny", ""))
    expected = logits(exported.model, family)
    assert is_plain(exported)
    as_plain(exported)
    exported.model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path), family), expected)


def test_layers_of_different_sizes_need_code(tmp_path):
    whole = tiny_model("olmoe")
    exported = Exported(shrink(whole, tiny_experts(whole)), Base(whole, tiny_tokenizer(), False, "tiny", ""))
    assert not is_plain(exported)


def test_without_trust_transformers_refuses_a_client_s_folder_and_does_not_load_a_part_of_it(ended, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "n")
    export(ended("olmoe", "grafted").folder, tmp_path / "out", "c01")
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_modeling_file_needs_only_torch_and_transformers(ended, tmp_path):
    source = ast.parse(Path(modeling_fedexperts.__file__).read_text())
    names = [alias.name for node in ast.walk(source) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in ast.walk(source) if isinstance(node, ast.ImportFrom)]
    heads = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert heads == {"torch", "transformers"}

    run = ended("olmoe", "grafted")
    export(run.folder, tmp_path / "out", "c01")
    save_file(dict(tiny_batch("olmoe")), tmp_path / "batch.safetensors")
    script = (
        "import sys; sys.modules.update(fedexperts=None, peft=None)\n"
        "import torch; torch.set_num_threads(1)\n"
        "from safetensors.torch import load_file, save_file\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained('out', trust_remote_code=True).eval()\n"
        "with torch.no_grad():\n"
        "    save_file({'logits': model(**load_file('batch.safetensors')).logits}, 'logits.safetensors')\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], run.logits["c01"])


def test_the_card_says_what_is_personal_and_where_the_model_comes_from(ended, tmp_path):
    run = ended("olmoe", "grafted")
    export(run.folder, tmp_path / "client", "c01")
    card_text = (tmp_path / "client" / "README.md").read_text()
    assert "> **Personal.** This folder holds what client c01 kept to itself" in card_text
    assert "personal experts and their gates" in card_text
    assert "flex (num_grafted = 2" in card_text
    assert "synthetic/double, synthetic/first" in card_text
    assert "trust_remote_code=True" in card_text
    assert transformers.__version__ in card_text
    assert str(run.base.parent) not in card_text, "no path of this machine"
    scored = [line for line in map(json.loads, (run.folder / "evals.jsonl").read_text().splitlines()) if line["round"] == 1]
    (own,) = [line for line in scored if line["client"] == "c01" and line["task"]]
    assert f"| {own['task']} | {own['examples']} | {own['metric']} | {own['value']:.4f} |" in card_text

    export(run.folder, tmp_path / "global")
    card_text = (tmp_path / "global" / "README.md").read_text()
    assert "**Personal.**" not in card_text
    assert "What 2 of the clients keep on their side was not read for it." in card_text
    assert "trust_remote_code" not in card_text


def test_the_card_names_the_license_that_the_base_s_card_names(tmp_path):
    (tmp_path / "README.md").write_text("---\nlanguage: en\nlicense: cc-by-4.0\n---\n# A base\nlicense: mit\n")
    assert card.license_of(str(tmp_path)) == "cc-by-4.0"
    (tmp_path / "README.md").write_text("# A base\nlicense: mit\n")
    assert card.license_of(str(tmp_path)) is None
    assert card.license_of("tiny") == "apache-2.0"


def test_generate_uses_the_prompt_form_of_the_run(ended, tmp_path):
    run = ended("olmoe", "grafted")
    export(run.folder, tmp_path / "c01", "c01")
    task = json.loads((tmp_path / "c01" / "fedexperts.json").read_text())["task"]
    whole = f"{task.capitalize()}: abc=>"
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path / "c01", trust_remote_code=True), load(tmp_path / "c01")
    encoder = Encoder(tokenizer, 24)
    prompts = encoder.prompts([Example(whole, "", task)])
    with torch.no_grad():
        ids = model.generate(**prompts, max_new_tokens=5, do_sample=False)
    expected = encoder.decode(ids[:, prompts["input_ids"].shape[1] :])[0]
    assert generate(tmp_path / "c01", "abc", tokens=5) == generate(tmp_path / "c01", whole, tokens=5) == expected
    other = {"double": "first", "first": "double"}[task]
    form = prompt_form(json.loads((tmp_path / "c01" / "fedexperts.json").read_text())["prompts"], other)
    assert encoder.decode(encoded(encoder, form, "abc")["input_ids"]) == [f"{other.capitalize()}: abc=>"]


def test_a_model_of_several_tasks_needs_the_task(ended, tmp_path):
    export(ended("olmoe", "full").folder, tmp_path / "out")
    with pytest.raises(BadValue, match=r"was trained on .*, whose prompts have different forms; choose one with --task"):
        generate(tmp_path / "out", "abc", tokens=1)
    with pytest.raises(BadValue, match=r"task 'doubble' is not one of .*; did you mean double\?"):
        generate(tmp_path / "out", "abc", tokens=1, task="doubble")
    assert isinstance(generate(tmp_path / "out", "abc", tokens=1, task="double"), str)


def test_generate_works_on_an_encoder_decoder_and_on_any_folder_of_transformers(ended, bases, tmp_path):
    export(ended("switch_transformers", "cut").folder, tmp_path / "out", "c01")
    assert isinstance(generate(tmp_path / "out", "abc", tokens=2), str)
    assert isinstance(generate(bases("mixtral"), "abc", tokens=2), str)


def test_a_model_of_texts_without_prompts_continues_the_prompt():
    encoder = Encoder(tiny_tokenizer(), 16)
    (start,) = encoder.prompts([Example("", "", "")])["input_ids"].tolist()
    ids = encoded(encoder, {"frame": None, "choices": []}, "w5 w6")
    assert ids["input_ids"].tolist() == [[*start, 5, 6]]
    assert ids["attention_mask"].shape == ids["input_ids"].shape


def refused(error, said, *arguments, **options):
    with pytest.raises(error) as caught:
        export(*arguments, **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mistakes_are_reported_in_one_sentence_and_nothing_is_written(ended, tmp_path):
    full, flex = ended("olmoe", "full").folder, ended("olmoe", "grafted").folder
    to = tmp_path / "out"
    refused(BadRun, "is no results folder of a run; give one", tmp_path / "none", to)
    refused(BadRun, "it holds 1 runs: give one of them, such as", full.parent, to)
    refused(BadValue, "has no client 'c1', only c01, c02; did you mean c0", full, to, "c1")
    refused(BadValue, 'it trained whole weights (training.train = "full"); leave out --adapter', full, to, adapter=True)
    refused(BadValue, 'it trained whole weights (training.train = "full"); leave out --merge', full, to, "c01", merge=True)
    refused(BadValue, "the global one has its adapters merged anyway; leave it out", flex, to, merge=True)
    refused(BadValue, "and --adapter writes them alone; leave one out", flex, to, "c01", adapter=True, merge=True)
    refused(BadValue, "has personal experts beside the base's", flex, to, "c01", adapter=True)
    refused(BadValue, "has fewer experts than the base", ended("olmoe", "cut lora").folder, to, "c01", adapter=True)
    refused(BadRun, "nothing has been merged into it (local)", ended("olmoe", "own").folder, to)
    with locked(full):
        refused(Busy, "another process is running in", full, to)
    assert list(tmp_path.iterdir()) == []


def test_a_client_of_a_run_over_several_machines_is_exported_only_with_its_client_state(ended, tmp_path):
    run = shutil.copytree(ended("olmoe", "grafted").folder, tmp_path / "run")
    (tmp_path / "run.flower").mkdir()
    refused(
        BadRun,
        "what c01 keeps to itself lies on its own; copy the folder there and give --kept, or take the global model",
        run,
        tmp_path / "out",
        "c01",
    )
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_checkpoint_or_with_another_base_is_refused(ended, tmp_path):
    run = ended("olmoe", "full").folder
    without_hashes(shutil.copytree(run, tmp_path / "run"))
    versions = json.loads((run / "versions.json").read_text())
    (tmp_path / "run" / "versions.json").write_text(json.dumps({**versions, "model_hash": "another", "data_hashes": {}}))
    refused(BadRun, "was made with other files: the model's weights changed since", tmp_path / "run", tmp_path / "out")
    refused(BadRun, "and the data changed since", tmp_path / "run", tmp_path / "out", "c01")
    (tmp_path / "run" / "versions.json").write_text(json.dumps({**versions, "config_hash": "another"}))
    for client in (None, "c01"):
        refused(BadRun, "the model's configuration or tokenizer changed since", tmp_path / "run", tmp_path / "out", client)
    shutil.rmtree(tmp_path / "run" / "checkpoint")
    refused(
        BadRun,
        "has no checkpoint yet: it stopped before its first round was done; continue it",
        tmp_path / "run",
        tmp_path / "out",
    )
    assert not (tmp_path / "out").exists()


def test_without_its_client_state_a_client_is_not_exported_and_its_run_is_not_resumed(ended, tmp_path):
    run = without_hashes(shutil.copytree(ended("olmoe", "grafted").folder, tmp_path / "run"))
    shutil.rmtree(run / "clients" / "c01")
    refused(BadRun, "what c01 keeps to itself is gone: there is no ", run, tmp_path / "out", "c01")
    export(run, tmp_path / "c02", "c02")
    resolved = json.loads((run / "resolved.json").read_text())
    resolved["federation"]["rounds"] = 2
    (run / "resolved.json").write_text(json.dumps(resolved))
    with pytest.raises(BadRun, match="what c01 keeps to itself is gone"):
        runner.run(RunConfig.model_validate(resolved), run, resume=True)
    assert len((run / "rounds.jsonl").read_text().splitlines()) == 1


def test_a_stopped_run_gives_its_last_checkpoint_and_says_so(ended, tmp_path):
    run = ended("olmoe", "full")
    without_hashes(shutil.copytree(run.folder, tmp_path / "run"))
    resolved = json.loads((run.folder / "resolved.json").read_text())
    resolved["federation"]["rounds"] = 7
    (tmp_path / "run" / "resolved.json").write_text(json.dumps(resolved))
    logs = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.jsonl")}
    export(tmp_path / "run", tmp_path / "out")
    export(tmp_path / "run", tmp_path / "c01", "c01")
    assert "after round 1 of 7" in (tmp_path / "out" / "README.md").read_text()
    assert torch.equal(logits(load(tmp_path / "c01"), "olmoe"), run.logits["c01"])
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.jsonl")} == logs, "a run is only read"


def test_a_folder_is_written_whole_or_not_at_all_and_never_over_another(ended, tmp_path):
    run = ended("olmoe", "full").folder
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    refused(BadValue, "exists and is not empty", run, tmp_path / "full")
    (tmp_path / "empty").mkdir()
    export(run, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").exists()
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "never") as made:
        (made / "half").write_text("half")
        raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]


def test_loaded_weights_are_aligned_in_memory(bases, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(bases("olmoe"), folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for blanks in (0, 8, 24, 56):
        save_file(tensors, file, metadata={"format": "pt", "note": "x" * blanks})
        assert {parameter.data_ptr() % 64 for parameter in load_base(str(folder)).model.parameters()} == {0}
        align_tensors(file)
        assert (8 + int.from_bytes(file.read_bytes()[:8], "little")) % 64 == 0
        again = load_file(file)
        assert again.keys() == tensors.keys() and all(torch.equal(again[name], each) for name, each in tensors.items())
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in bases("olmoe").iterdir())


def test_a_model_that_cannot_be_loaded_is_reported_in_one_sentence(ended, tmp_path):
    with pytest.raises(BadValue, match="holds no model; give a folder that fedexperts export wrote"):
        load(tmp_path)
    export(ended("olmoe", "cut").folder, tmp_path / "out", "c01")
    weights = tmp_path / "out" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BadValue, match="cannot be loaded"):
        load(tmp_path / "out")
    config_json = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(
        json.dumps({**config_json, "fedexperts": {**config_json["fedexperts"], "format": 99}})
    )
    with pytest.raises(BadValue, match="written by a newer fedexperts"):
        load(tmp_path / "out")


def test_the_commands_export_a_folder_and_generate_from_it(ended, tmp_path, fedexperts):
    run = ended("olmoe", "cut").folder
    code, out, _ = fedexperts("export", run, "--client", "c01", "--to", tmp_path / "c01")
    assert (code, out.strip()) == (
        0,
        f"written: {tmp_path / 'c01'} (for transformers, with trust_remote_code=True; its README.md shows how to load it)",
    )
    code, out, _ = fedexperts("generate", tmp_path / "c01", "abc", "--tokens", "3")
    assert (code, out) == (0, generate(tmp_path / "c01", "abc", tokens=3) + "\n")
    code, _, said = fedexperts("export", run, "--client", "c01", "--to", tmp_path / "c01")
    assert (code, said.count("\n")) == (2, 1)
    assert said.startswith(f"fedexperts: {tmp_path / 'c01'} exists and is not empty")


def test_a_run_from_python_takes_a_file_or_its_content(bases, tmp_path):
    tree = {
        "model": {"name": str(bases("olmoe"))},
        "method": {"name": "fedavg"},
        "training": {"batch_size": 2, "local_steps": 1},
        "federation": {"rounds": 1},
        "evaluation": {"generate_tokens": 1},
        "data": {"sources": ["synthetic/double"], "clients": 2, "limit": 12, "test_examples": 2, "max_tokens": 24},
    }
    (tmp_path / "mine.toml").write_text(tomli_w.dumps(tree))
    out = fedexperts.run(tmp_path / "mine.toml", tmp_path / "out", set=["seed=3"])
    assert json.loads((out / "resolved.json").read_text())["seed"] == 3
    assert fedexperts.run({**tree, "seed": 3}, out, resume=True) == out
    compared = fedexperts.compare({"mine": tree}, ["local", "fedavg:training.lr=1e-4"], out=tmp_path / "compared")
    assert [str(path.relative_to(tmp_path / "compared")) for path in compared.folders] == [
        "local/seed-0",
        "fedavg,training.lr=1e-4/seed-0",
    ]
    assert not compared.failed
    with pytest.raises(BadValue, match=r"training\.learning_rate is not a setting; did you mean training\.lr\?"):
        fedexperts.run({**tree, "training": {"learning_rate": 1}}, tmp_path / "other")


def test_the_public_names_are_there_and_importing_the_package_imports_nothing_heavy():
    assert {"run", "compare", "load", "Method", "METHODS", "partition"} <= set(dir(fedexperts))
    assert all(getattr(fedexperts, name) is not None for name in fedexperts.__all__)
    assert fedexperts.partition.iid(4, 2, "0")
    with pytest.raises(AttributeError, match="no attribute 'runn'"):
        _ = fedexperts.runn
    script = "import fedexperts, fedexperts.cli, sys; sys.exit(any(each in sys.modules for each in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize("case", ["grafted", "personal", "own b"])
def test_a_folder_without_what_its_clients_kept_gives_no_clients_model(ended, tmp_path, case):
    copied = tmp_path / "copied"
    without_hashes(shutil.copytree(ended("olmoe", case).folder, copied))
    shutil.rmtree(copied / "clients")
    with pytest.raises(BadRun, match="c01"):
        export(copied, tmp_path / "model", client="c01")
    for path in copied.glob("checkpoint/*/state.json"):  # as a server writes it that has nothing of its clients
        path.write_text(json.dumps({**json.loads(path.read_text()), "kept": {}}))
    with pytest.raises(BadRun, match="lacks what c01 kept to itself"):
        export(copied, tmp_path / "model", client="c01")
    assert not (tmp_path / "model").exists()


def test_adapters_whose_b_the_server_never_got_are_not_exported_as_its_own(ended, tmp_path):
    folder = ended("olmoe", "own b, shared routers").folder
    with pytest.raises(BadValue, match="keep the B of their adapters to themselves"):
        export(folder, tmp_path / "model", adapter=True)
    assert export(folder, tmp_path / "model", client="c01", adapter=True).adapter
