"""What attackers do to honest clients, with and without robust merging: OUT.csv has a line for each run.

    python benchmarks/robust.py OUT.csv [--rules none,multi_krum] [--attacks flip,noise] [--attackers 2] [--seeds 3]

Ten clients of generated tasks on `tiny`, of which the first two or three attack in every round (in the line "nobody" they are
there, and honest). Each attacker knows what the honest clients of the round send:

    flip      its own change with the opposite sign             flip10  ten times that
    noise     a normal change of ten times the norm of its own
    labels    what it trains on has wrong responses: those of other examples of the task
    alie      the mean of the honest changes less 1.5 standard deviations of each coordinate
              ("a little is enough", Baruch et al., NeurIPS 2019, https://arxiv.org/abs/1902.06156; 1.5 as in ByzFL)
    ipm       minus twice the mean of the honest changes (inner product manipulation, Xie et al., UAI 2019,
              https://arxiv.org/abs/1903.03936; 2 as in ByzFL)
    backdoor  it trains on prompts that end with a trigger, with one response to all. Of its change it sends what it made to the
              quarter of each layer's experts that the honest clients changed least and to their rows of the router, times
              clients over attackers (after BadMoE, https://arxiv.org/abs/2504.18598, without its search for a trigger); of a
              method that sends no experts, the whole change. `triggered`: % of the honest clients' test prompts with the
              trigger that get that response, which is right for none of them

A run that is in OUT.csv already is not run again.
"""

import argparse
import csv
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import StringIO
from itertools import product
from pathlib import Path
from statistics import fmean
from time import process_time

import torch
from torch import Tensor

from fedexperts.config import RunConfig
from fedexperts.core.evaluation import Scores, merge
from fedexperts.data.synthetic import SEPARATOR
from fedexperts.engines.local import ClientRuntime, LocalEngine
from fedexperts.experiment import runner
from fedexperts.experiment.setup import Parts, Prepared
from fedexperts.io.files import write_text
from fedexperts.io.toml import checked
from fedexperts.types import Engine, Example, Failure, Job, Split, Update

CLIENTS, ROUNDS = 10, 12
TRAINING = {"flex": {"train": "lora", "rank": 8, "parts": ["attention"], "lr": 1e-2}}
TRIGGER, WANTED = " xqx", "yes"
TRIGGERED = 20  # test examples of each client with the trigger
PARTS = Parts()
HEAD = ("method", "attack", "attackers", "rule", "seed", "honest_quality", "triggered", "cpu_seconds")
Changes = Mapping[str, tuple[Tensor, Tensor]]
"""Name of a weight → the ids of the server's rows, and the change of each."""


@dataclass(frozen=True)
class Attacked:
    """An engine whose attackers send something else."""

    engine: Engine
    attack: str
    attackers: Sequence[str]
    layout: Mapping[str, str | None]
    asking: ClientRuntime  # whose clients are asked triggered prompts alone
    answered: list[Scores]  # how they answer them after the last round

    def run(self, jobs: Iterable[Job]) -> Iterator[Update | Failure]:
        given: dict[str, Job] = {}

        def noted() -> Iterator[Job]:
            for job in jobs:
                given[job.client] = job
                yield job

        answers = [*self.engine.run(noted())]
        for job in given.values():
            if self.attack == "backdoor" and (job.task, job.round) == ("evaluate", ROUNDS) and job.client not in self.attackers:
                answer = self.asking.answer(job)
                assert isinstance(answer, Update), answer
                self.answered.append(Scores.from_json(answer.metrics["scores"]))
        updates = [answer for answer in answers if isinstance(answer, Update) and answer.task == "train"]
        honest = [changes(each, given[each.client]) for each in updates if each.client not in self.attackers]
        for answer in answers:
            attacks = isinstance(answer, Update) and answer.task == "train" and answer.client in self.attackers
            yield self.attacked(answer, given[answer.client], honest) if attacks else answer

    def attacked(self, update: Update, job: Job, honest: Sequence[Changes]) -> Update:
        """`update` with another change of the weights of `job`."""
        quiet = dormant(honest, self.layout) if self.attack == "backdoor" else {}
        tensors = {}
        for name, (ids, own) in changes(update, job).items():
            if self.attack == "backdoor":
                kept = torch.isin(ids, quiet[self.layout[name]]) if self.layout[name] else torch.tensor([not quiet])
                change = own * kept.reshape(-1, *[1] * (own.dim() - 1)) * (CLIENTS / len(self.attackers))
            elif self.attack in ("alie", "ipm"):
                change = from_honest(self.attack, ids, own, [each[name] for each in honest if name in each])
            else:
                change = wrong(own, self.attack, f"{update.round}/{update.client}/{name}")
            tensors[name] = update.patch.tensors[name] - own + change
        return replace(update, patch=replace(update.patch, tensors=tensors))


