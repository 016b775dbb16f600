"""A results folder as a run leaves it, drawn from a seed: nothing trained, everything of the right form."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from random import Random
from typing import Any

TASKS = {"sort": "exact_match", "reverse": "exact_match", "ag_news": "accuracy", "quoref": "token_f1"}
GAIN = {"fedmoe": 0.62, "fedavg": 0.55, "random_moe": 0.45, "local": 0.38}
SHARE = {"fedmoe": 0.4, "fedavg": 1.0, "random_moe": 0.4, "local": 1.0}  # of the experts a client holds
BYTES_OF_AN_EXPERT = 98_304
BYTES_OF_THE_REST = 1_200_000


def write_run(
    folder: Path,
    method: str = "fedmoe",
    seed: int = 0,
    rounds: int = 12,
    planned_rounds: int | None = None,
    clients: Iterable[str] = tuple(f"c{number:02}" for number in range(8)),
    layers: int = 4,
    num_experts: int = 16,
    setting: str = "",
    split: str = "test",
    clock: bool = False,
    retained: bool = False,
) -> Path:
    """A run of `rounds` rounds in which half of the clients take part each time, evaluated every second round.

    Without `clock` its logs say nothing of virtual time, as those of runs from before there was any; without `retained` they
    say nothing of how models stand against the base.
    """
    rng = Random(f"{setting}{method}/{seed}")
    names = list(clients)
    home = {name: list(TASKS)[number % len(TASKS)] for number, name in enumerate(names)}
    holds = {name: _subset(rng, layers, num_experts, SHARE.get(method, 0.5)) for name in names}
    full_bytes = 4 * (BYTES_OF_THE_REST + layers * num_experts * BYTES_OF_AN_EXPERT)
    folder.mkdir(parents=True, exist_ok=True)
    plan = {
        "method": method,
        "setting": setting,
        "reference": method == "local",
        "seed": seed,
        "model": {
            "name": "tiny",
            "parameters": 3_450_000,
            "blocks": {f"model.layers.{layer}.mlp": {"num_experts": num_experts, "top_k": 2} for layer in range(layers)},
        },
        "clients": [_client(rng, name, home[name], full_bytes) for name in names],
        "partition": {"by": "task", "within": {"dirichlet": 0.5}},
        "full_bytes": full_bytes,
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "versions.json").write_text(json.dumps({"torch": "2.13.0", "fedexperts": "0.1.0", "commit": "0123abc"}))
    planned, each = planned_rounds or rounds, max(len(names) // 2, 1)
    (folder / "run.toml").write_text(
        f'seed = {seed}\nmodel = {{ name = "tiny" }}\nmethod = {{ name = {json.dumps(method)} }}\n'
        f'federation = {{ rounds = {planned}, clients_per_round = {each}, engine = "local" }}\n'
        f'evaluation = {{ split = "{split}" }}\n'
    )
    log, ledger, evals = [], [], []
    if method == "fedmoe":
        log.append({"round": 0, "task": "profile", "clients": names, "failed": {}, "loss": None, "seconds": 3.0, "holds": holds})
        ledger += [_row(rng, 0, name, "profile", holds[name], uploads=False) for name in names]
    evals += _evaluations(rng, 0, home, 0.1)
    for number in range(1, rounds + 1):
        chosen = sorted(rng.sample(names, each))
        failed = {chosen[0]: "its update holds NaN in 2 of 14 tensors"} if number == 5 else {}
        if method == "random_moe":
            holds |= {name: _subset(rng, layers, num_experts, 0.4) for name in chosen}
        if method == "fedmoe":
            holds |= {name: _moved(rng, holds[name], num_experts) for name in chosen}
        log.append(
            {
                "round": number,
                "task": "train",
                "clients": chosen,
                "failed": failed,
                "loss": 2.0 / number,
                "seconds": 4.5,
                "holds": {name: holds[name] for name in chosen},
                "notes": {},
            }
        )
        ledger += [_row(rng, number, name, "train", holds[name], method != "local", failed.get(name)) for name in chosen]
        if number % 2 == 0:
            evals += _evaluations(rng, number, home, 0.1 + GAIN.get(method, 0.5) * (1 - 0.75**number))
            ledger += [_row(rng, number, name, "evaluate", holds[name], uploads=True) for name in names]
    if retained:
        blocks = [f"model.layers.{layer}.mlp" for layer in range(layers)]
        evals = [_against_base(rng, 0, None, []), *evals, *(_against_base(rng, rounds, name, blocks) for name in names)]
    for row in log if clock else ():
        row["clock_seconds"] = 20.0 + row["round"]
    for file, rows in (("rounds", log), ("ledger", ledger), ("evals", evals)):
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _against_base(rng: Random, number: int, name: str | None, blocks: list[str]) -> dict[str, Any]:
    """A line of what a model retained, and of its routers' drift."""
    values = [float(rng.random() < (0.5 if name is None else 0.4)) for _ in range(20)]
    quiz = {"metric": "likelihood", "examples": 20, "value": sum(values) / 20, "values": values}
    text = {"metric": "perplexity", "examples": 5, "value": rng.uniform(8, 12), "values": []}
    line = {"round": number, "client": name, "task": None, "examples": 25, "metric": None, "value": None}
    return {**line, "retained": {"mmlu": quiz, "books": text}, "drift": {block: rng.random() / 10 for block in blocks}}


