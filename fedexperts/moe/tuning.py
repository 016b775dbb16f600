"""Which parameters of a model are trained: all of them, or low-rank adapters, each part on or off."""

from dataclasses import dataclass
from typing import Literal

Part = Literal["attention", "experts", "router", "dense"]
"""dense: embeddings, norms, shared experts, dense MLP layers and the output head."""


@dataclass(frozen=True)
class Tuning:
    """How a model is fine-tuned."""

    train: Literal["full", "lora"] = "full"
    parts: tuple[Part, ...] = ("attention", "experts", "router", "dense")
    rank: int = 8
    alpha: float = 16.0
