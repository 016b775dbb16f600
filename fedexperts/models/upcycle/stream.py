"""Converts a dense model layer by layer; at no time is more than one of its layers in memory.

The hidden states of a few windows of text are carried through both models at once, the dense one and the new one, each layer of
which is run as soon as it is converted. What comes out at the end are the logits of both, without either model in memory.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.activations import ACT2FN

from fedexperts.models.upcycle.checkpoint import EMBEDDINGS, HEAD, NORM, Dense, Writer, copy_settings, skeleton
from fedexperts.models.upcycle.families import Target, family_of, target_for
from fedexperts.models.upcycle.measure import Comparison, compare, load_of
from fedexperts.models.upcycle.parts import FFN, States, Window
from fedexperts.models.upcycle.recipes import Facts, Recipe
from fedexperts.moe.kernel import choose_kernel

Hidden = list[Float[Tensor, "tokens hidden"]]
"""Hidden states, a tensor for each window."""

OnLayer = Callable[[int, int], None]
"""Is called with the number of converted layers, and of all layers."""


@dataclass(frozen=True, eq=False)
class Layers:
    """The decoder layers of a model that are made when they are needed, in float32."""

    model: nn.Module  # on the meta device
    rotary: nn.Module  # not on the meta device

    @classmethod
    def of(cls, model: nn.Module) -> "Layers":
        """`model`: on the meta device."""
        decoder = cast("Any", model).model
        return cls(decoder, type(decoder.rotary_emb)(config=cast("Any", model).config))

    def names(self, number: int) -> list[str]:
        """The names of the tensors of a layer."""
        return list(cast("Any", self.model).layers[number].state_dict())

    def make(self, number: int, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The layer `number` with `tensors`."""
        return filled(cast("Any", self.model).layers[number], tensors)

    def norm(self, weight: Tensor) -> nn.Module:
        """The norm behind the last layer."""
        return filled(cast("Any", self.model).norm, {"weight": weight})

    def run(self, layer: nn.Module, hidden: Hidden) -> Hidden:
        """`hidden` after `layer`, window by window, so that no token is padding."""
        return [self._run(layer, window) for window in hidden]

    def _run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        positions = torch.arange(len(hidden))[None]
        angles = self.rotary(hidden[None], positions)
        output: Tensor = layer(hidden[None], attention_mask=None, position_ids=positions, position_embeddings=angles)
        return output[0]


