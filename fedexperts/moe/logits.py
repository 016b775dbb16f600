"""What a model predicts for the responses of a batch, decoder-only or encoder-decoder."""

from collections.abc import Mapping
from inspect import signature
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

IGNORED = -100
"""A target that takes no part in a loss."""


def is_encoder_decoder(model: nn.Module) -> bool:
    return bool(cast("Any", model).config.is_encoder_decoder)


def keeps_logits(model: nn.Module) -> bool:
    """Whether the model can be told at which places to make logits."""
    return "logits_to_keep" in signature(model.forward).parameters


def predictions(
    model: nn.Module, batch: Mapping[str, Tensor]
) -> tuple[Float[Tensor, "examples places vocabulary"], Int[Tensor, "examples places"]]:
    """Logits, and the token that each should give (-100 where none counts).

    Decoder-only models predict the next token, so there the last logits and the first label have no partner; and the logits
    of places where no example has a target are never made, since prompts are long and vocabularies wide.
    """
    if is_encoder_decoder(model):
        return model(**batch, use_cache=False).logits, batch["labels"]
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    targets = batch["labels"][:, 1:]
    if not keeps_logits(model):
        return model(**inputs, use_cache=False).logits[:, :-1], targets
    everywhere = torch.arange(targets.shape[1], device=targets.device)  # where labels have no values to look at
    wanted = everywhere if is_fake(targets) else (targets != IGNORED).any(dim=0).nonzero().flatten()
    return model(**inputs, use_cache=False, logits_to_keep=wanted).logits, targets[:, wanted]
