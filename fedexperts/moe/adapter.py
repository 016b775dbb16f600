"""Starts the adapters of a model from an adapter of peft: what `lora.save_adapter` writes, or any plain LoRA of the same form."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedexperts.errors import BadValue
from fedexperts.moe import lora
from fedexperts.moe.anatomy import blocks
from fedexperts.moe.tuning import Tuning

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Begins the name of every tensor of an adapter; the path in the base model follows."""
NOT_PLAIN = (
    "use_dora",
    "use_rslora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "trainable_token_indices",
)
"""Settings of peft with which an adapter is more than B A with one rank and scale."""


@dataclass(frozen=True)
class Adapter:
    """An adapter of peft in a folder."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]  # by peft's names, without PREFIX

    @property
    def settings(self) -> str:
        """The settings of a run that fit this adapter, as a run file has them."""
        linears = {name.split(".lora_")[0] for name in self.tensors if ".lora_A." in name}
        experts = {path for path in linears if "experts" in path.split(".")}
        routers = [name for name in self.tensors if ".lora_" not in name]
        found = {"attention": linears - experts, "experts": experts, "router": routers}
        parts = [part for part, names in found.items() if names]
        modules = sorted({path.rpartition(".")[2] for path in linears - experts})
        return (
            f'train = "lora", rank = {self.config["r"]}, alpha = {self.config["lora_alpha"]:g}, parts = {json.dumps(parts)}'
            f"{f', attention_modules = {json.dumps(modules)}' if modules else ''}"
        )


def read_adapter(folder: Path) -> Adapter:
    """The adapter in `folder`.

    Raises:
        BadValue: it holds none, or another kind than plain LoRA.
    """
    remedy = "give a folder that fedexperts export --adapter or peft's save_pretrained wrote"
    try:
        config = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError):
        raise BadValue(f"model.adapter = {str(folder)!r} is no adapter: it lacks {CONFIG} or {WEIGHTS}; {remedy}") from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    changed = [] if kind != "LORA" else [name for name in NOT_PLAIN if config.get(name)]
    if kind != "LORA" or changed or config.get("bias", "none") != "none":
        what = f"with {(*changed, 'bias')[0]}" if kind == "LORA" else f"of the kind {kind}"
        raise BadValue(f"model.adapter = {str(folder)!r} is an adapter {what}, and only plain LoRA can be trained on; {remedy}")
    return Adapter(folder, config, {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()})


@torch.no_grad()
def start_from(model: nn.Module, adapter: Adapter, tuning: Tuning) -> None:
    """Copies the weights of `adapter` into the adapters and trained routers of `model`, which is prepared as `tuning` says.

    Raises:
        BadValue: the adapter has another rank, scale or form than the model's adapters.
    """
    targets = places(model) if tuning.train == "lora" else {}
    same_size = adapter.config["r"] == tuning.rank and isclose(adapter.config["lora_alpha"], tuning.alpha)
    strange = sorted(targets.keys() ^ adapter.tensors.keys())
    if not targets or not same_size or strange:
        what = f"{strange[0]} is in only one of the two" if same_size and targets else "they differ"
        raise BadValue(f"model.adapter does not fit the adapters that [training] makes ({what}); set {adapter.settings}")
    for name, tensor in adapter.tensors.items():
        target = targets[name]
        if tensor.numel() != target.numel():
            raise BadValue(
                f"model.adapter = {str(adapter.folder)!r} has {name} of shape {list(tensor.shape)}, and this base needs "
                f"{list(target.shape)}; give the base that the adapter was trained on"
            )
        target.copy_(by_expert(name, tensor, target))


def places(model: nn.Module) -> dict[str, Tensor]:
    """Name in an adapter of peft → the tensor of `model` that belongs there; of stacked experts ours, by expert."""
    tensors: dict[str, Tensor] = {}
    for path, _, _ in lora.linears(model):
        layer = cast("Any", model.get_submodule(path))
        tensors |= {f"{path}.lora_{factor}.weight": getattr(layer, f"lora_{factor}")["default"].weight for factor in "AB"}
    for name, block in blocks(model).items():
        if lora.is_trained(block.router):
            router = f"{name}.{lora.router_name(block)}"
            tensors |= {f"{router}.{path}": tensor for path, tensor in block.router.state_dict(keep_vars=True).items()}
        adapters = list(cast("nn.ModuleDict", block.experts._modules.get("lora") or nn.ModuleDict()).values())
        for index, each in enumerate(adapters):  # peft wraps the experts once for each matrix, the first innermost
            path = f"{name}.experts{'.base_layer' * (len(adapters) - 1 - index)}"
            own = cast("lora.ExpertLoRA", each)
            tensors |= {f"{path}.lora_A.weight": own.a, f"{path}.lora_B.weight": own.b}
    return tensors


def by_expert(name: str, tensor: Tensor, target: Tensor) -> Tensor:
    """`tensor` in the form of `target`: the factors of stacked experts by expert, all else as it is."""
    if target.ndim < 3:
        return tensor
    convert = lora.a_from_peft if name.endswith("lora_A.weight") else lora.b_from_peft
    return convert(tensor, len(target))
