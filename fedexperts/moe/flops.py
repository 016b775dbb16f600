"""What a model costs to hold and to run, counted on its real module tree."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional

from fedexperts.moe import graft
from fedexperts.moe.anatomy import BlockShape, Experts, anatomy, blocks
from fedexperts.moe.logits import IGNORED, is_encoder_decoder, keeps_logits, predictions
from fedexperts.moe.lora import ExpertLoRA, activated, first_matrix, normed
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
    num_experts: Mapping[str, int] = field(default_factory=dict)  # MoE block → those of the whole model
    update_bytes: Mapping[str, int] = field(default_factory=dict)  # MoE block → gradient and optimiser state of one expert

    def of(self, experts: Experts) -> int:
        """Bytes of the sub-model that holds `experts`."""
        held = sum(len(ids) * self.expert_bytes[block] for block, ids in experts.items())
        return self.dense_bytes + held + self.activation_bytes

    @property
    def fixed_bytes(self) -> int:
        """Of training the whole model while backward reaches no expert: weights, what is trained besides, activations."""
        everything = {block: tuple(range(number)) for block, number in self.num_experts.items()}
        return self.of(everything) - sum(number * self.update_bytes[block] for block, number in self.num_experts.items())

    @property
    def reached_bytes(self) -> int:
        """Of each expert that backward reaches: gradient and optimiser state, where blocks differ of one that takes most."""
        return max(self.update_bytes.values())

    def reaching(self, number: int) -> int:
        """Bytes of training the whole model, of whose experts backward reaches at most `number` at a time (HFedMoE).

        Where the blocks' experts differ in size, all count as the largest, so it may be more than they take.
        """
        return self.fixed_bytes + min(number, sum(self.num_experts.values())) * self.reached_bytes

    def reached_within(self, memory_bytes: int) -> int:
        """The most experts that backward may reach at a time within `memory_bytes`: at least 0, at most all.

        C_k of HFedMoE, for which the paper gives no formula: what is fixed off the memory, divided by what an expert takes.
        """
        left, most = memory_bytes - self.fixed_bytes, sum(self.num_experts.values())
        if left < 0:
            return 0
        return min(left // self.reached_bytes, most) if self.reached_bytes else most  # frozen ones take nothing

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
    target_places: int | None = None,
    grafts: int = 0,
) -> Footprint:
    """Bytes that it takes to train `model` as `tuning` says on batches of (examples, tokens each).

    Nothing is computed and no weight is copied: a twin of `model` without data takes one training step of shapes. A frozen
    parameter counts its own bytes, a trained one four times that under AdamW (weight, gradient, two moments: 16 bytes in
    fp32) and twice under SGD. `activation_bytes` is the most that was alive in forward and backward beside the parameters
    and their gradients: what autograd saves, logits, temporaries. `loss` stands for the training loop's own (default:
    cross-entropy of the next token).

    `target_places` are the places of a batch at which some example has a target: logits are made nowhere else, by models that
    can be told so. Of an encoder-decoder they are the tokens it writes. Default: all of `tokens each`.

    `grafts` personal experts stand beside each MoE block (FLEx): `dense_bytes` holds them.
    """
    twin = as_trained(model, tuning, grafts)
    _, update, _ = weigh(twin, lambda p: p.nbytes * (COPIES[optimizer] - 1) if p.requires_grad else 0)
    dense, expert, row = weigh(twin, lambda p: p.nbytes * (COPIES[optimizer] if p.requires_grad else 1))
    with FakeTensorMode(allow_non_fake_inputs=True):
        device = next(model.parameters()).device
        twin = with_tensors(twin, lambda tensor: torch.empty_like(tensor, device="cpu" if device.type == "meta" else device))
        as_shapes(twin)
        activations = step_bytes(twin, batch, loss or next_token_loss, batch[1] if target_places is None else target_places)
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


def as_trained(model: nn.Module, tuning: Tuning, grafts: int = 0) -> nn.Module:
    """A twin of `model` on the meta device as a client trains it, with so many personal experts beside each MoE block."""
    twin = prepare(on_meta(model), tuning, seed="")
    if grafts:
        graft.attach(twin, {name: tuple(range(grafts)) for name in anatomy(model).blocks}, tuning, seed="")
    return twin


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
    """What Switch's experts give, and save for backward, if each gets its share of the tokens."""
    out = torch.zeros_like(hidden)
    shares = zip(experts, hidden.tensor_split(len(experts)), weights.tensor_split(len(experts)), strict=True)
    start = 0
    for expert, share, weight in shares:
        where = torch.arange(start, start + len(share))
        out.index_add_(0, where, expert(share.clone()) * weight)
        start += len(share)
    return out


