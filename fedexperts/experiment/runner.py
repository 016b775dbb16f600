"""Executes a run, from its settings to its results folder."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import UTC, datetime
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from fedexperts.config import RunConfig, with_current_names
from fedexperts.core.devices import UTILIZATION
from fedexperts.core.ledger import Ledger
from fedexperts.data.settings import PLAIN
from fedexperts.engines.local import LocalEngine
from fedexperts.errors import BadRun, BadValue, Damaged
from fedexperts.experiment import checkpoint, control, trackers
from fedexperts.experiment.assess import assess, assess_base, failures, reported_scores, require_answers
from fedexperts.experiment.client_task import is_eval_round
from fedexperts.experiment.plan import plan
from fedexperts.experiment.pooled import reports_of
from fedexperts.experiment.predictions import keep_predictions
from fedexperts.experiment.progress import Progress, Quiet
from fedexperts.experiment.reference_lines import lines_of
from fedexperts.experiment.runtime import clock_for, devices_of, runtime_for
from fedexperts.experiment.setup import INPUTS, Parts, Prepared, prepare_run, versions, without_weights
from fedexperts.experiment.undo import Undo, undo_for
from fedexperts.federation import federate, steps
from fedexperts.io.files import locked, write_text
from fedexperts.io.manifest import MANIFEST, append, changed, finite, object_or_empty, read_object, write_manifest, write_sealed
from fedexperts.io.toml import different, flattened, to_toml
from fedexperts.methods.contract import Method
from fedexperts.moe.device import kind_of
from fedexperts.types import Engine, Server

MAY_DIFFER = (
    "federation.workers",
    "federation.gpus_per_worker",
    "federation.min_clients",
    "federation.round_seconds",
    "track.to",
    "checkpoint.keep",
    "evaluation.predictions",
    "federation.stop.patience",
    "federation.stop.min_delta",
    "federation.stop.target",
    "data.template",  # as far as it leads to the same templates: see `require_same_inputs`
    "training.device",  # as far as it is of the same kind: see `require_same_kind`
)
"""Settings that a resumed run may change, because they do not affect clients' answers."""

BEFORE = {
    "model.dtype": "float32",
    "training.precision": "auto",
    "training.gradient_accumulation_steps": 1,
    "training.gradient_checkpointing": False,
    "training.warmup_steps": 0,
    "training.packing": False,
    "federation.wire_dtype": "float32",
    "devices.out_of_memory": "train anyway",
    "devices.utilization": UTILIZATION,
    "training.device": "cpu",
    "training.dropout": 0.0,
    "training.schedule": "constant",
    "training.final_lr": 1e-6,
    "evaluation.score": "after_aggregation",
    "evaluation.perplexity": True,
    "evaluation.retained": [],
    "evaluation.drift": False,
    "data.names": [],
    "data.own": False,
    "data.template": PLAIN,
    "checkpoint.best": False,
    "data.too_long": "cut",
}
"""Values of these settings in runs that started before the settings existed; fields of methods then had their defaults."""

NO_EXPERT_SENT = "no client sent an expert, so the training of experts is lost and they stay as they are; "


