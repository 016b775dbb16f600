"""A run from its settings to its results folder."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from fedexperts.config import RunConfig
from fedexperts.core import evaluation
from fedexperts.core.devices import UTILISATION
from fedexperts.core.ledger import Ledger
from fedexperts.engines.base import Reports
from fedexperts.engines.local import LocalEngine
from fedexperts.errors import BadRun, BadValue
from fedexperts.experiment import checkpoint, trackers
from fedexperts.experiment.client_task import is_eval_round
from fedexperts.experiment.plan import plan
from fedexperts.experiment.progress import Progress, Quiet
from fedexperts.experiment.runtime import clock_for, encoder_for, runtime_for, task_for
from fedexperts.experiment.setup import INPUTS, Parts, Prepared, prepare_run, versions, without_weights
from fedexperts.federation import answers, federate, steps
from fedexperts.io.files import locked, write_text
from fedexperts.io.toml import different, flattened, to_toml
from fedexperts.methods.contract import Method
from fedexperts.types import Engine, Server

MAY_DIFFER = (
    "federation.workers",
    "federation.gpus_per_worker",
    "federation.min_clients",
    "federation.round_seconds",
    "track.to",
)
"""Settings that a resumed run may change: they do not change what clients answer."""

BEFORE = {
    "devices.out_of_memory": "train anyway",
    "devices.utilisation": UTILISATION,
    "training.dropout": 0.0,
    "training.schedule": "constant",
    "training.final_lr": 1e-6,
    "evaluation.score": "after_aggregation",
    "evaluation.retained": [],
    "evaluation.drift": False,
    "data.names": [],
    "data.own": False,
}
"""What a run did that began before these settings were there."""

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
    """Runs `config` and returns its results folder, `out`. `label` and `setting` are what reports call its method and run file.

    `parts` are those of runs before it, which are not made again. `together` is the folder of the comparison that it is in: what
    a tracker keeps of several runs in one place is there, else in `out`. `engine` carries the jobs in place of the one that the
    run file names (`flower.over` a grid, for one).

    Raises:
        BadValue: a setting, the data or the model does not allow the run; nothing was written then.
        BadRun: `out` holds another run, or not all that its clients keep to themselves; or too few clients of a round answered,
            and the run can be resumed before it.
        Busy: another process is at work in `out`.
    """
    torch.set_num_threads(config.training.threads)
    require_flower(config)
    trackers.require(config.track.to)
    claim(config, out, resume)
    prepared = prepare_run(config, label, setting, parts)
    require_same_inputs(prepared, out)
    total = len(steps(prepared.method, config.federation.rounds))
    with locked(out), progress or Quiet() as shown:
        ledger = Ledger(clock_for(prepared), shown.answered)
        write_start(prepared, out)
        behind = checkpoint.rewind(out, prepared.method, config.federation.rounds)
        shown.start(f"{setting}: {prepared.label}" if setting else prepared.label, config.seed, behind, total)
        about = trackers.Tracked(out, together or out, prepared.label, setting, config.seed, config.resolved())
        with trackers.tracking(config.track.to, about, done=behind == total) as tell:
            if behind == total:
                return out
            with (engine or engine_for)(prepared, out) as opened:
                course, prepared = begin(prepared, opened, ledger, out, shown), without_weights(prepared)
                started, noted = perf_counter(), False
                for server in course:
                    if not noted and no_expert_sent(ledger):
                        shown.noted(server, NO_EXPERT_SENT + prepared.method.declare().if_no_expert_is_sent)
                        noted = True
                    finish_round(prepared, server, opened, ledger, out, shown, perf_counter() - started)
                    tell()  # after the checkpoint: no line that a tracker has is cut off again
                    shown.round(server)
                    started = perf_counter()
    return out


def begin(prepared: Prepared, engine: Engine, ledger: Ledger, out: Path, progress: Progress) -> Iterator[Server]:
    """The rounds that are still to be done, from the last checkpoint in `out`; nothing else holds their first weights."""
    checkpoint.require_kept(out)
    federation, method = prepared.config.federation, prepared.method
    server = checkpoint.load(out, prepared.server)
    if server.task == "start":
        if prepared.retained.examples:
            assess_base(prepared, out)
        if not method.setup_tasks:
            assess(prepared, server, engine, ledger, out, progress, {})
    return federate(
        replace(server, clients=prepared.participants),
        method,
        engine,
        ledger,
        rounds=federation.rounds,
        clients_per_round=federation.clients_per_round or len(server.clients),
        by_task=federation.sampling == "by task",
        reports=reports_of(prepared),
    )


def finish_round(
    prepared: Prepared, server: Server, engine: Engine, ledger: Ledger, out: Path, progress: Progress, seconds: float
) -> None:
    """What follows on a round: its lines in the logs, an evaluation where one is due, the checkpoint.

    Raises:
        BadRun: too few clients answered.
    """
    fewest = prepared.config.federation.min_clients
    progress.failed(server, failures(ledger))
    scores = reported_scores(ledger)
    require_answers(server, ledger, fewest if server.round else max(fewest, 1))
    record(out, server, ledger, seconds)
    if due(server, prepared.method, prepared.config):
        assess(prepared, server, engine, ledger, out, progress, scores)
    checkpoint.save(out, server)


def reports_of(prepared: Prepared) -> Reports:
    """The metrics that the run asks clients for."""
    return partial(task_for(prepared).reports, prepared.data, prepared.clients.metrics())


def due(server: Server, method: Method, config: RunConfig) -> bool:
    """Whether the server is evaluated now: after all stages, every few rounds, and at the end."""
    if server.round == 0:
        return server.task == method.setup_tasks[-1]
    return is_eval_round(server.round, config.evaluation, config.federation.rounds)


def record(out: Path, server: Server, ledger: Ledger, seconds: float) -> None:
    """A line for the round and one for each client."""
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
        "holds": {client: {block: list(ids) for block, ids in held.items()} for client, held in ledger.holds.items()},
        **({"sends": ledger.sends} if ledger.sends else {}),
        **({"uses": ledger.uses} if ledger.uses else {}),
    }
    append(out / "rounds.jsonl", [line])
    append(out / "ledger.jsonl", [entry.as_json() for entry in entries])
    ledger.clear()


def require_answers(server: Server, ledger: Ledger, fewest: int = 1) -> None:
    """Raises BadRun when clients failed, and fewer than `fewest` did not."""
    failed, asked = failures(ledger), len(ledger.entries)
    if failed and asked - len(failed) < fewest:
        client, reason = next(iter(failed.items()))
        number = f"all {asked}" if len(failed) == asked else f"{len(failed)} of {asked}"
        quorum = f", and federation.min_clients = {fewest} must answer" if fewest > 1 else ""
        raise BadRun(
            f"round {server.round}: {number} clients failed, {client} because {reason}{quorum}; "
            "what came before is saved: mend the cause and go on (run with --resume, compare by itself), or, if it lies in the "
            "settings or the data, start anew with another --out"
        )


def no_expert_sent(ledger: Ledger) -> bool:
    """Whether clients of the round under way chose which of their experts to send, and all chose none."""
    used = [entry.client for entry in ledger.entries if not entry.failed]
    return bool(used) and all(client in ledger.sends and not any(ledger.sends[client].values()) for client in used)


def failures(ledger: Ledger) -> dict[str, str]:
    """Client → why it was left out, of the round under way."""
    return {entry.client: entry.failed for entry in ledger.entries if entry.failed}


def reported_scores(ledger: Ledger) -> dict[str, evaluation.Scores]:
    """The scores that clients gave with what they trained in the round under way: none but before aggregation."""
    reported = {entry.client: entry.metrics["scores"] for entry in ledger.entries if "scores" in entry.metrics}
    return {client: evaluation.Scores.from_json(scores) for client, scores in reported.items()}


def assess_base(prepared: Prepared, out: Path) -> None:
    """What the untouched base scores on the retained examples, into evals.jsonl."""
    asked, examples = prepared.config.evaluation, prepared.retained.examples
    size = (asked.generate_tokens, asked.batch_size)
    found = evaluation.by_example(prepared.base.model, examples, encoder_for(prepared), *size)
    append(out / "evals.jsonl", [against_base(0, None, {"retained": found})])


def assess(
    prepared: Prepared,
    server: Server,
    engine: Engine,
    ledger: Ledger,
    out: Path,
    progress: Progress,
    reported: Mapping[str, evaluation.Scores],
) -> None:
    """Every client's scores on its own examples of `evaluation.split`, and those of all clients together, into evals.jsonl.

    After the last round also how each client's model stands against the base. Where clients are scored before aggregation, they
    have `reported` their scores already, and of who took no part the last ones count.
    """
    server, task = replace(server, task="evaluate", clients=prepared.server.clients), task_for(prepared)
    metrics: dict[str, Mapping[str, Any]] = {}
    if task.evaluates(server.round):
        progress.evaluating(len(server.clients))
        updates = answers(server, prepared.method, engine, ledger, server.clients.values(), reports_of(prepared))
        metrics = {update.client: update.metrics for update in updates}
        require_answers(server, ledger)
    given = {client: found["scores"] for client, found in metrics.items() if "scores" in found}
    scores = {client: evaluation.Scores.from_json(found) for client, found in given.items()} | dict(reported)
    latest = {**last_scores(out), **scores} if task.scores_after_training else scores
    together = evaluation.merge(latest[client] for client in server.clients if client in latest)
    with_sums = task.scores_after_training  # the next rounds count on them, also of a resumed run
    own = [line for client in server.clients if client in scores for line in score_lines(scores[client], client, with_sums)]
    count = sum(part.examples for part in together.tasks.values())
    whole = {"client": None, "task": None, "examples": count, "metric": "overall", "value": together.overall()}
    lines = [{"round": server.round, **line} for line in [*own, *score_lines(together, None), whole]]
    ends = [against_base(server.round, client, found) for client, found in metrics.items() if found.keys() - {"scores"}]
    append(out / "evals.jsonl", [*lines, *ends])
    append(out / "ledger.jsonl", [entry.as_json() for entry in ledger.entries])
    progress.failed(server, failures(ledger))
    progress.scored(server, together)
    ledger.clear()


def against_base(round: int, client: str | None, found: Mapping[str, Any]) -> dict[str, Any]:
    """A line of what a client's model (None: the base itself) retained, and of its routers' drift.

    It has no value of its own, so readers that do not know it pass it over.
    """
    count = sum(task["examples"] for task in found.get("retained", {}).values())
    line = {"round": round, "client": client, "task": None, "examples": count, "metric": None, "value": None}
    return {**line, **{name: each for name, each in found.items() if name != "scores"}}


def last_scores(out: Path) -> dict[str, evaluation.Scores]:
    """Each client's latest scores in evals.jsonl."""
    found: dict[str, dict[str, Any]] = {}
    for line in map(json.loads, (out / "evals.jsonl").read_text().splitlines() if (out / "evals.jsonl").exists() else ()):
        if line["client"] is not None and "sums" in line:
            found.setdefault(line["client"], {})[line["task"]] = line["sums"]
    return {client: evaluation.Scores.from_json(tasks) for client, tasks in found.items()}


