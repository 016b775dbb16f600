"""What is reported of an upcycled model: upcycle.json, a model card, and a table."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from fedexperts.io.files import write_text
from fedexperts.models.upcycle.recipes import Recipe
from fedexperts.models.upcycle.stream import Upcycled
from fedexperts.moe.parameters import parameters

Report = dict[str, Any]

HOW: Mapping[str, str] = {
    "copy": "Each expert is a copy of the dense model's feed-forward network (sparse upcycling).",
    "split": "The neurons of each feed-forward network of the dense model were divided into experts by their co-activation.",
    "experts": "Each expert is the feed-forward network of a fine-tuned model; all other weights are the base model's.",
}


def report(name: str, experts: list[str], text: str, recipe: Recipe, upcycled: Upcycled, seed: int) -> Report:
    """All that is known of a model: what it was made of and how, its size, and how it compares with the dense model.

    Losses are in nats and bits, loads in parts of a fair share, errors in parts of the norm of the layer's output.
    """
    config, counts = upcycled.target.config, parameters(upcycled.model)
    known = sorted({fact for layer in upcycled.layers for fact in layer})
    means = {fact: sum(layer[fact] for layer in upcycled.layers) / len(upcycled.layers) for fact in known}
    settings = {key: value for key, value in vars(recipe).items() if key not in ("num_experts", "top_k", "shared")}
    compared = {key: round(value, 6) for key, value in vars(upcycled.comparison).items()}
    return {
        "model": name,
        **({"expert_models": experts} if experts else {}),
        "how": recipe.name,
        "class": config.architectures[0],
        "num_experts": recipe.num_experts,
        "top_k": recipe.top_k,
        "shared_neurons": recipe.shared,
        **settings,
        "seed": seed,
        "text": text,
        "parameters": {"total": counts.total, "active": counts.active},
        **compared,
        "mean_of_layers": rounded(means),
        "layers": [rounded(layer) for layer in upcycled.layers],
    }


def rounded(facts: Mapping[str, float]) -> dict[str, float]:
    """`facts` with four decimal places."""
    return {name: round(value, 4) for name, value in facts.items()}


def rows(report: Report) -> list[tuple[str, str]]:
    """The lines of the report's table: what, and how much."""
    means, sizes = report["mean_of_layers"], report["parameters"]
    lines = [
        ("class", report["class"]),
        ("experts, active per token", f"{report['num_experts']}, {report['top_k']}"),
        ("shared neurons", f"{report['shared_neurons']}"),
        ("parameters, active per token", f"{sizes['total']:,}, {sizes['active']:,} ({sizes['active'] / sizes['total']:.0%})"),
        ("KL to the dense model, nats per token", f"{report['kl']:.4f}"),
        ("bits per byte, dense and MoE", f"{report['dense_bits_per_byte']:.3f}, {report['bits_per_byte']:.3f}"),
        ("load of an expert, least and most", f"{means['load_least']:.2f}, {means['load_most']:.2f} of a fair share"),
    ]
    if "error_routed" in means:
        errors = ", ".join(f"{means[f'error_{kind}']:.3f}" for kind in ("routed", "random", "oracle"))
        lines.append(("error of a layer, routed, random, oracle", errors))
        sinks = [sum(layer[key] for layer in report["layers"]) for key in ("sink_neurons", "sink_neurons_shared")]
        lines.append(("attention-sink neurons, of these shared", f"{sinks[0]:.0f}, {sinks[1]:.0f}"))
    if "own_expert" in means:
        lines.append(("tokens whose first choice is the expert of their text", f"{means['own_expert']:.0%}"))
    return [*lines, ("measured on", f"{report['tokens']:,} tokens of {report['text']}")]


def table(report: Report) -> Table:
    """The table for a terminal."""
    shown = Table(title=escape(f"{report['model']}, upcycled ({report['how']})"), show_header=False)
    for row in rows(report):
        shown.add_row(*map(escape, row))
    return shown


def card(report: Report) -> str:
    """The model card."""
    lines = "\n".join(f"| {what} | {value} |" for what, value in rows(report))
    sources = f" and {', '.join(report['expert_models'])}" if "expert_models" in report else ""
    return f"""---
library_name: transformers
tags: [moe, upcycled]
---

# {Path(report["model"]).name}, upcycled

Made with `fedexperts upcycle` of {report["model"]}{sources}; the license of the original applies.
{HOW[report["how"]]} Attention, norms and positions are those of the dense model.

| | |
|---|---|
{lines}

`upcycle.json` has these numbers for each layer.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH OF THIS FOLDER")
tokenizer = AutoTokenizer.from_pretrained("PATH OF THIS FOLDER")
```
"""


def write(report: Report, folder: Path) -> None:
    """Writes upcycle.json and README.md."""
    write_text(folder / "upcycle.json", json.dumps(report, indent=2) + "\n")
    write_text(folder / "README.md", card(report))
