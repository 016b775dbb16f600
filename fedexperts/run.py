"""A run from its settings to its results folder; several runs side by side; and what a run will take before it starts."""

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from shutil import which
from time import perf_counter
from typing import Any

import torch

from fedexperts import checkpoint, evaluate
from fedexperts.base.load import Base, load
from fedexperts.client import install
from fedexperts.config import RunConfig, build, different, to_toml, with_settings
from fedexperts.data.clients import Clients, make_clients
from fedexperts.data.encode import Encoder
from fedexperts.devices import memories
from fedexperts.engines.kept import Keeper
from fedexperts.engines.local import LocalEngine, Site
from fedexperts.errors import BadRun, BadValue, nearest
from fedexperts.federation import done, federate, jobs_for, steps
from fedexperts.files import write_text
from fedexperts.ledger import Ledger
from fedexperts.methods import METHODS
from fedexperts.methods.base import patch_for
from fedexperts.methods.submodel import even_number, evenly
from fedexperts.moe import rows
from fedexperts.moe.anatomy import anatomy
from fedexperts.moe.flops import footprint, per_step
from fedexperts.moe.shrink import shrink
from fedexperts.moe.tuning import prepare
from fedexperts.progress import Progress, Quiet
from fedexperts.types import Bench, Client, Engine, Job, Method, Patch, Server, Update

MAY_DIFFER = ("federation.workers",)
"""Settings that a resumed run may change: they do not change the result."""


@dataclass(frozen=True)
class Prepared:
    """A run that can start."""

    config: RunConfig
    method: Method
    label: str  # of the method, in tables
    base: Base
    clients: Clients
    server: Server


@dataclass(frozen=True)
class Work:
    """What a client does with a job: what its method says, or an evaluation."""

    method: Method
    generate_tokens: int
    batch_size: int

    def __call__(self, job: Job, bench: Bench) -> Update:
        return self.evaluate(job, bench) if job.task == "evaluate" else self.method.train(job, bench)

    def evaluate(self, job: Job, bench: Bench) -> Update:
        """The client's own test examples, under what the server sent and what the client keeps."""
        model = install(job, bench)
        scores = evaluate.score(model, bench.data.test, bench.encoder, self.generate_tokens, self.batch_size)
        return Update(job.client, job.round, job.task, Patch({}), len(bench.data.train), metrics=scores.to_json())


def run(
    config: RunConfig, out: Path, *, resume: bool = False, label: str | None = None, progress: Progress | None = None
) -> Path:
    """Runs `config` and returns its results folder, `out`.

    Raises:
        BadValue: a setting, the data or the model does not allow the run; nothing was written then.
        BadRun: `out` holds another run; or all clients of a round failed, and the run can be resumed before it.
    """
    torch.set_num_threads(config.training.threads)
    claim(config, out, resume)
    prepared = prepare_run(config, label)
    require_same_inputs(prepared, out)
    write_start(prepared, out)
    with engine_for(prepared, out) as engine, progress or Quiet() as shown:
        rounds(prepared, out, shown.watch(engine), shown)
    return out


def rounds(prepared: Prepared, out: Path, engine: Engine, progress: Progress) -> None:
    """All rounds that are not done yet, each with its evaluation, its lines in the logs and its checkpoint."""
    federation, method = prepared.config.federation, prepared.method
    ledger = Ledger()
    begun = checkpoint.load(out, prepared.server)
    total = len(steps(method, federation.rounds))
    progress.start(prepared.label, prepared.config.seed, done(begun, method, federation.rounds), total)
    if begun.task == "start" and not method.before:
        assess(prepared, begun, engine, ledger, out, progress)
    number = federation.clients_per_round or len(begun.clients)
    by_task = federation.sampling == "by task"
    started = perf_counter()

    for server in federate(begun, method, engine, ledger, rounds=federation.rounds, clients_per_round=number, by_task=by_task):
        progress.failed(server, failures(ledger))
        record(out, server, ledger, perf_counter() - started)
        if due(server, method, prepared.config):
            assess(prepared, server, engine, ledger, out, progress)
        checkpoint.save(out, server)
        progress.round(server)
        started = perf_counter()


