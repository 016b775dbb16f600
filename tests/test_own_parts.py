"""A method from outside with a model of its own: what is trained is what is scored, exported and asked, bit for bit."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import fedexperts
from fedexperts import methods
from fedexperts.config import RunConfig
from fedexperts.core import evaluation
from fedexperts.errors import BadValue, Undeclared
from fedexperts.experiment import runner
from fedexperts.experiment.client_task import ClientTask
from fedexperts.export import export
from fedexperts.export.generate import generate
from fedexperts.federation import jobs_for
from fedexperts.io.toml import checked, to_toml
from fedexperts.methods import personal
from fedexperts.methods.contract import Declaration, Extension
from fedexperts.moe.anatomy import blocks
from fedexperts.testing import tiny_batch, tiny_context, tiny_model, tiny_server
from fedexperts.types import Client, Training

SOURCE = (Path(__file__).parents[1] / "examples" / "flame.py").read_text()
CLIENTS = ("c01", "c02", "c03", "c04")


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The example as an installed package, so that every process knows its method."""
    folder, there = tmp_path_factory.mktemp("package"), dict(methods.METHODS)
    (folder / "someones_flame.py").write_text(SOURCE)
    about = folder / "someones_flame-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: someones-flame\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[fedexperts.methods]\nflame = someones_flame:Flame\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        methods.enter_installed.cache_clear()
        methods.enter_installed()
        yield folder
    sys.modules.pop("someones_flame", None)
    methods.METHODS.clear()
    methods.METHODS.update(there)
    methods.enter_installed.cache_clear()


@pytest.fixture(scope="module")
def tree(tiny_tree):
    training = {**tiny_tree["training"], "train": "lora", "rank": 8, "lr": 0.01}
    return {**tiny_tree, "method": {"name": "flame"}, "training": training, "federation": {"rounds": 2}}


def logits(model):
    with torch.no_grad():
        return model.eval()(**tiny_batch("olmoe")).logits


def ran(tree, folder, **evaluation_settings):
    """The run's folder; of each client the logits after its last training, when it was last scored, and that very model."""
    trained, scored, models = [], {}, {}
    fit, scores = personal.fit, ClientTask.scores

    def fitted(model, context, **options):
        found = fit(model, context, **options)
        trained.append((context.client.name, logits(model)))
        return found

    def watched(self, model, examples, context):
        scored[context.client.name], models[context.client.name] = logits(model), model
        return scores(self, model, examples, context)

    tree = {**tree, "evaluation": {**tree["evaluation"], **evaluation_settings}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(personal, "fit", fitted)
        patch.setattr(ClientTask, "scores", watched)
        runner.run(checked(RunConfig, tree), folder)
    return folder, dict(trained), scored, models


@pytest.fixture(scope="module")
def after(package, tree, tmp_path_factory):
    return ran(tree, tmp_path_factory.mktemp("after") / "run")


def test_the_model_that_is_scored_before_aggregation_is_the_one_that_was_trained(package, tree, tmp_path):
    _, trained, scored, models = ran(tree, tmp_path / "run", score="before_aggregation", every=1)
    assert trained.keys() == scored.keys() == set(CLIENTS)
    assert all(torch.equal(trained[client], scored[client]) for client in CLIENTS)
    top_k = {client: {block.shape.top_k for block in blocks(model).values()} for client, model in models.items()}
    assert top_k == {"c01": {2}, "c02": {1}, "c03": {2}, "c04": {1}}
    scales = {client: [block.module.scale.item() for block in blocks(model).values()] for client, model in models.items()}
    assert len({tuple(each) for each in scales.values()}) == 4 and all(1.0 not in each for each in scales.values())


@pytest.mark.parametrize("client", CLIENTS[:2])
def test_the_model_that_is_taken_home_is_the_one_that_was_scored_and_answers_as_it_did(after, tmp_path, client):
    folder, _, scored, models = after
    kind = export(folder, tmp_path / client, client=client)
    assert kind.needs_code
    with pytest.raises(BadValue, match=r"needs code of its run's method \(rescale\).*--trust-remote-code"):
        fedexperts.load(tmp_path / client)
    ours = fedexperts.load(tmp_path / client, trust_remote_code=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / client, trust_remote_code=True)
    assert torch.equal(logits(ours), scored[client]) and torch.equal(logits(theirs), scored[client])

    answers = []

    def answer(model, prompts, encoder, tokens):
        answers.append((original(model, prompts, encoder, tokens), original(models[client], prompts, encoder, tokens)))
        return answers[-1][0]

    original = evaluation.answer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedexperts.export.generate.answer", answer)
        generate(tmp_path / client, "double: abc", tokens=8, trust_remote_code=True)
    ((taken_home, in_the_run),) = answers
    assert taken_home == in_the_run


def test_a_change_of_structure_that_the_method_does_not_describe_is_not_exported_as_another_model(after, tmp_path):
    folder, *_ = after
    method = methods.METHODS["flame"]
    rescale = sys.modules["someones_flame"].rescale

    def silent(self, job, context):
        model = super(method, self).build_model(job, context)
        for block in blocks(model).values():
            rescale(model, [], 1)
            block.router.top_k = 1
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(method, "extension", lambda self, job: None)
        patch.setattr(method, "build_model", silent)
        saved = next((folder / "clients" / "c01").glob("*.safetensors"))
        state = {name: tensor for name, tensor in load_file(saved).items() if not name.endswith(".scale")}
        patch.setattr("fedexperts.engines.client_store.undamaged", lambda path: state)
        with pytest.raises(BadValue, match="the exported folder would not compute what the trained model computes"):
            export(folder, tmp_path / "c01", client="c01")
    assert not (tmp_path / "c01").exists()


def test_a_folder_that_cannot_hold_a_part_of_the_method_is_refused(after, tmp_path):
    folder, *_ = after
    flame, rescale = methods.METHODS["flame"], sys.modules["someones_flame"].rescale
    with pytest.raises(BadValue, match=r"flame adds .*\.scale to the model, which an adapter cannot hold.*--client c02"):
        export(folder, tmp_path / "out", client="c02", adapter=True)

    def with_scales(self, base, tuning, server, seed):
        model = super(flame, self).global_model(base, tuning, server, seed)
        rescale(model, list(blocks(model)), 1)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flame, "global_model", with_scales)
        patch.setattr("fedexperts.export.models.has_changed", lambda start, weights: True)
        for adapter in (False, True):
            with pytest.raises(
                BadValue, match=r"flame adds .*\.scale to the model, which a folder of the global model or an adapter"
            ):
                export(folder, tmp_path / "out", adapter=adapter)
    assert not (tmp_path / "out").exists()


