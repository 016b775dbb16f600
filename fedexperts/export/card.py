"""The README.md of an exported folder, in the form of a model card: what it is, where it comes from, what of it is personal."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from huggingface_hub import try_to_load_from_cache

from fedexperts.core.evaluation import METRICS
from fedexperts.export.models import PERSONAL_EXPERTS, Exported, Run
from fedexperts.models.load import BUNDLED, location_of
from fedexperts.moe.anatomy import anatomy
from fedexperts.moe.shrink import kept_experts

AUTO = {False: "AutoModelForCausalLM", True: "AutoModelForSeq2SeqLM"}


def text(run: Run, found: Exported, client: str | None, adapter: bool, needs_code: bool, merged: bool = False) -> str:
    """The whole card. `merged`: its adapters were added into its weights, which a client's else are not."""
    what = f"The model of client {client}" if client is not None else "The global model"
    licence = licence_of(run.config.model.name)
    head = ["---", f"library_name: {'peft' if adapter else 'transformers'}", "tags: [mixture-of-experts, federated-learning]"]
    head += [f"license: {licence}"] if licence else []
    sections = [
        "\n".join([*head, "---"]),
        f"# {what} of a federated run",
        f"As it was after round {run.round} of {run.config.federation.rounds}"
        f"{', its adapters alone' if adapter else ', its adapters merged into its weights' if merged else ''}; "
        "written by `fedexperts export`.",
        personal(run, found, client),
        "## Use",
        usage(run, found, adapter, needs_code),
        "## Where it comes from",
        table({"": "", **origin(run, found, client, licence)}),
        "## Scores",
        *scores(run, client),
        "## Versions",
        table(
            {
                "package": "version",
                **{name: str(each) for name, each in run.versions.items() if not name.endswith(("hash", "hashes"))},
            }
        ),
    ]
    return "\n\n".join(sections) + "\n"


def personal(run: Run, found: Exported, client: str | None) -> str:
    """What in the folder a client did not share with the server, and what else tells of a client."""
    if client is None:
        keeping = sum(any(path.iterdir()) for path in (run.folder / "clients").glob("*"))
        apart = f" What {keeping} of the clients keep on their side was not read for it." if keeping else ""
        return f"It holds what clients sent and the server merged.{apart}"
    told = cut_told(found)
    if not found.personal:
        return f"Its weights are what the server would send this client; it kept no weight of this model to itself.{told}"
    kept = set(found.personal.values())
    what = [*({PERSONAL_EXPERTS} & kept), *sorted(kept - {PERSONAL_EXPERTS})]
    return (
        f"> **Personal.** This folder holds what client {client} kept to itself in the run and never sent: {', '.join(what)} "
        f"({len(found.personal)} tensors, trained on its own examples). It may tell of these examples: pass it on only if the "
        f"client would pass them on.{told}"
    )


def cut_told(found: Exported) -> str:
    if not found.changes.get("cut"):
        return ""
    held, all_there = kept_experts(found.model), anatomy(found.base.model).num_experts
    number = sum(len(ids) for ids in held.values())
    return f" It has {number} of the base's {all_there} experts; which ones may tell what its data is like."


def usage(run: Run, found: Exported, adapter: bool, needs_code: bool) -> str:
    auto = AUTO[found.base.encoder_decoder]
    base = shown(run.config.model.name)
    eager = ', experts_implementation="eager"' if found.changes.get("experts") == "eager" else ""
    if adapter:
        code = [
            "from peft import PeftModel",
            f"from transformers import {auto}",
            f'base = {auto}.from_pretrained("{base}"{eager})  # the base of the run, in float32',
            'model = PeftModel.from_pretrained(base, "FOLDER")',
        ]
        return fenced(code)
    trust = ", trust_remote_code=True" if needs_code else ""
    code = [
        f"from transformers import {auto}, AutoTokenizer",
        f'model = {auto}.from_pretrained("FOLDER"{trust}{eager})',
        f'tokenizer = AutoTokenizer.from_pretrained("FOLDER"{trust})',
    ]
    also = 'With FedExperts installed, `fedexperts.load("FOLDER")` gives the same model' + (
        " without running code from the folder" if needs_code else ""
    )
    return f'{fenced(code)}\n\n{also}, and `fedexperts generate FOLDER "prompt"` asks it as the run did.'


