"""The model card (README.md) of an exported folder: what the model is, its origin, and which parts are personal."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from huggingface_hub import try_to_load_from_cache
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from fedexperts.core.evaluation import METRICS
from fedexperts.export.models import PERSONAL_EXPERTS, Exported, Run
from fedexperts.models.files import BUNDLED, location_of
from fedexperts.moe.anatomy import anatomy
from fedexperts.moe.packed import Packed
from fedexperts.moe.shrink import kept_experts

AUTO = {False: "AutoModelForCausalLM", True: "AutoModelForSeq2SeqLM"}


@dataclass(frozen=True)
class Difference:
    """How far the logits of an exported model are from those of the model that was scored."""

    largest: float  # absolute difference
    divergence: float  # mean Kullback-Leibler divergence of the next token's distribution, in nats


def difference(scored: Float[Tensor, "..."], exported: Float[Tensor, "..."]) -> Difference:
    """The difference between the logits of two models on the same batch."""
    ours, theirs = (logits.flatten(0, -2).log_softmax(-1) for logits in (scored, exported))
    divergence = functional.kl_div(theirs, ours, reduction="batchmean", log_target=True)
    return Difference(float((scored - exported).abs().max()), float(divergence))


def text(
    run: Run,
    exported: Exported,
    client: str | None,
    adapter: bool,
    needs_code: bool,
    merged: bool = False,
    measured: Difference | None = None,
    asked: Iterable[str] = (),
) -> str:
    """The text of the card.

    merged: whether adapters were merged into the weights of a client's model. measured: from the scored model, if the exported
    one does not compute the same. asked: paragraphs that say how it is asked.
    """
    what = f"The model of client {client}" if client is not None else "The global model"
    license = license_of(run.config.model.name)
    head = ["---", f"library_name: {'peft' if adapter else 'transformers'}", "tags: [mixture-of-experts, federated-learning]"]
    head += [f"license: {license}"] if license else []
    sections = [
        "\n".join([*head, "---"]),
        f"# {what} of a federated run",
        f"As it was after round {run.round} of {run.config.federation.rounds}"
        f"{', its adapters alone' if adapter else ', its adapters merged into its weights' if merged else ''}; "
        "written by `fedexperts export`.",
        personal(run, exported, client),
        *computed(exported, adapter, measured),
        "## Use",
        usage(run, exported, adapter, needs_code),
        *asked,
        "## Servers and benchmarks",
        servers(exported, adapter, needs_code),
        "## Where it comes from",
        table({"": "", **origin(run, exported, client, license)}),
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


def computed(exported: Exported, adapter: bool, measured: Difference | None) -> Iterator[str]:
    """How the base's weights were stored in the run, and whether the exported model computes what the scored one does."""
    base = exported.base
    dtype = str(cast("Any", base.model).dtype).removeprefix("torch.")
    if base.stored_as:
        yield (
            f"The base is stored in {base.stored_as}. The run read it as the {dtype} values that it stands for"
            f"{'' if adapter else ', and these are the weights here'}."
        )
    if any(isinstance(weight, Packed) for weight in base.model.parameters()):
        yield (
            "In the run the weights of experts and dense linear layers that were not trained were stored in 4 bits (nf4), and "
            f"computed with as the {dtype} values that these stand for"
            f"{': on the base itself the adapters compute other logits' if adapter else ', which are the weights here'}."
        )
    if measured is not None:
        yield (
            "The run computed with adapters and weights in float32 that are rounded here. On 128 random tokens the logits differ "
            f"by at most {measured.largest:.3g} from those of the model that was scored, and the mean KL divergence is "
            f"{measured.divergence:.3g} nats. `--client` without `--merge` exports a client's model exactly."
        )


def personal(run: Run, exported: Exported, client: str | None) -> str:
    """Which contents of the folder a client never sent to the server, or may reveal something about its data."""
    if client is None:
        keeping = sum(any(path.iterdir()) for path in (run.folder / "clients").glob("*"))
        apart = f" What {keeping} of the clients keep on their side was not read for it." if keeping else ""
        return f"It holds what clients sent and the server merged.{apart}"
    note = selection_note(exported)
    if not exported.personal:
        return f"Its weights are what the server would send this client; it kept no weight of this model to itself.{note}"
    part_kinds = set(exported.personal.values())
    kinds = [*({PERSONAL_EXPERTS} & part_kinds), *sorted(part_kinds - {PERSONAL_EXPERTS})]
    return (
        f"> **Personal.** This folder holds what client {client} kept to itself in the run and never sent: {', '.join(kinds)} "
        f"({len(exported.personal)} tensors, trained on its own examples). It may tell of these examples: pass it on only if the "
        f"client would pass them on.{note}"
    )


def selection_note(exported: Exported) -> str:
    """A sentence on the experts of a sub-model, which may reveal something about the client's data; else empty."""
    if not exported.changes.get("cut"):
        return ""
    kept_ids, total = kept_experts(exported.model), anatomy(exported.base.model).num_experts
    number = sum(len(ids) for ids in kept_ids.values())
    return f" It has {number} of the base's {total} experts; which ones may tell what its data is like."


