"""Methods that an installed package brings."""

import importlib
import sys

import pytest

from fedexperts import methods
from fedexperts.io.toml import to_toml

MINE = """
from dataclasses import dataclass

from fedexperts.methods.fedavg import FedAvg


@dataclass(frozen=True)
class Mine(FedAvg):
    strength: float = 1.0
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a package of one module in place, with an entry point; takes its methods away again."""
    there = dict(methods.METHODS)

    def put(text=MINE, point="mine = someones_methods:Mine"):
        (tmp_path / "someones_methods.py").write_text(text)
        metadata = tmp_path / "someones_methods-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: someones-methods\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[fedexperts.methods]\n{point}\n")
        monkeypatch.syspath_prepend(tmp_path)
        methods.enter_installed.cache_clear()

    yield put
    sys.modules.pop("someones_methods", None)
    for name in methods.METHODS.keys() - there.keys():
        del methods.METHODS[name]
    methods.enter_installed.cache_clear()


def test_the_command_compares_a_method_of_an_installed_package_with_ours(install, fedexperts, tmp_path, tiny_tree):
    install()
    (tmp_path / "run.toml").write_text(to_toml(tiny_tree))
    code, _, err = fedexperts(
        "compare", tmp_path / "run.toml", "--methods", "mine:strength=2,fedavg", "--out", tmp_path / "out", "--quiet"
    )
    assert code == 0, err
    weights = [
        (tmp_path / "out" / name / "seed-0/checkpoint").glob("*/weights.safetensors") for name in ("mine,strength=2", "fedavg")
    ]
    mine, ours = ([path.read_bytes() for path in paths] for paths in weights)
    assert mine == ours != []


def test_a_module_may_also_register_its_own_method_itself(install, fedexperts, tmp_path, tiny_tree):
    install(MINE + '\n\nimport fedexperts\nfedexperts.METHODS["mine"] = Mine\n')
    (tmp_path / "run.toml").write_text(to_toml({**tiny_tree, "method": {"name": "mine"}}))
    importlib.import_module("someones_methods")
    assert fedexperts("plan", tmp_path / "run.toml")[0] == 0


def test_its_fields_are_validated_like_those_of_built_in_methods(install, fedexperts, tmp_path, tiny_tree):
    install()
    (tmp_path / "run.toml").write_text(to_toml({**tiny_tree, "method": {"name": "mine", "strenth": 2}}))
    code, _, err = fedexperts("plan", tmp_path / "run.toml")
    assert code == 2
    assert "method.strenth is not a setting of mine, which has experts_per_layer, strength; did you mean strength?" in err


@pytest.mark.parametrize(
    ("text", "point", "said"),
    [
        (
            MINE,
            "fedavg = someones_methods:Mine",
            "the method 'fedavg' of the installed package someones-methods has the name of another",
        ),
        (MINE, "mine = someones_methods:Yours", "cannot be imported (AttributeError: "),
        ("1 / 0", "mine = someones_methods:Mine", "cannot be imported (ZeroDivisionError: division by zero)"),
        ("class Mine:\n    name = 3", "mine = someones_methods:Mine", "a method is a frozen dataclass below fedexperts.Method"),
        (MINE.replace("@dataclass(frozen=True)", "").replace("(FedAvg)", ""), "mine = someones_methods:Mine", "is no method"),
    ],
)
def test_a_package_whose_methods_cannot_be_loaded_is_named_each_time(install, fedexperts, tmp_path, tiny_tree, text, point, said):
    install(text, point)
    (tmp_path / "run.toml").write_text(to_toml(tiny_tree))
    for _ in range(2):
        code, _, err = fedexperts("plan", tmp_path / "run.toml")
        assert code == 2
        assert said in " ".join(err.split())
        assert "repair that package or uninstall it" in " ".join(err.split())
