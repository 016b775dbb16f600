"""The memory, parameters and FLOPs of a model, counted on its modules."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

from fedexperts.errors import BadValue
from fedexperts.moe import graft
from fedexperts.moe.anatomy import BlockShape, Experts, anatomy, blocks
from fedexperts.moe.device import with_tensors
from fedexperts.moe.logits import IGNORED, is_encoder_decoder, keeps_logits, predictions
from fedexperts.moe.lora import ExpertLoRA, activated, first_matrix, normed
from fedexperts.moe.memory import MemoryMeter
from fedexperts.moe.packed import unpacks_stack
from fedexperts.moe.tuning import PROJECTIONS, Tuning, attentions, prepare

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


@dataclass(frozen=True)
class Parameters:
    """The numbers of parameters of a model, by kind; tied ones count once."""

    dense: int  # all but routed experts and router rows
    expert: Mapping[str, int]  # MoE block → one expert
    router_row: Mapping[str, int]  # MoE block → parameters of the router for one expert
    blocks: Mapping[str, BlockShape]

    @property
    def total(self) -> int:
        """Of the whole model."""
        return self.of({name: tuple(range(shape.num_experts)) for name, shape in self.blocks.items()})

    @property
    def active(self) -> int:
        """Those used for one token: its top-k experts, and the whole router."""
        routed = sum(shape.top_k * self.expert[name] for name, shape in self.blocks.items())
        routers = sum(shape.num_experts * self.router_row[name] for name, shape in self.blocks.items())
        return self.dense + routed + routers

    def of(self, experts: Experts) -> int:
        """Those of the sub-model with `experts`, router rows included."""
        return self.dense + sum(len(ids) * (self.expert[name] + self.router_row[name]) for name, ids in experts.items())


class ClassifiedParameter(NamedTuple):
    """A parameter, and the kind to which it belongs."""

    name: str
    parameter: nn.Parameter
    block: str | None  # the MoE block whose experts have equal shares of it; None: dense
    kind: Literal["expert", "router", "dense"]


def classified_parameters(model: nn.Module) -> Iterator[ClassifiedParameter]:
    """Each parameter of `model` once, with its kind."""
    model_blocks = blocks(model)
    rows = {f"{name}.{path}" for name, block in model_blocks.items() for path in block.expert_axes()}
    for name, parameter in model.named_parameters():
        block = next((block for block in model_blocks if name.startswith(f"{block}.")), None)
        if block and name.startswith(f"{block}.experts."):
            yield ClassifiedParameter(name, parameter, block, "expert")
        elif block and name in rows:
            yield ClassifiedParameter(name, parameter, block, "router")
        else:
            yield ClassifiedParameter(name, parameter, None, "dense")


def parameters(model: nn.Module) -> Parameters:
    """The numbers of parameters of `model`, which may be on the meta device."""
    dense, expert, row = sum_by_kind(model, lambda parameter: parameter.numel())
    return Parameters(dense, expert, row, anatomy(model).blocks)


def sum_by_kind(model: nn.Module, weight: Callable[[nn.Parameter], int]) -> tuple[int, dict[str, int], dict[str, int]]:
    """Sum of `weight` over the dense parameters, and by MoE block over one expert and over one router row."""
    shapes = anatomy(model).blocks
    dense, sums = 0, {"expert": dict.fromkeys(shapes, 0), "router": dict.fromkeys(shapes, 0)}
    for _, parameter, block, kind in classified_parameters(model):
        if block is None:
            dense += weight(parameter)
        else:
            sums[kind][block] += weight(parameter)
    expert, row = (
        {block: amount // shapes[block].num_experts for block, amount in sums[kind].items()} for kind in ("expert", "router")
    )
    return dense, expert, row


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


def expert_sides(model: nn.Module) -> int:
    """The sum of rows plus columns over every matrix of every expert of `model`."""
    experts = (each.parameter for each in classified_parameters(model) if each.kind == "expert" and "bias" not in each.name)
    matrices = [parameter.shape for parameter in experts if parameter.ndim >= 2]
    return sum((shape[0] if len(shape) == 3 else 1) * sum(shape[-2:]) for shape in matrices)


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


@runtime_checkable
class FlopsOfBatch(Protocol):
    """FLOPs of a training step on a batch. `reached`: MoE block → share of the pairs (token, expert) that backward reaches."""

    def __call__(self, batch: Batch, reached: Mapping[str, float] | None = None) -> float: ...


@runtime_checkable
class FlopsOfLengths(Protocol):
    """FLOPs of a training step on sequences with these numbers of tokens."""

    def __call__(self, read: list[int], written: list[int], reached: Mapping[str, float] | None = None) -> float: ...


def flops_estimated(model: nn.Module) -> FlopsOfBatch:
    """Estimates the floating point operations of a training step on a batch from shapes, without padding.

    Forward: 2 for each weight that multiplies a token (of E stacked experts, those of top_k), plus attention scores,
    2 * length * (width of all query heads + width of all value heads) for each token and layer (causal masks do not halve it).
    Backward: as much again for the gradient of the inputs, another 2 for each trained weight for its gradient, and twice the
    forward of the scores. Embedding look-ups, norms, biases and activations count nothing. In an encoder-decoder, the encoder
    counts the tokens of the prompt and all else those of the labels.

    If backward reaches only a share of the experts of a block (moe/backward.py), it takes this share for them, and 2 more for
    each weight of Switch's experts and of adapters, which are computed again. All else is unchanged.

    Layers under gradient checkpointing (set before this is called) take their forward twice.
    """
    of_lengths = per_step(model)

    def of_batch(batch: Batch, reached: Mapping[str, float] | None = None) -> float:
        read, written = batch["attention_mask"].sum(dim=1), (batch["labels"] != IGNORED).sum(dim=1)
        return of_lengths(read.tolist(), written.tolist(), reached)

    return of_batch


def per_step(model: nn.Module) -> FlopsOfLengths:
    """`flops_estimated` for sequences of given lengths, read and written; the modules are inspected once, here."""
    encoder = "encoder." if is_encoder_decoder(model) else ""  # all modules of a decoder-only model count the tokens read
    matrices, scores, twice = list(products(model)), list(score_widths(model)), checkpointed_layers(model)

    def of_lengths(read: list[int], written: list[int], reached: Mapping[str, float] | None = None) -> float:
        tokens = {True: sum(read), False: sum(written)}
        multiplied = sum(
            tokens[matrix.module.startswith(encoder)]
            * matrix.weights
            * (operations(matrix, reached or {}) + 2 * matrix.module.startswith(twice))
            for matrix in matrices
        )
        squares = {True: sum(n * n for n in read), False: sum(n * n for n in written)}
        attention = sum(squares[name.startswith(encoder)] * width * (6 + 2 * name.startswith(twice)) for name, width in scores)
        return float(multiplied + attention)

    return of_lengths


def checkpointed_layers(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the modules that run forward again in backward."""
    modules = model.named_modules()
    return tuple(
        f"{name}." for name, each in modules if isinstance(each, GradientCheckpointingLayer) and each.gradient_checkpointing
    )


