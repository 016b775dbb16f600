"""The names of Flower that are not public: in one module, counted, and there."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "fedexperts"
INTERNALS = PACKAGE / "deploy" / "flower_internals.py"
PUBLIC = ("flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.simulation")


def imported(path):
    """The names of Flower's modules that are not public, as (module, name), that a file imports."""
    return [
        (node.module, alias.name)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flwr" and node.module not in PUBLIC
        for alias in node.names
    ]


def replaced():
    """The names, as (module, name), that a process of ours replaces."""
    assigned = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(INTERNALS.read_text()).body
        if isinstance(node, ast.Assign)
    }
    return [(module, name) for names in assigned.values() for module, each in names.items() for name in each]


def test_one_module_alone_imports_them():
    assert [path.name for path in PACKAGE.rglob("*.py") if path != INTERNALS and imported(path)] == []


def test_no_other_module_imports_one_by_its_name():
    named = [
        path.name
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and "'flwr" in ast.unparse(node)
    ]
    assert named == []


def test_there_are_as_many_as_we_know_of():
    assert (len(imported(INTERNALS)), len(replaced())) == (45, 10)  # they should fall


@pytest.mark.parametrize(("module", "name"), [*imported(INTERNALS), *replaced()])
def test_flower_has_the_name(module, name):
    pytest.importorskip("flwr")
    try:
        there = import_module(module)
    except ImportError as error:
        pytest.fail(f"this version of Flower has no module {module}, of which the deployment uses {name} ({error})")
    assert hasattr(there, name), f"this version of Flower has no {name} in {module}, which the deployment uses"


def test_what_flower_no_longer_has_is_not_replaced_in_silence(monkeypatch):
    internals = pytest.importorskip("fedexperts.deploy.flower_internals")
    monkeypatch.setattr("flwr.superlink.extensions.get_middleware", None)
    internals.replace(internals.SUPERLINK, get_middleware=3)
    assert import_module("flwr.superlink.extensions").get_middleware == 3
    with pytest.raises(AttributeError, match="gone"):
        internals.replace({"flwr.superlink.extensions": ("gone",)}, gone=3)