def score_lines(scores: evaluation.Scores, client: str | None, with_sums: bool = False) -> Iterator[Mapping[str, Any]]:
    for task, metrics in scores.by_task().items():
        found = {"metric": scores.metric(task), "value": scores.main(task), "metrics": metrics}
        if with_sums:
            found["sums"] = asdict(scores.tasks[task])
        yield {"client": client, "task": task, "examples": scores.tasks[task].examples, **found}


def engine_for(prepared: Prepared, out: Path) -> AbstractContextManager[Engine]:
    """The engine that the run file names, over clients on this machine."""
    if prepared.config.federation.engine == "flower":
        from fedexperts.experiment.flower import simulated  # an extra

        return simulated(prepared, out)
    return LocalEngine(runtime_for(prepared, out), prepared.config.federation.workers)


def require_flower(config: RunConfig) -> None:
    """Raises BadValue when the run needs Flower, or graphics cards, and there is none."""
    if config.federation.engine == "flower" and not (find_spec("flwr") and find_spec("ray")):
        raise BadValue(
            'federation.engine = "flower" needs Flower with its simulation, which is not installed; '
            'install it (pip install "fedexperts[flower]"), or set federation.engine = "local"'
        )
    asked, there = config.federation.gpus_per_worker, torch.cuda.device_count()
    if asked > there:
        raise BadValue(f"federation.gpus_per_worker = {asked:g}, but this machine has {there}; lower it")