def origin(run: Run, found: Exported, client: str | None, licence: str | None) -> dict[str, str]:
    config = run.config
    method = config.resolved()["method"]
    settings = ", ".join(f"{key} = {value}" for key, value in method.items() if key != "name")
    training = config.training
    trained = f"{training.train}: {', '.join(training.trained)}"
    if training.train == "lora":
        trained += f" (rank {training.rank}, alpha {training.alpha:g})"
    told = {
        "base": shown(config.model.name),
        "licence of the base": licence or "not known here: see where the base comes from",
        "method": f"{method['name']}{f' ({settings})' if settings else ''}",
        "trained": trained,
        "rounds": f"{run.round} of {config.federation.rounds}, {config.federation.clients_per_round or 'all'} clients each",
        "clients": f"{len(run.clients)}, with {sum(each['examples'] for each in run.clients.values())} training examples",
        "data": ", ".join(shown(source.name) for source in config.data.sources),
        "seed": str(config.seed),
    }
    if client is not None:
        own = run.clients[client]
        told["this client"] = f"{own['examples']} training examples; " + ", ".join(
            f"{task}: {number}" for task, number in own["tasks"].items()
        )
    return told


def scores(run: Run, client: str | None) -> Iterator[str]:
    """The last ones before the checkpoint, and what they mean."""
    path = run.folder / "evals.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    own = [line for line in lines if line["client"] == client and line["task"] and line["metric"] and line["round"] <= run.round]
    if not own:
        yield "None were taken before this checkpoint."
        return
    last = max(line["round"] for line in own)
    evaluation = run.config.evaluation
    when = "right after its local training" if evaluation.score == "before_aggregation" else "after aggregation"
    whose = "this client's own examples" if client is not None else "the clients' own examples, all together"
    with_what = (
        ""
        if client is not None
        else " Each client was scored with its own model, what the server sends it and what it keeps: where that differs from "
        "the global model, so may the scores."
    )
    yield f"Of round {last}, on {whose} ({evaluation.split}), {when}.{with_what}"
    heads = "| task | examples | metric | value | |\n|---|---|---|---|---|"
    rows = (
        f"| {cell(line['task'])} | {line['examples']} | {line['metric']} | {line['value']:.4f} | {METRICS[line['metric']]} |"
        for line in own
        if line["round"] == last
    )
    yield "\n".join([heads, *rows])


def licence_of(name: str) -> str | None:
    """The licence that the base's own card names; of a base of ours, the package's."""
    if name in BUNDLED:
        return "apache-2.0"
    where = Path(location_of(name))
    path = where / "README.md" if where.is_dir() else try_to_load_from_cache(name, "README.md")
    card = Path(cast("str", path)) if isinstance(path, str | Path) else None
    if card is None or not card.is_file():
        return None
    front = card.read_text(encoding="utf-8", errors="replace").partition("---\n")[2].partition("\n---")[0]
    found = re.search(r"^license:\s*([\w.+-]+)\s*$", front, re.MULTILINE)
    return found.group(1) if found else None


def shown(name: str) -> str:
    """A model or source by its name; of a file or folder of one's own only the last part of its path."""
    return Path(name).name if Path(name).expanduser().exists() else name


def table(lines: Mapping[str, Any]) -> str:
    (first, *rest) = (f"| {cell(name)} | {cell(str(value))} |" for name, value in lines.items())
    return "\n".join([first, "|---|---|", *rest])


def cell(text: str) -> str:
    """On one line of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def fenced(lines: list[str]) -> str:
    return "\n".join(["```python", *lines, "```"])
