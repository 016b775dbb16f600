"""Runs whose weights travel in fewer bits: same bits with any workers and after a resume, and the bytes that they say."""

import json
from contextlib import nullcontext

import pytest
from older import without_hashes
from safetensors.torch import load_file
from tampering import PARTS, Changing

from fedexperts.config import RunConfig
from fedexperts.errors import BadRun, BadValue
from fedexperts.experiment import checkpoint, runner
from fedexperts.experiment.runtime import runtime_for
from fedexperts.io.toml import checked


def config_of(tree, wire, **federation):
    return checked(RunConfig, {**tree, "federation": {**tree["federation"], "wire_dtype": wire, **federation}})


def lines(out, name):
    """Without what a clock measured."""
    rows = [json.loads(line) for line in (out / name).read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def results(out):
    tensors = load_file(checkpoint.latest(out) / "weights.safetensors")
    bits = {name: (tensor.dtype, tensor.shape, tensor.numpy().tobytes()) for name, tensor in tensors.items()}
    return bits, *(lines(out, name) for name in ("ledger.jsonl", "evals.jsonl", "rounds.jsonl"))


@pytest.fixture(scope="module")
def outs(method_trees, tmp_path_factory):
    """What a run of FedMoE left in each dtype, in this process."""
    folder = tmp_path_factory.mktemp("wire")
    return {
        wire: runner.run(config_of(method_trees["fedmoe"], wire), folder / wire, parts=PARTS)
        for wire in ("float32", "bfloat16", "int8")
    }


def test_two_workers_end_with_the_bits_of_this_process(outs, method_trees, tmp_path):
    out = runner.run(config_of(method_trees["fedmoe"], "int8", workers=2), tmp_path / "out", parts=PARTS)
    assert results(out) == results(outs["int8"]) != results(outs["float32"])


def test_an_interrupted_run_ends_with_the_same_bits_once_it_is_resumed(outs, method_trees, tmp_path):
    config, out, stop = config_of(method_trees["fedmoe"], "int8"), tmp_path / "out", [True]

    def interrupt(job, answer):
        if job.round == 2 and stop.pop():
            raise KeyboardInterrupt
        return answer

    def engine(prepared, out):
        return nullcontext(Changing(runtime_for(prepared, out), interrupt if stop else lambda job, answer: answer))

    with pytest.raises(KeyboardInterrupt):
        runner.run(config, out, parts=PARTS, engine=engine)
    assert checkpoint.latest(out).name == "000001-train"
    runner.run(config, out, resume=True, parts=PARTS, engine=engine)
    assert results(out) == results(outs["int8"])


def test_plan_and_ledger_say_the_bytes_that_travel(outs):
    plans = {wire: json.loads((out / "plan.json").read_text()) for wire, out in outs.items()}
    rows = {wire: lines(out, "ledger.jsonl") for wire, out in outs.items()}
    for wire, plan in plans.items():
        first = {row["client"]: row["bytes_down"] for row in reversed(rows[wire])}
        assert {client["name"]: client["first_bytes_down"] for client in plan["clients"]} == first
        assert plan["patch"]["wire_dtype"] == wire
    whole = [plans[wire]["full_patch_bytes"] for wire in outs]
    assert whole[0] == 2 * whole[1] and 0.26 < whole[2] / whole[0] < 0.29
    for way in ("bytes_down", "bytes_up"):
        sent = [sum(row[way] for row in rows[wire] if row["task"] == "train" and not row["failed"]) for wire in outs]
        assert 0.5 < sent[1] / sent[0] < 0.52 and 0.26 < sent[2] / sent[0] < 0.3


def test_the_virtual_clock_follows_the_bytes(outs):
    seconds = {wire: [line["clock_seconds"] for line in lines(out, "rounds.jsonl")] for wire, out in outs.items()}
    assert all(few < half < whole for whole, half, few in zip(*seconds.values(), strict=True))


def test_a_run_is_not_resumed_in_another_dtype_and_older_runs_had_the_defaults(outs, method_trees):
    tree, out = method_trees["fedmoe"], outs["float32"]
    with pytest.raises(BadRun, match=r"other settings: federation\.wire_dtype changed"):
        runner.run(config_of(tree, "bfloat16"), outs["int8"], resume=True, parts=PARTS)
    without_hashes(out)
    settings = json.loads((out / "resolved.json").read_text())
    assert settings["federation"].pop("wire_dtype") == "float32"
    assert settings["method"].pop("reserve") == 0.7  # as if this field of the method were new
    (out / "resolved.json").write_text(json.dumps(settings))
    assert runner.run(config_of(tree, "float32"), out, resume=True, parts=PARTS) == out
    with pytest.raises(BadRun, match=r"other settings: federation\.wire_dtype changed"):
        runner.run(config_of(tree, "int8"), out, resume=True, parts=PARTS)
    with pytest.raises(BadRun, match=r"other settings: method\.reserve changed"):
        runner.run(config_of({**tree, "method": {**tree["method"], "reserve": 0.9}}, "float32"), out, resume=True, parts=PARTS)


def test_a_dtype_that_there_is_not_is_refused(tiny_tree):
    with pytest.raises(BadValue, match=r"federation\.wire_dtype.*'float32', 'bfloat16' or 'int8'"):
        config_of(tiny_tree, "int4")