def claim(config: RunConfig, out: Path, resume: bool) -> None:
    """Raises BadRun when `out` cannot take this run: it holds one and `resume` is off, or one with other settings."""
    there = out / "resolved.json"
    found = list(out.iterdir()) if out.is_dir() else []  # before `there` is looked for: another process may be writing it first
    if not there.exists():
        if (out.exists() and not out.is_dir()) or any(not path.name.startswith(".resolved.json.") for path in found):
            raise BadRun(f"{out} is not empty and holds no run of ours; give another folder with --out")
        return
    if not resume:
        raise BadRun(f"{out} holds a run already; continue it with --resume, or give another folder with --out")
    begun = {**BEFORE, **flattened(json.loads(there.read_text()))}
    changed = [key for key in different(begun, config.resolved()) if key not in MAY_DIFFER]
    if changed:
        raise BadRun(
            f"{out} holds a run with other settings: {', '.join(changed)} changed; resume it with the run file it had "
            f"({out / 'run.toml'}), or start anew with another --out"
        )


def require_same_inputs(prepared: Prepared, out: Path) -> None:
    """Raises BadRun when the run in `out` began with another model or other data under the same names."""
    if (out / "versions.json").exists():
        begun = json.loads((out / "versions.json").read_text())
        now = versions(prepared)
        inputs = [name for name in INPUTS if name in begun]  # runs from before noted fewer
        changed = [f"{INPUTS[name]} changed" for name in inputs if begun[name] != now[name]]
        if changed:
            raise BadRun(
                f"{out} holds a run that began with other files: {', '.join(changed)}; "
                "bring back the model and data it had, or start anew with another --out"
            )


def write_start(prepared: Prepared, out: Path) -> None:
    """What does not change from here on."""
    resolved = prepared.config.resolved()
    write_text(out / "resolved.json", json.dumps(resolved))  # first: with it the folder holds a run, which can be resumed
    write_text(out / "run.toml", to_toml(resolved))
    if not (out / "versions.json").exists():  # a resumed run keeps those that it began with
        write_text(out / "versions.json", json.dumps(versions(prepared)))
    prepared.clients.save(out / "partition.json")
    write_text(out / "plan.json", json.dumps(plan(prepared)))  # last: with it the folder is one that a report reads


def append(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Adds `lines` as JSON; they are on disk before the checkpoint that counts on them."""
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
