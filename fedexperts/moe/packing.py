"""Packed batches: several examples in a row, told apart by their positions (`Encoder.packed`).

transformers keeps the attention of sequences apart whose `position_ids` begin anew, if no attention mask is given.
"""

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from fedexperts.errors import BadValue

APART = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Kinds of layers that keep packed sequences apart; others, such as linear attention, carry a state from one to the next."""


def without_mask(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs that a model gets of `batch`: of a packed one no attention mask."""
    return {name: each for name, each in batch.items() if "position_ids" not in batch or name != "attention_mask"}


def real_tokens(position_ids: Int[Tensor, "windows tokens"]) -> Bool[Tensor, "windows tokens"]:
    """Which tokens of packed windows are no padding: those after the first of a sequence, and those that another follows."""
    follows = torch.zeros_like(position_ids)
    follows[:, :-1] = position_ids[:, 1:]
    return (position_ids > 0) | (follows == 1)


def require_packing(model: nn.Module) -> None:
    """Raises BadValue for a model that would mix packed examples; of one without weights only the kind is known."""
    config: Any = cast("Any", model).config
    mixing = sorted({*(getattr(config, "layer_types", None) or ())} - APART)
    reasons: dict[str, Callable[[], bool]] = {
        "is an encoder-decoder": lambda: bool(config.is_encoder_decoder),
        "takes no positions": lambda: "position_ids" not in signature(model.forward).parameters,
        f"has layers of {', '.join(mixing)}": lambda: bool(mixing),
        "does not use them for its attention": lambda: mixes(model),
    }
    if why := next((reason for reason, holds in reasons.items() if holds()), None):
        raise BadValue(
            f"training.packing tells examples in a row apart by their positions, but {type(model).__name__} {why}; leave it out"
        )


def mixes(model: nn.Module) -> bool:
    """Whether the logits of a sequence depend on the one before it in the same row; False for a model without weights."""
    embed = cast("Any", model).get_input_embeddings()
    if embed.weight.is_meta:
        return False
    embedded = embed(torch.arange(6, device=embed.weight.device)[None]).detach().requires_grad_()
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]], device=embedded.device)
    with torch.enable_grad():
        logits = model(inputs_embeds=embedded, position_ids=positions, use_cache=False).logits
        (gradient,) = torch.autograd.grad(logits[:, 3:].float().square().sum(), embedded)
    return bool(gradient[:, :3].any())
