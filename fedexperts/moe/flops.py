"""The floating point operations of forward passes and training steps, counted on a model's modules."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple, cast

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from fedexperts.moe.anatomy import Block, Experts, blocks
from fedexperts.moe.backward import Through
from fedexperts.moe.graft import CHILD, Grafted
from fedexperts.moe.logits import IGNORED, is_encoder_decoder, keeps_logits
from fedexperts.moe.lora import ExpertLoRA
from fedexperts.moe.tuning import PROJECTIONS, attentions

Batch = Mapping[str, Tensor]
Tokens = Literal["read", "written"]

CROSS_ATTENTION = "EncDecAttention"  # the name, in Switch, of the attention whose keys and values come from the encoder


class Size(NamedTuple):
    """The size of a batch, padding included: models compute with it too."""

    examples: int
    read: int  # tokens of each example
    written: int  # positions of each example with logits; of an encoder-decoder: tokens that its decoder reads


class FlopsEstimate:
    """Estimates the floating point operations of forward passes and training steps of `model` from shapes.

    Forward: 2 for each weight that multiplies a token (of E stacked experts, those of top_k; of the output head, tokens with
    logits, see moe/logits.py), plus attention scores, 2 * keys * (width of all query heads + width of all value heads) for each
    query and layer (causal masks do not halve it). Backward: 2 for each trained weight for its gradient, 2 for each weight for
    the gradient of its inputs, unless nothing below it is trained, and twice the forward of the scores; fused attention
    (anything but "eager") also computes queries * keys again. Look-ups, norms, biases and activations count nothing. Padding
    counts as any token. In an encoder-decoder, the encoder and the keys and values of cross-attention count the tokens of the
    prompt, and all else those of the labels.

    If backward reaches only `chosen` experts (moe/backward.py), it takes their part alone, and 2 more for each weight of
    Switch's experts and of adapters, which are computed again. All else is unchanged. With `through` = "all" only the gradients
    of weights are of chosen experts alone, and those of adapters of stacked experts of none alone.

    Layers under gradient checkpointing (set before this is created) take their forward twice in a step.

    `picks` are the tokens that each expert got (`Recorder.picks`). Without them tokens count as evenly spread over experts, which
    matters only where experts differ: with adapters on some of them, or with `chosen`. Tokens that Switch drops, since they are
    beyond the capacity of an expert, count without `picks`. Of a checkpointed layer, products at its end count twice, although
    torch does not repeat those whose result backward does not need.

    The modules are inspected once, here.
    """

    def __init__(self, model: nn.Module) -> None:
        self.matrices, self.scores = inspected(model)
        self.encoder_decoder, self.keeps_logits = is_encoder_decoder(model), keeps_logits(model)

    def size(self, batch: Batch) -> Size:
        """The size of `batch`."""
        examples, read = batch["input_ids"].shape
        if self.encoder_decoder:
            return Size(examples, read, batch["labels"].shape[1])
        with_target = int((batch["labels"][:, 1:] != IGNORED).any(dim=0).sum())
        return Size(examples, read, with_target if self.keeps_logits else read)

    def forward(self, size: Size) -> float:
        """FLOPs of a forward pass."""
        multiplied = sum(2 * each.rows(size) * each.weights for each in self.matrices)
        return float(multiplied + sum(each.forward(size) for each in self.scores))

    def step(
        self,
        size: Size,
        picks: Mapping[str, Tensor] | None = None,
        chosen: Experts | None = None,
        through: Through = "chosen",
    ) -> float:
        """FLOPs of a forward and a backward pass."""
        counts = {block: number.tolist() for block, number in (picks or {}).items()}
        multiplied = sum(each.step(size, counts, chosen, through) for each in self.matrices)
        return float(multiplied + sum(each.step(size) for each in self.scores))


class Matrix(NamedTuple):
    """A matrix, or a stack with one for each of `experts`, that multiplies tokens."""

    path: str
    weights: float  # of one matrix
    trained: bool
    tokens: Tokens
    reads: Literal["encoder", "decoder"]  # whose hidden states; "decoder" in a decoder-only model
    block: str | None = None  # the MoE block to whose experts it belongs
    experts: tuple[int, ...] = ()  # of the block
    even_share: float = 1.0  # of the tokens that an expert gets if they are evenly spread
    computed_again: bool = False  # by a backward that reaches only some experts
    checkpointed: bool = False
    joins: bool = False  # reads what several others give, not the input of its unit
    passes_gradient: bool = True  # whether its inputs need a gradient

    def rows(self, size: Size, counts: Mapping[str, Sequence[int]] | None = None, chosen: Experts | None = None) -> float:
        """Tokens that it multiplies; those that go to `chosen` experts alone, if given."""
        tokens = size.examples * getattr(size, self.tokens)
        if self.block is None:
            return float(tokens)
        experts = self.experts if chosen is None else [each for each in self.experts if each in chosen.get(self.block, ())]
        if counts and self.block in counts:
            return float(sum(counts[self.block][expert] for expert in experts))
        return float(tokens * self.even_share * len(experts))

    def step(self, size: Size, counts: Mapping[str, Sequence[int]], chosen: Experts | None, through: Through) -> float:
        """FLOPs of forward, and of backward as far as it reaches."""
        rows = self.rows(size, counts)
        forward = 2 * rows * (1 + self.checkpointed)
        if self.block is None or chosen is None:
            return self.weights * (forward + 2 * rows * (self.passes_gradient + self.trained))
        reached = self.rows(size, counts, chosen)
        passed = rows if through == "all" else reached
        weighed = passed if ".experts.lora." in self.path else reached  # adapters of a stack are one product
        return self.weights * (forward + 2 * passed * (1 + self.computed_again) + 2 * weighed * self.trained)


class Scores(NamedTuple):
    """The two products of an attention: queries * keys, and its result * values."""

    queries: Tokens
    keys: Tokens
    query_width: int  # of all heads together
    value_width: int
    fused: bool  # whether backward computes the first product again
    checkpointed: bool
    passes_gradient: bool  # whether backward reaches it

    def forward(self, size: Size) -> float:
        return 2.0 * self.pairs(size) * (self.query_width + self.value_width)

    def step(self, size: Size) -> float:
        """FLOPs of forward and backward."""
        again = 2 * self.pairs(size) * self.query_width * self.fused
        return self.forward(size) * (1 + self.checkpointed) + self.passes_gradient * (2 * self.forward(size) + again)

    def pairs(self, size: Size) -> int:
        """Pairs of a query and a key."""
        return size.examples * int(getattr(size, self.queries)) * int(getattr(size, self.keys))


def inspected(model: nn.Module) -> tuple[list[Matrix], list[Scores]]:
    """The matrices and attention scores of `model`, with whether backward passes their inputs a gradient.

    It does if something trained comes before, in the order of the modules: embeddings, then units one after the other (an
    attention, an MoE block, another module with matrices). The branches of a unit, such as the projections of queries and of
    keys, or router and experts, read the same input.
    """
    found, unit_of = [], units(model)
    embeddings = cast("Any", model).get_input_embeddings().weight
    from_start = embeddings.requires_grad or bool(checkpointed_layers(model))  # there transformers passes them a gradient anyway
    reached = {"encoder": from_start, "decoder": from_start}  # whether the hidden states so far need a gradient
    for unit, members in groupby(matrices(model), key=lambda matrix: unit_of(matrix.path)):
        branches: dict[str, bool] = {}
        for matrix in sorted(members, key=lambda matrix: (matrix.joins, "down_proj" in matrix.path)):
            before = reached[matrix.reads] or (matrix.joins and any(branches.values()))
            branch = branch_of(matrix.path.removeprefix(f"{unit}."))
            passes = branches.get(branch, before)
            found.append(matrix._replace(passes_gradient=passes))
            branches[branch] = passes or matrix.trained
        part = "encoder" if matrix.path.startswith("encoder.") else "decoder"
        reached[part] = reached[part] or any(branches.values())
    return found, list(scores(model, found))


def units(model: nn.Module) -> Callable[[str], str]:
    """The unit of a module, by its path: an attention, an MoE block, or else the module that contains it."""
    wholes = sorted((*attentions(model), *blocks(model)), key=len, reverse=True)
    return lambda path: next((whole for whole in wholes if path.startswith(f"{whole}.")), path.rpartition(".")[0])


def branch_of(path: str) -> str:
    """The branch of a module, by its path below its unit: a projection with its adapter, router, experts, a single expert."""
    if alone := re.match(rf"({CHILD}\.)?\w+\.expert_\d+", path):
        return alone.group()
    parts = path.split(".")
    return ".".join(parts[:2]) if parts[0] == CHILD else parts[0].partition("_")[0] if "_proj" in parts[0] else parts[0]


def matrices(model: nn.Module) -> Iterator[Matrix]:
    """Each matrix of `model` that multiplies tokens, in the order of its modules."""
    model_blocks, again, attention = blocks(model), checkpointed_layers(model), tuple(f"{path}." for path in attentions(model))
    head = cast("Any", model).get_output_embeddings()
    for name, module in model.named_modules():
        multiplies = {key: each for key, each in module._parameters.items() if each is not None and is_matrix(key, each, module)}
        sums = isinstance(module, Grafted) and len(module.own_gate.weight) > 1  # of a single one torch makes no product
        if not multiplies and not sums:
            continue
        block = next((each for each in model_blocks.values() if name.startswith(f"{each.name}.experts")), None)
        path_in_attention = next((name.removeprefix(each) for each in attention if name.startswith(each)), "")
        common = Matrix(
            name,
            0,
            trained=False,
            tokens="written" if module is head and keeps_logits(model) else tokens_of(model, name),
            reads="encoder" if is_encoder_decoder(model) and tokens_of(model, name) == "read" else "decoder",
            checkpointed=name.startswith(again),
            joins=path_in_attention.partition(".")[0] in PROJECTIONS["o"],
        )
        if block is not None:
            common = with_experts(common, module, block)
        if sums:  # of the outputs of personal experts, times their gates: both need a gradient
            weights = cast("Grafted", module).own_gate.weight.numel()
            yield common._replace(path=f"{name}.sum", weights=weights, trained=True, joins=True)
        for key, parameter in multiplies.items():
            one = parameter.numel() / (len(parameter) if block and parameter.ndim == 3 else 1)
            yield common._replace(path=f"{name}.{key}", weights=one, trained=parameter.requires_grad)


def is_matrix(name: str, parameter: Tensor, module: nn.Module) -> bool:
    """Whether the parameter `name` of `module` multiplies tokens."""
    return parameter.ndim >= 2 and "bias" not in name and not isinstance(module, nn.Embedding)


def with_experts(matrix: Matrix, module: nn.Module, block: Block) -> Matrix:
    """`matrix`, with the experts of `block` to which the weights of `module` belong."""
    if isinstance(module, ExpertLoRA):
        experts = tuple(range(len(module.ids))) if module.ids.is_meta else tuple(module.ids.tolist())
    elif expert := re.match(r"\.expert_(\d+)", matrix.path.removeprefix(f"{block.name}.experts")):
        experts = (int(expert.group(1)),)
    else:
        experts = tuple(range(block.shape.num_experts))
    return matrix._replace(
        block=block.name,
        experts=experts,
        even_share=block.shape.top_k / block.shape.num_experts,
        computed_again=isinstance(module, ExpertLoRA) or block.is_switch,
    )


def tokens_of(model: nn.Module, path: str) -> Tokens:
    """The tokens that reach the module `path`."""
    if not is_encoder_decoder(model) or path.startswith("encoder."):
        return "read"
    _, cross, below = path.partition(f".{CROSS_ATTENTION}.")
    return "read" if cross and below.partition(".")[0] in ("k", "v") else "written"


def checkpointed_layers(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the modules that run forward again in backward."""
    modules = model.named_modules()
    return tuple(
        f"{name}." for name, each in modules if isinstance(each, GradientCheckpointingLayer) and each.gradient_checkpointing
    )


def scores(model: nn.Module, found: Sequence[Matrix]) -> Iterator[Scores]:
    """The attention scores of `model`, whose matrices are `found`."""
    is_eager = cast("Any", model).config._attn_implementation == "eager"
    for name in attentions(model):
        children = dict(model.get_submodule(name).named_children())
        query = [children[child] for child in PROJECTIONS["q"] if child in children][-1]
        key = next(child for child in PROJECTIONS["k"] if child in children)
        out = next(children[child] for child in PROJECTIONS["o"] if child in children)
        joined = next(matrix for matrix in found if matrix.joins and matrix.path.startswith(f"{name}."))
        query_width, value_width = cast("Any", query).out_features, cast("Any", out).in_features
        yield Scores(
            tokens_of(model, f"{name}.query"),
            tokens_of(model, f"{name}.{key}"),
            query_width,
            value_width,
            not is_eager and query_width == value_width,  # torch has no fused attention on CPUs for heads of two widths
            joined.checkpointed,
            joined.passes_gradient,
        )
