"""What a model costs to hold and to run, counted on its real module tree."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional

from fedexperts.moe.anatomy import BlockShape, Experts, anatomy, blocks
from fedexperts.moe.logits import IGNORED, is_encoder_decoder, predictions
from fedexperts.moe.memory import MemoryMeter
from fedexperts.moe.tuning import PROJECTIONS, Tuning, attentions, prepare

Batch = Mapping[str, Tensor]
Optimizer = Literal["adamw", "sgd"]

COPIES = {"adamw": 4, "sgd": 2}
"""Times its own size that a trained parameter takes: weight and gradient, and two moments under AdamW."""


@dataclass(frozen=True)
class Footprint:
    """Bytes that training a (sub-)model holds in memory: weights, gradients, optimiser state, activations."""

    dense_bytes: int  # of all that is no routed expert and no router row
    expert_bytes: Mapping[str, int]  # MoE block → one expert with its router row
    activation_bytes: int
    frozen_bytes: int = 0  # of the whole model's weights alone
    sides: int = 0  # rows plus columns of all experts' matrices: what a LoRA of rank 1 on every expert has parameters
    copies: int = 4  # times its own bytes that a trained parameter takes
    lora_bytes: int | None = None  # of training the whole model's adapters, when that is how the run trains

    def of(self, experts: Experts) -> int:
        """Bytes of the sub-model that holds `experts`."""
        held = sum(len(ids) * self.expert_bytes[block] for block, ids in experts.items())
        return self.dense_bytes + held + self.activation_bytes

    def adapting(self, rank: int) -> int:
        """Bytes of training LoRA of this rank on every expert of the whole model, in fp32, all else frozen.

        A run that trains LoRA anyway takes its own adapters for that. Activations are those of the run's own training.
        """
        if self.lora_bytes is not None:
            return self.lora_bytes
        return self.frozen_bytes + 4 * self.copies * rank * self.sides + self.activation_bytes


@dataclass(frozen=True)
class Parameters:
    """How many parameters a model has, by kind; tied ones count once."""

    dense: int  # all that is no routed expert and no router row
    expert: Mapping[str, int]  # MoE block → one expert
    router_row: Mapping[str, int]  # MoE block → what the router holds for one expert
    blocks: Mapping[str, BlockShape]

    @property
    def total(self) -> int:
        return self.of({name: tuple(range(shape.num_experts)) for name, shape in self.blocks.items()})

    @property
    def active(self) -> int:
        """Those that one token meets: its top-k experts, and the whole router."""
        routed = sum(shape.top_k * self.expert[name] for name, shape in self.blocks.items())
        routers = sum(shape.num_experts * self.router_row[name] for name, shape in self.blocks.items())
        return self.dense + routed + routers

    def of(self, experts: Experts) -> int:
        """Those of the sub-model that holds `experts`, router rows included."""
        return self.dense + sum(len(ids) * (self.expert[name] + self.router_row[name]) for name, ids in experts.items())


class Located(NamedTuple):
    """A parameter, and whose it is."""

    name: str
    parameter: nn.Parameter
    block: str | None  # the MoE block that has one share of it for each expert; None: dense
    kind: Literal["expert", "router", "dense"]


def located(model: nn.Module) -> Iterator[Located]:
    """Every parameter of `model`, each once."""
    found = blocks(model)
    rows = {f"{name}.{path}" for name, block in found.items() for path in block.expert_axes()}
    for name, parameter in model.named_parameters():
        block = next((block for block in found if name.startswith(f"{block}.")), None)
        if block and name.startswith(f"{block}.experts."):
            yield Located(name, parameter, block, "expert")
        elif block and name in rows:
            yield Located(name, parameter, block, "router")
        else:
            yield Located(name, parameter, None, "dense")


def parameters(model: nn.Module) -> Parameters:
    """The parameters of `model`, which may be on the meta device, counted by kind."""
    dense, expert, row = weigh(model, lambda parameter: parameter.numel())
    return Parameters(dense, expert, row, anatomy(model).blocks)


def weigh(model: nn.Module, weight: Callable[[nn.Parameter], int]) -> tuple[int, dict[str, int], dict[str, int]]:
    """Sum of `weight` over the dense parameters, and by MoE block over one expert and over one router row."""
    shapes = anatomy(model).blocks
    dense, sums = 0, {"expert": dict.fromkeys(shapes, 0), "router": dict.fromkeys(shapes, 0)}
    for _, parameter, block, kind in located(model):
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
) -> Footprint:
    """Bytes that it takes to train `model` as `tuning` says on batches of (examples, tokens each).

    Nothing is computed and no weight is copied: a twin of `model` without data takes one training step of shapes. A frozen
    parameter counts its own bytes, a trained one four times that under AdamW (weight, gradient, two moments: 16 bytes in
    fp32) and twice under SGD. `activation_bytes` is the most that was alive in forward and backward beside the parameters
    and their gradients: what autograd saves, logits, temporaries. An encoder-decoder reads `tokens each` and writes as many.
    `loss` stands for the training loop's own (default: cross-entropy of the next token).
    """
    twin = prepare(on_meta(model), tuning, seed="")
    dense, expert, row = weigh(twin, lambda p: p.nbytes * (COPIES[optimizer] if p.requires_grad else 1))
    with FakeTensorMode(allow_non_fake_inputs=True):
        device = next(model.parameters()).device
        twin = with_tensors(twin, lambda tensor: torch.empty_like(tensor, device="cpu" if device.type == "meta" else device))
        as_shapes(twin)
        activations = step_bytes(twin, batch, loss or next_token_loss)
    held = {block: expert[block] + row[block] for block in expert}
    cost = Footprint(
        dense, held, activations, sum(each.nbytes for each in model.parameters()), expert_sides(model), COPIES[optimizer]
    )
    return replace(cost, lora_bytes=cost.of(anatomy(model).all_experts)) if tuning.train == "lora" else cost


def expert_sides(model: nn.Module) -> int:
    """Rows plus columns of every matrix of every expert of `model`."""
    experts = (each for each in located(model) if each.kind == "expert" and "bias" not in each.name)
    matrices = [each.parameter.shape for each in experts if each.parameter.ndim >= 2]
    return sum((shape[0] if len(shape) == 3 else 1) * sum(shape[-2:]) for shape in matrices)


def on_meta(model: nn.Module) -> nn.Module:
    """A twin of `model` on the meta device: shapes without data."""
    return with_tensors(model, lambda tensor: tensor.detach().to("meta"))


def with_tensors(model: nn.Module, make: Callable[[Tensor], Tensor]) -> nn.Module:
    """A twin of `model` whose parameters and buffers are made from those of `model`; what is tied stays tied."""
    memo: dict[int, Any] = {id(buffer): make(buffer) for buffer in model.buffers()}
    for old in model.parameters():
        memo[id(old)] = nn.Parameter(make(old.detach()), requires_grad=old.requires_grad)
    return copy.deepcopy(model, memo)


def as_shapes(twin: nn.Module) -> None:
    """Where a forward pass looks at values (which expert got which token), makes it go by shapes alone."""
    if cast("Any", twin).get_experts_implementation() == "eager":
        cast("Any", twin).set_experts_implementation("grouped_mm")
    for block in blocks(twin).values():
        if block.is_switch:
            experts = list(cast("nn.ModuleDict", block.experts).values())
            cast("Any", block.experts).forward = lambda hidden, _, weights, each=experts: in_equal_shares(each, hidden, weights)
            classifier = cast("Any", block.router).classifier
            classifier.to = lambda *_, same=classifier: same  # torch cannot swap the data of a tensor without data


def in_equal_shares(experts: list[nn.Module], hidden: Tensor, weights: Tensor) -> Tensor:
    """What Switch's experts give, and save for backward, if each gets its share of the tokens."""
    out = torch.zeros_like(hidden)
    shares = zip(experts, hidden.tensor_split(len(experts)), weights.tensor_split(len(experts)), strict=True)
    start = 0
    for expert, share, weight in shares:
        where = torch.arange(start, start + len(share))
        out.index_add_(0, where, expert(share.clone()) * weight)
        start += len(share)
    return out


