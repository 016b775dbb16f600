"""Imports go one way, and heavy packages stay where they belong: read from the source."""

import ast
import traceback
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch

from fedexperts.io.toml import to_toml
from fedexperts.methods import FORMER_NAMES, METHODS

PACKAGE = Path(__file__).parents[1] / "fedexperts"
LAYERS = (
    ("errors", "io"),
    ("moe",),
    ("types",),
    ("core",),
    ("methods",),
    ("engines",),
    ("federation",),
    ("config", "data", "models", "report", "testing"),
    ("experiment",),
    ("export",),
    ("deploy",),
    ("cli", "api"),
    ("__main__", "__init__"),
)
"""Each imports from those above it here, and from its own line as far as there is no circle."""

RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))


def module(path):
    """`fedexperts.moe.rows` of its file; a package is its `__init__`."""
    return ".".join(["fedexperts", *path.relative_to(PACKAGE).with_suffix("").parts])


MODULES = {module(path): path for path in FILES}


def imported(path):
    """Full names of all that `path` imports, wherever in it; `from a import b` is a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(path):
    """The modules of the package that `path` imports."""
    for name in imported(path):
        if name.startswith("fedexperts."):
            candidates = (name, f"{name}.__init__", name.rpartition(".")[0], f"{name.rpartition('.')[0]}.__init__")
            yield next(candidate for candidate in candidates if candidate in MODULES)


def part(name):
    """`moe` of `fedexperts.moe.rows`."""
    return name.split(".")[1]


def importers(package):
    return {module(path) for path in FILES for name in imported(path) if name.split(".")[0] == package}


def test_every_part_of_the_package_has_its_layer():
    parts = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert parts == set(RANK)
    assert len(FILES) >= 45


def test_no_part_imports_from_a_layer_above_its_own():
    edges = [(name, used) for name, path in MODULES.items() for used in ours(path)]
    assert len(edges) > 100
    assert [f"{name} imports {used}" for name, used in edges if RANK[part(used)] > RANK[part(name)]] == []


def test_no_two_modules_import_each_other_in_a_circle():
    graph = {name: {used for used in ours(path) if used != name} for name, path in MODULES.items()}
    order = list(TopologicalSorter(graph).static_order())
    assert sorted(order) == sorted(MODULES)


def test_only_the_lora_imports_peft_only_the_flower_engine_flwr_and_of_that_only_the_simulation_ray():
    assert importers("peft") == {"fedexperts.moe.lora"}
    assert all(name.startswith(("fedexperts.engines.flower.", "fedexperts.deploy.")) for name in importers("flwr"))
    assert importers("ray") == {"fedexperts.engines.flower.simulation"}


def test_only_the_models_import_bitsandbytes():
    assert importers("bitsandbytes") == {"fedexperts.models.nf4"}


@pytest.mark.parametrize("unsafe", ["pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"])
def test_nothing_is_pickled(unsafe):
    assert importers(unsafe) == set()


def test_nothing_is_read_with_torch_load():
    calls = [
        f"{path.name}:{node.lineno}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("load", "save") and ast.unparse(node.value) == "torch"
    ]
    assert calls == []


def test_annotations_are_not_postponed():
    assert importers("__future__") == set()


def test_nothing_draws_from_a_global_generator():
    """`random.random()`, `np.random.rand()` and `torch.manual_seed()`; the engine alone seeds torch's, job by job."""
    seeding = {
        (module(path), ast.unparse(node.func))
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).startswith(("random.", "np.random.", "numpy.random.", "torch.manual_seed"))
    }
    allowed = {
        ("fedexperts.engines.local", "torch.manual_seed"),  # for dropout and PhiMoE's router, and puts it back
        ("fedexperts.testing", "torch.manual_seed"),  # a fresh model's weights, and puts it back
        ("fedexperts.models.pretrain", "torch.manual_seed"),  # likewise
        ("fedexperts.models.continued.training", "torch.manual_seed"),  # for dropout and routers' jitter, and puts it back
    }
    fresh = {entry for entry in seeding if not entry[1].endswith((".default_rng", ".SeedSequence", ".PCG64", ".Generator"))}
    assert fresh <= allowed


