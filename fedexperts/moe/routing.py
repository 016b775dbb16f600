"""The experts that a model picks, counted at every router without padding; and the load-balance loss."""

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
from fedexperts.moe.packing import real_tokens


@dataclass(frozen=True)
class Routing:
    """How often each expert was picked, and for how many tokens; padding does not count."""

    counts: Mapping[str, Tensor]  # MoE block → int64 [experts]
    tokens: Mapping[str, int]  # MoE block → tokens that its router saw

    def probabilities(self) -> dict[str, Tensor]:
        """MoE block → share of the tokens that each expert got (p = n / N), float64 [experts]; 0 if there were no tokens."""
        return {name: counts.double() / max(self.tokens[name], 1) for name, counts in self.counts.items()}


class Recorder:
    """Within its `with` block, counts the experts that the routers of `model` pick in each forward pass.

    Padding is left out by the attention mask; in the decoder of an encoder-decoder by its own mask, or else by the labels
    (-100). Passes that gradient checkpointing repeats during backward are not counted again.

    `picks` counts padding too: MoE block → tokens that each expert computes with, int64 [experts].

    With `keep_logits`, `logits` has the router's logits of each forward pass for the tokens that count, with their graph.
    `found` has the model's MoE blocks where they are known: to look for them at every step takes time.
    """

    def __init__(self, model: nn.Module, keep_logits: bool = False, found: Mapping[str, Block] | None = None) -> None:
        self.blocks = blocks(model) if found is None else found
        self._keep_logits = keep_logits
        self._logits: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self.blocks}
        self._scopes = _scopes(model)
        self._scope_of = {name: self._innermost(name) for name in self.blocks}
        self._counts = {name: torch.zeros(b.shape.num_experts, dtype=torch.int64) for name, b in self.blocks.items()}
        self._tokens = {name: torch.zeros((), dtype=torch.int64) for name in self.blocks}
        self.picks = {name: torch.zeros(b.shape.num_experts, dtype=torch.int64) for name, b in self.blocks.items()}
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
        """MoE block → the router's logits of each forward pass, for the tokens that count; empty without `keep_logits`."""
        return {name: [logits[counts] for logits, counts in passes] for name, passes in self._logits.items()}

    def last(self, name: str) -> tuple[Float[Tensor, "tokens experts"], Bool[Tensor, " tokens"]]:
        """The router's logits of block `name` in its last forward pass for all tokens, and which of the tokens count."""
        return self._logits[name][-1]

    def routing(self) -> Routing:
        """The picks since the recorder was created."""
        counts = {name: count.cpu().clone() for name, count in self._counts.items()}
        return Routing(counts, {name: int(number) for name, number in self._tokens.items()})

    def _innermost(self, name: str) -> str:
        """The longest prefix of a scope that contains the block `name`."""
        return max((scope for scope in self._scopes if name.startswith(scope)), key=len)

    def _see(self, name: str) -> Any:
        block, scope = self.blocks[name], self._scopes[self._scope_of[name]]

        def hook(router: nn.Module, args: object, output: tuple[Tensor, ...]) -> None:
            if not scope.is_open:  # gradient checkpointing repeats this layer
                return
            picked, logits = _picked(block, output), _logits(block, output)
            counts = scope.counts(len(picked)).to(picked.device)
            self._counts[name] = self._counts[name].to(picked.device) + (picked * counts[:, None]).sum(0)
            self._tokens[name] = self._tokens[name].to(picked.device) + counts.sum()
            self.picks[name] = self.picks[name].to(picked.device) + picked.sum(0)
            if self._keep_logits:
                # A tensor computed here would be missing when a checkpointed layer is repeated, so tokens are selected later.
                self._logits[name].append((logits, counts))

        return hook


