"""A client's model of a federated run: the base model's class with fewer experts, adapters or personal experts.

This file is part of the exported model and needs only torch and transformers. `AutoModelForCausalLM.from_pretrained(folder,
trust_remote_code=True)` (AutoModelForSeq2SeqLM for an encoder-decoder) executes it; `fedexperts.load(folder)` loads the same
model without executing code from the folder. The differences from the base model's class are in config.json under "fedexperts":

    cut       MoE block → its number of experts, and the tensors that contain them, with the experts' axis
    grafted   MoE block → its number of personal experts, and the width of its tokens
    linears   path of a linear layer → the rank and scale of its adapter
    stacks    path of stacked experts → matrix → the rank and scale of its adapters, and the ids of the adapted experts
    experts   transformers' implementation of stacked experts with which the model was scored
    precision the dtype of products if it is not float32: of the weights, the weights that are float32 nevertheless, and the
              modules under autocast (entrances) and without it (routers)
    extension the method's own change of the model: a function, whose source is at the end of this file, and its settings

The arithmetic is that of the run, operation by operation, so that logits are bitwise equal on the same number of threads.
"""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

FORMAT = 3  # 2 without precision, 1 without an extension either
MODEL_TYPE = "fedexperts"
IMPLEMENTATION = "fedexperts_exported"  # name of stacked experts with adapters in transformers' registry
ROW_BYTES = 16  # torch's grouped product needs rows whose size is a multiple of this


class ClientConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]  # transformers types no __init_subclass__
    """Reads a client's config.json as the config of the base model's family."""

    model_type = MODEL_TYPE

    @classmethod
    def from_pretrained(cls, folder: Any, **options: Any) -> Any:  # type: ignore[override]  # it returns another class
        settings, options = cls.get_config_dict(folder, **options)
        if settings["fedexperts"]["format"] > FORMAT:
            raise ValueError(f"{folder} was written by a newer fedexperts; load it with that one, or with trust_remote_code=True")
        return CONFIG_MAPPING[settings["base_model_type"]].from_dict(
            {**settings, "model_type": settings["base_model_type"]}, **options
        )


class ClientModel:
    """The entry point of transformers' auto classes."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing to do: the model's `save_pretrained` copies this file."""

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, config: Any = None, **options: Any) -> Any:
        config = config or ClientConfig.from_pretrained(folder)
        base: Any = getattr(transformers, config.architectures[0])

        def init(self: Any, config: Any, *args: Any, **options: Any) -> None:
            base.__init__(self, config, *args, **options)
            change(self, config.fedexperts)

        def save_pretrained(self: Any, folder: Any, **options: Any) -> None:
            base.save_pretrained(self, folder, **{**options, "save_original_format": False})
            finish(folder, self.config, self.config.fedexperts)

        # transformers reads the source of __module__ to learn which experts implementations a class allows.
        names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
        changed: Any = type(base.__name__, (base,), {"__init__": init, "save_pretrained": save_pretrained, **names})
        model = changed.from_pretrained(folder, *args, config=config, **options)
        requested, scored = options.get("experts_implementation"), config.fedexperts["experts"]
        if scored and (requested is None or scored == IMPLEMENTATION):
            model.set_experts_implementation(scored)
        for parameter in model.parameters():
            if parameter.data_ptr() % 64:  # memory-mapped and not aligned: products would differ in their last bits
                parameter.data = parameter.data.clone()
        return model


def finish(folder: Any, config: Any, changes: dict[str, Any]) -> None:
    """Completes a folder that transformers saved: adds `changes` to its config.json, and this file."""
    path, auto = Path(folder) / "config.json", "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"
    config_json = json.loads(path.read_text()) | {
        "base_model_type": config.model_type,
        "model_type": MODEL_TYPE,  # unknown to transformers, which would otherwise load the base class and drop the rest
        "auto_map": {"AutoConfig": "modeling_fedexperts.ClientConfig", auto: "modeling_fedexperts.ClientModel"},
        "fedexperts": {**changes, "format": FORMAT if "precision" in changes else 2 if "extension" in changes else 1},
    }
    if "precision" in changes:
        config_json["dtype"] = changes["precision"]["weights"]
    path.write_text(json.dumps(config_json, indent=2) + "\n")
    shutil.copyfile(__file__, Path(folder) / "modeling_fedexperts.py")


