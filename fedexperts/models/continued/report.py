"""What is reported of continued training: training.json, the curve as curve.csv, a model card, and a table."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from fedexperts.io.files import write_text
from fedexperts.models.continued.measure import HeldOut, compare, loads, routes
from fedexperts.models.continued.settings import ContinueSettings
from fedexperts.models.continued.training import Point, Trained, has_experts
from fedexperts.moe.parameters import parameters

Report = dict[str, Any]
REPORT, CURVE = "training.json", "curve.csv"


def measured(trained: Trained, held_out: HeldOut, seed: int) -> Report:
    """What is measured before and after: bits per byte, load, what routing is worth, and the distance from the control."""
    bits, kl = compare(trained.models, held_out)
    mean = bits["model"]["mean"]
    found: Report = {"bits_per_byte": rounded(bits["model"])}
    if "control" in bits:
        found["control_bits_per_byte"] = rounded(bits["control"])
        found["over_control"] = round(mean - bits["control"]["mean"], 4)
        found["kl"] = round(kl, 4)
    if has_experts(trained.model):
        shares = loads(trained.model, held_out)
        found["load"] = {name: [round(share, 3) for share in values] for name, values in shares.items()}
        found["least_used"] = round(min(min(values) for values in shares.values()), 3)
        found |= {name: rounded(values) for name, values in routes(trained.model, held_out, seed, mean).items()}
    return found


def rounded(values: Mapping[str, float]) -> dict[str, float]:
    """`values` with four decimal places."""
    return {name: round(value, 4) for name, value in values.items()}


def report(
    settings: ContinueSettings, plan: Mapping[str, Any], after: Report, curve: Sequence[Point], trained: Trained, tokens: int
) -> Report:
    """All that is known. Losses are in nats per token, loads in parts of a fair share, errors in parts of a layer's output.

    tokens: on which was measured.
    """
    counts = parameters(trained.model) if has_experts(trained.model) else None
    total = sum(parameter.numel() for parameter in trained.model.parameters())
    return {
        "start": settings.start,
        "control": settings.control,
        "steps": curve[-1].step,
        "tokens": curve[-1].tokens,
        "seconds": round(curve[-1].seconds),
        "parameters": {"total": total, "active": counts.active if counts else total},
        "measured_on_tokens": tokens,
        "before": plan["before"],
        "after": after,
        "data": plan["settings"]["data"],
        "settings": settings.model_dump(mode="json", exclude={"out"}),
    }


def rows(report: Report) -> list[tuple[str, ...]]:
    """The lines of the report's table: what, before, and after."""
    before, after = report["before"], report["after"]
    lines: list[tuple[str, ...]] = [("bits per byte", *(f"{each['bits_per_byte']['mean']:.4f}" for each in (before, after)))]
    if "kl" in after:
        lines.append(
            ("bits per byte of the control", *(f"{each['control_bits_per_byte']['mean']:.4f}" for each in (before, after)))
        )
        lines.append(("bits per byte over the control", *(f"{each['over_control']:+.4f}" for each in (before, after))))
        lines.append(("KL from the control, nats per token", *(f"{each['kl']:.4f}" for each in (before, after))))
    if "load" in after:
        lines.append(("least used expert, of a fair share", *(f"{each['least_used']:.3f}" for each in (before, after))))
    if "error_of_a_layer" in after:
        for name, title in (("error", "error of a layer"), ("bits", "bits per byte by choice")):
            key = "error_of_a_layer" if name == "error" else "bits_by_choice"
            chosen = (", ".join(f"{value:.4f}" for value in each[key].values()) for each in (before, after))
            lines.append((f"{title}: routed, random, oracle", *chosen))
    return lines


def table(report: Report) -> Table:
    """The table for a terminal."""
    shown = Table("", "before", "after", title=escape(f"{report['start']}, {report['tokens']:,} tokens later"))
    for row in rows(report):
        shown.add_row(*map(escape, row))
    return shown


def card(report: Report) -> str:
    """The model card."""
    sizes = report["parameters"]
    lines = "\n".join(f"| {what} | {before} | {after} |" for what, before, after in rows(report))
    data = "\n".join(f"| {name} | `{digest}` |" for name, digest in report["data"].items())
    beside = (
        f" The control, {report['control']}, was trained on the same batches with the same schedule." if report["control"] else ""
    )
    return f"""---
library_name: transformers
---

# {Path(report["start"]).name}, trained further

Made with `fedexperts pretrain` of {report["start"]}; the license of the original applies.
{sizes["total"]:,} parameters, of which {sizes["active"]:,} are active per token.
Trained on {report["tokens"]:,} tokens in {report["steps"]:,} steps.{beside}

| on {report["measured_on_tokens"]:,} held-out tokens | before | after |
|---|---|---|
{lines}

`{REPORT}` has all numbers and settings, `{CURVE}` the curve.

| read | sha256 |
|---|---|
{data}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH OF THIS FOLDER")
tokenizer = AutoTokenizer.from_pretrained("PATH OF THIS FOLDER")
```
"""


def written(value: float) -> str:
    """`value` in the curve: a count as it is."""
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def write(report: Report, curve: Sequence[Point], folder: Path) -> None:
    """Writes the report, the curve and README.md."""
    write_text(folder / REPORT, json.dumps(report, indent=2) + "\n")
    lines = [",".join(Point._fields), *(",".join(written(value) for value in point) for point in curve)]
    write_text(folder / CURVE, "\n".join(lines) + "\n")
    write_text(folder / "README.md", card(report))
