"""The recipe of `smol`: its settings, and the commands that its script runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedexperts.io.toml import read_tree
from fedexperts.models.continued.settings import read_settings
from fedexperts.models.files import BUNDLED

ROOT = Path(__file__).parents[3]
STUB = """#!/bin/sh
echo "$@" >> "$LOG"
for last; do :; done
mkdir -p "$last"
echo {} > "$last/config.json"
"""


def test_the_recipe_is_valid_and_trains_beside_a_control():
    settings = read_settings(read_tree(ROOT / "assets" / "smol" / "heal.toml", ""))
    assert settings.control is not None and settings.distill > 0.5
    assert len(settings.corpus.texts) == 10 and settings.corpus.separator == "<|endoftext|>"
    asked = {"ag_news", "banking77", "trec6", "piqa", "mmlu", "commonsenseqa", "dolly"}
    assert not asked & set(settings.corpus.instructions) and not any("superni" in name for name in settings.corpus.instructions)


@pytest.fixture
def build(tmp_path):
    """Runs the script with a stub of the command; gives its output and the arguments of each call."""
    stub, log = tmp_path / "fedexperts", tmp_path / "log"
    stub.write_text(STUB)
    stub.chmod(0o755)

    def run(**settings):
        log.write_text("")
        variables = {**os.environ, "LOG": str(log), "FEDEXPERTS_BASES": str(tmp_path / "bases"), **settings}
        command = ["sh", str(ROOT / "assets" / "smol" / "build.sh"), str(stub), sys.executable]
        output = subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout
        return output, log.read_text().splitlines()

    return run


def test_the_script_splits_and_heals_and_leaves_a_base_that_is_there(build, tmp_path):
    bases = tmp_path / "bases"
    output, (upcycle, pretrain) = build(SMOL_SOURCE="some/model", SMOL_THREADS="1")
    assert upcycle == f"upcycle some/model --split 16 --shared 768 --top-k 8 --to {bases}/.smol/split"
    heal = ROOT / "assets" / "smol" / "heal.toml"
    start = f"--set start={bases}/.smol/split --set threads=1"
    assert pretrain == f"pretrain {heal} {start} --control some/model --out {bases}/smol"
    assert f"built: {bases}/smol" in output

    output, calls = build(SMOL_SOURCE="some/model")
    assert calls == [] and "smol is there already" in output
    (bases / "smol" / "config.json").unlink()
    assert len(build(SMOL_SOURCE="some/model")[1]) == 1


def test_the_script_builds_the_variant_with_more_of_it_in_experts(build, tmp_path):
    output, (upcycle, pretrain) = build(SMOL_SOURCE="some/model", SMOL_SHARED="384")
    assert upcycle.startswith("upcycle some/model --split 24 --shared 384 --top-k 16 --to ")
    assert pretrain.endswith(f"--out {tmp_path}/bases/smol-384") and BUNDLED["smol-384"].name == "smol-384"
    assert 'model.name = "smol-384"' in output
    with pytest.raises(subprocess.CalledProcessError):
        build(SMOL_SOURCE="some/model", SMOL_SHARED="100")