def due(server: Server, method: Method, config: RunConfig) -> bool:
    """Whether the server is evaluated now: after all stages, every few rounds, and at the end."""
    if server.round == 0:
        return server.task == method.before[-1]
    return server.round % config.evaluation.every == 0 or server.round == config.federation.rounds


def record(out: Path, server: Server, ledger: Ledger, seconds: float) -> None:
    """A line for the round and one for each client.

    Raises:
        BadRun: no client gave a usable answer.
    """
    entries = ledger.entries
    failed = failures(ledger)
    if entries and len(failed) == len(entries):
        client, reason = next(iter(failed.items()))
        raise BadRun(
            f"round {server.round}: all {len(entries)} clients failed, {client} because {reason}; "
            "what came before is saved: mend the cause and run again with --resume"
        )
    losses = [entry.loss for entry in entries if entry.loss is not None]
    line = {
        "round": server.round,
        "task": server.task,
        "clients": [entry.client for entry in entries],
        "failed": failed,
        "loss": sum(losses) / len(losses) if losses else None,
        "seconds": seconds,
        "holds": {client: {block: list(ids) for block, ids in held.items()} for client, held in ledger.holds.items()},
    }
    append(out / "rounds.jsonl", [line])
    append(out / "ledger.jsonl", [entry.as_json() for entry in entries])
    ledger.clear()


def failures(ledger: Ledger) -> dict[str, str]:
    """Client → why it was left out, of the round under way."""
    return {entry.client: entry.failed for entry in ledger.entries if entry.failed}


def assess(prepared: Prepared, server: Server, engine: Engine, ledger: Ledger, out: Path, progress: Progress) -> None:
    """Every client's scores on its own test examples, and those of all clients together, into evals.jsonl."""
    asked = replace(server, task="evaluate")
    progress.evaluating(len(server.clients))
    jobs = ledger.sent(jobs_for(asked, prepared.method, asked.clients.values()))
    scores = {update.client: evaluate.Scores.from_json(update.metrics) for update in ledger.received(engine.run(jobs))}
    together = evaluate.merge(scores[client] for client in server.clients if client in scores)
    lines = [line for client in server.clients if client in scores for line in score_lines(scores[client], client)]
    count = sum(part.examples for part in together.tasks.values())
    whole = {"client": None, "task": None, "examples": count, "metric": "overall", "value": together.overall()}
    append(out / "evals.jsonl", [{"round": server.round, **line} for line in [*lines, *score_lines(together, None), whole]])
    append(out / "ledger.jsonl", [entry.as_json() for entry in ledger.entries])
    progress.failed(asked, failures(ledger))
    progress.scored(server, together)
    ledger.clear()


def score_lines(scores: evaluate.Scores, client: str | None) -> Iterator[Mapping[str, Any]]:
    for task, metrics in scores.by_task().items():
        found = {"metric": scores.metric(task), "value": scores.main(task), "metrics": metrics}
        yield {"client": client, "task": task, "examples": scores.tasks[task].examples, **found}


def prepare_run(config: RunConfig, label: str | None = None) -> Prepared:
    """The base, the clients' data and the first server.

    Raises:
        BadValue: the model, the data, the devices or the method do not allow the run.
    """
    method = config.build_method()
    base = load(config.model.name, config.model.trust_remote_code)
    clients = make_clients(config.data, config.seed)
    server = first_server(config, base, clients)
    for client in server.clients.values():  # a client that can have no part in it says so now, not in the tenth round
        method.assign(replace(server, task=steps(method, 1)[0][1]), client)
    return Prepared(config, method, label or str(config.method["name"]), base, clients, server)