def change(model: nn.Module, changes: dict[str, Any]) -> None:
    """Changes a new model of the base class, in place, so that the client's weights can be loaded into it."""
    for name, cut in changes["cut"].items():
        _cut(model.get_submodule(name), **cut)
    for name, graft in changes["grafted"].items():
        block: Any = model.get_submodule(name)
        block.grafted = Grafted(block.experts, **graft)
        block.register_forward_hook(_add_grafted, with_kwargs=True)
    for path, adapter in changes["linears"].items():
        model.set_submodule(path, AdaptedLinear(model.get_submodule(path), **adapter))
    for path, adapters in changes["stacks"].items():
        experts: Any = model.get_submodule(path)
        experts.lora = nn.ModuleDict({name: AdaptedStack(experts, name, **adapter) for name, adapter in adapters.items()})
    if precision := changes.get("precision"):
        _compute_in(model, **precision)
    if extension := changes.get("extension"):
        function: Any = globals().get(extension["function"])
        if function is None:
            raise ValueError(
                f"its structure comes from code of its run's method ({extension['function']}); "
                "give trust_remote_code=True (--trust-remote-code) to run the copy in modeling_fedexperts.py there"
            )
        function(model, **extension["settings"])


def _compute_in(
    model: nn.Module, compute: str, weights: str, float32: list[str], entrances: list[str], routers: list[str]
) -> None:
    """Lets `model` compute its products in `compute`, with the weights `float32` in that dtype and all others in `weights`."""
    for name in float32:
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.float()
    for path in entrances:
        module: Any = model.get_submodule(path)
        module.compute_dtype = getattr(torch, compute)
        module.register_forward_pre_hook(_enter_autocast, with_kwargs=True)
        module.register_forward_hook(_leave_autocast, always_call=True)
    for path in routers:
        model.get_submodule(path).register_forward_pre_hook(_enter_own_dtype)
        model.get_submodule(path).register_forward_hook(_leave_autocast, always_call=True)


