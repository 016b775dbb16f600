"""The floating point operations of training steps, counted on a model's modules."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from fedexperts.moe.anatomy import blocks
from fedexperts.moe.logits import IGNORED, is_encoder_decoder
from fedexperts.moe.lora import ExpertLoRA
from fedexperts.moe.tuning import PROJECTIONS, attentions

Batch = Mapping[str, Tensor]


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