def run(
    config: RunConfig,
    out: Path,
    *,
    resume: bool = False,
    label: str | None = None,
    setting: str = "",
    progress: Progress | None = None,
    parts: Parts | None = None,
    together: Path | None = None,
    engine: Callable[[Prepared, Path], AbstractContextManager[Engine]] | None = None,
) -> Path:
    """Executes the run `config` and returns its results folder, `out`.

    label, setting: names of the method and of the run file in reports. parts: cache shared with other runs. together: folder of
    the comparison that the run belongs to, for trackers that store several runs in one place; None: `out`. engine: used in place
    of the engine of the run file (for example `flower.over(grid)`).

    Raises:
        BadValue: the settings, the data or the model do not allow the run; nothing has been written.
        BadRun: `out` contains another run, or client states are missing; or too few clients of a round answered, and the run can
            be resumed before that round.
        Busy: another process is running in `out`.
    """
    torch.set_num_threads(config.training.threads)
    require_extras(config)
    claim(config, out, resume)
    prepared = same_as_begun(prepare_run(config, label, setting, parts), out)
    total = len(steps(prepared.method, config.federation.rounds))
    with locked(out), progress or Quiet() as shown:
        ledger = Ledger(clock_for(prepared), shown.answered)
        write_start(prepared, out, shown)
        behind = checkpoint.rewind(out, prepared.method, config.federation.rounds, shown.say)
        shown.start(f"{setting}: {prepared.label}" if setting else prepared.label, config.seed, *in_rounds(prepared, behind))
        about = trackers.Tracked(out, together or out, prepared.label, setting, config.seed, config.resolved())
        reason = control.reason_to_stop(control.history(out), config.federation.stop)
        with trackers.tracking(config.track.to, about, done=behind == total or bool(reason)) as track:
            if behind == total or reason:
                return out
            checkpoint.require_client_state(out)
            if behind == 0 and prepared.retained.examples:
                assess_base(prepared, out)
            with (engine or engine_for)(prepared, out) as running:
                server, prepared = checkpoint.load(out, prepared.server), without_weights(prepared)
                if behind == 0 and not prepared.method.setup_tasks:
                    assess(prepared, server, running, ledger, out, shown, {})
                started, noted, undo = perf_counter(), False, undo_for(prepared, running, out, shown)
                # The name is used again, so that the first weights stay no longer than the first round
                for server in rounds_after(server, prepared, running, ledger, undo):  # noqa: B020
                    if not noted and no_expert_sent(ledger):
                        shown.noted(server, NO_EXPERT_SENT + prepared.method.declare().if_no_expert_is_sent)
                        noted = True
                    finish_round(prepared, server, running, ledger, out, shown, perf_counter() - started, undo)
                    track()  # after the checkpoint: a resumed run never truncates lines that a tracker has received
                    shown.round(server)
                    if server.round and (reason := control.reason_to_stop(control.history(out), config.federation.stop)):
                        shown.say(f"{prepared.label}, seed {config.seed}: stopped after {reason}")
                        break
                    started = perf_counter()
    return out


def in_rounds(prepared: Prepared, behind: int) -> tuple[int, int]:
    """How many rounds are done and how many there are, after `behind` steps, of which setup tasks are no rounds."""
    rounds = prepared.config.federation.rounds
    return max(0, behind - (len(steps(prepared.method, rounds)) - rounds)), rounds


def rounds_after(server: Server, prepared: Prepared, engine: Engine, ledger: Ledger, undo: Undo | None) -> Iterator[Server]:
    """The run's rounds that `server` does not have behind it."""
    federation = prepared.config.federation
    return federate(
        replace(server, clients=prepared.participants),
        prepared.method,
        engine,
        ledger,
        rounds=federation.rounds,
        clients_per_round=federation.clients_per_round or len(server.clients),
        by_task=federation.sampling == "by task",
        reports=reports_of(prepared),
        guard=undo,
    )


def finish_round(
    prepared: Prepared,
    server: Server,
    engine: Engine,
    ledger: Ledger,
    out: Path,
    progress: Progress,
    seconds: float,
    undo: Undo | None = None,
) -> None:
    """Completes a round: writes its log lines, evaluates if an evaluation is due, and saves the checkpoint.

    Raises:
        BadRun: too few clients answered.
    """
    fewest = prepared.config.federation.min_clients
    progress.failed(server, failures(ledger))
    scores = reported_scores(ledger)
    require_answers(server, ledger, fewest if server.round else max(fewest, 1))
    keep_predictions(prepared, server.round, ledger, out)
    record(out, server, ledger, seconds, undo.line if undo and server.round else {})
    settings, score = prepared.config.checkpoint, None
    if due(server, prepared.method, prepared.config):
        known = undo.metrics if undo and server.round else None
        validation = assess(prepared, server, engine, ledger, out, progress, scores, known)
        score = control.signed(validation) if settings.best and server.round else None
    checkpoint.save(out, server, settings.keep, score if score is None or isfinite(score) else None)