def stack_in_equal_shares(experts: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The same of a stack whose experts are computed one by one (transformers' eager)."""

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
    twin: nn.Module, batch: tuple[int, int], loss: Callable[[nn.Module, dict[str, Tensor]], Tensor], target_places: int
) -> int:
    """The most bytes alive beside parameters and gradients in one forward and backward of `twin`."""
    device = next(twin.parameters()).device
    ids = torch.zeros(batch, dtype=torch.int64, device=device)
    labels = ids.clone()
    if is_encoder_decoder(twin):
        labels = labels[:, :target_places].contiguous()
    elif keeps_logits(twin):
        labels = labels[:, : target_places + 1]  # the first is nobody's target
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
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


@runtime_checkable
class FlopsOfBatch(Protocol):
    """Of a training step on a batch. `reached`: MoE block → share of the pairs (token, expert) that backward reaches."""

    def __call__(self, batch: Batch, reached: Mapping[str, float] | None = None) -> float: ...


@runtime_checkable
class FlopsOfLengths(Protocol):
    """FlopsOfBatch for sequences of these lengths."""

    def __call__(self, read: list[int], written: list[int], reached: Mapping[str, float] | None = None) -> float: ...


def flops_estimated(model: nn.Module) -> FlopsOfBatch:
    """Counts the floating point operations of a training step on a batch, from shapes; padding is not counted.

    Forward: 2 for each weight that multiplies a token, where of a stack of E experts a token meets top_k; plus attention
    scores, 2 * length * (width of all query heads + width of all value heads) for each token and layer (causal masks do not
    halve it). Backward: as much again for the gradient of the inputs; for the gradient of the weights another 2 for each
    weight that is trained; scores twice the forward. Embedding look-ups, norms, biases and activations count nothing. Of an
    encoder-decoder, the encoder sees the prompt and all else the labels.

    Where backward reaches only some experts of a block (moe/backward.py), it takes that share of what it else would for them;
    and 2 more for each weight of Switch's experts and of adapters, which are computed again. Other blocks and all else as ever.
    """
    of_lengths = per_step(model)

    def of_batch(batch: Batch, reached: Mapping[str, float] | None = None) -> float:
        read, written = batch["attention_mask"].sum(dim=1), (batch["labels"] != IGNORED).sum(dim=1)
        return of_lengths(read.tolist(), written.tolist(), reached)

    return of_batch


def per_step(model: nn.Module) -> FlopsOfLengths:
    """flops_estimated for sequences of given lengths, read and written; the model is looked through once."""
    encoder = "encoder." if is_encoder_decoder(model) else ""  # all that a decoder-only model has goes by what it reads
    matrices, scores = list(products(model)), list(score_widths(model))

    def of_lengths(read: list[int], written: list[int], reached: Mapping[str, float] | None = None) -> float:
        tokens = {True: sum(read), False: sum(written)}
        multiplied = sum(
            tokens[each.module.startswith(encoder)] * each.weights * operations(each, reached or {}) for each in matrices
        )
        squares = {True: sum(n * n for n in read), False: sum(n * n for n in written)}
        attended = sum(squares[name.startswith(encoder)] * width * 6 for name, width in scores)
        return float(multiplied + attended)

    return of_lengths


class Product(NamedTuple):
    """A matrix, or a stack of them, that multiplies tokens."""

    module: str
    block: str | None  # the MoE block whose experts it is of
    weights: float  # that one token meets
    trained: bool
    again: bool  # whether a backward that reaches only some experts computes it once more


def operations(product: Product, reached: Mapping[str, float]) -> float:
    """Of a training step, for each weight that a token meets: forward, and backward as far as it reaches."""
    backward = 4.0 if product.trained else 2.0
    if product.block is None or product.block not in reached:
        return 2 + backward
    return 2 + reached[product.block] * (backward + 2 * product.again)


def products(model: nn.Module) -> Iterator[Product]:
    """Each matrix that multiplies tokens."""
    found = blocks(model)
    for name, module in model.named_modules():
        block = next((path for path in found if name.startswith(f"{path}.experts")), None)
        share = found[block].shape.top_k / found[block].shape.num_experts if block else 1.0
        again = isinstance(module, ExpertLoRA) or (block is not None and found[block].is_switch)
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 2 and "bias" not in key and not isinstance(module, nn.Embedding):
                yield Product(name, block, parameter.numel() * share, parameter.requires_grad, again)


def score_widths(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Each attention module, and the width of its query and value heads together."""
    for name in attentions(model):
        children = dict(model.get_submodule(name).named_children())
        query = [children[each] for each in PROJECTIONS["q"] if each in children][-1]
        out = next(children[each] for each in PROJECTIONS["o"] if each in children)
        yield name, cast("Any", query).out_features + cast("Any", out).in_features
