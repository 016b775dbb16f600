"""Exports the global model of a run, or a client's, to a folder, and loads it again."""

import json
from copy import deepcopy
from dataclasses import dataclass, replace
from inspect import getsource
from pathlib import Path
from textwrap import dedent
from typing import Any, Literal, cast

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from fedexperts.errors import BadValue, Busy
from fedexperts.export import card, modeling_fedexperts
from fedexperts.export.models import Exported, Run, of_client, of_server, open_run
from fedexperts.export.plain import as_plain, is_plain
from fedexperts.export.prompts import chat_template, described
from fedexperts.io.files import align_tensors, atomic_folder, disk_errors, locked, require_empty
from fedexperts.methods.contract import Method
from fedexperts.models.files import location_of
from fedexperts.models.load import align_parameters, without_progress_bars
from fedexperts.moe import factors, lora, rows
from fedexperts.moe.kernel import choose_kernel
from fedexperts.moe.packed import unpack_weights
from fedexperts.moe.precision import undo_mixed_precision
from fedexperts.moe.shrink import shrink

ABOUT = "fedexperts.json"
"""The file in an exported folder that describes the form of its model's prompts."""


@dataclass(frozen=True)
class Kind:
    """The kind of folder that was written."""

    client: str | None
    adapter: bool  # adapters in peft's format, without the base model
    needs_code: bool  # transformers loads it with the modeling file in the folder


def export(
    folder: Path,
    to: Path,
    client: str | None = None,
    adapter: bool = False,
    kept: Path | None = None,
    merge: bool = False,
    round: int | Literal["best"] | None = None,
) -> Kind:
    """Writes the global model of the run in `folder`, or the model of `client`, at a checkpoint to `to`.

    round: of the checkpoint; "best": the one with the best score on validation examples (`checkpoint.best`); None: the last one.

    The global model is a plain transformers folder, with adapters merged into the weights. A client's model is bitwise the one
    that is scored: a plain folder if it has no adapters and all its layers have one number of experts, else with a modeling file.

    adapter: writes only the adapters, in peft's format, with the routers if they were trained. kept: the client's own folder, if
    the run was on several machines. merge: merges the adapters of a client's model into its weights, including those of personal
    experts: faster, equal up to rounding, and a plain folder if nothing else differs from the base's class than a number of
    experts.

    Raises:
        BadRun: `folder` has no run with a checkpoint, another process is using it, or there is no such model.
        BadValue: an unknown client, a model without adapters, `to` is not empty, `kept` or `merge` without a client, or `merge`
            together with `adapter` or without adapters.
    """
    require_empty(to)
    run = open_run(folder, round)
    require_consistent(run, client, adapter, kept, merge)
    try:
        with locked(folder):
            exported = of_client(run, client, kept) if client is not None else of_server(run)
    except Busy:
        raise Busy(f"another process is running in {folder}; wait until it is done, or stop it") from None
    if adapter and client is None:
        require_merged_adapters(run, exported)
    if client is None or adapter:
        require_no_parts_of_the_method(run, exported, client)
    exported, difference = (exported, None) if adapter else as_written(exported, merge=client is None or merge)
    kind = Kind(client, adapter, needs_code=client is not None and not adapter and not is_plain(exported))
    with disk_errors(to), atomic_folder(to) as made, without_progress_bars():
        if adapter:
            write_adapter(run, exported, made)
        elif kind.needs_code:
            write_changed(exported, made)
        else:
            as_plain(exported)
            cast("Any", exported.model).save_pretrained(made)
        for file in made.glob("*.safetensors"):
            align_tensors(file)
        exact = not adapter and difference is None
        if exact and not run.config.build_method().is_ours and known_class(exported.model):
            require_same_model(made, exported.model, client)
        write_beside(run, exported, made, kind, merge, difference)
    return kind


def write_beside(run: Run, exported: Exported, made: Path, kind: Kind, merge: bool, difference: card.Difference | None) -> None:
    """Writes the tokenizer with the run's chat template, `ABOUT` and the model card into the folder `made` of a model."""
    known = about(run, kind.client)
    tokenizer = deepcopy(exported.base.tokenizer)
    tokenizer.chat_template = chat_template(known["prompts"], tokenizer)
    tokenizer.save_pretrained(made)
    (made / ABOUT).write_text(json.dumps(known, indent=2, ensure_ascii=False) + "\n")
    asked = described(known["prompts"], tokenizer.chat_template)
    (made / "README.md").write_text(
        card.text(run, exported, kind.client, kind.adapter, kind.needs_code, merge, difference, asked)
    )