def _enter_autocast(module: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    device = next(each.device.type for each in (*args, *named.values()) if isinstance(each, Tensor))
    _push(module, torch.autocast(device, module.compute_dtype))


def _enter_own_dtype(router: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Routers compute in the dtype of their weights: tokens that are routed by rounded scores go to other experts."""
    hidden, *others = args
    _push(router, torch.autocast(hidden.device.type, enabled=False))
    return hidden.to(next(router.parameters()).dtype), *others


def _push(module: nn.Module, context: torch.autocast) -> None:
    context.__enter__()
    vars(module).setdefault("autocasts", []).append(context)


def _leave_autocast(module: Any, args: Any, output: Any) -> None:
    module.autocasts.pop().__exit__(None, None, None)


def _cut(block: Any, num_experts: int, router: str, axes: dict[str, int], router_groups: dict[str, int]) -> None:
    for path, axis in axes.items():
        parent, _, name = path.rpartition(".")
        owner = block.get_submodule(parent)
        part = getattr(owner, name).detach().narrow(axis, 0, num_experts).clone()
        setattr(owner, name, nn.Parameter(part) if name in owner._parameters else part)
        if isinstance(owner, nn.Linear):
            owner.out_features = num_experts
    if isinstance(block.experts, nn.ModuleDict):
        for expert in list(block.experts)[num_experts:]:
            del block.experts[expert]
        block._is_hf_initialized = True  # otherwise transformers would initialize as many experts as in the config
    for module in (block, getattr(block, router), block.experts):
        if "num_experts" in vars(module):
            module.num_experts = num_experts
    for name, value in router_groups.items():
        setattr(getattr(block, router), name, value)


class Grafted(nn.Module):
    """The personal experts p of a block, which add Σ_p σ(w_p · x) E_p(x) to its output."""

    def __init__(self, experts: nn.Module, number: int, hidden: int):
        super().__init__()
        if isinstance(experts, nn.ModuleDict):
            first = next(iter(experts.values()))
            self.copies: Any = nn.ModuleDict({f"expert_{index}": copy.deepcopy(first) for index in range(number)})
        else:
            self.copies = copy.deepcopy(experts)
            for name, stack in experts.named_parameters(recurse=False):
                setattr(self.copies, name, nn.Parameter(stack.new_empty(number, *stack.shape[1:])))
            self.copies.num_experts = number
        self.own_gate = nn.Linear(hidden, number, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        shares = torch.sigmoid(self.own_gate(rows).float()).to(rows.dtype)
        return torch.einsum("tg,gth->th", shares, self._outputs(rows, shares.shape[1])).reshape(hidden.shape)

    def _outputs(self, rows: Tensor, number: int) -> Tensor:
        """[personal experts, tokens, hidden]"""
        if isinstance(self.copies, nn.ModuleDict):
            return torch.stack([self.copies[f"expert_{index}"](rows) for index in range(number)])
        expert = torch.arange(number, device=rows.device).repeat_interleave(len(rows))
        return expert_outputs(self.copies, rows.repeat(number, 1), expert).view(number, *rows.shape)


def _add_grafted(block: Any, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
    added = block.grafted(args[0] if args else named["hidden_states"])
    return output + added if isinstance(output, Tensor) else (output[0] + added, *output[1:])


class AdaptedLinear(nn.Module):
    """A linear layer and its adapter, with peft's names of weights."""

    def __init__(self, base_layer: Any, rank: int, scale: float):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base_layer.out_features, bias=False)})
        self.scale = scale

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.base_layer(inputs) + self.lora_B["default"](self.lora_A["default"](inputs)) * self.scale
        return out

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, whose dtype some families read."""
        weight: Tensor = self.base_layer.weight
        return weight


class AdaptedStack(nn.Module):
    """The adapters of one matrix of stacked experts, for the experts `ids`: a [ids, rank, in], b [ids, out, rank]."""

    def __init__(self, experts: Any, matrix: str, rank: int, scale: float, ids: list[int]):
        super().__init__()
        weight = getattr(experts, matrix)
        fan_in, fan_out = weight.shape[1:] if experts.is_transposed else reversed(weight.shape[1:])
        self.a = nn.Parameter(weight.new_empty(len(ids), rank, fan_in))
        self.b = nn.Parameter(weight.new_empty(len(ids), fan_out, rank))
        self.scale, self.ids, self.num_experts = scale, ids, experts.num_experts

    def add(self, out: Tensor, rows: Tensor, expert: Tensor, ends: Tensor) -> Tensor:
        """`out` plus the output of the adapters; `rows` are sorted by `expert`, those of expert e end before `ends[e]`."""
        if len(self.ids) == self.num_experts:
            return out.add_(self._of(rows, ends))
        ids = torch.tensor(self.ids, device=rows.device)
        adapted = torch.isin(expert, ids)
        own_ends = torch.searchsorted(expert[adapted], ids, right=True).to(torch.int32)
        return out.index_add(0, adapted.nonzero().squeeze(1), self._of(rows[adapted], own_ends))

    def _of(self, rows: Tensor, ends: Tensor) -> Tensor:
        return grouped(grouped(rows, self.a.transpose(1, 2), ends) * self.scale, self.b.transpose(1, 2), ends)


def experts_forward(self: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Forward pass of stacked experts with adapters, called by transformers in place of its own implementation."""
    tokens, top_k = top_k_index.shape
    expert, order = torch.sort(top_k_index.reshape(-1), stable=True)
    out = expert_outputs(self, hidden[order // top_k], expert)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    weighted = (out * top_k_weights.reshape(-1)[order].unsqueeze(1))[back]
    return weighted.view(tokens, top_k, -1).sum(dim=1).to(hidden.dtype)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


def expert_outputs(self: Any, rows: Tensor, expert: Tensor) -> Tensor:
    """Unweighted outputs of stacked experts for rows that are sorted by `expert`."""
    ends = torch.searchsorted(expert, torch.arange(self.num_experts, device=expert.device), right=True).to(torch.int32)
    first = _projected(self, "gate_up_proj" if self.has_gate else "up_proj", rows, expert, ends)
    out = _projected(self, "down_proj", self._apply_gate(first) if self.has_gate else self.act_fn(first), expert, ends)
    return self.post_expert_norm(out) if self.has_post_expert_norm else out


def _projected(self: Any, name: str, rows: Tensor, expert: Tensor, ends: Tensor) -> Tensor:
    """Sorted rows times the stacked matrix `name`, with its adapters and biases."""
    weight = getattr(self, name)
    out = grouped(rows, weight if self.is_transposed else weight.transpose(1, 2), ends)
    adapters = self.lora if "lora" in self._modules else {}
    out = adapters[name].add(out, rows, expert, ends) if name in adapters else out
    return out.add_(getattr(self, f"{name}_bias")[expert]) if self.has_bias else out


def grouped(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Each row times the matrix of its expert; one product per expert if torch's grouped product does not support the width."""
    kind = rows.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows.dtype
    rows, weight = rows.to(dtype), weight.to(dtype)
    if all(size * weight.element_size() % ROW_BYTES == 0 for size in weight.shape[1:]):
        return torch.nn.functional.grouped_mm(rows, weight, offs=ends)
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return torch.cat([part @ matrix for part, matrix in zip(rows.split(counts), weight.unbind(), strict=True)])
