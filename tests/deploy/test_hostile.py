"""A client of a real deployment that answers with far more than its job allows, and otherwise as no honest one does."""

import json
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread

import pytest
import tomli_w
from deployed import processes

from fedexperts import report
from fedexperts.config import RunConfig
from fedexperts.deploy import server
from fedexperts.deploy.deployment import Federation
from fedexperts.deploy.processes import free_port
from fedexperts.io.toml import checked

LYING_WORKER = """
import sys, torch
from dataclasses import replace
from fedexperts.deploy import client
from fedexperts.engines import remote

honest = remote.answer_message

def answer_message(answer):
    if answer.task == "train":
        weights = {name: tensor * float("nan") for name, tensor in answer.patch.tensors.items()}
        changes = {
            1: {"extra": {"huge": torch.zeros(75_000_000)}},
            2: {"metrics": {**answer.metrics, "qualified": 1}},
            3: {"patch": replace(answer.patch, tensors=weights)},
        }
        answer = replace(answer, **changes.get(answer.round, {}))
    return honest(answer)

remote.answer_message = answer_message
sys.exit(client.main())
"""
SUPERVISOR = """
import json, sys
from pathlib import Path
from fedexperts.deploy.processes import end_with_parent
from fedexperts.deploy.supervisor import SuperNodeSupervisor
end_with_parent()
options = json.loads(sys.argv[1])
worker = [sys.executable, "-c", options["code"], json.dumps(options)]
SuperNodeSupervisor(options["name"], options["server"], Path(options["folder"]) / "flower", None, worker).run()
"""


def memory_bytes(pid, what):
    """VmRSS: of a process now; VmHWM: at its peak."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(what))


@contextmanager
def largest(folder):
    """A list whose first number is the most bytes that were in `folder` at a time."""
    most, ended = [0], Event()

    def look():
        while not ended.wait(0.02):
            with suppress(FileNotFoundError):  # what has just been removed
                most[0] = max(most[0], sum(path.stat().st_size for path in folder.iterdir()))

    thread = Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()


@pytest.mark.skipif(sys.platform != "linux", reason="peaks of memory are read from /proc")
def test_a_client_that_lies_fails_in_that_round_and_the_server_never_has_the_300_mb_that_it_sends(tiny_tree, tmp_path):
    names = ["honest", "lying"]
    data = {**{key: value for key, value in tiny_tree["data"].items() if key != "clients"}, "names": names}
    config = checked(RunConfig, {**tiny_tree, "federation": {"rounds": 4}, "data": data})
    (tmp_path / "run.toml").write_text(tomli_w.dumps(config.resolved()))
    port = free_port()
    own = {"server": f"127.0.0.1:{port}", "run": str(tmp_path / "run.toml"), "set": [], "data": [], "devices": {}}
    with processes(tmp_path) as started:
        started.start(
            *("honest", "client", "--name", "honest", "--server", own["server"], "--run", own["run"], "--insecure"),
            *("--out", tmp_path / "honest"),
        )
        options = json.dumps({**own, "name": "lying", "folder": str(tmp_path / "lying"), "code": LYING_WORKER})
        started.start("lying", options, code=SUPERVISOR)
        with Federation(tmp_path / "federation", port=port, keys=None) as federation:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            before = memory_bytes("self", "VmRSS")
            with largest(federation.home / "objects") as stored:
                out = server.serve(config, tmp_path / "out", federation, announce=print)
            assert 0 < stored[0] < 20_000_000
            assert memory_bytes("self", "VmHWM") - before < 200_000_000
            assert memory_bytes(federation.superlink.pid, "VmHWM") < 300_000_000
    ledger = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    trained = {(line["client"], line["round"]): line["failed"] for line in ledger if line["task"] == "train"}
    lies = {number: trained.pop(("lying", number)) for number in (1, 2, 3)}
    assert lies.pop(1).startswith("its answer takes at least ")
    assert lies == {
        2: "its update reports 'qualified', a metric that neither the run nor its method declares",
        3: "its update has NaN or infinity in model.embed_tokens.weight",
    }
    assert trained == {**{("honest", number): None for number in (1, 2, 3, 4)}, ("lying", 4): None}
    report.write([out], html=tmp_path / "page.html")
