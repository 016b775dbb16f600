"""The bytes of memory that training a model or a sub-model takes, counted on its modules."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional

from fedexperts.errors import BadValue
from fedexperts.moe import graft
from fedexperts.moe.anatomy import Experts, anatomy, blocks
from fedexperts.moe.device import with_tensors
from fedexperts.moe.logits import is_encoder_decoder, keeps_logits, predictions
from fedexperts.moe.lora import activated, first_matrix, normed
from fedexperts.moe.memory import MemoryMeter
from fedexperts.moe.packed import unpacks_stack
from fedexperts.moe.parameters import expert_sides, sum_by_kind
from fedexperts.moe.tuning import Tuning, prepare

Batch = Mapping[str, Tensor]
Optimizer = Literal["adamw", "sgd"]

COPIES = {"adamw": 4, "sgd": 2}
"""Optimizer → size of a trained parameter with its gradient and optimizer state, in multiples of its own (AdamW: two moments)."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of memory that training a model or a sub-model takes: weights, gradients, optimizer state, activations."""

    dense_bytes: int  # of all but routed experts and router rows
    expert_bytes: Mapping[str, int]  # MoE block → one expert with its router row
    activation_bytes: int
    frozen_bytes: int = 0  # of the whole model's weights alone
    sides: int = 0  # rows plus columns of all matrices of all experts: the number of parameters of LoRA of rank 1 on them
    copies: int = 4  # see COPIES
    lora_bytes: int | None = None  # of training the whole model's adapters, if the run trains adapters
    num_experts: Mapping[str, int] = field(default_factory=dict)  # MoE block → experts of the whole model
    update_bytes: Mapping[str, int] = field(default_factory=dict)  # MoE block → gradient and optimizer state of one expert

    def of(self, experts: Experts) -> int:
        """Bytes of training the sub-model with `experts`."""
        all_expert_bytes = sum(len(ids) * self.expert_bytes[block] for block, ids in experts.items())
        return self.dense_bytes + all_expert_bytes + self.activation_bytes

    @property
    def fixed_bytes(self) -> int:
        """Bytes of training the whole model if backward reaches no expert: all but gradients and optimizer state of experts."""
        all_experts = {block: tuple(range(number)) for block, number in self.num_experts.items()}
        return self.of(all_experts) - sum(number * self.update_bytes[block] for block, number in self.num_experts.items())

    @property
    def reached_bytes(self) -> int:
        """Bytes of gradient and optimizer state of an expert that backward reaches; of the largest if blocks differ."""
        return max(self.update_bytes.values())

    def reaching(self, number: int) -> int:
        """Bytes of training the whole model if backward reaches at most `number` experts at a time (HFedMoE).

        If the experts of blocks differ in size, all count as the largest, so this is an upper bound.
        """
        return self.fixed_bytes + min(number, sum(self.num_experts.values())) * self.reached_bytes

    def reached_within(self, memory_bytes: int) -> int:
        """The largest number of experts that backward can reach at a time within `memory_bytes`: from 0 to all.

        C_k of HFedMoE, for which the paper gives no formula: the memory less `fixed_bytes`, divided by `reached_bytes`.
        """
        free_bytes, num_experts = memory_bytes - self.fixed_bytes, sum(self.num_experts.values())
        if free_bytes < 0:
            return 0
        return min(free_bytes // self.reached_bytes, num_experts) if self.reached_bytes else num_experts  # 0: frozen experts

    def lora_training_bytes(self, rank: int) -> int:
        """Bytes of training LoRA of this rank on every expert of the whole model, in fp32, with all else frozen.

        If the run trains LoRA itself, these are the bytes of its own adapters. Activations are those of the run's training.
        """
        if self.lora_bytes is not None:
            return self.lora_bytes
        return self.frozen_bytes + 4 * self.copies * rank * self.sides + self.activation_bytes


def footprint(
    model: nn.Module,
    tuning: Tuning,
    batch: tuple[int, int],
    optimizer: Optimizer = "adamw",
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor] | None = None,
    target_positions: int | None = None,
    grafts: int = 0,
    gradient_checkpointing: bool = False,
) -> Footprint:
    """Bytes that it takes to train `model` as `tuning` says on batches of `batch` = (examples, tokens of each).

    Nothing is computed and no weight is copied: a twin of `model` without data takes one training step of shapes. A frozen
    parameter counts its own bytes, a trained one four times that with AdamW (weight, gradient, two moments: 16 bytes in fp32)
    and twice with SGD. `activation_bytes` is the peak in forward and backward beside the parameters and their gradients: what
    autograd saves, logits, temporaries.

    Args:
        loss: the loss of the training loop; by default the cross-entropy of the next token.
        target_positions: number of positions in a batch at which some example has a target, if the model computes logits only
            there; of an encoder-decoder, the tokens of the response. By default all tokens.
        grafts: number of personal experts beside each MoE block (FLEx), which count in `dense_bytes`.
        gradient_checkpointing: whether activations are computed again in backward.
    """
    twin = as_trained(model, tuning, grafts)
    if gradient_checkpointing:
        checkpoint_activations(twin)
    _, update, _ = sum_by_kind(twin, lambda p: p.nbytes * (COPIES[optimizer] - 1) if p.requires_grad else 0)
    dense, expert, row = sum_by_kind(twin, lambda p: p.nbytes * (COPIES[optimizer] if p.requires_grad else 1))
    with FakeTensorMode(allow_non_fake_inputs=True):
        device = next(model.parameters()).device
        twin = with_tensors(twin, lambda tensor: torch.empty_like(tensor, device="cpu" if device.type == "meta" else device))
        as_shapes(twin)
        activations = step_bytes(twin, batch, loss or next_token_loss, batch[1] if target_positions is None else target_positions)
    cost = Footprint(
        dense_bytes=dense,
        expert_bytes={block: expert[block] + row[block] for block in expert},
        activation_bytes=activations,
        frozen_bytes=sum(each.nbytes for each in model.parameters()),
        sides=expert_sides(model),
        copies=COPIES[optimizer],
        num_experts={name: shape.num_experts for name, shape in anatomy(model).blocks.items()},
        update_bytes=update,
    )
    return replace(cost, lora_bytes=cost.of(anatomy(model).all_experts)) if tuning.train == "lora" else cost