METHODS_ROLES = {
    ("config", "fedmoe"),  # the method of a run file that names none
    ("config", "local"),  # an engine
    ("deploy.commands", "profile"),  # of a device
    ("deploy.status", "score"),  # of an evaluation
    ("experiment.plan_tables", "budget"),  # a key of plan.json
    ("experiment.plan", "budget"),
    ("experiment.plan_tables", "sent"),  # headings of tables
    ("report.axes", "sent"),
    ("report.run_cost_tables", "sent"),
    ("report.run_figures", "stack"),  # plotly's way to draw bars
    ("report.scores", "score"),  # a setting of evaluations
    ("core.predictions", "score"),  # of a single answer
    ("report.frames", "score"),
    ("report.facts", "rank"),  # of LoRA
    ("export.models", "rank"),
    ("export.models", "grafted"),  # a key of an exported model's config
    ("export.__init__", "grafted"),
    ("export.modeling_fedexperts", "grafted"),
    ("moe.graft", "grafted"),  # what a block calls its personal experts
    ("models.continued.command", "control"),  # the dense model that is trained beside
    ("models.continued.measure", "control"),
    ("models.continued.report", "control"),
    ("models.continued.training", "control"),
    ("data.synthetic", "count"),  # a generated task
}
"""(module, word): words of methods that mean something else there. `seed` does everywhere."""


def invented():
    """The names of all methods, and every key that one declares."""
    words = {*METHODS, *FORMER_NAMES}
    for method in METHODS.values():
        declared = method().declare()
        words |= {*declared.setup_tasks, *declared.extra, *declared.metrics, *declared.job_extra, *declared.client_state}
    return {word.removesuffix("/") for word in words} - {"seed"}


def strings(path):
    """All string literals of a file but docstrings."""
    tree = ast.parse(path.read_text())
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    literals = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return {node.value for node in literals if id(node) not in docstrings}


def test_no_module_outside_methods_knows_a_methods_name_or_a_key_that_a_method_invented():
    words = invented()
    assert len(words) > 40
    outside = [path for path in FILES if PACKAGE / "methods" not in path.parents]
    knows = {
        (module(path), word.removesuffix("/")) for path in outside for word in strings(path) if word.removesuffix("/") in words
    }
    assert {(name.removeprefix("fedexperts."), word) for name, word in knows} <= METHODS_ROLES


def test_files_and_functions_stay_within_the_size_limits():
    """Few modules at the top, no file above 450 lines, no function above 60 but with a reason beside it."""
    top = [path for path in PACKAGE.glob("*.py") if not path.name.startswith("__")]
    assert len(top) <= 12
    assert [str(path) for path in FILES if len(path.read_text().splitlines()) > 450] == []
    lengths, long = [], []
    for path in FILES:
        source = path.read_text().splitlines()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                lengths.append(node.end_lineno - node.lineno + 1)
                if lengths[-1] > 60 and not any("# long: " in line for line in source[node.lineno - 1 : node.end_lineno]):
                    long.append(f"{module(path)}.{node.name}: {lengths[-1]} lines")
    assert long == []
    assert len(lengths) > 1000 and sorted(lengths)[len(lengths) // 2] <= 8


@pytest.mark.parametrize("method", [{"name": "fedmoe"}, {"name": "fedper"}, {"name": "fedprox"}])
def test_from_the_command_to_the_optimizers_step_there_are_at_most_eleven_frames_of_ours(
    fedexperts, tiny_tree, tmp_path, monkeypatch, method
):
    frames, step = [], torch.optim.AdamW.step

    def counted(self, *args, **options):
        stack = traceback.extract_stack()
        frames.append([f"{Path(each.filename).stem}.{each.name}" for each in stack if str(PACKAGE) in each.filename])
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    (tmp_path / "run.toml").write_text(to_toml({**tiny_tree, "method": method, "federation": {"rounds": 1}}))
    code, _, err = fedexperts("run", tmp_path / "run.toml", "--out", tmp_path / "out", "--quiet")
    assert code == 0, err
    assert len(frames) >= 8
    assert max(map(len, frames)) <= 11, max(frames, key=len)
