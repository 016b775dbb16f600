"""The parameters of a model that are trained: whole parts, or low-rank adapters on them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import Field
from torch import nn

from fedexperts.errors import BadValue, listed, nearest
from fedexperts.moe import lora
from fedexperts.moe.anatomy import Experts, blocks
from fedexperts.moe.packed import plain
from fedexperts.moe.precision import Precision, mixed_precision, trained_dtype
from fedexperts.moe.shrink import kept_experts

Part = Literal["attention", "experts", "router", "dense"]
"""dense: embeddings, norms, shared experts, dense MLP layers and the output head."""

PARTS: tuple[Part, ...] = get_args(Part)

PROJECTIONS = {
    "q": ("q_proj", "q", "q_a_proj", "q_b_proj"),
    "k": ("k_proj", "k", "kv_a_proj_with_mqa", "kv_b_proj"),
    "v": ("v_proj", "v", "kv_a_proj_with_mqa", "kv_b_proj"),
    "o": ("o_proj", "o", "out_proj"),
}
"""The names of the four projections of attention in the model families; DeepSeek's latent attention has two steps for each."""

UNTRAINED = "e_score_correction_bias"
"""DeepSeek-V3's routing bias, which is set by counting tokens, never by a gradient; in ERNIE it is a parameter."""


@dataclass(frozen=True)
class Tuning:
    """How a model is fine-tuned.

    With "full" each part is trained whole. With "lora" attention and experts get adapters and the router is trained whole.
    """

    train: Literal["full", "lora"] = "full"
    parts: tuple[Part, ...] | None = None  # None: all four, or under lora all but dense
    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    attention_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")  # that get an adapter
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of what adapters read in training, from torch's global generator
    precision: Precision = "auto"  # dtype of the products; auto: that of the model's weights. Trained weights are float32

    @property
    def trained(self) -> tuple[str, ...]:
        """The parts that are trained."""
        if self.parts is not None:
            return self.parts
        return PARTS if self.train == "full" else PARTS[:3]

    def check(self) -> None:
        """Raises BadValue if no model can be trained with these settings."""
        for part in self.trained:
            if part not in PARTS:
                raise BadValue(f"training.parts has {part!r}, which is not one of {', '.join(PARTS)}{nearest(part, PARTS)}")
        if self.train not in ("full", "lora"):
            raise BadValue(f"training.train = {self.train!r} is not one of full, lora{nearest(self.train, ('full', 'lora'))}")
        if not self.trained:
            raise BadValue(f"training.parts is empty, so nothing would be trained; set some of {', '.join(PARTS)}")
        if self.train == "lora" and "dense" in self.trained:
            raise BadValue(
                "training.parts has 'dense', but LoRA adapts attention and experts only and trains the router whole; "
                "leave 'dense' out, or set train = \"full\""
            )
        if self.train == "lora" and (self.rank < 1 or self.alpha <= 0):
            raise BadValue(
                f"training.rank = {self.rank} and training.alpha = {self.alpha:g}, but both must be above zero; raise them"
            )
        if self.dropout and self.train != "lora":
            raise BadValue(
                f"training.dropout = {self.dropout:g} applies to LoRA adapters, and training.train = {self.train!r} has none; "
                'set train = "lora", or remove dropout'
            )
        if not 0 <= self.dropout < 1:
            raise BadValue(f"training.dropout = {self.dropout:g}, but it must be at least 0 and below 1; change it")


def prepare(model: nn.Module, tuning: Tuning, seed: str, only: Experts | None = None) -> nn.Module:
    """`model`, prepared in place to be trained as `tuning` says.

    Trained parameters become copies, in float32 if the model is in float16 or bfloat16; all others stay shared and frozen.
    Parameter objects of the base are replaced in `model` and not changed, so their values and `requires_grad` stay as they are.
    Tied weights stay tied. Adapters start from `seed`: B at zero, and A the same for an expert in the full model and in every
    shrunk one. If `only` is given, of the experts only these, by their ids in `model`, get adapters.

    Raises:
        BadValue: a part, rank or projection with which this model cannot be trained.
    """
    tuning.check()
    part_of = parts(model)
    whole_parts = set(tuning.trained) if tuning.train == "full" else set(tuning.trained) & {"router"}
    whole = {path for path, part in part_of.items() if part in whole_parts and not path.endswith(UNTRAINED)}
    mixed_precision(model, tuning.precision)
    replace_parameters(model, whole)
    if tuning.train == "lora":
        attach_adapters(model, tuning, seed, only)
    elif "experts" in whole_parts:
        lora.require_casts(model)
    return model


