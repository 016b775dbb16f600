"""What a model predicts for the responses of a batch, decoder-only or encoder-decoder."""

from collections.abc import Mapping
from typing import Any, cast

from jaxtyping import Float, Int
from torch import Tensor, nn

IGNORED = -100
"""A target that takes no part in a loss."""


def is_encoder_decoder(model: nn.Module) -> bool:
    return bool(cast("Any", model).config.is_encoder_decoder)


def predictions(
    model: nn.Module, batch: Mapping[str, Tensor]
) -> tuple[Float[Tensor, "examples tokens vocabulary"], Int[Tensor, "examples tokens"]]:
    """Logits, and the token that each should give (-100 where none counts).

    Decoder-only models predict the next token, so there the last logits and the first label have no partner.
    """
    if is_encoder_decoder(model):
        return model(**batch, use_cache=False).logits, batch["labels"]
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    return model(**inputs, use_cache=False).logits[:, :-1], batch["labels"][:, 1:]
