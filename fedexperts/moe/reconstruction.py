"""Which experts do the work of a whole MoE block on some text: by how well they alone give what the block gives.

Selection of FLEx (Liu et al., https://arxiv.org/abs/2506.00965), as reconstructed from its code and the pruning method it builds
on. Choices of ours are marked.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedexperts.moe.anatomy import Block, Experts, blocks
from fedexperts.moe.flops import flops_estimated
from fedexperts.moe.graft import run
from fedexperts.moe.logits import IGNORED, is_encoder_decoder, predictions
from fedexperts.moe.routing import Recorder, log_gates

Batch = Mapping[str, Tensor]
CHUNK_BYTES = 2**25
"""About as many bytes of experts' inner activations are alive at a time."""


def by_reconstruction(model: nn.Module, batches: Sequence[Batch], number: int = 1, stride: int = 1) -> Experts:
    """The `number` experts of each block with the least loss of reconstruction, chosen one after the other (greedily).

    Each takes a pass over the text. Of equal losses the lower id wins. `stride`: see `reconstruction_losses`.
    """
    held: Experts = {}
    for _ in range(number):
        losses = reconstruction_losses(model, batches, held, stride)
        held = {name: tuple(sorted((*held.get(name, ()), int(loss.argmin())))) for name, loss in losses.items()}
    return held


@torch.no_grad()
def reconstruction_losses(
    model: nn.Module, batches: Iterable[Batch], held: Experts, stride: int = 1
) -> dict[str, Float[Tensor, " experts"]]:
    """MoE block → for each expert j the loss Σ_x ‖Z(x) − Ẑ_j(x)‖₂ over the tokens x of `batches`, padding left out; float64.

    Z is what the block's routed experts give, without a shared one. Ẑ_j is what `held` and j would give if the router had no
    others: Σ_e G_e(x) E_e(x) over them, G the router's softmax over them alone; E_j(x) where nothing is held. An expert
    that is held already has an infinite loss. In one forward pass for each batch, a block at a time, so what it takes does
    not grow with the text. With a `stride` only every so many-th token of a batch is looked at: experts see all tokens else,
    not the few that they are routed, which is most of what a pass takes.
    """
    was_training = model.training
    model.eval()
    losses: dict[str, Tensor] = {}
    for batch in batches:
        with Recorder(model, keep_logits=True) as recorder, ExitStack() as hooks:
            for name, block in recorder.blocks.items():
                hook = adding(losses, recorder, block, held.get(name, ()), stride)
                hooks.callback(block.experts.register_forward_hook(hook).remove)
            predictions(model, batch)
    model.train(was_training)
    return {name: losses[name] for name in recorder.blocks}


def adding(
    losses: dict[str, Tensor], recorder: Recorder, block: Block, held: tuple[int, ...], stride: int
) -> Callable[..., None]:
    """A hook on the experts of `block` that adds to its losses what the tokens of a forward pass give."""

    def hook(experts: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        logits, counts = recorder.last(block.name)
        counted = counts.nonzero().squeeze(1)[::stride]
        rows, wanted = (each.reshape(-1, each.shape[-1])[counted] for each in (args[0], output))
        added = losses_of(block, rows, wanted, log_gates(logits[counted], block.sigmoid), held)
        losses[block.name] = losses[block.name] + added if block.name in losses else added

    return hook


def losses_of(
    block: Block,
    rows: Float[Tensor, "tokens hidden"],
    wanted: Float[Tensor, "tokens hidden"],
    log_gate: Float[Tensor, "tokens experts"],
    held: tuple[int, ...],
) -> Float[Tensor, " experts"]:
    """The losses of one block on some tokens."""
    free = [expert for expert in range(block.shape.num_experts) if expert not in held]
    losses = torch.full((block.shape.num_experts,), torch.inf, dtype=torch.float64)
    old = run(block.experts, rows, held) if held else rows.new_zeros(0, *rows.shape)
    for some in chunks(free, block, rows):
        for expert, new in zip(some, run(block.experts, rows, some), strict=True):
            share = log_gate[:, [*held, expert]].softmax(-1)  # G among them
            approximated = torch.einsum("te,eth->th", share, torch.cat([old, new.unsqueeze(0)]).float()) if held else new.float()
            losses[expert] = float((wanted.float() - approximated).norm(dim=-1).double().sum())
    return losses


def chunks(ids: list[int], block: Block, rows: Tensor) -> Iterable[list[int]]:
    """`ids` in groups whose activations together take about CHUNK_BYTES."""
    widest = max(max(weight.shape) for weight in block.experts.parameters() if weight.ndim > 1)
    number = max(1, CHUNK_BYTES // max(1, len(rows) * widest * rows.element_size()))
    return (ids[start : start + number] for start in range(0, len(ids), number))


@torch.no_grad()
def most_used(model: nn.Module, batches: Iterable[Batch], number: int = 1) -> Experts:
    """The `number` experts of each block that routing picks most often; of equals the lower id."""
    was_training = model.training
    model.eval()
    with Recorder(model) as recorder:
        for batch in batches:
            predictions(model, batch)
    model.train(was_training)
    counts = recorder.routing().counts
    return {name: tuple(sorted(count.argsort(descending=True, stable=True)[:number].tolist())) for name, count in counts.items()}


def selection_flops_estimated(model: nn.Module, batches: Iterable[Batch], passes: int, stride: int = 1) -> float:
    """Operations of `passes` passes of `by_reconstruction` over `batches`, padding left out; of `most_used` with 0 passes.

    Each is a forward pass, a third of a step that trains the whole model, and two operations for each weight of each expert
    and each token that is looked at; those of a decoder that has an encoder look at the answers.
    """
    flops_of = flops_estimated(model)
    forward = sum(flops_of(batch) for batch in batches) / 3
    read = sum(int(batch["attention_mask"].sum()) for batch in batches)
    written = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
    looked = 0
    for name, block in blocks(model).items():
        weights = sum(weight.numel() for weight in block.experts.parameters() if weight.ndim > 1)
        looked += weights * (written if is_encoder_decoder(model) and not name.startswith("encoder.") else read)
    return max(passes, 1) * forward + passes * 2.0 * looked / stride
