"""Your own data: a CSV file with your own column names, divided among clients with different label distributions.

    python examples/own_data.py

It writes messages.csv (messages to a hotel and the responsible departments), names the columns of prompt and label, shows which
client would get what before anything runs, and trains. It takes half a minute; all results are in results/own-data.
"""

import csv
from collections import Counter
from pathlib import Path
from random import Random

from rich import print

import fedexperts
from fedexperts import report
from fedexperts.config import RunConfig
from fedexperts.experiment.setup import prepare_run

DEPARTMENTS = {
    "kitchen": ("lemon", "soup", "bread", "sugar"),
    "garden": ("roses", "fence", "grass", "trees"),
    "garage": ("wheel", "brake", "petrol", "engine"),
    "laundry": ("shirt", "towel", "sheets", "coat"),
}
SAYINGS = ("The {} is bad", "We need {}", "Where is the {}?", "No {} today", "More {}", "It is the {}", "Room {number}: {}")


def write_messages(path: Path) -> None:
    """Writes a row for each combination of a saying and a thing, some with several room numbers, sorted by text."""
    rng = Random(0)
    rows = {
        (saying.format(thing, number=rng.randint(100, 400)), department)
        for department, things in DEPARTMENTS.items()
        for thing in things
        for saying in SAYINGS
        for _ in range(8 if "number" in saying else 1)
    }
    with path.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["message", "department"])
        lines.writerows(sorted(rows))


if __name__ == "__main__":
    out = Path("results/own-data")
    out.mkdir(parents=True, exist_ok=True)
    messages = out / "messages.csv"
    write_messages(messages)

    run = {
        "model": {"name": "tiny"},
        "method": {"name": "fedavg"},
        "training": {"lr": 3e-3, "batch_size": 8, "local_steps": 10},
        "federation": {"rounds": 8},
        "evaluation": {"every": 4, "generate_tokens": 8},
        "data": {
            # `label` is the column of the class; the class names are the possible answers. For free answers use `response`.
            "sources": [{"name": str(messages), "prompt": "message", "label": "department", "task": "desk"}],
            "partition": {"dirichlet": 0.5},  # over departments: the smaller, the more skewed
            "clients": 4,
            "max_tokens": 64,
        },
    }

    prepared = prepare_run(RunConfig(**run))
    for name, split in prepared.clients.items():
        labels = Counter(example.response for example in split.train)
        print(f"{name}: {len(split.train)} training examples, {dict(labels.most_common())}")
    print("The first prompt:", repr(split.train[0].prompt))

    folder = fedexperts.run(run, out / "run", resume=True)
    report.write([folder], html=folder / "report.html")
    print(report.table([folder]))
