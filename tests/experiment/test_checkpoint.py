import errno
import json
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError

from fedexperts.errors import BadRun
from fedexperts.experiment import checkpoint
from fedexperts.io import files
from fedexperts.methods.fedavg import FedAvg
from fedexperts.moe.anatomy import Anatomy, BlockShape
from fedexperts.moe.footprint import Footprint
from fedexperts.types import Server

LEDGER = [(1, "train", None), (1, "evaluate", None), (2, "train", "late"), (2, "evaluate", None)]
START = Server({"w": torch.zeros(2, 3)}, {"w": "mlp"}, Anatomy({"mlp": BlockShape(2, 1)}), Footprint(0, {"mlp": 1}, 0), {})


def server(round, task="train"):
    weights = {"w": torch.full((2, 3), float(round)), "half": torch.ones(1, 2, dtype=torch.bfloat16)}
    return replace(START, weights=weights, method_state={"held/c01": torch.tensor([True, False])}, round=round, task=task)


def log(folder, text):
    with (folder / "rounds.jsonl").open("a") as file:
        file.write(text)


def test_a_saved_server_is_restored_unchanged(tmp_path):
    checkpoint.save(tmp_path, server(3))
    back = checkpoint.load(tmp_path, START)
    assert (back.round, back.task) == (3, "train")
    assert back.weights["w"].tolist() == [[3.0] * 3] * 2
    assert back.weights["half"].dtype == torch.bfloat16
    assert back.method_state["held/c01"].tolist() == [True, False]
    assert back.layout == START.layout


def test_without_a_checkpoint_the_server_starts_anew_with_empty_logs(tmp_path):
    log(tmp_path, "of a round that was cut off\n")
    assert checkpoint.load(tmp_path, START) is START
    assert checkpoint.rewind(tmp_path, FedAvg(), 3) == 0
    assert (tmp_path / "rounds.jsonl").read_text() == ""


def test_logs_are_truncated_to_the_checkpoint(tmp_path):
    log(tmp_path, "round 1\n")
    checkpoint.save(tmp_path, server(1))
    log(tmp_path, "round 2\nhalf a li")
    (tmp_path / "evals.jsonl").write_text("of round 2\n")
    assert checkpoint.rewind(tmp_path, FedAvg(), 3) == 1
    assert (tmp_path / "rounds.jsonl").read_text() == "round 1\n"
    assert (tmp_path / "evals.jsonl").read_text() == ""


def test_a_missing_client_state_of_the_checkpoint_is_refused(tmp_path):
    for client, rounds in (("c01", (1, 2)), ("c02", (1,))):
        for round in rounds:
            files.write_tensors(tmp_path / "clients" / client / f"00000{round}-train.safetensors", {"w": torch.ones(1)})
    answered = {"c01": "000002-train", "c02": "000001-train", "c03": "000002-train"}  # c03 keeps nothing
    checkpoint.save(tmp_path, replace(server(2), accepted=answered))
    assert checkpoint.load(tmp_path, START).accepted == answered
    assert json.loads((tmp_path / "checkpoint/000002-train/state.json").read_text())["kept"] == {
        "c01": "000002-train",
        "c02": "000001-train",
    }
    checkpoint.require_client_state(tmp_path)
    (tmp_path / "clients/c01/000002-train.safetensors").unlink()
    checkpoint.require_client_state(tmp_path, "c02")
    for name in (None, "c01"):
        with pytest.raises(BadRun, match=r"what c01 keeps to itself is gone: there is no .*000002-train\.safetensors; bring"):
            checkpoint.require_client_state(tmp_path, name)


@pytest.mark.parametrize(("keep", "kept"), [(1, [10]), (2, [2, 10]), (9, [1, 2, 10])])
def test_only_the_newest_checkpoints_are_kept(tmp_path, keep, kept):
    for number in (1, 2, 10):
        checkpoint.save(tmp_path, server(number), keep)
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == [f"{number:06d}-train" for number in kept]


def test_setup_tasks_are_resumed_in_order(tmp_path):
    for number, task in ((0, "vote"), (0, "profile"), (1, "train")):
        checkpoint.save(tmp_path, server(number, task))
        assert (checkpoint.load(tmp_path, START).round, checkpoint.load(tmp_path, START).task) == (number, task)


@pytest.mark.parametrize(
    "left", [(), ("weights.safetensors",), ("weights.safetensors", "method_state.safetensors", ".state.json.x")]
)
def test_an_incomplete_checkpoint_is_ignored_and_written_again(tmp_path, left):
    checkpoint.save(tmp_path, server(3))
    partial = tmp_path / "checkpoint" / "000004-train"
    partial.mkdir()
    for name in left:
        (partial / name).write_bytes(b"half")
    assert checkpoint.load(tmp_path, START).round == 3
    checkpoint.save(tmp_path, server(4))
    assert checkpoint.load(tmp_path, START).round == 4
    names = sorted(path.name for path in partial.iterdir())
    assert names == ["method_state.safetensors", "state.json", "weights.safetensors"]


def test_a_checkpoint_of_version_0_1_0_is_read_with_the_accepted_answers_of_its_ledger(tmp_path):
    lines = [{"client": "c01", "round": round, "task": task, "failed": why} for round, task, why in LEDGER]
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    checkpoint.save(tmp_path, server(2))
    (saved,) = (tmp_path / "checkpoint").iterdir()
    (saved / "method_state.safetensors").rename(saved / "memory.safetensors")
    state = json.loads((saved / "state.json").read_text())
    state = {key: value for key, value in state.items() if key in ("round", "task", "logs", "kept")}
    (saved / "state.json").write_text(json.dumps(state))
    back = checkpoint.load(tmp_path, START)
    assert back.method_state.keys() == server(2).method_state.keys()
    assert back.accepted == {"c01": "000001-train"}


def test_a_partly_removed_older_checkpoint_is_ignored(tmp_path):
    checkpoint.save(tmp_path, server(3))
    older = tmp_path / "checkpoint" / "000002-train"
    older.mkdir()
    (older / "state.json").write_text(json.dumps({"round": 2, "task": "train", "logs": {}}))
    assert checkpoint.load(tmp_path, START).round == 3


def test_tensors_that_share_memory_are_saved_separately(tmp_path):
    even = torch.ones(4)
    checkpoint.save(tmp_path, replace(server(1), method_state={"p/c01": even, "p/c02": even, "p/c03": even[1:]}))
    assert [tensor.tolist() for tensor in checkpoint.load(tmp_path, START).method_state.values()] == [
        [1.0] * 4,
        [1.0] * 4,
        [1.0] * 3,
    ]


def test_a_full_disk_is_an_error_of_the_disk_and_what_was_there_stays(tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")  # as it says it

    path = tmp_path / "w.safetensors"
    files.write_tensors(path, {"w": torch.ones(2)})
    before = path.read_bytes()
    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="No space left on device") as error:
        files.write_tensors(path, {"w": torch.zeros(2)})
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(path))
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [before]
