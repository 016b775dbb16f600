"""Small mistakes of users: what they are told."""

import errno

import pytest
from safetensors import SafetensorError

from fedexperts import api
from fedexperts.config import RunConfig
from fedexperts.errors import BadValue
from fedexperts.experiment import sweep
from fedexperts.experiment.plan import plan
from fedexperts.experiment.setup import prepare_run
from fedexperts.experiment.sweep import compare, read_variants
from fedexperts.io.files import disk_errors
from fedexperts.io.toml import checked, to_toml


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"precision": "bf16"}, "precision is not a setting; did you mean training.precision?"),
        ({"model": {"precision": "bf16"}}, "model.precision is not a setting; did you mean training.precision?"),
        (
            {"gradient_accumulation": 2},
            "gradient_accumulation is not a setting; did you mean training.gradient_accumulation_steps?",
        ),
        ({"data": {"sources": []}}, "data.sources is empty; give at least 1"),
        ({"federation": {"rounds": 10**6}}, "federation.rounds = 1000000 should be less than or equal to 999999"),
    ],
)
def test_a_mistake_is_named_with_what_was_meant(tree, said):
    with pytest.raises(BadValue) as error:
        checked(RunConfig, {"data": {"sources": ["synthetic/copy"]}, **tree})
    assert str(error.value) == said


def test_help_keeps_the_names_of_extras(fedexperts):
    code, printed, _ = fedexperts("report", "--help")
    assert code == 0 and "fedexperts[png]" in printed


def test_a_plan_says_that_there_are_fewer_clients_than_a_round_asks_for(tiny_tree):
    for number, warned in ((4, False), (5, True)):
        federation = {**tiny_tree["federation"], "clients_per_round": number}
        warnings = plan(prepare_run(checked(RunConfig, {**tiny_tree, "federation": federation})))["warnings"]
        assert any("but there are 4 clients, so all of them train" in each for each in warnings) is warned


def test_a_disk_that_refuses_is_a_failed_run_of_a_comparison_without_a_traceback(tiny_tree, tmp_path, monkeypatch, capfd):
    def full(*given, **options):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "x"))

    monkeypatch.setattr(sweep, "run", full)
    compared = compare({"": checked(RunConfig, tiny_tree)}, read_variants("fedavg"), 1, tmp_path / "out")
    (reason,) = compared.failed.values()
    assert reason == f"{tmp_path / 'x'} cannot be read or written (No space left on device)"
    assert "Traceback" not in capfd.readouterr().err


def test_a_full_disk_of_an_export_is_an_error_of_the_disk(tmp_path):
    with pytest.raises(OSError, match="No space left on device") as error, disk_errors(tmp_path / "model"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert error.value.filename == str(tmp_path / "model")
    with pytest.raises(SafetensorError), disk_errors(tmp_path):
        raise SafetensorError("header too large")


def test_no_results_are_put_into_a_pseudo_file_system(tiny_tree, tmp_path):
    (tmp_path / "run.toml").write_text(to_toml(tiny_tree))
    with pytest.raises(BadValue, match="no folder can be made at /proc/none/out; give another one with --out"):
        api.run(tmp_path / "run.toml", "/proc/none/out")