class Product(NamedTuple):
    """A matrix, or a stack of them, that multiplies tokens."""

    module: str
    block: str | None  # the MoE block to whose experts it belongs
    weights: float  # used for one token
    trained: bool
    recomputed: bool  # whether a backward that reaches only some experts computes it again


def operations(product: Product, reached: Mapping[str, float]) -> float:
    """Operations of a training step per token and weight: of forward, and of backward as far as it reaches."""
    backward = 4.0 if product.trained else 2.0
    if product.block is None or product.block not in reached:
        return 2 + backward
    return 2 + reached[product.block] * (backward + 2 * product.recomputed)


def products(model: nn.Module) -> Iterator[Product]:
    """Each matrix of `model` that multiplies tokens."""
    model_blocks = blocks(model)
    for name, module in model.named_modules():
        block = next((path for path in model_blocks if name.startswith(f"{path}.experts")), None)
        share = model_blocks[block].shape.top_k / model_blocks[block].shape.num_experts if block else 1.0
        recomputed = isinstance(module, ExpertLoRA) or (block is not None and model_blocks[block].is_switch)
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 2 and "bias" not in key and not isinstance(module, nn.Embedding):
                used = share_of_stack(module, parameter) * share
                yield Product(name, block, parameter.numel() * used, parameter.requires_grad, recomputed)


def share_of_stack(module: nn.Module, parameter: nn.Parameter) -> float:
    """The share of a stack that belongs to the experts of `module`, which may share it with a larger model."""
    ids = module._buffers.get("stack_ids")
    return 1.0 if ids is None else len(ids) / len(parameter)


def score_widths(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Each attention module, and the sum of the widths of its query and value heads."""
    for name in attentions(model):
        children = dict(model.get_submodule(name).named_children())
        query = [children[child] for child in PROJECTIONS["q"] if child in children][-1]
        out = next(children[child] for child in PROJECTIONS["o"] if child in children)
        yield name, cast("Any", query).out_features + cast("Any", out).in_features