def step_bytes(twin: nn.Module, batch: tuple[int, int], loss: Callable[[nn.Module, dict[str, Tensor]], Tensor]) -> int:
    """The most bytes alive beside parameters and gradients in one forward and backward of `twin`."""
    device = next(twin.parameters()).device
    ids = torch.zeros(batch, dtype=torch.int64, device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    for parameter in twin.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    twin.train()
    weights = sum(each.nbytes for each in (*twin.parameters(), *twin.buffers()))
    with ShapeMeter(twin, inputs.values()) as meter:
        loss(twin, inputs).backward()
    return meter.peak_bytes - weights


def next_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy as a training loop takes it."""
    logits, targets = predictions(model, batch)
    return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), label_smoothing=0.1)


class ShapeMeter(MemoryMeter):
    """A MemoryMeter for tensors without data."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._grouped_mm.default:  # torch knows its shapes for bf16 only
            out = grouped_shape(*args[:3])
            self.see(out)
            return out
        return super().__torch_dispatch__(func, types, args, kwargs)


def grouped_shape(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """An empty result of the grouped product: of rows and matrices, or (the gradient of the matrices) of rows and rows."""
    if right.ndim == 3:
        return left.new_empty(left.shape[0], right.shape[2])
    return left.new_empty(ends.shape[0], left.shape[0], right.shape[1])


def flops_estimated(model: nn.Module) -> Callable[[Batch], float]:
    """Counts the floating point operations of a training step on a batch, from shapes; padding is not counted.

    Forward: 2 for each weight that multiplies a token, where of a stack of E experts a token meets top_k; plus attention
    scores, 2 * length * (width of all query heads + width of all value heads) for each token and layer (causal masks do not
    halve it). Backward: as much again for the gradient of the inputs; for the gradient of the weights another 2 for each
    weight that is trained; scores twice the forward. Embedding look-ups, norms, biases and activations count nothing. Of an
    encoder-decoder, the encoder sees the prompt and all else the labels.
    """
    of_lengths = per_step(model)

    def of_batch(batch: Batch) -> float:
        read, written = batch["attention_mask"].sum(dim=1), (batch["labels"] != IGNORED).sum(dim=1)
        return of_lengths(read.tolist(), written.tolist())

    return of_batch


def per_step(model: nn.Module) -> Callable[[list[int], list[int]], float]:
    """flops_estimated for sequences of given lengths, read and written; the model is looked through once."""
    encoder = "encoder." if is_encoder_decoder(model) else ""  # all that a decoder-only model has goes by what it reads
    matrices, scores = list(products(model)), list(score_widths(model))
    reading = [name.startswith(encoder) for name, _, _ in matrices], [name.startswith(encoder) for name, _ in scores]

    def of_lengths(read: list[int], written: list[int]) -> float:
        tokens = {True: sum(read), False: sum(written)}
        squares = {True: sum(n * n for n in read), False: sum(n * n for n in written)}
        multiplied = sum(
            tokens[reads] * meets * (6 if trained else 4) for reads, (_, meets, trained) in zip(reading[0], matrices, strict=True)
        )
        attended = sum(squares[reads] * width * 6 for reads, (_, width) in zip(reading[1], scores, strict=True))
        return float(multiplied + attended)

    return of_lengths


def products(model: nn.Module) -> Iterator[tuple[str, float, bool]]:
    """Each matrix that multiplies tokens: its module, how many of its weights one token meets, and whether it is trained."""
    found = blocks(model)
    for name, module in model.named_modules():
        block = next((each for path, each in found.items() if name.startswith(f"{path}.experts")), None)
        share = block.shape.top_k / block.shape.num_experts if block else 1.0
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 2 and "bias" not in key and not isinstance(module, nn.Embedding):
                yield name, parameter.numel() * share, parameter.requires_grad


def score_widths(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Each attention module, and the width of its query and value heads together."""
    for name in attentions(model):
        children = dict(model.get_submodule(name).named_children())
        query = [children[each] for each in PROJECTIONS["q"] if each in children][-1]
        out = next(children[each] for each in PROJECTIONS["o"] if each in children)
        yield name, cast("Any", query).out_features + cast("Any", out).in_features