def round_of(text: str | None) -> int | Literal["best"] | None:
    """The round that `text` names.

    Raises:
        BadValue: it is neither a number nor "best".
    """
    if text is None or text == "best":
        return text  # type: ignore[return-value]  # mypy does not narrow a string to a literal
    if not text.isdecimal():
        raise BadValue(f"--round {text} is no round; give a number, or best")
    return int(text)


def as_written(exported: Exported, *, merge: bool) -> tuple[Exported, card.Difference | None]:
    """The model with the weights that are written, in place; and how far its logits then are from the scored model's, if at all.

    merge: its adapters are merged into the weights, which then have the base's dtypes.
    """
    before = logits_on(probe(exported), exported.model) if merge and exported.rounded else None
    if merge:
        exported = replace(exported, model=lora.merge(exported.model), merged=True)
    unpack_weights(exported.model)
    if before is None:
        return exported, None
    if is_plain(exported):
        in_stored_dtypes(exported)
    return exported, card.difference(before, logits_on(probe(exported), exported.model))


def probe(exported: Exported) -> dict[str, Tensor]:
    """Four sequences of 32 random tokens, on which a model and what is exported of it are compared."""
    rows = cast("Any", exported.model).get_input_embeddings().weight.shape[0]
    ids = torch.randint(rows, (4, 32), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@torch.no_grad()
def logits_on(batch: dict[str, Tensor], model: nn.Module) -> Tensor:
    """The logits of `model` on `batch`, in float32."""
    return cast("Tensor", model.eval()(**batch).logits.float())


def in_stored_dtypes(exported: Exported) -> None:
    """Gives weights that were trained in float32 the dtypes of the base's, in which a plain folder has them."""
    stored = {name: weight.dtype for name, weight in exported.base.model.named_parameters()}
    for name, weight in exported.model.named_parameters():
        weight.data = weight.data.to(stored[name])
    undo_mixed_precision(exported.model)
    choose_kernel(exported.model)


def require_consistent(run: Run, client: str | None, adapter: bool, kept: Path | None, merge: bool) -> None:
    """Raises BadValue if the options of an export exclude each other or do not fit the run."""
    if kept is not None and client is None:
        raise BadValue(f"--kept {kept} is a client's own folder; say which one's with --client")
    if merge and adapter:
        raise BadValue("--merge puts adapters into the weights, and --adapter writes them alone; leave one out")
    if merge and client is None:
        raise BadValue("--merge is for a client's model, and the global one has its adapters merged anyway; leave it out")
    if (adapter or merge) and run.config.training.train == "full":
        raise BadValue(
            f'{run.folder} has no adapters: it trained whole weights (training.train = "full"); '
            f"leave out {'--adapter' if adapter else '--merge'}"
        )


def require_merged_adapters(run: Run, exported: Exported) -> None:
    """Raises BadValue if the server never got the B of any adapter, so that all of them would be zero."""
    weights, keeps_weights = rows.read(exported.model), run.config.build_method().declare().keeps_weights
    if keeps_weights and not any(weights[b].any() for b in factors.pairs(weights).values()):
        raise BadValue(
            f"the clients of {run.folder} keep the B of their adapters to themselves ({run.config.method['name']}), so the "
            f"server's adapters change nothing; give a client's with --client, such as {next(iter(run.clients))}"
        )


def require_no_parts_of_the_method(run: Run, exported: Exported, client: str | None) -> None:
    """Raises BadValue if the method extends the model, or adds weights that neither the base model nor its adapters have."""
    if run.config.build_method().is_ours:
        return
    known = rows.layout(Method().global_model(exported.base.model, run.config.training.tuning, None, seed=""))
    strange = [name for name in rows.layout(exported.model) if name not in known]
    if strange or exported.extension is not None:
        what = f"adds {strange[0]} to" if strange else "changes the structure of"
        form = "an adapter" if client is not None else "a folder of the global model or an adapter"
        raise BadValue(
            f"method {run.config.method['name']} {what} the model, which {form} cannot hold; export a client's whole model: "
            f"--client {client or next(iter(run.clients))}, without --adapter"
        )


def known_class(model: nn.Module) -> bool:
    """Whether transformers has the model's class; it loads its classes lazily, so there is no list to search."""
    return hasattr(transformers, type(model).__name__)


@torch.no_grad()
def require_same_model(folder: Path, model: nn.Module, client: str | None) -> None:
    """Raises BadValue if the model in `folder` does not compute the logits of `model`, whose method may change its structure."""
    ids = torch.arange(3, 11)[None]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    ours, theirs = (each.eval()(**batch).logits for each in (cast("Any", model), load(folder, trust_remote_code=True)))
    if not torch.equal(ours, theirs):
        remedy = (
            "describe the change with the method's extension()" if client is not None else "export a client's model (--client)"
        )
        raise BadValue(
            "the exported folder would not compute what the trained model computes, because the method changes the model's "
            f"structure in a way that the export does not know; {remedy}"
        )


def write_changed(exported: Exported, folder: Path) -> None:
    """Writes the model with the modeling file that constructs its class.

    Raises:
        BadValue: the modeling file cannot construct its class.
    """
    model = cast("Any", exported.model)
    if not known_class(model):
        raise BadValue(
            f"the base brings its own code ({type(model).__name__}), of which no client's model can be written; "
            "take the global model, or --adapter"
        )
    model.save_pretrained(folder, save_original_format=False)
    modeling_fedexperts.finish(folder, model.config, exported.changes)
    if exported.extension is not None:
        with (folder / "modeling_fedexperts.py").open("a") as file:
            file.write(f"\n\n{dedent(getsource(exported.extension.apply))}")


def write_adapter(run: Run, exported: Exported, folder: Path) -> None:
    """Writes the adapters of the model.

    Raises:
        BadValue: the model is not the base model with adapters.
    """
    changes = exported.changes
    why = (
        "has fewer experts than the base, on which its adapters would not fit"
        if changes.get("cut")
        else "has personal experts beside the base's, which no adapter can hold"
        if changes.get("grafted")
        else "has in its weights what former rounds added to them, which no adapter can hold"
        if exported.added
        else None
    )
    if why:
        raise BadValue(f"the model {why}; leave out --adapter")
    bare = shrink(exported.base.model, {})
    lora.save_adapter(exported.model, bare, folder, location_of(run.config.model.name))


def about(run: Run, client: str | None) -> dict[str, Any]:
    """The content of fedexperts.json, which `generate` reads."""
    partition = json.loads((run.folder / "partition.json").read_text())
    return {
        "client": client,
        "task": run.clients[client]["task"] if client is not None else None,
        "prompts": partition.get("prompts", {}),  # older runs have none
        "max_tokens": run.config.data.max_tokens,
        "generate_tokens": run.config.evaluation.generate_tokens,
    }


def load(folder: Path | str, trust_remote_code: bool = False) -> PreTrainedModel:
    """Loads the model in `folder`, written by `export` or in transformers' format, in eval mode.

    Code in the folder is executed only with `trust_remote_code`, which a model with an extension of its method needs.

    Raises:
        BadValue: no model, only an adapter, or a model that needs code from the folder.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists():
        if (folder / "adapter_config.json").exists():
            raise BadValue(
                f"{folder} is an adapter; put it on its base with peft: PeftModel.from_pretrained(base, {str(folder)!r})"
            )
        raise BadValue(f"{folder} holds no model; give a folder that fedexperts export wrote")
    if not trust_remote_code and (function := _function_in(folder)) is not None:
        raise BadValue(
            f"{folder} needs code of its run's method ({function}), which is copied into its modeling_fedexperts.py; "
            "read it, then give trust_remote_code=True (--trust-remote-code) to run it"
        )
    try:
        with without_progress_bars():
            model = _read(folder, trust_remote_code)
    except (OSError, ValueError, RuntimeError, AttributeError, SafetensorError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise BadValue(f"{folder} cannot be loaded ({first}); export it again") from error
    return cast("PreTrainedModel", model.eval())


def _function_in(folder: Path) -> str | None:
    """The function in the folder's modeling file that extends the model; None if the installed code suffices."""
    try:
        changes = json.loads((folder / "config.json").read_text()).get("fedexperts", {})
    except (OSError, ValueError):
        return None  # which loading reports
    return str(changes["extension"]["function"]) if "extension" in changes else None


def _read(folder: Path, trust_remote_code: bool) -> Any:
    config_json = json.loads((folder / "config.json").read_text())
    if config_json.get("model_type") == modeling_fedexperts.MODEL_TYPE and trust_remote_code:
        auto = next(name for name in config_json["auto_map"] if name != "AutoConfig")
        return getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
    if config_json.get("model_type") == modeling_fedexperts.MODEL_TYPE:
        config = modeling_fedexperts.ClientConfig.from_pretrained(folder)
        return modeling_fedexperts.ClientModel.from_pretrained(folder, config=config)
    config = AutoConfig.from_pretrained(folder)
    kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = kind.from_pretrained(folder, config=config)
    choose_kernel(model)
    align_parameters(model)
    return model
