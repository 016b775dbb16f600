"""Which experts a model picks: counted on every router, without padding; and the loss that keeps them balanced."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from inspect import signature
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from fedexperts.errors import BadValue
from fedexperts.moe.anatomy import Block, blocks
from fedexperts.moe.logits import predictions


@dataclass(frozen=True)
class Routing:
    """How often each expert was picked, and of how many tokens; padding does not count."""

    counts: Mapping[str, Tensor]  # MoE block → int64 [experts]
    tokens: Mapping[str, int]  # MoE block → tokens that its router saw

    def probabilities(self) -> dict[str, Tensor]:
        """MoE block → share of the tokens that each expert got (p = n / N), float64 [experts]; 0 where no token came."""
        return {name: counts.double() / max(self.tokens[name], 1) for name, counts in self.counts.items()}


class Recorder:
    """While it is on, counts what the routers of `model` pick in each forward pass.

    Padding is left out by the attention mask; in the decoder of an encoder-decoder model by its own mask, else by the
    labels (-100). What gradient checkpointing computes a second time, during backward, is not counted again.

    With `keep_logits`, `logits` are the router's logits of each forward pass, of the tokens that count, with their graph.
    """

    def __init__(self, model: nn.Module, keep_logits: bool = False) -> None:
        self.blocks = blocks(model)
        self._keep_logits = keep_logits
        self._logits: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self.blocks}
        self._scopes = _scopes(model)
        self._scope_of = {name: self._innermost(name) for name in self.blocks}
        self._counts = {name: torch.zeros(b.shape.num_experts, dtype=torch.int64) for name, b in self.blocks.items()}
        self._tokens = {name: torch.zeros((), dtype=torch.int64) for name in self.blocks}
        self._hooks = ExitStack()

    def __enter__(self) -> "Recorder":
        for scope in self._scopes.values():
            self._hooks.callback(scope.module.register_forward_pre_hook(scope.open, with_kwargs=True).remove)
            self._hooks.callback(scope.module.register_forward_hook(scope.close, always_call=True).remove)
        for name, block in self.blocks.items():
            self._hooks.callback(block.router.register_forward_hook(self._see(name)).remove)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._hooks.close()

    @property
    def logits(self) -> dict[str, list[Float[Tensor, "tokens experts"]]]:
        return {name: [logits[counts] for logits, counts in passes] for name, passes in self._logits.items()}

    def last(self, name: str) -> tuple[Float[Tensor, "tokens experts"], Bool[Tensor, " tokens"]]:
        """The logits that the router of block `name` gave in its last forward pass, and which of the tokens count."""
        return self._logits[name][-1]

    def routing(self) -> Routing:
        """What was picked since the recorder was made."""
        counts = {name: count.cpu().clone() for name, count in self._counts.items()}
        return Routing(counts, {name: int(number) for name, number in self._tokens.items()})

    def _innermost(self, name: str) -> str:
        """The longest scope in which the block `name` lies."""
        return max((scope for scope in self._scopes if name.startswith(scope)), key=len)

    def _see(self, name: str) -> Any:
        block, scope = self.blocks[name], self._scopes[self._scope_of[name]]

        def hook(router: nn.Module, args: object, output: tuple[Tensor, ...]) -> None:
            if not scope.is_open:  # gradient checkpointing computes this layer again
                return
            picked, logits = _picked(block, output), _logits(block, output)
            counts = scope.counts(len(picked)).to(picked.device)
            self._counts[name] = self._counts[name].to(picked.device) + (picked * counts[:, None]).sum(0)
            self._tokens[name] = self._tokens[name].to(picked.device) + counts.sum()
            if self._keep_logits:
                # What is computed here would be missed when a checkpointed layer is computed again: select later.
                self._logits[name].append((logits, counts))

        return hook


def balance_loss(recorder: Recorder) -> Float[Tensor, ""]:
    """How unevenly the experts are used: 1 when all alike, as many as there are when one gets everything (top 1).

    The mean over MoE blocks of E / k · Σ_e f_e · P_e: E the experts of this block, k picked per token, f_e the share of
    tokens that picked e, P_e the mean probability the router gives it (Switch Transformers, eq. 4, for k > 1). Where the
    router scores each expert by a sigmoid, the scores of a token are divided by their sum first, as DeepSeek-V3 does.

    Raises:
        BadValue: the recorder kept no logits.
    """
    seen = kept_logits(recorder)
    shares = recorder.routing().probabilities()
    return torch.stack([_imbalance(recorder.blocks[name], each, shares[name]) for name, each in seen.items()]).mean()


def gating_entropy(recorder: Recorder) -> Float[Tensor, ""]:
    """How undecided the routers are: the mean over MoE blocks and tokens of −Σ_e G_e log G_e, G as in `log_gates`.

    Raises:
        BadValue: the recorder kept no logits.
    """
    logs = [log_gates(each, recorder.blocks[name].sigmoid) for name, each in kept_logits(recorder).items()]
    return torch.stack([-(each.exp() * each).sum(-1).mean() for each in logs]).mean()


def kept_logits(recorder: Recorder) -> dict[str, Float[Tensor, "tokens experts"]]:
    """MoE block → the logits of all tokens that its router saw; blocks that saw none are left out.

    Raises:
        BadValue: the recorder kept no logits.
    """
    logits = {name: torch.cat(passes) for name, passes in recorder.logits.items() if passes}
    seen = {name: each for name, each in logits.items() if len(each)}
    if not seen:
        raise BadValue("the recorder kept no router logits; use Recorder(model, keep_logits=True) around a forward pass")
    return seen


def log_gates(logits: Float[Tensor, "... experts"], sigmoid: bool) -> Float[Tensor, "... experts"]:
    """log G: of the softmax over all experts, before top-k; of a router's sigmoids, divided by their sum."""
    logits = logits.float()
    return (functional.logsigmoid(logits) if sigmoid else logits).log_softmax(-1)