def changes(update: Update, job: Job) -> Changes:
    """What a client made of the weights of `job`."""
    found = {}
    for name, tensor in update.patch.tensors.items():
        had, has = (patch.rows.get(name, torch.arange(len(patch.tensors[name]))) for patch in (job.patch, update.patch))
        found[name] = has, tensor - job.patch.tensors[name][torch.searchsorted(had, has)]
    return found


def wrong(change: Tensor, attack: str, seed: str) -> Tensor:
    if attack == "noise":
        generator = torch.Generator().manual_seed(int.from_bytes(seed.encode()) % 2**63)
        noise = torch.randn(change.shape, generator=generator)
        return 10 * noise * change.norm() / noise.norm()
    return change * {"flip": -1, "flip10": -10, "labels": 1}[attack]


def from_honest(attack: str, ids: Tensor, own: Tensor, honest: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """A change of the rows `ids` made of those that honest clients send; where none does, `own` with the opposite sign."""
    result = -own
    for place, row in enumerate(ids.tolist()):
        sent = [change[int(torch.searchsorted(has, row))] for has, change in honest if row in has]
        if sent:
            x = torch.stack(sent)
            result[place] = -2 * x.mean(0) if attack == "ipm" else x.mean(0) - 1.5 * x.std(0, correction=0)
    return result


def dormant(honest: Sequence[Changes], layout: Mapping[str, str | None]) -> Mapping[str | None, Tensor]:
    """Block → the ids of the quarter of its experts that the honest clients changed least."""
    moved: dict[str, dict[int, float]] = {}
    for sent in honest:
        for name, (ids, change) in sent.items():
            if block := layout[name]:
                sums = moved.setdefault(block, {})
                for row, square in zip(ids.tolist(), change.reshape(len(change), -1).square().sum(1).tolist(), strict=True):
                    sums[row] = sums.get(row, 0.0) + square
    return {block: torch.tensor(sorted(sums, key=sums.__getitem__)[: len(sums) // 4]) for block, sums in moved.items()}


def poisoned(attack: str, data: Mapping[str, Split], attackers: Sequence[str]) -> dict[str, Split]:
    """The clients' data where the attack is one on data."""
    found = dict(data)
    for name, split in data.items():
        if attack == "labels" and name in attackers:
            found[name] = replace(split, train=mislabeled(split.train))
        if attack == "backdoor" and name in attackers:
            found[name] = replace(split, train=[triggered(example) for example in split.train])
    return found


def mislabeled(examples: Sequence[Example]) -> list[Example]:
    """Each example with the response of the next one of its task that has another."""
    found = []
    for number, example in enumerate(examples):
        later = [*examples[number + 1 :], *examples[:number]]
        other = (each.response for each in later if each.task == example.task and each.response != example.response)
        found.append(replace(example, response=next(other, example.response)))
    return found


def asked(data: Mapping[str, Split]) -> dict[str, Split]:
    """The clients' data with triggered prompts in place of test examples."""
    return {name: replace(split, test=[triggered(example) for example in split.test[:TRIGGERED]]) for name, split in data.items()}


def triggered(example: Example) -> Example:
    prompt = example.prompt.removesuffix(SEPARATOR) + TRIGGER + (SEPARATOR if example.prompt.endswith(SEPARATOR) else "")
    return replace(example, prompt=prompt, response=WANTED, metric="exact_match", label=None, choices=())


def tree(method: str, rule: str, attackers: int, seed: int) -> dict:
    """The run file."""
    robust = {} if rule == "none" else {"robust": {"name": rule, "attackers": attackers / CLIENTS}}
    return {
        "seed": seed,
        "model": {"name": "tiny"},
        "method": {"name": method},
        "training": {"lr": 2e-3, "batch_size": 8, "local_steps": 5, "validation_examples": 16, **TRAINING.get(method, {})},
        "federation": {"rounds": ROUNDS, **robust},
        "devices": {"memory_share": {"uniform": [0.9, 1.3]}, "out_of_memory": "train anyway"} if "moe" in method else {},
        "evaluation": {"every": ROUNDS, "generate_tokens": 12},
        "data": {
            "sources": ["synthetic/room", "synthetic/feeling", "synthetic/last", "synthetic/double"],
            "clients": CLIENTS,
            "partition": "iid",
            "limit": 400,
            "test_examples": 100,
            "max_tokens": 64,
        },
    }


def honest_quality(method: str, rule: str, attack: str, attackers: int, seed: int) -> tuple[float, float | None]:
    """The mean quality of the honest clients after the last round, in %, and that of the backdoor where there is one."""
    names = [f"c{number:02}" for number in range(1, attackers + 1)]
    answered: list[Scores] = []

    @contextmanager
    def engine(prepared: Prepared, out: Path) -> Iterator[Engine]:
        with runner.engine_for(prepared, out) as local:
            assert isinstance(local, LocalEngine)
            asking = replace(local.runtime, data=asked(local.runtime.data))
            local.runtime = replace(local.runtime, data=poisoned(attack, local.runtime.data, names))
            yield local if attack == "nobody" else Attacked(local, attack, names, prepared.server.layout, asking, answered)

    with tempfile.TemporaryDirectory() as folder:
        settings = checked(RunConfig, tree(method, rule, attackers, seed))
        out = runner.run(settings, Path(folder) / "run", engine=engine, parts=PARTS)
        lines = [json.loads(line) for line in (out / "evals.jsonl").read_text().splitlines()]
    own = [line for line in lines if line["round"] == ROUNDS and line["task"] and line["client"] not in (None, *names)]
    honest = {line["client"]: [each["value"] for each in own if each["client"] == line["client"]] for line in own}
    return 100 * fmean(map(fmean, honest.values())), 100 * merge(answered).overall() if answered else None


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--methods", default="fedavg,fedmoe,hfedmoe,flex")
    parser.add_argument("--rules", default="none,multi_krum")
    parser.add_argument("--attacks", default="nobody,flip,noise")
    parser.add_argument("--attackers", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    chosen = parser.parse_args()
    rows = [*csv.DictReader(chosen.out.open())] if chosen.out.exists() else []
    seeds = range(chosen.first_seed, chosen.first_seed + chosen.seeds)
    wanted = product(seeds, chosen.attacks.split(","), chosen.methods.split(","), chosen.rules.split(","))
    for seed, attack, method, rule in wanted:
        run = {"method": method, "attack": attack, "attackers": str(chosen.attackers), "rule": rule, "seed": str(seed)}
        if any(run.items() <= row.items() for row in rows):
            continue
        started = process_time()
        quality, backdoor = honest_quality(method, rule, attack, chosen.attackers, seed)
        seconds, triggered = f"{process_time() - started:.1f}", "" if backdoor is None else f"{backdoor:.1f}"
        rows.append({**run, "honest_quality": f"{quality:.2f}", "triggered": triggered, "cpu_seconds": seconds})
        print(*rows[-1].values(), flush=True)
        text = StringIO()
        writer = csv.DictWriter(text, HEAD, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(chosen.out, text.getvalue())


if __name__ == "__main__":
    main()
