"""The learning rate over rounds."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from fedexperts.config import EvaluationSettings, RunConfig
from fedexperts.errors import BadRun, BadValue
from fedexperts.experiment import checkpoint
from fedexperts.experiment.client_task import ClientTask
from fedexperts.experiment.runner import claim, engine_for, run
from fedexperts.experiment.runtime import task_for
from fedexperts.experiment.setup import prepare_run
from fedexperts.io.toml import checked, with_settings
from fedexperts.methods.fedavg import FedAvg
from fedexperts.testing import tiny_context, tiny_model
from fedexperts.types import Client, Job, Patch, Training


def test_the_cosine_by_hand():
    """Five rounds, 0.5 → 0.1: halfway down in the third; (1 ± √½) / 2 of the way in between."""
    settings = Training(lr=0.5, schedule="cosine", final_lr=0.1)
    half = 0.5**0.5
    expected = [0.5, 0.1 + 0.4 * (1 + half) / 2, 0.3, 0.1 + 0.4 * (1 - half) / 2, 0.1]
    assert [settings.lr_in(round, 5) for round in (1, 2, 3, 4, 5)] == pytest.approx(expected)
    assert settings.lr_in(0, 5) == settings.lr_in(1, 5) == settings.lr_in(1, 1) == 0.5


@given(st.integers(2, 300), st.floats(1e-6, 1.0))
def test_the_cosine_falls_from_lr_to_final_lr(rounds, lr):
    settings = Training(lr=lr, schedule="cosine")
    rates = [settings.lr_in(round, rounds) for round in range(1, rounds + 1)]
    assert rates[0] == lr
    assert rates[-1] == pytest.approx(1e-6)
    assert all(later <= sooner for sooner, later in pairwise(rates))


def test_without_a_schedule_the_rate_stays_to_the_bit():
    settings = Training(lr=0.3)
    assert {settings.lr_in(round, 7) for round in range(8)} == {0.3}


def test_every_job_of_a_round_trains_at_its_rate_and_nothing_else_of_the_context_changes():
    task = ClientTask(FedAvg(), EvaluationSettings(), 3)
    training = Training(batch_size=3, local_steps=8, lr=0.5, schedule="cosine", final_lr=0.1)
    context = tiny_context(tiny_model("olmoe", num_hidden_layers=1), Client("a", 4), training)
    jobs = [Job("a", number, "train" if number else "profile", "seed", {}, Patch({})) for number in range(4)]
    contexts = [task.scheduled(job, context) for job in jobs]
    assert [round(each.training.lr, 6) for each in contexts] == [0.5, 0.5, 0.3, 0.1]
    assert all(replace(each, training=training) == context for each in contexts)
    assert all(replace(each.training, lr=0.5) == training for each in contexts)
    assert all(each.client_state is context.client_state for each in contexts), "what is kept is the client's own, not a copy"


def run_config(tree, *settings):
    return checked(RunConfig, with_settings(tree, settings))


def test_a_run_has_its_schedule_and_a_centralized_one_all_steps(tiny_tree, tmp_path):
    prepared = prepare_run(run_config(tiny_tree, "method.name=centralized", "training.schedule=cosine", "training.lr=0.5"))
    rounds = task_for(prepared).rounds
    assert [prepared.training.lr_in(round, rounds) for round in (1, 2, 3)] == pytest.approx([0.5, 0.25, 1e-6], abs=1e-6)
    assert engine_for(prepared, tmp_path).runtime.training.local_steps == 2 * 2


def weights(out):
    return load_file(checkpoint.latest(out) / "weights.safetensors")


def test_weights_hardly_change_in_the_last_round(tiny_tree, tmp_path):
    """The third of three rounds has a rate of 1e-12: its clients end where they began."""
    cosine = ("training.schedule=cosine", "training.final_lr=1e-12", "training.lr=1e-2")
    three = weights(run(run_config(tiny_tree, *cosine), tmp_path / "three"))
    constant = weights(run(run_config(tiny_tree, "training.lr=1e-2"), tmp_path / "constant"))
    # with one round there is no way down: the first round's rate, so the same bits as without a schedule
    one = weights(run(run_config(tiny_tree, *cosine, "federation.rounds=1"), tmp_path / "one"))
    alone = weights(run(run_config(tiny_tree, "training.lr=1e-2", "federation.rounds=1"), tmp_path / "alone"))
    assert all((one[name] == alone[name]).all() for name in alone)
    far, near = (sum(float((end[name] - one[name]).square().sum()) for name in one) ** 0.5 for end in (constant, three))
    assert 0 < near < 0.6 * far


def test_a_cosine_that_would_rise_is_refused():
    with pytest.raises(BadValue, match=r"^training\.final_lr = 0\.1 is above training\.lr = 0\.01, but the cosine falls"):
        run_config(
            {"data": {"sources": ["synthetic/sort"]}}, "training.schedule=cosine", "training.lr=0.01", "training.final_lr=0.1"
        )
    run_config({"data": {"sources": ["synthetic/sort"]}}, "training.lr=1e-9")  # no schedule, so it is no matter


@pytest.mark.parametrize("setting", ["training.schedule=steps", "training.final_lr=0"])
def test_an_unknown_schedule_is_refused(setting):
    with pytest.raises(BadValue, match=f"^{setting.partition('=')[0]} = "):
        run_config({"data": {"sources": ["synthetic/sort"]}}, setting)


def test_a_run_from_before_schedules_is_resumed_unchanged(tiny_tree, tmp_path):
    config = run_config(tiny_tree)
    resolved = config.resolved()
    for key in ("schedule", "final_lr"):
        del resolved["training"][key]
    (tmp_path / "resolved.json").write_text(json.dumps(resolved))
    claim(config, tmp_path, resume=True)
    with pytest.raises(BadRun, match=r"other settings: training\.schedule changed"):
        claim(run_config(tiny_tree, "training.schedule=cosine"), tmp_path, resume=True)
    with pytest.raises(BadRun, match=r"other settings: federation\.server_optimizer\.beta1, .*name.* changed"):
        claim(run_config(tiny_tree, "federation.server_optimizer=fedavgm"), tmp_path, resume=True)