def due(server: Server, method: Method, config: RunConfig) -> bool:
    """Whether an evaluation is due: after the last setup task, every `evaluation.every` rounds, and after the last round."""
    if server.round == 0:
        return server.task == method.setup_tasks[-1]
    return is_eval_round(server.round, config.evaluation, config.federation.rounds)


def record(out: Path, server: Server, ledger: Ledger, seconds: float, more: Mapping[str, Any]) -> None:
    """Writes a line for the round, with `more`, and one for each client."""
    entries = ledger.entries
    losses = [entry.loss for entry in entries if entry.loss is not None]
    line = {
        "round": server.round,
        "task": server.task,
        "clients": [entry.client for entry in entries],
        "failed": failures(ledger),
        "loss": sum(losses) / len(losses) if losses else None,
        "seconds": seconds,
        "clock_seconds": ledger.clock_seconds,
        "holds": {client: {block: list(ids) for block, ids in experts.items()} for client, experts in ledger.holds.items()},
        **({"sends": ledger.sends} if ledger.sends else {}),
        **({"uses": ledger.uses} if ledger.uses else {}),
        **more,
    }
    append(out / "rounds.jsonl", [line])
    append(out / "ledger.jsonl", [entry.as_json() for entry in entries])
    ledger.clear()


def no_expert_sent(ledger: Ledger) -> bool:
    """Whether the clients of the current round select the experts that they send, and all selected none."""
    used = [entry.client for entry in ledger.entries if not entry.failed]
    return bool(used) and all(client in ledger.sends and not any(ledger.sends[client].values()) for client in used)


def engine_for(prepared: Prepared, out: Path) -> AbstractContextManager[Engine]:
    """The engine of the run file, with clients on this machine."""
    if prepared.config.federation.engine == "flower":
        from fedexperts.experiment.flower import simulated  # an extra

        return simulated(prepared, out)
    federation = prepared.config.federation
    return LocalEngine(runtime_for(prepared, out), federation.workers, devices_of(prepared.config), federation.round_seconds)


def require_extras(config: RunConfig) -> None:
    """Raises BadValue if the run needs packages or GPUs that are not available."""
    require_flower(config)
    trackers.require(config.track.to)


def require_flower(config: RunConfig) -> None:
    """Raises BadValue if the run needs Flower or GPUs that are not available."""
    if config.federation.engine == "flower" and not (find_spec("flwr") and find_spec("ray")):
        raise BadValue(
            'federation.engine = "flower" needs Flower with its simulation, which is not installed; '
            'install it (pip install "fedexperts[flower]"), or set federation.engine = "local"'
        )
    needed, available = config.federation.gpus_per_worker, torch.cuda.device_count()
    if needed > available:
        raise BadValue(f"federation.gpus_per_worker = {needed:g}, but this machine has {available}; lower it")


def claim(config: RunConfig, out: Path, resume: bool) -> None:
    """Raises BadRun if `out` contains other files, or a run and `resume` is off, or a run with other settings."""
    resolved = out / "resolved.json"
    files = list(out.iterdir()) if out.is_dir() else []  # listed before `resolved`, which another process may be writing first
    if not resolved.exists():
        if (out.exists() and not out.is_dir()) or any(not path.name.startswith(".resolved.json.") for path in files):
            raise BadRun(f"{out} is not empty and holds no run of ours; give another folder with --out")
        return
    if not resume:
        raise BadRun(f"{out} holds a run already; continue it with --resume, or give another folder with --out")
    require_begun(out)
    defaults = config.model_copy(update={"method": {"name": config.method["name"]}}).resolved()["method"]
    begun = {**flattened({"method": defaults}), **BEFORE, **flattened(with_current_names(read_object(resolved)))}
    more = config.federation.rounds > begun["federation.rounds"]
    settings = [key for key in different(begun, config.resolved()) if key not in MAY_DIFFER]
    if settings := [key for key in settings if not (more and key == "federation.rounds")]:
        raise BadRun(
            f"{out} holds a run with other settings: {', '.join(settings)} changed; resume it with the run file it had "
            f"({out / 'run.toml'}), or start anew with another --out"
        )