def checkpoint_activations(model: nn.Module) -> None:
    """Lets training store the inputs of each layer of `model` alone, and compute the rest again in backward.

    Raises:
        BadValue: the model cannot.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise BadValue(
            f"training.gradient_checkpointing = true, but {type(model).__name__} does not support it; set it to false and lower "
            "training.batch_size with more training.gradient_accumulation_steps"
        )
    former = "gradient_checkpointing_enable"  # its name in transformers before 5.23
    enable = getattr(model, "activation_checkpointing_enable", None) or getattr(model, former)
    cast("Any", enable)({"use_reentrant": False})


def as_trained(model: nn.Module, tuning: Tuning, grafts: int = 0) -> nn.Module:
    """A twin of `model` on the meta device as a client trains it, with `grafts` personal experts beside each MoE block."""
    twin = prepare(on_meta(model), tuning, seed="")
    if grafts:
        graft.attach(twin, {name: tuple(range(grafts)) for name in anatomy(model).blocks}, tuning, seed="")
    return twin


def on_meta(model: nn.Module) -> nn.Module:
    """A twin of `model` on the meta device: shapes without data."""
    return with_tensors(model, lambda tensor: tensor.detach().to("meta"))


def as_shapes(twin: nn.Module) -> None:
    """Replaces the forward passes of `twin` that depend on values (the expert of each token) by ones that use shapes alone."""
    one_by_one = "eager" in cast("Any", twin).get_experts_implementation().values()
    for block in blocks(twin).values():
        if block.is_switch:
            experts = list(cast("nn.ModuleDict", block.experts).values())
            cast("Any", block.experts).forward = lambda hidden, _, weights, each=experts: in_equal_shares(each, hidden, weights)
            classifier = cast("Any", block.router).classifier
            classifier.to = lambda *_, same=classifier: same  # torch cannot swap the data of a tensor without data
        elif one_by_one:
            cast("Any", block.experts).forward = partial(stack_in_equal_shares, block.experts)


def in_equal_shares(experts: list[nn.Module], hidden: Tensor, weights: Tensor) -> Tensor:
    """The outputs of Switch's experts if each gets an equal share of the tokens; it saves for backward what the real one does."""
    out = torch.zeros_like(hidden)
    shares = zip(experts, hidden.tensor_split(len(experts)), weights.tensor_split(len(experts)), strict=True)
    start = 0
    for expert, share, weight in shares:
        tokens = torch.arange(start, start + len(share))
        out.index_add_(0, tokens, expert(share.clone()) * weight)
        start += len(share)
    return out


def stack_in_equal_shares(experts: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The same for stacked experts that are computed one by one (transformers' eager implementation)."""

    def product(name: str, rows: Tensor, expert: int) -> Tensor:
        weight = getattr(experts, name)[expert]
        out: Tensor = rows @ (weight if experts.is_transposed else weight.T)
        return out + getattr(experts, f"{name}_bias")[expert] if experts.has_bias else out

    out = torch.zeros_like(hidden)
    for expert, pairs in enumerate(torch.arange(index.numel()).tensor_split(experts.num_experts)):
        token = pairs // index.shape[1]
        inner = activated(experts, product(first_matrix(experts), hidden[token], expert))
        weight = weights.reshape(-1)[pairs].unsqueeze(1)
        out.index_add_(0, token, (normed(experts, product("down_proj", inner, expert)) * weight).to(out.dtype))
    return out


def step_bytes(
    twin: nn.Module, batch: tuple[int, int], loss: Callable[[nn.Module, dict[str, Tensor]], Tensor], target_positions: int
) -> int:
    """The peak of bytes beside parameters and gradients in one forward and backward of `twin`."""
    device = next(twin.parameters()).device
    ids = torch.zeros(batch, dtype=torch.int64, device=device)
    labels = ids.clone()
    if is_encoder_decoder(twin):
        labels = labels[:, :target_positions].contiguous()
    elif keeps_logits(twin):
        labels = labels[:, : target_positions + 1]  # the first is no target
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    for parameter in twin.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    twin.train()
    weights = sum(tensor.nbytes for tensor in (*twin.parameters(), *twin.buffers()))
    with ShapeMeter(twin, inputs.values()) as meter:
        loss(twin, inputs).backward()
    return meter.peak_bytes - weights


def next_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The cross-entropy of the next token, with label smoothing."""
    logits, targets = predictions(model, batch)
    return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), label_smoothing=0.1)


class ShapeMeter(MemoryMeter):
    """A MemoryMeter for tensors without data."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._grouped_mm.default and not unpacks_stack(args[1]):  # torch knows its shapes for bf16 only
            out = grouped_shape(*args[:3])
            self.see(out)
            return out
        return super().__torch_dispatch__(func, types, args, kwargs)


def grouped_shape(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """An empty result of a grouped product: of rows and matrices, or (the gradient of the matrices) of rows and rows."""
    if right.ndim == 3:
        return left.new_empty(left.shape[0], right.shape[2])
    return left.new_empty(ends.shape[0], left.shape[0], right.shape[1])