def needs_its_module(model):
    torch.manual_seed(0)


class TrainsALostWeight(fedexperts.Method):
    def extension(self, job):
        return Extension(adds_a_weight)


def adds_a_weight(model):
    import torch

    model.added = torch.nn.Parameter(torch.ones(1))


def test_an_extension_that_an_export_cannot_carry_is_refused_when_it_is_made():
    with pytest.raises(BadValue, match="needs_its_module uses torch from outside of itself"):
        Extension(needs_its_module)
    with pytest.raises(BadValue, match="which has no source to copy"):
        Extension(torch.nn.Linear)
    with pytest.raises(BadValue, match="the extension's settings cannot be written as JSON"):
        Extension(adds_a_weight, {"top_k": torch.tensor(1)})
    with pytest.raises(BadValue, match=r"job_extra = 'top_k' of a Declaration is a string; give a tuple: \('top_k',\)"):
        Declaration(job_extra="top_k")


def test_an_added_weight_that_is_neither_sent_nor_kept_is_refused():
    training = Training(local_steps=1)
    model, clients = tiny_model("olmoe"), [Client("a", examples=8)]
    server = replace(tiny_server(model, clients, training), round=1, task="train")
    (job,) = jobs_for(server, TrainsALostWeight(), clients)
    with pytest.raises(
        Undeclared, match=r"TrainsALostWeight\.extension adds the trained weight added, which is neither in the job"
    ):
        TrainsALostWeight().train(job, tiny_context(model, clients[0], training))


def test_over_flowers_simulation_it_gives_the_same_bits(after, package, tree, tmp_path):
    folder, *_ = after
    (tmp_path / "run.toml").write_text(to_toml({**tree, "federation": {**tree["federation"], "engine": "flower"}}))
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "fedexperts",
        "run",
        tmp_path / "run.toml",
        "--out",
        tmp_path / "out",
        "--quiet",
    ]
    path = os.pathsep.join(
        [str(package), *filter(None, [os.environ.get("PYTHONPATH")]), str(Path(fedexperts.__file__).parents[1])]
    )
    done = subprocess.run(
        [*command, "--quiet"], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert tensors(tmp_path / "out") == tensors(folder)
    assert scores(tmp_path / "out") == scores(folder) and len(scores(folder)) > 8


def tensors(folder):
    """Bits of the server's weights and of what each client kept last."""
    files = [next(folder.glob("checkpoint/*/weights.safetensors"))]
    files += [max((folder / "clients" / client).glob("*.safetensors")) for client in CLIENTS]
    return [{name: tensor.numpy().tobytes() for name, tensor in load_file(file).items()} for file in files]


def scores(folder):
    return [json.loads(line) for line in (folder / "evals.jsonl").read_text().splitlines()]