def require_begun(out: Path) -> None:
    """Raises Damaged if the settings or the versions of the run in `out` are not what it wrote when it began."""
    wrong = changed(out)
    if error := wrong.get("resolved.json") or wrong.get("versions.json"):
        raise Damaged(f"{error}, so the run cannot be continued; {checkpoint.REMEDY}")
    if "federation" not in read_object(out / "resolved.json"):  # it may have changed places with the manifest
        raise Damaged(f"{out / 'resolved.json'} holds no settings of a run, so it cannot be continued; {checkpoint.REMEDY}")


def same_as_begun(prepared: Prepared, out: Path) -> Prepared:
    """`prepared`, if the run in `out` began with the same model, data and kind of device.

    Raises:
        BadRun: it did not.
    """
    require_same_inputs(prepared, out)
    require_same_kind(kind_of(devices_of(prepared.config)), out)
    return prepared


def require_same_inputs(prepared: Prepared, out: Path) -> None:
    """Raises BadRun if the model or the data of the run in `out` have changed since it started."""
    if (out / "versions.json").exists():
        begun = read_object(out / "versions.json")
        now = versions(prepared)
        begun = {"template_hashes": dict.fromkeys(now["template_hashes"], PLAIN), **begun}  # which all older runs have
        inputs = [name for name in INPUTS if name in begun]  # older runs recorded fewer
        changed = [f"{INPUTS[name]} changed" for name in inputs if begun[name] != now[name]]
        if changed:
            raise BadRun(
                f"{out} holds a run that began with other files: {', '.join(changed)}; "
                "restore its model and data, or start a new run with another --out"
            )


def require_same_kind(kind: str, out: Path) -> None:
    """Raises BadRun if the run in `out` began on another kind of device, which gives other bits."""
    if (out / "versions.json").exists():
        begun = read_object(out / "versions.json").get("device", BEFORE["training.device"])
        if begun != kind:
            raise BadRun(
                f"{out} holds a run that began on {begun}, and would go on on {kind}, which gives other bits; resume it where "
                "there is the former, with training.device set to it, or start anew with another --out"
            )


def write_start(prepared: Prepared, out: Path, progress: Progress) -> None:
    """Writes the files of `out` that do not change during the run, and says which of them had changed."""
    for error in changed(out).values():
        progress.say(f"{error}; it is written again")
    training, rounds = prepared.config.training, prepared.config.federation.rounds
    earlier = object_or_empty(out / "resolved.json").get("federation", {}).get("rounds", rounds)
    if earlier < rounds and training.schedule != "constant":
        progress.say(
            f"{out} began with {earlier} rounds and now has {rounds}: its {training.schedule} of the learning rate goes by their "
            "number, so the result is not that of a run that had it from the start"
        )
    resolved = prepared.config.resolved()
    if (out / MANIFEST).exists():
        write_sealed(out / MANIFEST, {})  # until all of these are written again
    write_text(out / "resolved.json", json.dumps(resolved))  # written first: from here on the run can be resumed
    write_text(out / "run.toml", to_toml(resolved))
    if not (out / "versions.json").exists():  # a resumed run keeps the versions that it started with
        begun = {"device": kind_of(devices_of(prepared.config)), "begun": datetime.now(UTC).isoformat(timespec="seconds")}
        write_text(out / "versions.json", json.dumps({**versions(prepared), **begun}))
    prepared.clients.save(out / "partition.json")
    write_text(out / "reference_lines.jsonl", "".join(json.dumps(finite(line)) + "\n" for line in lines_of(prepared)))
    write_text(out / "plan.json", json.dumps(finite(plan(prepared)), allow_nan=False))  # reports read a folder that has it
    write_manifest(out)
