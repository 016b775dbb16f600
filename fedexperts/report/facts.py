"""The top of a page: what was run and how, and the headline results, each as name → text."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from fedexperts.report import axes, expert_sets, progress, resources, scores
from fedexperts.report.read import RunResults
from fedexperts.report.table_format import NONE, count, megabytes, number, quality_value

PACKAGES = ("fedexperts", "torch", "transformers", "peft")
UNDER_WAY = "They are in tables and figures as far as they are."
UNFINISHED = "Unfinished runs are in tables and figures only as long as no run is finished."


def of_run(run: RunResults) -> dict[str, str]:
    """What was run: method, model, clients, data and schedule."""
    settings = progress.settings(run)
    per_round = settings.get("federation", {}).get("clients_per_round")
    method = {key: value for key, value in settings.get("method", {}).items() if key != "name"}
    memory = [client.memory_bytes for client in run.plan.clients if client.memory_bytes is not None]
    return {
        "method": run.plan.method + (f", {inline(method)}" if method else ""),
        "model": f"{run.plan.model.name}: {run.plan.model.parameters:,} parameters, {_shape(run)}",
        "clients": f"{len(run.plan.clients)}" + (f", {per_round} in each round" if per_round is not None else ""),
        **_training(run),
        "client memory": f"{megabytes(min(memory))} to {megabytes(max(memory))} MB" if memory else "not limited",
        "data": ", ".join(scores.tasks([run]) or dict.fromkeys(client.task for client in run.plan.clients)),
        "scored on": f"the clients' {scores.scored_on([run])} examples",
        "scored when": scores.scored_when([run]),
        "partition": inline(run.plan.partition) or "given by the data",
        "rounds": _rounds(run),
        "seed": str(run.plan.seed),
        **_when([run]),
        **({"warnings": "; ".join(run.plan.warnings)} if run.plan.warnings else {}),
    }


def _when(runs: Sequence[RunResults]) -> dict[str, str]:
    """When the runs began, how long their rounds took, and the versions they ran on; each if it was recorded."""
    begun = sorted({each[:16].replace("T", " ") for run in runs if isinstance(each := run.versions.get("begun"), str)})
    seconds = [sum(row.seconds for row in run.rounds) for run in runs if run.rounds]
    packages = {name: dict.fromkeys(str(run.versions[name]) for run in runs if name in run.versions) for name in PACKAGES}
    recorded = ", ".join(f"{name} {' and '.join(each)}" for name, each in packages.items() if each)
    each = " a run on average" if len(seconds) > 1 else ""
    return {
        **({"begun (UTC)": " to ".join(dict.fromkeys((begun[0], begun[-1])))} if begun else {}),
        **({"duration": f"{_clock(fmean(seconds))}{each}: wall time of the rounds, without evaluations"} if seconds else {}),
        **({"versions": recorded} if recorded else {}),
    }


def _clock(seconds: float) -> str:
    """`seconds` as hours, minutes and seconds, without those that are 0 at the front."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _rounds(run: RunResults) -> str:
    """The number of rounds, and how many of them are done."""
    planned, done = progress.rounds_planned(run), progress.rounds_done(run)
    if planned is None:
        return f"{done} done"
    return str(planned) if done >= planned else f"{done} of {planned} done so far"


def _training(run: RunResults) -> dict[str, str]:
    """What clients train, the optimizer with its schedule, and the server's optimizer if it has one; empty without a run file."""
    settings = progress.settings(run).get("training", {})
    server_optimizer = progress.settings(run).get("federation", {}).get("server_optimizer")
    if not settings:
        return {}
    rank = f" of rank {settings.get('rank')}" if settings.get("train") == "lora" else ""
    schedule = settings.get("schedule", "constant")
    over_rounds = "constant" if schedule == "constant" else f"{schedule} to {settings.get('final_lr')} over the rounds"
    steps = f"{settings['local_steps']} steps" if settings.get("local_steps") else f"{settings.get('local_epochs')} epochs"
    return {
        "training": f"{settings.get('train')}{rank}, {steps} of {settings.get('batch_size')} examples per client and round",
        "optimizer": f"{settings.get('optimizer')}, learning rate {settings.get('lr')}, {over_rounds}",
        **({"server optimizer": inline(server_optimizer)} if server_optimizer else {}),
    }


def headline(run: RunResults) -> dict[str, str]:
    """The most important results of a run, as label → number."""
    rows, unit = scores.evaluations(run, None, None), scores.unit([run], None)
    ends = [quality_value(row.value, unit) for row in (rows[0], rows[-1])] if rows else []
    return {
        f"overall quality ({unit})" if unit else "overall quality": " → ".join(ends) or NONE,
        "sent per client and round, down and up": f"{megabytes(resources.bytes_per_client_round(run))} MB",
        "sent in total": f"{megabytes(resources.bytes_both_ways(resources.cost_rows(run)))} MB",
        **({"virtual time": f"{number(axes.virtual_seconds(run))} s"} if axes.has_clock(run) else {}),
        "largest peak memory of a client": f"{megabytes(resources.largest_peak(run))} MB",
        f"experts held by a client, of {expert_sets.total_experts(run)} (mean, least–most)": _expert_counts(run),
        "clients over their memory": str(len(resources.over_memory(run))),
        "failures": str(len(resources.failures(run))),
    }


def of_comparison(
    methods: Sequence[str], runs: Sequence[RunResults], unfinished: Sequence[str], *, under_way: bool = False
) -> dict[str, str]:
    """What was compared: settings, methods, models, data and seeds; with `under_way`, unfinished runs too."""
    settings = dict.fromkeys(run.plan.setting for run in runs if run.plan.setting)
    return {
        **({"settings" if len(settings) > 1 else "setting": ", ".join(settings)} if settings else {}),
        "methods": ", ".join(methods),
        "models": ", ".join(dict.fromkeys(run.plan.model.name for run in runs)),
        "data": ", ".join(scores.tasks(runs)),
        "scored on": f"the clients' {scores.scored_on(runs)} examples",
        "scored when": scores.scored_when(runs),
        "clients": ", ".join(dict.fromkeys(str(len(run.plan.clients)) for run in runs)),
        "rounds": ", ".join(dict.fromkeys(str(progress.rounds_done(run)) for run in runs)),
        "seeds": ", ".join(map(str, sorted({run.plan.seed for run in runs}))),
        **_when(runs),
        **({"not finished": f"{'; '.join(unfinished)}. {UNDER_WAY if under_way else UNFINISHED}"} if unfinished else {}),
    }


def _shape(run: RunResults) -> str:
    """The MoE layers of the base model, in words."""
    blocks = list(run.plan.model.blocks.values())
    sizes = " or ".join(dict.fromkeys(str(block.num_experts) for block in blocks))
    top_k = " or ".join(dict.fromkeys(str(block.top_k) for block in blocks))
    return f"{len(blocks)} MoE layers of {sizes} experts, top-{top_k} routing"


def _expert_counts(run: RunResults) -> str:
    counts = expert_sets.assigned_last(run)
    return f"{count(counts.mean)} ({counts.least}–{counts.most})" if counts else NONE


def inline(values: Mapping[str, Any]) -> str:
    """Settings on one line, without the empty ones."""
    present = {key: value for key, value in values.items() if value not in (None, "", [], {})}
    return ", ".join(f"{key} {inline(value) if isinstance(value, Mapping) else _scalar(value)}" for key, value in present.items())


def _scalar(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
