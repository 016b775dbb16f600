"""Personal experts: copies of some experts of each MoE block, beside it, each with a gate of its own.

Liu et al., "FLEx: Personalized Federated Learning for Mixture-of-Experts LLMs via Expert Grafting",
https://arxiv.org/abs/2506.00965. The block itself, its router and its experts, stays as it is.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedexperts.errors import BadValue
from fedexperts.moe import lora
from fedexperts.moe.anatomy import Block, BlockShape, Experts, blocks
from fedexperts.moe.tuning import Tuning

CHILD = "grafted"
"""What a block calls its personal experts. Every weight with it in its name is one client's own."""


class Grafted(nn.Module):
    """The personal experts of one block: it then gives y = block(x) + Σ_p σ(w_p · x) E_p(x).

    E_p starts as a copy of an expert of the block, w_p as that expert's row of the router (a bias of the router stays behind),
    in the type of the experts: the routers of some families are in float32 whatever the model is in.
    """

    def __init__(self, block: Block, ids: Sequence[int]):
        super().__init__()
        self.copies = copied(block, ids)
        rows = router_rows(block).detach()[list(ids)].to(next(self.copies.parameters()))
        self.own_gate = nn.Linear(rows.shape[1], len(ids), bias=False, device="meta")
        self.own_gate.weight = nn.Parameter(rows)

    def forward(self, hidden: Float[Tensor, "... hidden"]) -> Float[Tensor, "... hidden"]:
        """What is added to the block's output."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        shares = torch.sigmoid(self.own_gate(rows).float()).to(rows.dtype)
        outputs = run(self.copies, rows, range(shares.shape[1]))
        return torch.einsum("tg,gth->th", shares, outputs).reshape(hidden.shape)


def attach(model: nn.Module, ids: Experts, tuning: Tuning, seed: str) -> None:
    """Grafts personal experts onto `model`, in place: copies of those that `ids` names in each MoE block.

    Under "full" they and their gates are trained whole; under "lora" they get adapters drawn from `seed`, whatever
    `tuning.parts` says of the model itself.

    Raises:
        BadValue: an expert that the block does not have, or one that is named twice.
    """
    found = blocks(model)
    for name, chosen in ids.items():
        require_experts(name, found[name].shape, chosen)
        personal = Grafted(found[name], chosen)
        personal.requires_grad_(tuning.train == "full")
        setattr(found[name].module, CHILD, personal)
        found[name].module.register_forward_hook(add, with_kwargs=True)
    if tuning.train == "lora":
        adapt(model, tuning, f"{seed}/{CHILD}")


def require_experts(name: str, shape: BlockShape, chosen: Sequence[int]) -> None:
    """Raises BadValue unless `chosen` are different experts of the block `name`."""
    if len(set(chosen)) < len(chosen) or not all(0 <= expert < shape.num_experts for expert in chosen):
        raise BadValue(
            f"{name} has experts 0 to {shape.num_experts - 1}, and {list(chosen)} of them would be grafted; name each once"
        )


def add(block: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any], output: Any) -> Any:
    """The block's output with what its personal experts add; some families give a tuple, whose first part is the output."""
    added = getattr(block, CHILD)(args[0] if args else named["hidden_states"])
    return output + added if isinstance(output, Tensor) else (output[0] + added, *output[1:])


def adapt(model: nn.Module, tuning: Tuning, seed: str) -> None:
    """Puts an adapter on every matrix of every personal expert, and on every gate."""
    linears = []
    for name, block in blocks(model).items():
        personal = block.module._modules.get(CHILD)
        if not isinstance(personal, Grafted):
            continue
        path = f"{name}.{CHILD}"
        linears += [f"{path}.{below}" for below, module in personal.named_modules() if isinstance(module, nn.Linear)]
        if not block.is_switch:
            copies = Block(path, personal, block.router, personal.copies)
            ids = tuple(range(copies.shape.num_experts))
            known = [f"{seed}/{name}/{expert}" for expert in ids]
            personal.copies.lora = nn.ModuleDict(
                {
                    each: lora.expert_lora(copies, each, ids, tuning.rank, tuning.alpha, known, tuning.dropout)
                    for each in lora.matrices(personal.copies)
                }
            )
    lora.attach_linears(model, {path: path for path in linears}, tuning.rank, tuning.alpha, seed, tuning.dropout)


def copied(block: Block, ids: Sequence[int]) -> nn.Module:
    """A module like the block's experts that holds copies of `ids` alone, in this order."""
    if isinstance(block.experts, nn.ModuleDict):
        return nn.ModuleDict({f"expert_{new}": copy.deepcopy(block.experts[f"expert_{old}"]) for new, old in enumerate(ids)})
    stacks: dict[int, Any] = {id(stack): stack for stack in block.experts.parameters(recurse=False)}
    copies = copy.deepcopy(block.experts, memo=stacks)  # all but the stacks: of these only `ids` are copied
    for name, stack in list(copies._parameters.items()):
        if stack is not None:
            copies._parameters[name] = nn.Parameter(stack.detach()[list(ids)])
    cast("Any", copies).num_experts = len(ids)
    return copies


def router_rows(block: Block) -> Float[Tensor, "experts hidden"]:
    """What the router multiplies a token by, a row for each expert."""
    return next(weight for weight in block.router.parameters() if weight.ndim == 2 and len(weight) == block.shape.num_experts)


def run(experts: nn.Module, rows: Float[Tensor, "tokens hidden"], ids: Sequence[int]) -> Float[Tensor, "ids tokens hidden"]:
    """What each of the experts `ids`, ascending, makes of every row, unweighted."""
    if isinstance(experts, nn.ModuleDict):
        return torch.stack([experts[f"expert_{expert}"](rows) for expert in ids])
    expert = torch.tensor(list(ids), device=rows.device).repeat_interleave(len(rows))
    return lora.expert_outputs(experts, rows.repeat(len(ids), 1), expert).view(len(ids), *rows.shape)


def is_personal(name: str) -> bool:
    """Whether what is so called is one client's own: a weight of a personal expert or its gate, or which experts they were."""
    return CHILD in re.split(r"[./]", name)


def kept(ids: Experts) -> dict[str, Tensor]:
    """`ids` as a client keeps them: `grafted/<block>` → int64 [grafts]."""
    return {f"{CHILD}/{name}": torch.tensor(chosen) for name, chosen in ids.items()}


def chosen(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The ids that `kept` made tensors of, among whatever else a client keeps; nothing where it has no personal expert."""
    start = f"{CHILD}/"
    return {key.removeprefix(start): tuple(ids.tolist()) for key, ids in tensors.items() if key.startswith(start)}
