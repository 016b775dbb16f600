"""What a model costs, from its config alone: it is built on the meta device, and its modules are counted."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from fedexperts.errors import BadValue, nearest, shortened
from fedexperts.models.files import BUNDLED, bundled_folder
from fedexperts.moe.anatomy import Anatomy, Experts, anatomy, blocks
from fedexperts.moe.footprint import COPIES, on_meta
from fedexperts.moe.lora import ExpertLoRA
from fedexperts.moe.parameters import parameters
from fedexperts.moe.shrink import shrink
from fedexperts.moe.tuning import Tuning, prepare, trainable

FP32 = 4  # bytes
FP32_TRAINED = FP32 * COPIES["adamw"]  # bytes of a weight, its gradient and its two moments


@dataclass(frozen=True)
class Layer:
    """One MoE layer."""

    name: str
    router: str  # the name of its class
    num_experts: int
    top_k: int
    groups: int
    expert_parameters: int  # of one expert
    router_row_parameters: int  # of the router, for one expert
    kept: int  # experts in the sub-model


@dataclass(frozen=True)
class Size:
    """The size of a model or a sub-model. Tied weights count once; router rows count with their experts."""

    experts: int
    parameters: int
    active_parameters: int  # used for one token
    send_bytes: int  # of all parameters in fp32, one way
    training_bytes: int  # without activations: 16 per parameter; with LoRA 4, and 16 per parameter of an adapter


@dataclass(frozen=True)
class Adapters:
    """What LoRA adds to a model.

    Our adapters of stacked experts treat the gate and up projections as the one matrix that they are stored as, with one A.
    The papers count them as two matrices with an A each: `parameters_by_matrix`.
    """

    parts: tuple[str, ...]
    rank: int
    attention_modules: tuple[str, ...]
    parameters: int
    parameters_by_matrix: int
    send_bytes: int  # of the adapters alone in fp32
    with_model_bytes: int  # of the model and the adapters together


@dataclass(frozen=True)
class Inspection:
    """What a model costs, and what a sub-model of it and adapters do."""

    model: str
    model_type: str
    layers: tuple[Layer, ...]  # those with experts
    dense_parameters: int  # all but routed experts and router rows
    grafted_parameters: int  # of one copied expert in every MoE layer
    full: Size
    kept: Size | None = None
    adapters: Adapters | None = None

    def to_json(self) -> str:
        """All numbers, under the names of the fields."""
        return json.dumps(asdict(self), indent=2)


def inspect(model: str | Path, keep: int | None = None, keep_total: int | None = None, lora: Tuning | None = None) -> Inspection:
    """What the model of a config, a folder or a hub id costs; and its sub-model of `keep` experts a layer or `keep_total` in all.

    No weights are read. `keep_total` is spread evenly over the layers; the first ones get one more if it does not divide. With
    `lora`, also what these adapters add, and the cost of training the model with them.

    Raises:
        BadValue: no config, a model without experts, a sub-model that cannot run, or adapters that do not fit.
    """
    full = skeleton(read_config(str(model)))
    counted, shape = parameters(full), anatomy(full)
    experts = first_experts(shape, keep, keep_total)
    small = shrink(full, experts) if experts else None
    adapters = adapters_of(full, lora) if lora else None
    small_adapters = adapters_of(small, lora) if small and lora else None
    router = {name: type(block.router).__name__ for name, block in blocks(full).items()}
    return Inspection(
        model=str(model),
        model_type=cast("Any", full).config.model_type,
        layers=tuple(
            Layer(
                name=name,
                router=router[name],
                num_experts=block.num_experts,
                top_k=block.top_k,
                groups=block.groups,
                expert_parameters=counted.expert[name],
                router_row_parameters=counted.router_row[name],
                kept=len(experts[name]) if experts else block.num_experts,
            )
            for name, block in shape.blocks.items()
        ),
        dense_parameters=counted.dense,
        grafted_parameters=sum(counted.expert.values()),
        full=size_of(full, adapters),
        kept=size_of(small, small_adapters) if small else None,
        adapters=adapters,
    )


def lora_option(parts: str, rank: int, modules: str | None = None) -> Tuning:
    """The Tuning of `--lora attention+experts --rank 8 --lora-modules q,k,v`.

    Raises:
        BadValue: a part or a rank that does not exist.
    """
    names = tuple(modules.split(",")) if modules else Tuning().attention_modules
    tuning = Tuning("lora", cast("Any", tuple(parts.split("+"))), rank, attention_modules=names)
    tuning.check()
    return tuning


def read_config(model: str) -> Any:
    """The transformers config of `model`: a JSON file, a folder, a bundled base or a hub id.

    Raises:
        BadValue: there is none.
    """
    path = Path(model)
    if path.suffix == ".json":
        return AutoConfig.for_model(**config_file(path))
    folder = bundled_folder(model) if model in BUNDLED else path
    try:
        return AutoConfig.from_pretrained(folder if folder.is_dir() else model)
    except (OSError, ValueError) as error:
        reason = shortened(str(error).splitlines()[0])
        raise BadValue(
            f"no model config could be read from {model!r} ({reason}); "
            f"give {', '.join(BUNDLED)}, a config file, a folder or a hub id{nearest(model, BUNDLED)}"
        ) from error


def config_file(path: Path) -> Mapping[str, Any]:
    """The content of a config.json."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadValue(f"{path} could not be read as JSON ({shortened(str(error))}); give the config.json of a model") from error
    if not isinstance(content, dict) or content.get("model_type") not in CONFIG_MAPPING:
        raise BadValue(f"{path} names no model_type that transformers knows; give the config.json of a model")
    return content


