"""The facts that a page begins with: what was run and how, as name → text, and the headline numbers of a run."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedexperts.report import axes, expert_sets, progress, resources, scores
from fedexperts.report.expert_sets import Held
from fedexperts.report.read import RunResults
from fedexperts.report.table_format import NONE, megabytes, number, quality_value, whole

UNFINISHED = "Such runs are in tables and figures only while no run is finished."


def of_run(run: RunResults) -> dict[str, str]:
    asked, done = progress.rounds_asked(run), progress.rounds_done(run)
    each = progress.settings(run).get("federation", {}).get("clients_per_round")
    so_far = f"{done} done" if asked is None else str(asked) if done >= asked else f"{done} of {asked} done so far"
    method = {key: value for key, value in progress.settings(run).get("method", {}).items() if key != "name"}
    memory = [client.memory_bytes for client in run.plan.clients if client.memory_bytes is not None]
    return {
        "method": run.plan.method + (f", {inline(method)}" if method else ""),
        "model": f"{run.plan.model.name}: {run.plan.model.parameters:,} parameters, {_shape(run)}",
        "clients": f"{len(run.plan.clients)}" + (f", {each} in each round" if each is not None else ""),
        **_how_they_train(run),
        "their memory": f"{megabytes(min(memory))} to {megabytes(max(memory))} MB" if memory else "not limited",
        "data": ", ".join(scores.tasks([run]) or dict.fromkeys(client.task for client in run.plan.clients)),
        "scored on": f"the clients' {scores.scored_on([run])} examples",
        "scored when": scores.scored_when([run]),
        "divided": inline(run.plan.partition) or "as given",
        "rounds": so_far,
        "seed": str(run.plan.seed),
        **({"warned of": "; ".join(run.plan.warnings)} if run.plan.warnings else {}),
    }


def _how_they_train(run: RunResults) -> dict[str, str]:
    """What is trained, the optimiser and its schedule, and the server's where it has one; nothing without a run file."""
    asked, server = (
        progress.settings(run).get("training", {}),
        progress.settings(run).get("federation", {}).get("server_optimizer"),
    )
    if not asked:
        return {}
    rank = f" of rank {asked.get('rank')}" if asked.get("train") == "lora" else ""
    rate, schedule = asked.get("lr"), asked.get("schedule", "constant")
    over = "constant" if schedule == "constant" else f"{schedule} to {asked.get('final_lr')} over the rounds"
    steps = f"{asked['local_steps']} steps" if asked.get("local_steps") else f"{asked.get('local_epochs')} epochs"
    return {
        "trained": f"{asked.get('train')}{rank}, {steps} of {asked.get('batch_size')} examples in a client's round",
        "optimiser": f"{asked.get('optimizer')}, learning rate {rate}, {over}",
        **({"server's optimiser": inline(server)} if server else {}),
    }


def headline(run: RunResults) -> dict[str, str]:
    rows, unit = scores.evaluated(run, None, None), scores.unit([run], None)
    ends = [quality_value(row.value, unit) for row in (rows[0], rows[-1])] if rows else []
    held = expert_sets.held_last(run)
    over = resources.over_memory(run)
    return {
        f"overall quality ({unit})" if unit else "overall quality": " → ".join(ends) or NONE,
        "sent per client and round, down and up": f"{megabytes(resources.bytes_per_client_round(run))} MB",
        "sent in total": f"{megabytes(resources.carried(resources.counted(run)))} MB",
        **({"virtual time": f"{number(axes.virtual_seconds(run))} s"} if axes.has_clock(run) else {}),
        "largest peak memory of a client": f"{megabytes(resources.largest_peak(run))} MB",
        f"experts held by a client, of {expert_sets.experts_of(run)} (mean, least–most)": _held(held),
        "clients over their memory": str(len(over)),
        "failures": str(len(resources.failures(run))),
    }


def of_comparison(methods: Sequence[str], runs: Sequence[RunResults], unfinished: Sequence[str]) -> dict[str, str]:
    named = dict.fromkeys(run.plan.setting for run in runs if run.plan.setting)
    return {
        **({"settings" if len(named) > 1 else "setting": ", ".join(named)} if named else {}),
        "methods": ", ".join(methods),
        "models": ", ".join(dict.fromkeys(run.plan.model.name for run in runs)),
        "data": ", ".join(scores.tasks(runs)),
        "scored on": f"the clients' {scores.scored_on(runs)} examples",
        "scored when": scores.scored_when(runs),
        "clients": ", ".join(dict.fromkeys(str(len(run.plan.clients)) for run in runs)),
        "rounds": ", ".join(dict.fromkeys(str(progress.rounds_done(run)) for run in runs)),
        "seeds": ", ".join(map(str, sorted({run.plan.seed for run in runs}))),
        **({"not finished": f"{'; '.join(unfinished)}. {UNFINISHED}"} if unfinished else {}),
    }


def _shape(run: RunResults) -> str:
    blocks = list(run.plan.model.blocks.values())
    sizes = " or ".join(dict.fromkeys(str(block.num_experts) for block in blocks))
    chosen = " or ".join(dict.fromkeys(str(block.top_k) for block in blocks))
    return f"{len(blocks)} MoE layers of {sizes} experts, {chosen} for each token"


def _held(held: Held | None) -> str:
    return f"{whole(held.mean)} ({held.least}–{held.most})" if held else NONE


def inline(values: Mapping[str, Any]) -> str:
    """A small table of settings on one line, without the empty ones."""
    given = {key: value for key, value in values.items() if value not in (None, "", [], {})}
    return ", ".join(f"{key} {inline(value) if isinstance(value, Mapping) else _one(value)}" for key, value in given.items())


def _one(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
