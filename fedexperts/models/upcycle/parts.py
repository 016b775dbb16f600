"""The parts of a layer on the way from dense to Mixture of Experts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class FFN:
    """A gated feed-forward network: down(act(gate x) · up x). Axis 0 of gate and up, and axis 1 of down, are its neurons."""

    gate: Float[Tensor, "width hidden"]
    up: Float[Tensor, "width hidden"]
    down: Float[Tensor, "hidden width"]

    @property
    def width(self) -> int:
        """Number of neurons."""
        return self.gate.shape[0]

    def part(self, neurons: Tensor, scale: float = 1.0) -> "FFN":
        """The network of only `neurons` (ids), its output times `scale`."""
        return FFN(self.gate[neurons], self.up[neurons], self.down[:, neurons] * scale)

    def activations(self, inputs: Float[Tensor, "tokens hidden"], act: Activation) -> Float[Tensor, "tokens width"]:
        """What each neuron gives to the down projection, in float32."""
        return act(inputs.float() @ self.gate.float().T) * (inputs.float() @ self.up.float().T)

    def output(self, inputs: Float[Tensor, "tokens hidden"], act: Activation) -> Float[Tensor, "tokens hidden"]:
        """The output, in float32."""
        return self.activations(inputs, act) @ self.down.float().T


def no_ffn(width: int, like: FFN) -> FFN:
    """A network of `width` neurons whose output is zero, in the dtype of `like`."""
    hidden = like.gate.shape[1]
    gate, down = like.gate.new_zeros(width, hidden), like.gate.new_zeros(hidden, width)
    return FFN(gate, gate.clone(), down)


@dataclass(frozen=True, eq=False)
class MoE:
    """What takes the place of an FFN: the shared expert's gate is zero (sigmoid(0) = 1/2), so its down projection is doubled."""

    router: Float[Tensor, "experts hidden"]
    experts: Sequence[FFN]
    shared: FFN | None = None


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of a text."""

    ids: tuple[int, ...]
    bytes: int  # of the text of all tokens but the first
    held_out: bool  # measured on, and not calibrated on
    expert: int | None = None  # whose text it is


@dataclass(frozen=True, eq=False)
class States:
    """The inputs of one layer's FFN, token by token, in the dense model."""

    inputs: Sequence[Float[Tensor, "tokens hidden"]]  # one tensor a window
    windows: Sequence[Window]
    act: Activation

    def calibration(self) -> Float[Tensor, "tokens hidden"]:
        """Of the windows to calibrate on."""
        return self._of(held_out=False)

    def held_out(self) -> Float[Tensor, "tokens hidden"]:
        """Of the windows to measure on."""
        return self._of(held_out=True)

    def owners(self) -> tuple[Float[Tensor, "tokens hidden"], Tensor]:
        """Those that belong to an expert's text, without the held-out ones, and the ids of these experts."""
        owned = [(x, w.expert) for x, w in zip(self.inputs, self.windows, strict=True) if w.expert is not None and not w.held_out]
        ids = torch.cat([torch.full((len(x),), expert) for x, expert in owned])
        return torch.cat([x for x, _ in owned]), ids

    def _of(self, held_out: bool) -> Tensor:
        chosen = [x for x, window in zip(self.inputs, self.windows, strict=True) if window.held_out == held_out]
        return torch.cat(chosen)