def balance_loss(recorder: Recorder) -> Float[Tensor, ""]:
    """The load-balance loss: 1 if all experts are used equally, the number of experts if one gets every token (top 1).

    The mean over MoE blocks of E / k · Σ_e f_e · P_e, with E the number of experts of the block, k the number picked per
    token, f_e the share of tokens that picked e, and P_e the mean probability that the router gives to e (Switch Transformers,
    equation 4, generalized to k > 1). If the router scores experts by sigmoids, the scores of a token are divided by their sum
    first, as in DeepSeek-V3.

    Raises:
        BadValue: the recorder has no logits.
    """
    logits = recorded_logits(recorder)
    shares = recorder.routing().probabilities()
    losses = [_balance_loss_of(recorder.blocks[name], block_logits, shares[name]) for name, block_logits in logits.items()]
    return torch.stack(losses).mean()


def gating_entropy(recorder: Recorder) -> Float[Tensor, ""]:
    """The entropy of the routers' distributions: the mean over MoE blocks and tokens of −Σ_e G_e log G_e, G as in `log_gates`.

    Raises:
        BadValue: the recorder has no logits.
    """
    logits = recorded_logits(recorder)
    log_g = [log_gates(block_logits, recorder.blocks[name].sigmoid) for name, block_logits in logits.items()]
    return torch.stack([-(block_log_g.exp() * block_log_g).sum(-1).mean() for block_log_g in log_g]).mean()


def recorded_logits(recorder: Recorder) -> dict[str, Float[Tensor, "tokens experts"]]:
    """MoE block → the logits of all tokens that its router saw; blocks whose router saw none are left out.

    Raises:
        BadValue: the recorder has no logits.
    """
    all_logits = {name: torch.cat(passes) for name, passes in recorder.logits.items() if passes}
    logits = {name: block_logits for name, block_logits in all_logits.items() if len(block_logits)}
    if not logits:
        raise BadValue("the recorder has no router logits; use Recorder(model, keep_logits=True) around a forward pass")
    return logits


def log_gates(logits: Float[Tensor, "... experts"], sigmoid: bool) -> Float[Tensor, "... experts"]:
    """log G: of the softmax over all experts, before top-k; of a router with sigmoids, of these divided by their sum."""
    logits = logits.float()
    return (functional.logsigmoid(logits) if sigmoid else logits).log_softmax(-1)


def divergence(
    base: Float[Tensor, "tokens experts"], tuned: Float[Tensor, "tokens experts"], sigmoid: bool
) -> Float[Tensor, " tokens"]:
    """KL(G ‖ G′) = Σ_e G_e (log G_e − log G′_e) of each token, in nats: G of the base's logits, G′ of the tuned model's.

    Both are over all experts, before top-k, as in `log_gates`. Never negative, and 0 if they are equal.
    """
    log_base, log_tuned = (log_gates(logits, sigmoid).cpu().double() for logits in (base, tuned))  # mps has no float64
    return (log_base.exp() * (log_base - log_tuned)).sum(-1).clamp(min=0)


def router_drift(base: nn.Module, tuned: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
    """MoE block → the mean `divergence` of the routers of `tuned` from those of `base` on the same text (ours).

    The mean is over all tokens of all batches without padding. Each router sees the hidden states of its own model, so changes
    of earlier layers count too. Both models must have the same experts, and are in eval mode afterwards.
    """
    sigmoid = {name: block.sigmoid for name, block in blocks(base).items()}
    sums: dict[str, float] = {}
    tokens: dict[str, int] = {}
    for batch in batches:
        base_logits, tuned_logits = (_logits_on(model, batch) for model in (base, tuned))
        for name, logits in base_logits.items():
            divergences = divergence(logits, tuned_logits[name], sigmoid[name])
            sums[name] = sums.get(name, 0.0) + float(divergences.sum())
            tokens[name] = tokens.get(name, 0) + len(divergences)
    return {name: total / tokens[name] for name, total in sums.items()}


@torch.no_grad()
def _logits_on(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "tokens experts"]]:
    """`recorded_logits` of one forward pass."""
    with Recorder(model.eval(), keep_logits=True) as recorder:
        predictions(model, batch)
    return recorded_logits(recorder)


