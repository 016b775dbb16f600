"""How a model predicts held-out text, how it uses its experts, and what the choice of its routers is worth.

Choices are compared in two ways. Bits per byte of the whole model, whose routers choose as they do, at random, or as an oracle
that takes the experts which would add the largest norm. And the error of a layer: the distance of its output from that with all
experts active, each with the mean weight of a chosen one, in parts of its norm; attention sinks do not count.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fedexperts.models.continued.training import has_experts, logits_of
from fedexperts.models.upcycle.split import UNUSUAL
from fedexperts.moe.anatomy import Block, blocks
from fedexperts.moe.routing import Recorder

Choice = Literal["routed", "random", "oracle"]
CHOICES: tuple[Choice, ...] = ("routed", "random", "oracle")

Rows = Int[Tensor, "windows tokens"]
AT_ONCE = 4  # windows


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Windows of held-out texts, and the bytes that the tokens of each but the first stand for."""

    rows: Mapping[str, Rows]
    bytes: Mapping[str, int]
    bf16: bool  # whether matrix products are in bfloat16

    @classmethod
    def of(cls, rows: Mapping[str, Rows], tokenizer: PreTrainedTokenizerBase, bf16: bool) -> "HeldOut":
        """The windows of each text."""
        return cls(rows, {name: sum(bytes_of(tokenizer, row) for row in some) for name, some in rows.items()}, bf16)

    def part(self, windows: int, tokenizer: PreTrainedTokenizerBase) -> "HeldOut":
        """At most `windows` of each text."""
        return HeldOut.of({name: rows[:windows] for name, rows in self.rows.items()}, tokenizer, self.bf16)

    @property
    def tokens(self) -> int:
        """Number of tokens that are predicted."""
        return sum(rows[:, 1:].numel() for rows in self.rows.values())

    def batches(self) -> Iterator[Rows]:
        """All windows, AT_ONCE at a time."""
        for rows in self.rows.values():
            yield from (part.long() for part in rows.split(AT_ONCE))


