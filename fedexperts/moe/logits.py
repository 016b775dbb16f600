"""The predictions of a model, decoder-only or encoder-decoder, for the responses of a batch."""

from collections.abc import Mapping
from inspect import signature
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from fedexperts.moe.device import device_of, to_device
from fedexperts.moe.packing import without_mask

IGNORED = -100
"""A label that does not count in a loss."""


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model reads prompts in an encoder and writes responses in a decoder."""
    return bool(cast("Any", model).config.is_encoder_decoder)


def keeps_logits(model: nn.Module) -> bool:
    """Whether the model can compute logits at some positions alone (`logits_to_keep`)."""
    return "logits_to_keep" in signature(model.forward).parameters


def predictions(
    model: nn.Module, batch: Mapping[str, Tensor]
) -> tuple[Float[Tensor, "examples positions vocabulary"], Int[Tensor, "examples positions"]]:
    """Logits, and the token that each should predict (-100: no prediction counts); `batch` is moved to the model's device.

    Decoder-only models predict the next token, so there the last logits and the first label are left out. Logits at
    positions where no example has a target are not computed, since prompts are long and vocabularies large.
    """
    batch = to_device(batch, device_of(model))
    if is_encoder_decoder(model):
        return model(**batch, use_cache=False).logits, batch["labels"]
    inputs = {name: tensor for name, tensor in without_mask(batch).items() if name != "labels"}
    targets = batch["labels"][:, 1:]
    if not keeps_logits(model):
        return model(**inputs, use_cache=False).logits[:, :-1], targets
    all_positions = torch.arange(targets.shape[1], device=targets.device)  # if the labels have no values
    positions = all_positions if is_fake(targets) else (targets != IGNORED).any(dim=0).nonzero().flatten()
    return model(**inputs, use_cache=False, logits_to_keep=positions).logits, targets[:, positions]
