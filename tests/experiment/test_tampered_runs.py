"""Whole runs of which one client of three answers what it likes: they go on, also resumed, and leave results that can be read."""

import json
from dataclasses import replace
from io import StringIO

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tampered_examples import examples
from tampered_kinds import Absent
from tampering import PARTS, WHO, changing

from fedexperts import report
from fedexperts.config import RunConfig
from fedexperts.engines.base import LARGEST_NORM
from fedexperts.experiment import checkpoint, runner
from fedexperts.experiment.progress import Shown
from fedexperts.export import export
from fedexperts.io.toml import checked
from fedexperts.types import Patch, Update

KINDS = {kind.name: kind for kind in examples()}
IN_TURN = {
    "profile": ["all extra tensors are NaN", "extra is a list"],
    "count": ["all extra tensors are beyond all bounds below"],
    "train": [
        "a failure whose reason is with HTML",
        "a failure whose reason is with markup",
        "a failure whose reason is empty",
        "all weights are with one NaN",
        "all weights are zero",
        "loss = nan",
        "cost.tokens = 1.5",
        "qualified, which only one method declares",
        "all extra tensors are None",
        "client = 'c01'",
        "the answer is None",
        "examples = 9999998",
    ],
    "evaluate": ["labels of a task = {'a': [0, 0, 0]}", "a failure whose reason is with HTML", "no scores", "drift = {}"],
}
"""Task → the kinds of answers that the client gives, in turn."""
RUNS = {
    "fedmoe": {},
    "hfedmoe": {},
    "flora": {},
    "fedavg": {"federation": {"server_optimizer": {"name": "fedadam"}}, "evaluation": {"score": "before_aggregation"}},
}


class Lies:
    """What becomes of the client's answers, from the kind `first` on; the run is stopped, once, in round `stop`."""

    def __init__(self, first, stop=None):
        self.first, self.stop, self.given = first, stop, {}

    def __call__(self, job, answer):
        if job.client == "c03" and (job.task, job.round) == ("train", self.stop):
            self.stop = None
            raise KeyboardInterrupt
        if job.client != WHO or not isinstance(answer, Update):
            return answer
        kinds = IN_TURN[job.task]
        for turn in range(len(kinds)):
            kind = KINDS[kinds[(self.first + job.round + turn) % len(kinds)]]
            try:
                changed = kind.change(answer)
            except Absent:
                continue
            self.given[job.round, job.task] = kind
            return changed
        raise AssertionError(f"no kind is for the answers to {job.task}")


def config_of(method_trees, name, **changes):
    tree = {**method_trees[name], "devices": {"memory_share": {"uniform": [1.0, 1.4]}}}
    parts = {
        "federation": {"rounds": 4},
        "evaluation": {"every": 2, "generate_tokens": 1, "drift": True},
        "data": {**tree["data"], "clients": 3},
    }
    return checked(RunConfig, {**tree, **{part: {**keys, **changes.get(part, {})} for part, keys in parts.items()}})


def lines(out, name):
    """Of a log; NaN and infinity are no JSON."""
    return [json.loads(line, parse_constant=pytest.fail) for line in (out / name).read_text().splitlines()]


def weights(out):
    return load_file(checkpoint.latest(out) / "weights.safetensors")


@pytest.mark.parametrize("name", RUNS)
def test_a_run_with_a_client_that_lies_goes_on_is_resumed_and_leaves_results_that_can_be_read(method_trees, tmp_path, name):
    config, undisturbed, out = config_of(method_trees, name, **RUNS[name]), tmp_path / "undisturbed", tmp_path / "out"
    first = 3 * list(RUNS).index(name)
    lies, stopped = Lies(first), Lies(first, stop=3)
    terminal = Console(file=StringIO(), force_terminal=True, width=100)
    runner.run(config, undisturbed, parts=PARTS, engine=changing(lies), progress=Shown(terminal))
    with pytest.raises(KeyboardInterrupt):
        runner.run(config, out, parts=PARTS, engine=changing(stopped))
    assert checkpoint.latest(out).name == "000002-train"
    runner.run(config, out, resume=True, parts=PARTS, engine=changing(stopped))

    after, again = weights(undisturbed), weights(out)
    assert after.keys() == again.keys()
    assert all(torch.equal(tensor, again[key]) and bool(tensor.isfinite().all()) for key, tensor in after.items())

    entries = {(row["round"], row["task"]): row for row in lines(out, "ledger.jsonl") if row["client"] == WHO}
    assert entries.keys() == lies.given.keys() >= {(number, "train") for number in (1, 2, 3, 4)}
    for key, kind in lies.given.items():
        reason = entries[key]["failed"]
        assert kind.harmless or (reason.isprintable() and 0 < len(reason) <= 500), f"{key}: {kind.name}"
    rounds = lines(out, "rounds.jsonl")
    assert [{*line["failed"]} - {WHO} for line in rounds] == [set()] * len(rounds)
    assert all(line["value"] is None or 0 <= line["value"] < 1e308 for line in lines(out, "evals.jsonl"))

    page, text = tmp_path / "page.html", Console(file=StringIO(), width=200)
    report.write([out], html=page, csv=tmp_path / "table.csv", markdown=tmp_path / "table.md")
    text.print(report.table([out]))
    assert "<script>alert(1)" not in page.read_text() and name in text.file.getvalue()
    export(out, tmp_path / "model")


def test_a_client_that_always_sends_the_largest_weights_that_it_may_does_not_stop_the_others(method_trees, tmp_path):
    """Nor do they grow by a factor in every round, which would be infinite after some."""

    def enlarged(job, answer):
        if job.client != WHO or job.task != "train":
            return answer
        return replace(answer, patch=Patch({name: t * 90 for name, t in answer.patch.tensors.items()}, answer.patch.rows))

    config = config_of(method_trees, "fedavg", federation={"rounds": 10}, evaluation={"every": 10})
    out = runner.run(config, tmp_path / "out", parts=PARTS, engine=changing(enlarged))
    rounds = lines(out, "rounds.jsonl")
    assert "c02" not in rounds[0]["failed"] and "c02" in rounds[-1]["failed"]
    assert all(not {"c01", "c03"} & line["failed"].keys() for line in rounds)
    assert all(tensor.square().mean().sqrt() <= LARGEST_NORM for tensor in weights(out).values())