def first_server(config: RunConfig, base: Base, clients: Clients) -> Server:
    """The server before the first round: the base's weights that will be trained, or fresh adapters."""
    training = config.training.build()
    seed = str(config.seed)
    shape = anatomy(base.model)
    model = prepare(shrink(base.model, shape.all_experts), training.tuning, seed=f"{seed}/start")
    size = (training.batch_size, config.data.max_tokens)
    cost = footprint(base.model, training.tuning, size, optimizer=training.optimizer)
    devices = config.devices
    memory = memories(list(clients), cost.of(shape.all_experts), seed, gb=devices.memory_gb, share=devices.memory_share)
    known = {name: replace(clients.client(name), memory_bytes=memory[name]) for name in clients}
    return Server(weights=rows.read(model), layout=rows.layout(model), anatomy=shape, footprint=cost, clients=known, seed=seed)


def engine_for(prepared: Prepared, out: Path) -> LocalEngine:
    config, base = prepared.config, prepared.base
    site = Site(
        model=base.model,
        encoder=Encoder(base.tokenizer, config.data.max_tokens, base.encoder_decoder),
        training=config.training.build(),
        clients=prepared.server.clients,
        data=prepared.clients,
        work=Work(prepared.method, config.evaluation.generate_tokens, config.evaluation.batch_size),
        keeper=Keeper(out / "clients"),
    )
    return LocalEngine(site, config.federation.workers)


def plan(prepared: Prepared) -> dict[str, Any]:
    """What a run will work with, as plan.json says it: the model, and each client's data, memory and what fits it."""
    server = prepared.server
    full = server.footprint.of(server.anatomy.all_experts)
    clients = [client_plan(prepared, client, full) for client in server.clients.values()]
    return {
        "method": prepared.label,
        "seed": prepared.config.seed,
        "model": {
            "name": prepared.base.name,
            "parameters": sum(parameter.numel() for parameter in prepared.base.model.parameters()),
            "blocks": {
                name: {"num_experts": block.num_experts, "top_k": block.top_k} for name, block in server.anatomy.blocks.items()
            },
        },
        "clients": clients,
        "partition": prepared.config.data.partition.model_dump(mode="json", exclude_none=True),
        "full_bytes": full,
        "full_patch_bytes": sum(tensor.nbytes for tensor in server.weights.values()),
        "round_flops_estimated": round_flops(prepared),
        "warnings": warnings(prepared, clients),
    }


def round_flops(prepared: Prepared) -> float:
    """Floating point operations of one client's local steps on the whole model and full-length examples: the most it can be."""
    config, base = prepared.config, prepared.base
    training = config.training.build()
    model = prepare(shrink(base.model, prepared.server.anatomy.all_experts), training.tuning, seed="")
    lengths = [config.data.max_tokens] * training.batch_size
    return per_step(model)(lengths, lengths) * training.local_steps


def warnings(prepared: Prepared, clients: Sequence[Mapping[str, Any]]) -> list[str]:
    """What will not fit, as sentences."""
    over = [client["name"] for client in clients if client["first_experts"] and not client["first_fits"]]
    if not over:
        return []
    return [
        f"{len(over)} of {len(clients)} clients have less memory than {prepared.label} would use on them: {', '.join(over)}; "
        "it trains there all the same, and the report marks them"
    ]


def client_plan(prepared: Prepared, client: Client, full: int) -> dict[str, Any]:
    """`first_…`: of the client's first job; no experts where it has no part in that."""
    split, server, method = prepared.clients[client.name], prepared.server, prepared.method
    first = replace(server, task=steps(method, 1)[0][1])
    assignment = method.assign(first, client)
    held = assignment.experts if assignment else {}
    needed = server.footprint.of(held)
    return {
        "name": client.name,
        "task": client.task,
        "examples": len(split.train),
        "validation": len(split.validation),
        "test": len(split.test),
        "memory_bytes": client.memory_bytes,
        "experts_fit": experts_fit(server, client),
        "full_fits": client.memory_bytes is None or full <= client.memory_bytes,
        "tasks": prepared.clients.tasks(client.name),
        "first_task": first.task,
        "first_experts": sum(len(ids) for ids in held.values()),
        "first_bytes_down": patch_for(first, assignment).nbytes if assignment else 0,
        "first_fits": first.task != "train" or client.memory_bytes is None or needed <= client.memory_bytes,
    }