def write_comparison(
    folder: Path, methods: Iterable[str] = tuple(GAIN), seeds: int = 3, retained: bool = False, setting: str = ""
) -> Path:
    """What `fedexperts compare` leaves: OUT/<method>/seed-<s>/."""
    for method in methods:
        for seed in range(seeds):
            write_run(folder / method / f"seed-{seed}", method, seed, retained=retained, setting=setting)
    return folder


def write_settings(folder: Path, settings: Iterable[str] = ("standard", "enforced"), seeds: int = 2, clock: bool = False) -> Path:
    """What `fedexperts compare` leaves of several run files: OUT/<setting>/<method>/seed-<s>/."""
    for setting in settings:
        for method in GAIN:
            for seed in range(seeds):
                write_run(folder / setting / method / f"seed-{seed}", method, seed, setting=setting, clock=clock)
    return folder


def _subset(rng: Random, layers: int, num_experts: int, share: float) -> dict[str, list[int]]:
    count = max(2, round(share * num_experts))
    return {f"model.layers.{layer}.mlp": sorted(rng.sample(range(num_experts), count)) for layer in range(layers)}


def _moved(rng: Random, holds: Mapping[str, list[int]], num_experts: int) -> dict[str, list[int]]:
    """One expert more or less in one layer."""
    block = rng.choice(sorted(holds))
    experts = set(holds[block]) ^ {rng.randrange(num_experts)}
    return {**holds, block: sorted(experts)} if len(experts) >= 2 else dict(holds)


def _client(rng: Random, name: str, task: str, full_bytes: int) -> dict[str, Any]:
    examples = rng.randrange(60, 240)
    other = rng.choice([each for each in TASKS if each != task])
    memory = int(full_bytes * rng.choice([0.45, 0.6, 1.2]))
    return {
        "name": name,
        "task": task,
        "examples": examples,
        "validation": 16,
        "test": 40,
        "memory_bytes": memory,
        "experts_fit": int(64 * min(memory / full_bytes, 1)),
        "full_fits": memory >= full_bytes,
        "tasks": {task: examples - 20, other: 20},
    }


def _row(
    rng: Random, number: int, name: str, task: str, holds: Mapping[str, list[int]], uploads: bool, failed: str | None = None
) -> dict[str, Any]:
    experts = sum(len(each) for each in holds.values())
    size = BYTES_OF_THE_REST + experts * BYTES_OF_AN_EXPERT
    return {
        "round": number,
        "client": name,
        "task": task,
        "bytes_down": size if uploads else 0,
        "bytes_up": size if uploads and failed is None else 0,
        "seconds": round(rng.uniform(3, 6), 3),
        "tokens": rng.randrange(4000, 6000),
        "peak_bytes": int(size * rng.uniform(3.9, 4.3)),
        "flops_estimated": experts * 2.5e9,
        "experts": experts,
        "failed": failed,
    }


def _evaluations(rng: Random, number: int, home: Mapping[str, str], level: float) -> list[dict[str, Any]]:
    rows, by_task = [], {}
    for task in TASKS:
        values = {}
        for name in (name for name, its in home.items() if its == task):
            values[name] = min(max(level + rng.gauss(0, 0.06), 0.0), 1.0)
            rows.append(_evaluation(number, name, task, 40, values[name]))
        if values:
            by_task[task] = sum(values.values()) / len(values)
            rows.append(_evaluation(number, None, task, 40 * len(values), by_task[task]))
    overall = sum(by_task.values()) / len(by_task)
    total = 40 * len(home)
    return [*rows, {"round": number, "client": None, "task": None, "examples": total, "metric": "mean", "value": overall}]


def _evaluation(number: int, client: str | None, task: str, examples: int, value: float) -> dict[str, Any]:
    main = TASKS[task]
    return {
        "round": number,
        "client": client,
        "task": task,
        "examples": examples,
        "metric": main,
        "value": value,
        "metrics": {main: value, "exact_match": value * 0.9, "perplexity": 9.0 - 7 * value} | {main: value},
    }
