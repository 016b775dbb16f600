"""Personal experts: copies of some experts of each MoE block, beside it, each with its own gate.

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

from fedexperts.errors import BadValue, listed
from fedexperts.moe import lora
from fedexperts.moe.anatomy import Block, BlockShape, Experts, blocks
from fedexperts.moe.tuning import Tuning, replace_parameters

CHILD = "grafted"
"""The name of the personal experts in a block. Every weight with it in its path is personal to one client."""


class Grafted(nn.Module):
    """The personal experts of one block, whose output becomes y = block(x) + Σ_p σ(w_p · x) E_p(x).

    E_p starts as a copy of an expert of the block, w_p as that expert's row of the router, without the router's bias, in the
    dtype of the experts: the routers of some families are float32 whatever the dtype of the model.
    """

    def __init__(self, block: Block, ids: Sequence[int]):
        super().__init__()
        self.copies = copied_experts(block, ids)
        rows = router_rows(block).detach()[list(ids)].to(next(self.copies.parameters()))
        self.own_gate = nn.Linear(rows.shape[1], len(ids), bias=False, device="meta")
        self.own_gate.weight = nn.Parameter(rows)

    def forward(self, hidden: Float[Tensor, "... hidden"]) -> Float[Tensor, "... hidden"]:
        """The sum over p, which is added to the output of the block."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        shares = torch.sigmoid(self.own_gate(rows).float()).to(rows.dtype)
        outputs = run_experts(self.copies, rows, range(shares.shape[1]))
        return torch.einsum("tg,gth->th", shares, outputs).reshape(hidden.shape)


def attach(model: nn.Module, ids: Experts, tuning: Tuning, seed: str) -> None:
    """Grafts personal experts onto `model`, in place: copies of the experts `ids` of each MoE block.

    With "full" they and their gates are trained whole; with "lora" they get adapters drawn from `seed`, whatever
    `tuning.parts` says about the model itself.

    Raises:
        BadValue: an expert that the block does not have, or the same expert twice.
    """
    model_blocks = blocks(model)
    for name, block_ids in ids.items():
        block = model_blocks[name]
        require_experts(name, block.shape, block_ids)
        personal = Grafted(block, block_ids)
        if tuning.train == "full":
            replace_parameters(personal, {path for path, _ in personal.named_parameters()})
        else:
            personal.requires_grad_(False)
        setattr(block.module, CHILD, personal)
        block.module.register_forward_hook(add_personal_output, with_kwargs=True)
    if tuning.train == "lora":
        attach_adapters(model, tuning, f"{seed}/{CHILD}")


def require_experts(name: str, shape: BlockShape, ids: Sequence[int]) -> None:
    """Raises BadValue unless `ids` are different experts of the block `name`."""
    if len(set(ids)) < len(ids) or not all(0 <= expert < shape.num_experts for expert in ids):
        raise BadValue(f"experts {listed(ids)} of {name} cannot be grafted; give different ids from 0 to {shape.num_experts - 1}")


def add_personal_output(block: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any], output: Any) -> Any:
    """A forward hook: the output of the block plus that of its personal experts.

    The output of some families is a tuple, whose first element are the hidden states.
    """
    personal = getattr(block, CHILD)(args[0] if args else named["hidden_states"])
    return output + personal if isinstance(output, Tensor) else (output[0] + personal, *output[1:])


def attach_adapters(model: nn.Module, tuning: Tuning, seed: str) -> None:
    """Attaches an adapter to every matrix of every personal expert, and to every gate."""
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
            seeds = [f"{seed}/{name}/{expert}" for expert in ids]
            personal.copies.lora = nn.ModuleDict(
                {
                    matrix: lora.expert_lora(copies, matrix, ids, tuning.rank, tuning.alpha, seeds, tuning.dropout)
                    for matrix in lora.matrices(personal.copies)
                }
            )
    lora.attach_linears(model, {path: path for path in linears}, tuning.rank, tuning.alpha, seed, tuning.dropout)


def copied_experts(block: Block, ids: Sequence[int]) -> nn.Module:
    """A module like the block's experts with copies of the experts `ids` alone, in this order."""
    if isinstance(block.experts, nn.ModuleDict):
        return nn.ModuleDict({f"expert_{new}": copy.deepcopy(block.experts[f"expert_{old}"]) for new, old in enumerate(ids)})
    stacks: dict[int, Any] = {id(stack): stack for stack in block.experts.parameters(recurse=False)}
    rows = lora.rows_in_stack(block.experts, torch.tensor(list(ids))).tolist()
    copies = copy.deepcopy(block.experts, memo=stacks)  # all but the stacks, of which only `ids` are copied
    copies._buffers.pop("stack_ids", None)
    for name, stack in list(copies._parameters.items()):
        if stack is not None:
            copies._parameters[name] = nn.Parameter(stack.detach()[rows])
    cast("Any", copies).num_experts = len(ids)
    return copies


def router_rows(block: Block) -> Float[Tensor, "experts hidden"]:
    """The weight of the router, with a row for each expert."""
    return next(weight for weight in block.router.parameters() if weight.ndim == 2 and len(weight) == block.shape.num_experts)


def run_experts(
    experts: nn.Module, rows: Float[Tensor, "tokens hidden"], ids: Sequence[int]
) -> Float[Tensor, "ids tokens hidden"]:
    """The unweighted outputs of each of the experts `ids`, which ascend, for every row."""
    if isinstance(experts, nn.ModuleDict):
        return torch.stack([experts[f"expert_{expert}"](rows) for expert in ids])
    expert = torch.tensor(list(ids), device=rows.device).repeat_interleave(len(rows))
    return lora.expert_outputs(experts, rows.repeat(len(ids), 1), expert).view(len(ids), *rows.shape)


def is_personal(name: str) -> bool:
    """Whether a tensor of this name is personal to one client: of a personal expert or its gate, or ids of copied experts."""
    return CHILD in re.split(r"[./]", name)