def usage(run: Run, exported: Exported, adapter: bool, needs_code: bool) -> str:
    """Code that loads the model."""
    auto_class = AUTO[exported.base.encoder_decoder]
    base = shown(run.config.model.name)
    eager = ', experts_implementation="eager"' if exported.changes.get("experts") == "eager" else ""
    dtype = str(cast("Any", exported.base.model).dtype).removeprefix("torch.")
    if adapter:
        code = [
            "from peft import PeftModel",
            f"from transformers import {auto_class}",
            f'base = {auto_class}.from_pretrained("{base}"{eager})  # the base of the run, in {dtype}',
            'model = PeftModel.from_pretrained(base, "FOLDER")',
        ]
        return fenced(code)
    trust = ", trust_remote_code=True" if needs_code else ""
    code = [
        f"from transformers import {auto_class}, AutoTokenizer",
        f'model = {auto_class}.from_pretrained("FOLDER"{trust}{eager})',
        f'tokenizer = AutoTokenizer.from_pretrained("FOLDER"{trust})',
    ]
    also = 'With FedExperts installed, `fedexperts.load("FOLDER")` gives the same model' + (
        " without running code from the folder" if needs_code else ""
    )
    return f'{fenced(code)}\n\n{also}, and `fedexperts generate FOLDER "prompt"` asks it as the run did.'


def servers(exported: Exported, adapter: bool, needs_code: bool) -> str:
    """What else can load the model, and how lm-evaluation-harness scores it."""
    architecture = cast("Any", exported.base.model).config.architectures[0]
    loads = (
        f"Any server that loads {architecture} with adapters of peft can load it."
        if adapter
        else f"It is a {architecture} with other parts, which modeling_fedexperts.py adds: transformers can load it, as above; "
        "servers and converters that know only fixed architectures, such as vLLM and those to GGUF, cannot."
        if needs_code
        else f"It is a {architecture} in the format of transformers; servers and converters that know this architecture, such as "
        "vLLM and those to GGUF, need nothing else."
    )
    return f"{loads}\n\nlm-evaluation-harness scores it with its own prompts:\n\n{fenced([harness(adapter, needs_code)], 'sh')}"


def harness(adapter: bool, needs_code: bool) -> str:
    """The command by which lm-evaluation-harness scores an exported folder."""
    where = "pretrained=BASE,peft=FOLDER" if adapter else f"pretrained=FOLDER{',trust_remote_code=True' if needs_code else ''}"
    return f"lm_eval --model hf --model_args {where} --tasks arc_easy,piqa --batch_size 8  # with --apply_chat_template as a chat"


def origin(run: Run, exported: Exported, client: str | None, license: str | None) -> dict[str, str]:
    """The table of the run: base model, method, training, clients and data."""
    config = run.config
    method = config.resolved()["method"]
    settings = ", ".join(f"{key} = {value}" for key, value in method.items() if key != "name")
    training = config.training
    trained = f"{training.train}: {', '.join(training.trained)}"
    if training.train == "lora":
        trained += f" (rank {training.rank}, alpha {training.alpha:g})"
    lines = {
        "base": shown(config.model.name),
        "license of the base": license or "not known here: see where the base comes from",
        "method": f"{method['name']}{f' ({settings})' if settings else ''}",
        "trained": trained,
        "rounds": f"{run.round} of {config.federation.rounds}, {config.federation.clients_per_round or 'all'} clients each",
        "clients": f"{len(run.clients)}, with {sum(each['examples'] for each in run.clients.values())} training examples",
        "data": ", ".join(shown(source.name) for source in config.data.sources),
        "seed": str(config.seed),
    }
    if client is not None:
        own = run.clients[client]
        lines["this client"] = f"{own['examples']} training examples; " + ", ".join(
            f"{task}: {number}" for task, number in own["tasks"].items()
        )
    return lines


def scores(run: Run, client: str | None) -> Iterator[str]:
    """The last scores before the checkpoint, with a description."""
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


def license_of(name: str) -> str | None:
    """The license in the base model's card; for a bundled base, the package's; None if it is unknown."""
    if name in BUNDLED:
        return "apache-2.0"
    where = Path(location_of(name))
    path = where / "README.md" if where.is_dir() else try_to_load_from_cache(name, "README.md")
    card = Path(cast("str", path)) if isinstance(path, str | Path) else None
    if card is None or not card.is_file():
        return None
    front = card.read_text(encoding="utf-8", errors="replace").partition("---\n")[2].partition("\n---")[0]
    match = re.search(r"^license:\s*([\w.+-]+)\s*$", front, re.MULTILINE)
    return match.group(1) if match else None


def shown(name: str) -> str:
    """The name of a model or source; of a local file or folder only the last part of its path."""
    return Path(name).name if Path(name).expanduser().exists() else name


def table(lines: Mapping[str, Any]) -> str:
    (first, *rest) = (f"| {cell(name)} | {cell(str(value))} |" for name, value in lines.items())
    return "\n".join([first, "|---|---|", *rest])


def cell(text: str) -> str:
    """`text` as a cell of a Markdown table: on one line, with pipes escaped."""
    return " ".join(text.split()).replace("|", "\\|")


def fenced(lines: list[str], language: str = "python") -> str:
    return "\n".join([f"```{language}", *lines, "```"])