def _balance_loss_of(
    block: Block, logits: Float[Tensor, "tokens experts"], share: Float[Tensor, " experts"]
) -> Float[Tensor, ""]:
    logits = logits.float()
    if block.sigmoid:
        scores = logits.sigmoid()
        probabilities = scores / scores.sum(-1, keepdim=True)
    else:
        probabilities = logits.softmax(-1)
    shape = block.shape
    return shape.num_experts / shape.top_k * (share.to(logits) * probabilities.mean(0)).sum()


class _Scope:
    """A part of the model whose routers have the same mask; open while its forward pass runs."""

    def __init__(self, module: nn.Module, mask_names: tuple[str, ...]) -> None:
        self.module = module
        self.is_open = False
        self._mask_names = mask_names
        self._mask: Bool[Tensor, "batch tokens"] | None = None

    def open(self, module: nn.Module, args: tuple[object, ...], named: dict[str, Any]) -> None:
        self.is_open = True
        named = {**dict(zip(signature(module.forward).parameters, args, strict=False)), **named}
        name = next((name for name in self._mask_names if named.get(name) is not None), None)
        if name is None:
            self._mask = self._packed(named.get("position_ids"))
        elif named[name].ndim != 2:
            raise BadValue(f"{name} has {named[name].ndim} axes, so padding cannot be recognized; give [batch, tokens]")
        else:
            self._mask = named[name] != (-100 if name == "labels" else 0)

    @staticmethod
    def _packed(position_ids: object) -> Bool[Tensor, "windows tokens"] | None:
        """Which tokens of packed windows count; None if there are none (all tokens count)."""
        if isinstance(position_ids, Tensor) and position_ids.ndim == 2 and position_ids.shape[1] > 1:
            return real_tokens(position_ids)
        return None

    def close(self, module: nn.Module, args: object, output: object) -> None:
        self.is_open = False

    def counts(self, number: int) -> Bool[Tensor, " tokens"]:
        """Which of the `number` tokens that a router sees are no padding.

        With a cache the mask covers the tokens of earlier passes too; the last columns belong to this pass.
        """
        if self._mask is None:
            return torch.ones(number, dtype=torch.bool)
        columns = number // len(self._mask)
        return self._mask[:, -columns:].reshape(-1)


def _scopes(model: nn.Module) -> dict[str, _Scope]:
    """Prefix of module names → scope. An encoder is a separate scope, since generation runs it by itself."""
    config: Any = model.config
    if not config.is_encoder_decoder:
        return {"": _Scope(model, ("attention_mask",))}
    encoder = model.get_encoder()  # type: ignore[operator]  # transformers' method, unknown to nn.Module
    name = next(name for name, module in model.named_modules() if module is encoder)
    return {"": _Scope(model, ("decoder_attention_mask", "labels")), f"{name}.": _Scope(encoder, ("attention_mask",))}


def _picked(block: Block, output: tuple[Tensor, ...]) -> Int[Tensor, "tokens experts"]:
    """1 where a token picked an expert. The order of a router's outputs varies: the ids are the output of type int64."""
    number = block.shape.num_experts
    ids = next(part for part in output if part.dtype == torch.int64)
    if block.is_switch:
        return ids.reshape(-1, number)
    picked = torch.zeros(len(ids), number, dtype=torch.int64, device=ids.device)
    return picked.scatter_add_(1, ids, torch.ones_like(ids))


def _logits(block: Block, output: tuple[Tensor, ...]) -> Float[Tensor, "tokens experts"]:
    """The first float output with a column for each expert; the weights of the picked experts, which may have as many, follow it.

    In Switch the logits are the last output, after one probability per token.
    """
    number = block.shape.num_experts
    floats = [part for part in output if part.is_floating_point() and part.shape[-1] == number]
    return floats[-1].reshape(-1, number) if block.is_switch else floats[0]