def experts_fit(server: Server, client: Client) -> int:
    """The most experts, spread evenly over the layers, that the client can train within its memory."""
    number = even_number(server, client)
    return sum(evenly(server.anatomy, number).values()) if number else 0


def claim(config: RunConfig, out: Path, resume: bool) -> None:
    """Raises BadRun when `out` cannot take this run: it holds one and `resume` is off, or one with other settings."""
    there = out / "resolved.json"
    if not there.exists():
        if out.exists() and (not out.is_dir() or any(not path.name.startswith(".resolved.json.") for path in out.iterdir())):
            raise BadRun(f"{out} is not empty and holds no run of ours; give another folder with --out")
        return
    if not resume:
        raise BadRun(f"{out} holds a run already; continue it with --resume, or give another folder with --out")
    changed = [key for key in different(json.loads(there.read_text()), config.resolved()) if key not in MAY_DIFFER]
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
        changed = [f"{name} changed" for name in ("model_hash", "data_hashes") if begun[name] != now[name]]
        if changed:
            raise BadRun(
                f"{out} holds a run that began with other files: {', '.join(changed)}; "
                "bring back the model and data it had, or start anew with another --out"
            )


def write_start(prepared: Prepared, out: Path) -> None:
    """What does not change from here on."""
    resolved = prepared.config.resolved()
    write_text(out / "resolved.json", json.dumps(resolved))  # first: with it the folder holds a run, which can be resumed
    write_text(out / "plan.json", json.dumps(plan(prepared)))
    write_text(out / "versions.json", json.dumps(versions(prepared)))
    prepared.clients.save(out / "partition.json")
    write_text(out / "run.toml", to_toml(resolved))


def versions(prepared: Prepared) -> dict[str, Any]:
    packages = ("fedexperts", "torch", "transformers", "peft", "safetensors", "tokenizers", "numpy")
    return {
        **{package: version(package) for package in packages},
        "git_commit": git_commit(),
        "model_hash": prepared.base.hash,
        "data_hashes": dict(prepared.clients.hashes),
    }


def git_commit() -> str | None:
    """Of the checkout that the library runs from; None where it runs from none."""
    if not which("git"):
        return None
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return asked.stdout.strip() or None


def append(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def variant(config: RunConfig, text: str) -> RunConfig:
    """`config` with another method: `name`, or `name:key=value:key=value`.

    What the run file says of the same method stays.

    Raises:
        BadValue: no such method or key.
    """
    name, *settings = text.split(":")
    if name not in METHODS:
        raise BadValue(f"{name!r} is not one of {', '.join(METHODS)}{nearest(name, METHODS)}")
    method = dict(config.method) if config.method["name"] == name else {"name": name}
    tree = config.model_dump(mode="json", exclude_none=True)
    return build(with_settings({**tree, "method": method}, [f"method.{setting}" for setting in settings]))


def compare(
    config: RunConfig, methods: Sequence[str], seeds: Sequence[int], out: Path, progress: Progress | None = None
) -> list[Path]:
    """Each method with each seed, over the same data and clients, in `out`/<method>/seed-<seed>; finished runs stay.

    Raises:
        FedExpertsError: as `run`; and every method's settings are checked before the first run starts.
        BadRun: `out` is the folder of a single run.
    """
    if (out / "resolved.json").exists():
        raise BadRun(f"{out} holds a single run, so a comparison cannot be put there; give another folder with --out")
    runs = [(method, seed, variant(config, method).model_copy(update={"seed": seed})) for seed in seeds for method in methods]
    folders = []
    for method, seed, each in runs:
        folder = out / method.replace(":", ",") / f"seed-{seed}"
        folders.append(run(each, folder, resume=True, label=method, progress=progress))
    return folders
