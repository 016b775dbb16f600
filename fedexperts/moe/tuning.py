"""Which parameters of a model are trained: all of them, or low-rank adapters, each part on or off."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import Field
from torch import nn

from fedexperts.errors import BadValue, nearest
from fedexperts.moe import lora
from fedexperts.moe.anatomy import Experts, blocks
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
"""What the families call the four projections of attention; DeepSeek's latent attention has two steps for each."""

UNTRAINED = "e_score_correction_bias"
"""DeepSeek-V3's routing bias is set by counting tokens, never by a gradient; ERNIE keeps it as a parameter."""


@dataclass(frozen=True)
class Tuning:
    """How a model is fine-tuned.

    Under "full" each part is trained whole. Under "lora" attention and experts get adapters and the router is trained whole.
    """

    train: Literal["full", "lora"] = "full"
    parts: tuple[Part, ...] | None = None  # None: all four, or under lora all but dense
    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    attention_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")  # that get an adapter
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of what adapters read in training, from torch's global generator

    @property
    def trained(self) -> tuple[str, ...]:
        """The parts that are trained."""
        if self.parts is not None:
            return self.parts
        return PARTS if self.train == "full" else PARTS[:3]

    def check(self) -> None:
        """Raises BadValue for what no model can be trained with."""
        for part in self.trained:
            if part not in PARTS:
                raise BadValue(f"training.parts has {part!r}, which is not one of {', '.join(PARTS)}{nearest(part, PARTS)}")
        if self.train not in ("full", "lora"):
            raise BadValue(f"training.train = {self.train!r} is not one of full, lora{nearest(self.train, ('full', 'lora'))}")
        if not self.trained:
            raise BadValue(f"training.parts is empty, so nothing would be trained; name some of {', '.join(PARTS)}")
        if self.train == "lora" and "dense" in self.trained:
            raise BadValue(
                "training.parts has 'dense', but LoRA adapts attention and experts only and trains the router whole; "
                "leave 'dense' out, or set train = \"full\""
            )
        if self.train == "lora" and (self.rank < 1 or self.alpha <= 0):
            raise BadValue(f"training.rank = {self.rank} and training.alpha = {self.alpha:g}, but both must be above zero")
        if self.dropout and self.train != "lora":
            raise BadValue(
                f"training.dropout = {self.dropout:g} is of what LoRA's adapters read, and training.train = {self.train!r} has "
                'none; set train = "lora", or leave dropout out'
            )
        if not 0 <= self.dropout < 1:
            raise BadValue(f"training.dropout = {self.dropout:g}, but it is a share from 0 to below 1")


def prepare(model: nn.Module, tuning: Tuning, seed: str, only: Experts | None = None) -> nn.Module:
    """`model`, made ready in place to be trained as `tuning` says.

    What is trained becomes the model's own copy; all else stays shared with whatever it was shared with, and frozen. No
    parameter object of the base is touched, so its values and its `requires_grad` stay as they are. Weights that the model
    ties stay tied. Adapters start from `seed`: B at zero, A the same for an expert in the full model and every shrunk one.
    `only`: of the experts these alone, by their places in `model`, get any.

    Raises:
        BadValue: a part, rank or projection that this model cannot be trained with.
    """
    tuning.check()
    part = parts(model)
    whole = set(tuning.trained) if tuning.train == "full" else set(tuning.trained) & {"router"}
    own(model, {path for path, its in part.items() if its in whole and not path.endswith(UNTRAINED)})
    if tuning.train == "lora":
        adapt(model, tuning, seed, only)
    return model


def parts(model: nn.Module) -> dict[str, Part]:
    """Parameter → the part of the model it belongs to; a tied parameter once, under its first name."""
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
        return any(isinstance(module._modules.get(name), lora.LINEAR) for name in PROJECTIONS[kind])

    return [name for name, module in model.named_modules() if has(module, "q") and has(module, "k")]


def projections(model: nn.Module, names: tuple[str, ...]) -> list[str]:
    """Paths of the attention's linear layers called `names`, or what this family calls the same.

    Raises:
        BadValue: the model's attention has none of them, or has not one that is named by a name of its own.
    """
    wanted = {alias for name in names for alias in aliases(name)}
    linears = [f"{name}.{child}" for name in attentions(model) for child in linear_children(model.get_submodule(name))]
    found = [linear for linear in linears if linear.rpartition(".")[2] in wanted]
    there = sorted({linear.rpartition(".")[2] for linear in linears})
    unknown = [name for name in names if aliases(name) == (name,) and name not in there]
    if unknown or not found:
        raise BadValue(
            f"training.attention_modules = {', '.join(unknown or names)}, but this model's attention has "
            f"{', '.join(there) or 'no projections'}; name some of these, or leave 'attention' out of training.parts"
        )
    return found


def aliases(name: str) -> tuple[str, ...]:
    """What the families call the projection `name`: `q_proj`, or `q`, is one of all; a name of its own is itself."""
    return PROJECTIONS.get(name.removesuffix("_proj"), (name,))


def linear_children(module: nn.Module) -> Iterator[str]:
    return (name for name, child in module.named_children() if isinstance(child, nn.Linear))


def own(model: nn.Module, trained: set[str]) -> None:
    """Gives `model` parameter objects of its own: copies of those named in `trained`, frozen views of the rest."""
    trained_ids = {id(parameter) for name, parameter in model.named_parameters() if name in trained}
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old is None:
                continue
            if id(old) not in made:
                learns = id(old) in trained_ids
                made[id(old)] = nn.Parameter(old.detach().clone() if learns else old.detach(), requires_grad=learns)
            module._parameters[name] = made[id(old)]


def adapt(model: nn.Module, tuning: Tuning, seed: str, only: Experts | None) -> None:
    """Puts on the adapters that `tuning` asks for."""
    linears: dict[str, str] = {}
    if "attention" in tuning.trained:
        linears |= {name: name for name in projections(model, tuning.attention_modules)}
    if "experts" in tuning.trained:
        linears |= single_experts(model, only)
        lora.attach_experts(model, tuning.rank, tuning.alpha, seed, only, tuning.dropout)
    if linears:
        lora.attach_linears(model, linears, tuning.rank, tuning.alpha, seed, tuning.dropout)


def single_experts(model: nn.Module, only: Experts | None) -> dict[str, str]:
    """The linear layers of experts that are modules of their own (Switch), or of `only` those: path → path in the full model."""
    held = kept_experts(model)
    return {
        f"{name}.experts.expert_{index}.{child}": f"{name}.experts.expert_{known}.{child}"
        for name, block in blocks(model).items()
        if isinstance(block.experts, nn.ModuleDict)
        for index, known in enumerate(held[name])
        if only is None or index in only.get(name, ())
        for child in linear_children(block.experts[f"expert_{index}"])
    }


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that training changes, each once."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
