"""Every test runs on one thread, and calls of the modules of fedexperts.moe that say shapes have them checked."""

import gc
import sys
from contextlib import contextmanager
from pathlib import Path

import peft  # noqa: F401  # what is imported under the hook is compiled anew in each process
import pytest
import torch
import transformers
from jaxtyping import install_import_hook
from torch.overrides import TorchFunctionMode

MOE = Path(__file__).parents[1] / "fedexperts" / "moe"
checked = [f"fedexperts.moe.{path.stem}" for path in MOE.glob("*.py") if "from jaxtyping" in path.read_text()]
install_import_hook(checked, "beartype.beartype")  # before anything imports the library

from fedexperts import cli, testing  # noqa: E402
from fedexperts.experiment import setup  # noqa: E402
from fedexperts.methods import METHODS  # noqa: E402
from fedexperts.models.tokenizer import make_tokenizer  # noqa: E402
from fedexperts.moe.anatomy import blocks  # noqa: E402
from fedexperts.testing import tiny_model  # noqa: E402

LONGEST = (
    *("test_deployment.py", "test_resume.py", "test_export.py", "test_engines_agree.py", "test_every_method.py"),
    *(
        "test_sweep.py",
        "test_tampering.py",
        "test_chaos.py",
        "test_examples.py",
        "test_browser.py",
        "test_footprint.py",
        "test_cli.py",
    ),
)

torch.set_num_threads(1)
transformers.logging.disable_progress_bar()


def pytest_collection_finish():
    """What libraries and tests have made while they were imported stays; to look through it for garbage takes half a second."""
    gc.freeze()


def pytest_collection_modifyitems(items):
    """The files that take longest first, in that order: else one worker is at one of them when the other is done."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="session", autouse=True)
def footprints_once():
    """Counts the memory of models of the same shapes once for all runs of a process; tests of the count call it themselves."""
    known, count = {}, setup.footprint

    def once(model, *arguments, **options):
        shapes = [(name, type(each), tuple(each.shape), each.dtype, each.device) for name, each in named_tensors(model)]
        key = repr((type(model), model.config.to_dict(), shapes, arguments, options))
        return setup.cached(known, 200, key, lambda: count(model, *arguments, **options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "footprint", once)
        patch.setattr(testing, "footprint", once)
        yield


@pytest.fixture
def fedexperts(monkeypatch, capsys):
    """Calls the command; gives its exit code, and what it wrote to stdout and stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["fedexperts", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        written = capsys.readouterr()
        return code, written.out, written.err

    return call


class MinusInfinity(TorchFunctionMode):
    """Sets the logits and the bias of experts that are not kept to −inf, inside the routers of a whole model."""

    def __init__(self, model, experts):
        super().__init__()
        self.calls = []
        self.dropped, self.biases = {}, []
        for name, block in blocks(model).items():
            if name in experts:
                dropped = torch.ones(block.shape.num_experts, dtype=torch.bool)
                dropped[list(experts[name])] = False
                weight = block.router.classifier.weight if block.is_switch else block.router.weight
                self.dropped[weight.data_ptr()] = dropped
                self.biases += [(t, dropped) for n, t in named_tensors(block.router) if n.endswith("e_score_correction_bias")]

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if function is torch.nn.functional.linear and args[1].data_ptr() in self.dropped:
            self.calls.append(function)
            return output.masked_fill(self.dropped[args[1].data_ptr()], float("-inf"))
        return output


def named_tensors(module):
    return [*module.named_parameters(), *module.named_buffers()]


@pytest.fixture
def masked():
    """A context in which a whole model routes among some experts only: what a shrunk model must equal."""

    @contextmanager
    def masking(model, experts):
        mode = MinusInfinity(model, experts)
        before = [bias.detach().clone() for bias, _ in mode.biases]
        for bias, dropped in mode.biases:
            bias.detach()[..., dropped] = float("-inf")
        with mode:
            yield mode.calls
        for (bias, _), old in zip(mode.biases, before, strict=True):
            bias.detach().copy_(old)

    return masking


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A model folder with three MoE layers of eight experts and a tokenizer that reads the generated tasks: what a run takes."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer(max_tokens=48)
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    tiny_model("olmoe", vocab_size=len(tokenizer), **ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_tree(tiny_folder):
    """The run file, as a tree, of the smallest run: four clients, three rounds of two, two steps each."""
    return {
        "model": {"name": str(tiny_folder)},
        "method": {"name": "fedavg"},
        "training": {"batch_size": 2, "local_steps": 2, "validation_examples": 2},
        "federation": {"rounds": 3, "clients_per_round": 2},
        "evaluation": {"every": 2, "generate_tokens": 2},
        "data": {
            "sources": ["synthetic/double", "synthetic/first"],
            "clients": 4,
            "limit": 12,
            "test_examples": 2,
            "max_tokens": 24,
        },
    }


@pytest.fixture(scope="session")
def method_trees(tiny_tree):
    """For each method the run file of such a run, with devices on which methods that cut the model have to."""
    adapters = ("fedit", "ffa_lora", "fedsa_lora", "flora", "flexlora", "hetlora", "random_expert", "flex")
    training = {name: {"train": "lora", "rank": 8, "dropout": 0.1} for name in adapters}
    training["flex"]["parts"] = ["attention"]
    devices = {"memory_share": {"uniform": [1.0, 1.4]}, "profile": {"mix": {"phone": 1, "laptop_gpu": 1}}}
    return {
        name: {
            **tiny_tree,
            "method": {"name": name},
            "training": {**tiny_tree["training"], **training.get(name, {})},
            "devices": devices,
        }
        for name in METHODS
    }
