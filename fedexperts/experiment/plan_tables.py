"""A run's plan, as tables for a terminal."""

from typing import Any

from rich.table import Table
from rich.text import Text

MB = 1e6


def plan_tables(planned: dict[str, Any]) -> list[Table]:
    """The plan as tables: the model and its costs, the memory by what it holds, what of the data is lost, and the clients."""
    with_budgets = any(client["budget"] is not None for client in planned["clients"])
    data = [data_table(planned)] if planned["lost"] else []
    return [costs_table(planned, with_budgets), memory_table(planned), *data, clients_table(planned, with_budgets)]


def costs_table(planned: dict[str, Any], with_budgets: bool) -> Table:
    """The model of a plan, and the memory, bytes and FLOPs of training it; `with_budgets`: backward reaches only some experts."""
    model, blocks = planned["model"], planned["model"]["blocks"].values()
    table = Table(title=Text(f"{planned['method']} on {model['name']}"), show_header=False)
    table.add_row("parameters", f"{model['parameters']:,}")
    table.add_row("MoE layers", f"{len(blocks)}")
    table.add_row("experts", f"{sum(block['num_experts'] for block in blocks)}")
    table.add_row("memory to train the whole model (estimated)", f"{planned['full_bytes'] / MB:.1f} MB")
    table.add_row("presets of devices that hold it", ", ".join(planned["held_by"]) or "none")
    if planned["personal_bytes"]:
        table.add_row("more for personal experts (estimated)", f"{planned['personal_bytes'] / MB:.1f} MB")
    if with_budgets:
        table.add_row("memory if backward reaches no expert (estimated)", f"{planned['fixed_bytes'] / MB:.1f} MB")
        table.add_row("more for each expert that backward reaches", f"{planned['reached_bytes'] / MB:.3f} MB")
    table.add_row("trained parameters, one way", f"{planned['full_patch_bytes'] / MB:.1f} MB")
    table.add_row(
        "a client's round on the whole model, at most (estimated)", f"{planned['round_flops_estimated'] / 1e9:,.0f} GFLOP"
    )
    return table


def memory_table(planned: dict[str, Any]) -> Table:
    """Estimated megabytes by what they hold: to train the whole model, and in the largest first job of a client."""
    columns = {"whole model": planned["memory"]["parts"]}
    first = [client["first_memory"] for client in planned["clients"] if client["first_memory"]]
    if first:
        columns["largest first job"] = max(first, key=lambda parts: sum(parts.values()))
    table = Table(title="Memory to train, estimated, in MB (10⁶)")
    table.add_column("of")
    for name in columns:
        table.add_column(name, justify="right")
    for part in planned["memory"]["parts"]:
        if any(parts[part] for parts in columns.values()):
            table.add_row(part.replace("_", " "), *(f"{parts[part] / MB:,.1f}" for parts in columns.values()))
    table.add_row("total", *(f"{sum(parts.values()) / MB:,.1f}" for parts in columns.values()))
    return table


def data_table(planned: dict[str, Any]) -> Table:
    """What of each task's data is cut, and the share of its most frequent answer."""
    table = Table(
        title="Data",
        padding=0,  # so that nine columns fit a terminal of 80
        caption="dropped: too long; in %: prompts that are cut, tokens that these lose, answers that are cut, references longer "
        "than generate_tokens, test examples that are training examples, the most frequent answer",
    )
    columns = ("task", "train", "dropped", "prompts", "tokens", "answers", "refs", "leaked", "majority")
    for name in columns:
        table.add_column(name, justify="left" if name == "task" else "right", overflow="fold")
    for row in planned["lost"]:
        shares = [value for key, value in row.items() if key not in ("task", "examples", "dropped")]
        counts = str(row["examples"]), str(row["dropped"])
        table.add_row(Text(row["task"]), *counts, *("<1" if 0 < value < 0.005 else f"{100 * value:.0f}" for value in shares))
    return table


def clients_table(planned: dict[str, Any], with_budgets: bool) -> Table:
    """The clients of a plan: their data, their memory, what fits into it, and their first job."""
    table = Table(title="Clients", caption=f"first job: {planned['clients'][0]['first_task']}; memory and bytes in MB (10⁶)")
    budget_column = ("budget",) if with_budgets else ()  # number of experts that backward reaches
    for name in ("client", "task", "train", "val", "test", "memory", "fit", "first job", "sent", *budget_column):
        table.add_column(name, justify="left" if name in ("client", "task") else "right", no_wrap=name != "task", overflow="fold")
    for client in planned["clients"]:
        memory = client["memory_bytes"]
        table.add_row(
            client["name"],
            Text(client["task"]),
            *(str(client[key]) for key in ("examples", "validation", "test")),
            "any" if memory is None else f"{memory / MB:.1f}",
            "all" if client["full_fits"] else str(client["experts_fit"]),
            f"{client['first_experts']} experts" if client["first_experts"] else "none",
            f"{client['first_bytes_down'] / MB:.1f}",
            *("any" if client[name] is None else str(client[name]) for name in budget_column),
        )
    return table