def divergence(
    base: Float[Tensor, "tokens experts"], tuned: Float[Tensor, "tokens experts"], sigmoid: bool
) -> Float[Tensor, " tokens"]:
    """KL(G ‖ G′) = Σ_e G_e (log G_e − log G′_e) of each token, in nats: G of the base's logits, G′ of the tuned model's.

    Both over all experts, before top-k, as in `log_gates`; 0 where they are the same, never less.
    """
    before, after = log_gates(base, sigmoid).double(), log_gates(tuned, sigmoid).double()
    return (before.exp() * (before - after)).sum(-1).clamp(min=0)


def router_drift(base: nn.Module, tuned: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
    """MoE block → how far the routers of `tuned` are from those of `base` on the same text (ours).

    The mean over all tokens of all batches, padding left out, of `divergence`. Each router sees the hidden states of its own
    model, so what earlier layers changed counts too. Both models have the same experts, and are in eval mode afterwards.
    """
    sigmoid = {name: block.sigmoid for name, block in blocks(base).items()}
    sums: dict[str, float] = {}
    tokens: dict[str, int] = {}
    for batch in batches:
        before, after = (_logits_on(model, batch) for model in (base, tuned))
        for name, logits in before.items():
            each = divergence(logits, after[name], sigmoid[name])
            sums[name] = sums.get(name, 0.0) + float(each.sum())
            tokens[name] = tokens.get(name, 0) + len(each)
    return {name: total / tokens[name] for name, total in sums.items()}


@torch.no_grad()
def _logits_on(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "tokens experts"]]:
    """`kept_logits` of one forward pass."""
    with Recorder(model.eval(), keep_logits=True) as recorder:
        predictions(model, batch)
    return kept_logits(recorder)


def _imbalance(block: Block, logits: Float[Tensor, "tokens experts"], share: Float[Tensor, " experts"]) -> Float[Tensor, ""]:
    logits = logits.float()
    if block.sigmoid:
        scores = logits.sigmoid()
        probabilities = scores / scores.sum(-1, keepdim=True)
    else:
        probabilities = logits.softmax(-1)
    shape = block.shape
    return shape.num_experts / shape.top_k * (share.to(logits) * probabilities.mean(0)).sum()


class _Scope:
    """A part of the model whose routers share one mask; open while its forward pass runs."""

    def __init__(self, module: nn.Module, mask_names: tuple[str, ...]) -> None:
        self.module = module
        self.is_open = False
        self._mask_names = mask_names
        self._mask: Bool[Tensor, "batch tokens"] | None = None

    def open(self, module: nn.Module, args: tuple[object, ...], named: dict[str, Any]) -> None:
        self.is_open = True
        named = {**dict(zip(signature(module.forward).parameters, args, strict=False)), **named}
        given = next(((name, named[name]) for name in self._mask_names if named.get(name) is not None), None)
        if given is None:
            self._mask = None
        elif given[1].ndim != 2:
            raise BadValue(f"{given[0]} has {given[1].ndim} axes; give [batch, tokens], so that padding can be told from tokens")
        else:
            self._mask = given[1] != (-100 if given[0] == "labels" else 0)

    def close(self, module: nn.Module, args: object, output: object) -> None:
        self.is_open = False

    def counts(self, number: int) -> Bool[Tensor, " tokens"]:
        """Which of the `number` tokens that a router sees are none of padding.

        With a cache the mask also covers the tokens of earlier passes: this pass has the last columns.
        """
        if self._mask is None:
            return torch.ones(number, dtype=torch.bool)
        columns = number // len(self._mask)
        return self._mask[:, -columns:].reshape(-1)


def _scopes(model: nn.Module) -> dict[str, _Scope]:
    """Prefix of module names → scope. An encoder is run by itself when text is generated, so it is one of its own."""
    config: Any = model.config
    if not config.is_encoder_decoder:
        return {"": _Scope(model, ("attention_mask",))}
    encoder = model.get_encoder()  # type: ignore[operator]  # transformers' method, unknown to nn.Module
    name = next(name for name, module in model.named_modules() if module is encoder)
    return {"": _Scope(model, ("decoder_attention_mask", "labels")), f"{name}.": _Scope(encoder, ("attention_mask",))}


def _picked(block: Block, output: tuple[Tensor, ...]) -> Int[Tensor, "tokens experts"]:
    """1 where a token picked an expert. Routers give their outputs in several orders: ids are the ones of int64."""
    number = block.shape.num_experts
    chosen = next(part for part in output if part.dtype == torch.int64)
    if block.is_switch:
        return chosen.reshape(-1, number)
    picked = torch.zeros(len(chosen), number, dtype=torch.int64, device=chosen.device)
    return picked.scatter_add_(1, chosen, torch.ones_like(chosen))


def _logits(block: Block, output: tuple[Tensor, ...]) -> Float[Tensor, "tokens experts"]:
    """The floats with a column for each expert; where the weights of the chosen have as many, logits come first.

    Switch gives them last, after one probability per token.
    """
    number = block.shape.num_experts
    floats = [part for part in output if part.is_floating_point() and part.shape[-1] == number]
    return floats[-1].reshape(-1, number) if block.is_switch else floats[0]