def filled(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `module`, which is on the meta device, with `tensors` in float32."""
    copy = deepcopy(module)
    copy.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return copy


@contextmanager
def inputs_of(ffn: nn.Module) -> Iterator[Hidden]:
    """The inputs that `ffn` gets within the block, a tensor for each call."""
    seen: Hidden = []
    handle = ffn.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def picks_of(router: nn.Module) -> Iterator[list[Int[Tensor, "tokens top_k"]]]:
    """The experts that `router` picks within the block, best first, a tensor for each call."""
    seen: list[Tensor] = []
    handle = router.register_forward_hook(lambda module, args, output: seen.append(output[2]))
    try:
        yield seen
    finally:
        handle.remove()


@dataclass(frozen=True, eq=False)
class Upcycled:
    """What is known of a model that was written."""

    target: Target
    model: nn.Module  # on the meta device
    comparison: Comparison
    layers: list[Facts]


@dataclass(frozen=True, eq=False)
class Conversion:
    """A model on its way from dense to Mixture of Experts."""

    dense: Dense
    experts: Sequence[Dense]  # whose FFNs become experts; none: the dense model's own
    recipe: Recipe
    windows: Sequence[Window]
    target: Target
    writer: Writer
    old: Layers
    new: Layers

    @property
    def held_out(self) -> list[Window]:
        """The windows that go through the new model too."""
        return [window for window in self.windows if window.held_out]

    @property
    def head(self) -> Tensor:
        """The matrix that gives the logits of both models."""
        return self.dense.read(EMBEDDINGS if self.dense.config.tie_word_embeddings else HEAD)

    def ends(self) -> tuple[Hidden, Hidden]:
        """Writes embeddings, last norm and head; returns the embedded windows for the dense and for the new model."""
        family, config = family_of(self.dense.name, self.dense.config), self.dense.config
        embeddings, scale = self.dense.read(EMBEDDINGS), config.hidden_size**0.5 if family.scaled_embeddings else 1.0
        norm = family.with_plain_norms({NORM: self.dense.read(NORM)})
        tied = self.target.config.tie_word_embeddings
        stored = {
            EMBEDDINGS: embeddings if scale == 1 else embeddings.float() * scale,
            **norm,
            **({} if tied else {HEAD: self.head}),
        }
        stored = self.writer.cast(stored)
        self.writer.write(0, stored)
        before = [embeddings[list(window.ids)].float() * scale for window in self.windows]
        return before, [stored[EMBEDDINGS][list(window.ids)].float() for window in self.held_out]

    def layer(self, number: int, before: Hidden, after: Hidden, rng: Random) -> tuple[Hidden, Hidden, Facts]:
        """Converts a layer and writes it; returns the hidden states behind it in both models, and what is known of it."""
        before, states = self._run_dense(number, before)
        layers = [self._read(model, number) for model in (self.dense, *self.experts)]
        moe, facts = self.recipe.convert([ffn_of(layer) for layer in layers[bool(self.experts) :]], states, rng)
        stored = self.writer.cast(self.target.layer(layers[0], moe))
        self.writer.write(1 + number, {f"model.layers.{number}.{name}": tensor for name, tensor in stored.items()})

        layer = self.new.make(number, self.target.loaded(stored))
        with picks_of(cast("Any", layer).mlp.gate) as picks:
            after = self.new.run(layer, after)
        return before, after, {**facts, **load_of(picks, self.held_out, self.recipe.num_experts)}

    def compare(self, before: Hidden, after: Hidden) -> Comparison:
        """The predictions of both models from the hidden states behind their last layers."""
        norm = {NORM: self.dense.read(NORM)}
        family = family_of(self.dense.name, self.dense.config)
        norms = self.old.norm(norm[NORM]), self.new.norm(self.writer.cast(family.with_plain_norms(norm))[NORM])
        held_out = [hidden for hidden, window in zip(before, self.windows, strict=True) if window.held_out]
        pairs = [(norms[0](old), norms[1](new)) for old, new in zip(held_out, after, strict=True)]
        return compare(pairs, self.held_out, self.head, self.writer.dtype)

    def _run_dense(self, number: int, hidden: Hidden) -> tuple[Hidden, States]:
        """The hidden states behind a layer of the dense model, and the inputs of its FFN."""
        tensors = {name: self.dense.read(f"model.layers.{number}.{name}") for name in self.old.names(number)}
        layer = self.old.make(number, tensors)
        with inputs_of(cast("Any", layer).mlp) as inputs:
            hidden = self.old.run(layer, hidden)
        return hidden, States(inputs, self.windows, ACT2FN[self.dense.config.hidden_act])

    def _read(self, model: Dense, number: int) -> dict[str, Tensor]:
        """The tensors of a layer of a dense model, as Llama calls them."""
        tensors = {name: model.read(f"model.layers.{number}.{name}") for name in self.old.names(number)}
        return family_of(model.name, model.config).as_llama(model.config, tensors)


def ffn_of(layer: Mapping[str, Tensor]) -> FFN:
    """The FFN of a layer with Llama's names."""
    gate, up, down = (layer[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return FFN(gate, up, down)


@torch.inference_mode()
def convert(
    dense: Dense,
    experts: Sequence[Dense],
    recipe: Recipe,
    windows: Sequence[Window],
    folder: Path,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    on_layer: OnLayer = lambda done, total: None,
) -> Upcycled:
    """Writes the MoE model that `recipe` makes of `dense` to `folder`, and compares the two on the held-out `windows`.

    experts: the models that give the FFNs; none: `dense` itself. dtype: of the weights; None: that of the dense model.

    Raises:
        BadValue: no MoE class fits the dense model, or a checkpoint lacks a weight.
    """
    target = target_for(dense.name, dense.config, recipe)
    model, total = skeleton(target.config), int(dense.config.num_hidden_layers)
    choose_kernel(model)
    writer = Writer(folder, 1 + total, dtype or dense.read(EMBEDDINGS).dtype)
    conversion = Conversion(dense, experts, recipe, windows, target, writer, Layers.of(skeleton(dense.config)), Layers.of(model))

    before, after = conversion.ends()
    layers = []
    for number in range(total):
        before, after, facts = conversion.layer(number, before, after, Random(f"{seed}/{number}"))
        layers.append(facts)
        on_layer(number + 1, total)
    target.config.dtype, target.config.architectures = writer.dtype, [type(model).__name__]
    copy_settings(dense, target.config, folder)
    writer.finish()
    return Upcycled(target, model, conversion.compare(before, after), layers)