def bytes_of(tokenizer: PreTrainedTokenizerBase, row: Int[Tensor, " tokens"]) -> int:
    """The bytes of the text of all tokens but the first; special tokens stand for none."""
    text = tokenizer.decode(row[1:].tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return len(str(text).encode())


def bits_per_byte(model: nn.Module, held_out: HeldOut) -> dict[str, float]:
    """Of each text; and their mean."""
    return compare({"model": model}, held_out)[0]["model"]


@torch.inference_mode()
def compare(models: Mapping[str, nn.Module], held_out: HeldOut) -> tuple[dict[str, dict[str, float]], float]:
    """Bits per byte of each model, of each text and their mean; and KL(control ‖ model) in nats per token; 0: no control."""
    bits: dict[str, dict[str, float]] = {name: {} for name in models}
    divergence = 0.0
    for text, rows in held_out.rows.items():
        nats = dict.fromkeys(models, 0.0)
        for part in rows.long().split(AT_ONCE):
            found = {name: predictions(model.eval(), part, held_out.bf16) for name, model in models.items()}
            for name, logprobs in found.items():
                nats[name] -= float(logprobs.gather(2, part[:, 1:, None]).sum(dtype=torch.float64))
            if "control" in found:
                old, new = found["control"], found["model"]
                divergence += float((old.exp() * (old - new)).sum(dtype=torch.float64))
        for name, total in nats.items():
            bits[name][text] = total / max(held_out.bytes[text], 1) / math.log(2)
    means = {name: {**each, "mean": sum(each.values()) / len(each)} for name, each in bits.items()}
    return means, divergence / held_out.tokens


def predictions(model: nn.Module, windows: Rows, bf16: bool) -> Float[Tensor, "windows positions vocabulary"]:
    """The logarithms of the probabilities, in float32."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return logits_of(model, windows).float().log_softmax(-1)


@torch.inference_mode()
def loads(model: nn.Module, held_out: HeldOut) -> dict[str, list[float]]:
    """MoE block → tokens of each expert on held-out text, in parts of a fair share."""
    with Recorder(model.eval()) as recorder, torch.autocast("cpu", torch.bfloat16, enabled=held_out.bf16):
        for part in held_out.batches():
            model(input_ids=part, attention_mask=torch.ones_like(part), use_cache=False, logits_to_keep=1)
    counts = recorder.routing().counts
    return {name: (count.double() / count.sum() * len(count)).tolist() for name, count in counts.items()}


def routes(model: nn.Module, held_out: HeldOut, seed: int, routed: float) -> dict[str, dict[str, float]]:
    """Bits per byte and mean error of a layer, by choice; empty if the model has no experts, or experts of other shapes.

    routed: the bits per byte as its routers choose.
    """
    if not has_experts(model) or not all(measurable(block) for block in blocks(model).values()):
        return {}
    bits = {"routed": routed}
    for choice in CHOICES[1:]:
        with chosen(model, choice, seed):
            bits[choice] = bits_per_byte(model, held_out)["mean"]
    return {"bits_by_choice": bits, "error_of_a_layer": layer_errors(model, held_out, seed)}


def measurable(block: Block) -> bool:
    """Whether the experts are stacked, gated networks without biases."""
    stack = cast("Any", block.experts)
    matrices = {name for name, _ in stack.named_parameters()}
    return not block.is_switch and not stack.is_transposed and matrices == {"gate_up_proj", "down_proj"}


@contextmanager
def chosen(model: nn.Module, choice: Choice, seed: int) -> Iterator[None]:
    """Within the block the routers of `model` make this choice; the weights of a token's experts add up as before."""
    chance = torch.Generator().manual_seed(seed)
    with ExitStack() as hooks:
        for block in blocks(model).values():
            hooks.callback(block.router.register_forward_hook(chooser(block, choice, chance)).remove)
        yield


def chooser(block: Block, choice: Choice, chance: torch.Generator) -> Callable[..., Any]:
    """The hook that replaces what a router picks. transformers' routers return (logits, weights, ids)."""

    def hook(router: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, ids = output
        hidden = args[0].reshape(-1, args[0].shape[-1])
        scores = scores_of(choice, logits, expert_outputs(block, hidden) if choice == "oracle" else None, chance)
        ids = scores.topk(ids.shape[1], dim=1).indices
        picked = logits.float().gather(1, ids).softmax(1) * weights.sum(1, keepdim=True)
        return logits, picked.to(weights.dtype), ids

    return hook


def scores_of(choice: Choice, logits: Tensor, outputs: Tensor | None, chance: torch.Generator) -> Float[Tensor, "tokens experts"]:
    """The scores whose largest are chosen. outputs: those of all experts, for the oracle."""
    if choice == "random":
        return torch.rand(logits.shape, generator=chance)
    return logits if outputs is None or choice == "routed" else outputs.norm(dim=2)


def expert_outputs(block: Block, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens experts hidden"]:
    """What each expert gives for each token, with weight 1."""
    stack = cast("Any", block.experts)
    both = torch.einsum("th,enh->ten", hidden, stack.gate_up_proj.to(hidden.dtype))
    return torch.einsum("ten,ehn->teh", stack._apply_gate(both), stack.down_proj.to(hidden.dtype))


@dataclass(eq=False)
class LayerErrors:
    """Sums over the tokens that a block sees, for its mean error by choice."""

    block: Block
    chance: torch.Generator
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CHOICES, 0.0))
    tokens: int = 0

    def see(self, module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        """A hook behind the forward pass of the block."""
        hidden = args[0].reshape(-1, args[0].shape[-1]).float()
        result = (output[0] if isinstance(output, tuple) else output).reshape(hidden.shape).float()
        logits, weights, ids = cast("Any", self.block.router)(hidden.to(args[0].dtype))
        outputs, mean = expert_outputs(self.block, hidden).float(), weights.float().mean(1, keepdim=True)
        routed = torch.zeros_like(logits, dtype=torch.float32).scatter(1, ids, weights.float())
        full = result + torch.einsum("te,teh->th", mean - routed, outputs)
        size = full.norm(dim=1)
        usual = (size < UNUSUAL * size.median()) & (size > 0)
        for choice in CHOICES:
            picked = scores_of(choice, logits, outputs, self.chance).topk(ids.shape[1], dim=1).indices
            given = torch.zeros_like(routed).scatter(1, picked, mean.expand(-1, ids.shape[1]))
            left_out = torch.einsum("te,teh->th", mean - given, outputs)
            self.sums[choice] += float((left_out.norm(dim=1) / size)[usual].sum())
        self.tokens += int(usual.sum())


@torch.inference_mode()
def layer_errors(model: nn.Module, held_out: HeldOut, seed: int) -> dict[str, float]:
    """Choice → mean error over all MoE blocks."""
    errors = [LayerErrors(block, torch.Generator().manual_seed(seed)) for block in blocks(model).values()]
    with ExitStack() as hooks:
        for each in errors:
            hooks.callback(each.block.module.register_forward_hook(each.see).remove)
        for part in held_out.batches():
            cast("Any", model.eval())(input_ids=part, attention_mask=torch.ones_like(part), use_cache=False, logits_to_keep=1)
    means: dict[str, float] = {}
    for choice in CHOICES:
        means[choice] = sum(each.sums[choice] / max(each.tokens, 1) for each in errors) / len(errors)
    return means