def skeleton(config: Any) -> nn.Module:
    """The model of `config` without weights."""
    kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        try:
            return cast("nn.Module", kind.from_config(config, dtype=torch.float32))
        except ValueError as error:
            raise BadValue(
                f"{config.model_type} is no language model that transformers can build; give the config of one that is"
            ) from error


def first_experts(shape: Anatomy, keep: int | None, keep_total: int | None) -> Experts | None:
    """The first experts of each layer, as many as `keep` or `keep_total` says; which ones does not change the costs.

    Raises:
        BadValue: both numbers, or one with which a layer cannot run.
    """
    if keep is not None and keep_total is not None:
        raise BadValue(f"keep = {keep} a layer and keep_total = {keep_total} exclude each other; give one of them")
    if keep is None and keep_total is None:
        return None
    layers = len(shape.blocks)
    per_layer, rest = (keep, 0) if keep is not None else divmod(cast("int", keep_total), layers)
    counts = {name: per_layer + (index < rest) for index, name in enumerate(shape.blocks)}
    for name, block in shape.blocks.items():
        if not block.fewest <= counts[name] <= block.num_experts:
            raise BadValue(
                f"{name} would keep {counts[name]} of its {block.num_experts} experts; keep {block.fewest} to "
                f"{block.num_experts} a layer ({layers * block.fewest} to {shape.num_experts} in all)"
            )
    return {name: tuple(range(count)) for name, count in counts.items()}


def size_of(model: nn.Module, adapters: Adapters | None) -> Size:
    """The size of a model that is trained whole or, if given, by its `adapters`."""
    counted = parameters(model)
    training = counted.total * FP32 + adapters.parameters * FP32_TRAINED if adapters else counted.total * FP32_TRAINED
    return Size(
        experts=sum(block.num_experts for block in counted.blocks.values()),
        parameters=counted.total,
        active_parameters=counted.active,
        send_bytes=counted.total * FP32,
        training_bytes=training,
    )


def adapters_of(model: nn.Module, lora: Tuning) -> Adapters:
    """What the adapters of `lora` add to `model`."""
    adapted = prepare(on_meta(model), lora, seed="")
    number = sum(parameter.numel() for parameter in trainable(adapted))
    fused = [module for name, module in adapted.named_modules() if name.endswith("gate_up_proj")]
    second_a = sum(module.a.numel() for module in fused if isinstance(module, ExpertLoRA))
    return Adapters(
        parts=lora.trained,
        rank=lora.rank,
        attention_modules=lora.attention_modules,
        parameters=number,
        parameters_by_matrix=number + second_a,
        send_bytes=number * FP32,
        with_model_bytes=(parameters(model).total + number) * FP32,
    )


def render(inspection: Inspection) -> RenderableType:
    """`inspection` as tables for a terminal: layers, parameters, costs and adapters."""
    tables = [layers_table(inspection), parameters_table(inspection), costs_table(inspection)]
    return Group(*tables, *([adapters_table(inspection.adapters)] if inspection.adapters else []))


def layers_table(inspection: Inspection) -> Table:
    """The layers with experts; equal ones share a row, with `*` for their numbers."""
    routers = ", ".join(sorted({layer.router for layer in inspection.layers}))
    table = Table(title=f"{inspection.model} ({inspection.model_type}), router {routers}", title_justify="left")
    for column in ("layers", "experts", "kept", "top k", "one expert", "router row"):
        table.add_column(column, justify="left" if column == "layers" else "right", overflow="fold")
    for (name, *cells), number in Counter(cells_of(layer) for layer in inspection.layers).items():
        table.add_row(f"{number} × {name}", *cells)
    return table


def cells_of(layer: Layer) -> tuple[str, ...]:
    """The cells of `layer`; its number in its name is replaced by `*`."""
    counts = (str(layer.num_experts), str(layer.kept), str(layer.top_k))
    return (
        re.sub(r"\d+", "*", layer.name, count=1),
        *counts,
        in_millions(layer.expert_parameters),
        f"{layer.router_row_parameters:,}",
    )


def parameters_table(inspection: Inspection) -> Table:
    """The numbers of parameters by kind."""
    table = Table(title="Parameters", title_justify="left")
    table.add_column("kind")
    table.add_column("number", justify="right")
    table.add_row("dense (no expert, no router row)", in_millions(inspection.dense_parameters))
    table.add_row("one expert in every layer (a graft)", in_millions(inspection.grafted_parameters))
    table.add_row("total", in_millions(inspection.full.parameters))
    table.add_row("active per token", in_millions(inspection.full.active_parameters))
    return table


def costs_table(inspection: Inspection) -> Table:
    """The bytes to send and to train the model and its sub-model."""
    table = Table(title="Costs (fp32; training without activations)", title_justify="left")
    for column in ("model", "experts", "parameters", "send one way", "training"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, size in (("full", inspection.full), ("sub-model", inspection.kept)):
        if size:
            table.add_row(
                name, str(size.experts), in_millions(size.parameters), in_gib(size.send_bytes), in_gib(size.training_bytes)
            )
    return table


def adapters_table(adapters: Adapters) -> Table:
    """The parameters and bytes of the adapters."""
    table = Table(title=f"LoRA on {' and '.join(adapters.parts)}, rank {adapters.rank}", title_justify="left")
    table.add_column("what")
    table.add_column("amount", justify="right")
    table.add_row("parameters (gate and up as one, as here)", in_millions(adapters.parameters))
    table.add_row("parameters (gate and up apart, as in papers)", in_millions(adapters.parameters_by_matrix))
    table.add_row("send adapters one way", in_gib(adapters.send_bytes))
    table.add_row("send full model and adapters one way", in_gib(adapters.with_model_bytes))
    return table


def in_millions(number: int) -> str:
    return f"{number / 1e6:,.2f} M"


def in_gib(number: int) -> str:
    return f"{number / 2**30:.3f} GiB"
