"""What a reader must know before comparing the numbers of a report: warnings beside its tables."""

import tomllib

from fedexperts.moe.tuning import PARTS
from fedexperts.report import empty_updates, robustness
from fedexperts.report.read import Groups, RunResults


def warning(groups: Groups) -> str:
    """The warnings about `groups`, in one line; empty if there are none."""
    return " ".join(filter(None, [empty_updates.warning(groups), different_parts(groups), robustness.warning(groups)]))


def different_parts(groups: Groups) -> str:
    """A sentence that names what each method trains, if these are not the same parts of the model; else empty."""
    labels: dict[str, list[str]] = {}
    for label, runs in groups.items():
        for parts in dict.fromkeys(filter(None, map(trained_parts, runs))):
            labels.setdefault(parts, []).append(label)
    if len(labels) < 2:
        return ""
    each = "; ".join(f"{', '.join(members)}: {parts}" for parts, members in labels.items())
    return f"Warning: these methods train different parts of the model ({each}), so they differ in more than their method."


def trained_parts(run: RunResults) -> str | None:
    """What clients train, in words; None if the run file cannot be read."""
    try:
        training = tomllib.loads(run.run_file).get("training", {})
    except tomllib.TOMLDecodeError:
        return None
    if not isinstance(training, dict) or "train" not in training:
        return None
    adapted = training["train"] == "lora"
    parts = training.get("parts")
    which = ", ".join(map(str, parts if isinstance(parts, list) else PARTS[: 3 if adapted else 4]))
    return f"adapters on {which}" if adapted else f"weights of {which}"