def parts(model: nn.Module) -> dict[str, Part]:
    """Parameter → the part of the model to which it belongs; a tied parameter once, under its first name."""
    part_of: dict[int, Part] = {}
    for block in blocks(model).values():
        part_of |= {id(parameter): "experts" for parameter in block.experts.parameters()}
        part_of |= {id(parameter): "router" for parameter in block.router.parameters()}
    for name in attentions(model):
        part_of |= {id(parameter): "attention" for parameter in model.get_submodule(name).parameters()}
    return {name: part_of.get(id(parameter), "dense") for name, parameter in model.named_parameters()}


def attentions(model: nn.Module) -> list[str]:
    """Paths of the attention modules: those with projections for both queries and keys."""

    def has(module: nn.Module, kind: str) -> bool:
        return any(lora.is_linear(module._modules[name]) for name in PROJECTIONS[kind] if name in module._modules)

    return [name for name, module in model.named_modules() if has(module, "q") and has(module, "k")]


def projections(model: nn.Module, names: tuple[str, ...]) -> list[str]:
    """Paths of the attention's linear layers called `names`, or by the names that this family has for them.

    Raises:
        BadValue: the model's attention has none of them, or lacks one that is no common projection.
    """
    accepted = {alias for name in names for alias in aliases(name)}
    linears = [f"{name}.{child}" for name in attentions(model) for child in linear_children(model.get_submodule(name))]
    selected = [linear for linear in linears if linear.rpartition(".")[2] in accepted]
    available = sorted({linear.rpartition(".")[2] for linear in linears})
    unknown = [name for name in names if aliases(name) == (name,) and name not in available]
    if unknown or not selected:
        raise BadValue(
            f"training.attention_modules = {listed(unknown or names)}, but this model's attention has "
            f"{listed(available) or 'no projections'}; name some of these, or leave 'attention' out of training.parts"
        )
    return selected


def aliases(name: str) -> tuple[str, ...]:
    """The names of the projection `name` in the families, if it is a common one such as `q_proj` or `q`; else `name` alone."""
    return PROJECTIONS.get(name.removesuffix("_proj"), (name,))


def linear_children(module: nn.Module) -> Iterator[str]:
    """The names of the linear layers directly below `module`."""
    return (name for name, child in module.named_children() if isinstance(child, nn.Linear))


def replace_parameters(model: nn.Module, trained: set[str]) -> None:
    """Replaces the parameters of `model`: those named in `trained` by copies, the rest by frozen views."""
    trained_ids = {id(parameter) for name, parameter in model.named_parameters() if name in trained}
    replacements: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old is None:
                continue
            if id(old) not in replacements:
                is_trained = id(old) in trained_ids
                values = plain(old.detach()).to(trained_dtype(old.dtype), copy=True) if is_trained else old.detach()
                replacements[id(old)] = nn.Parameter(values, requires_grad=is_trained)
            module._parameters[name] = replacements[id(old)]


def attach_adapters(model: nn.Module, tuning: Tuning, seed: str, only: Experts | None) -> None:
    """Attaches the adapters that `tuning` names."""
    linears: dict[str, str] = {}
    if "attention" in tuning.trained:
        linears |= {name: name for name in projections(model, tuning.attention_modules)}
    if "experts" in tuning.trained:
        linears |= module_expert_linears(model, only)
        lora.attach_experts(model, tuning.rank, tuning.alpha, seed, only, tuning.dropout)
    if linears:
        lora.attach_linears(model, linears, tuning.rank, tuning.alpha, seed, tuning.dropout)


def module_expert_linears(model: nn.Module, only: Experts | None) -> dict[str, str]:
    """The linear layers of experts that are modules (Switch), or of those in `only`: path → path in the full model."""
    original_ids = kept_experts(model)
    return {
        f"{name}.experts.expert_{index}.{child}": f"{name}.experts.expert_{original}.{child}"
        for name, block in blocks(model).items()
        if isinstance(block.experts, nn.ModuleDict)
        for index, original in enumerate(original_ids[name])
        if only is None or index in only.get(name, ())
        for child in linear_children(block.experts[f"expert_{index}"])
    }


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that training changes, each once."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
