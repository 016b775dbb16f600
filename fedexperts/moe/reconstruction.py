"""Selects the experts that alone best reproduce the output of their MoE block on some text.

The selection of FLEx (Liu et al., https://arxiv.org/abs/2506.00965), as reconstructed from its code and the pruning method on
which it builds. Our own choices are marked.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedexperts.moe.anatomy import Block, Experts, blocks
from fedexperts.moe.flops import FlopsEstimate
from fedexperts.moe.graft import router_rows, run_experts
from fedexperts.moe.logits import IGNORED, is_encoder_decoder, predictions
from fedexperts.moe.routing import Recorder, log_gates

Batch = Mapping[str, Tensor]
CHUNK_BYTES = 2**25
"""About this many bytes of inner activations of experts are alive at a time."""


def by_reconstruction(model: nn.Module, batches: Sequence[Batch], number: int = 1, stride: int = 1) -> Experts:
    """The `number` experts of each block with the lowest reconstruction loss, selected greedily one after the other.

    Each takes a pass over the text. Of equal losses the lower id is selected. `stride`: see `reconstruction_losses`.
    """
    selected: Experts = {}
    for _ in range(number):
        losses = reconstruction_losses(model, batches, selected, stride)
        selected = {name: tuple(sorted((*selected.get(name, ()), int(loss.argmin())))) for name, loss in losses.items()}
    return selected


@torch.no_grad()
def reconstruction_losses(
    model: nn.Module, batches: Iterable[Batch], selected: Experts, stride: int = 1
) -> dict[str, Float[Tensor, " experts"]]:
    """MoE block → for each expert j the loss Σ_x ‖Z(x) − Ẑ_j(x)‖₂ over the tokens x of `batches` without padding; float64.

    Z is the output of the block's routed experts, without a shared expert. Ẑ_j is the output of the experts `selected` and j if
    the router had no others: Σ_e G_e(x) E_e(x) over them, with G the router's softmax over them; E_j(x) if none is selected. An
    expert that is already selected has an infinite loss.

    Each batch takes one forward pass, and one block at a time is evaluated, so the memory does not grow with the text. Every
    expert is run on every token, which is most of the cost; with a `stride` s only on every s-th token of a batch.
    """
    was_training = model.training
    model.eval()
    losses: dict[str, Tensor] = {}
    for batch in batches:
        with Recorder(model, keep_logits=True) as recorder, ExitStack() as hooks:
            for name, block in recorder.blocks.items():
                hook = adding_losses(losses, recorder, block, selected.get(name, ()), stride)
                hooks.callback(block.experts.register_forward_hook(hook).remove)
            predictions(model, batch)
    model.train(was_training)
    return {name: losses[name] for name in recorder.blocks}


def adding_losses(
    losses: dict[str, Tensor], recorder: Recorder, block: Block, selected: tuple[int, ...], stride: int
) -> Callable[..., None]:
    """A forward hook on the experts of `block` that adds the losses on the tokens of the pass to `losses`."""

    def hook(experts: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        logits, counts = recorder.last(block.name)
        tokens = counts.nonzero().squeeze(1)[::stride]
        rows, targets = (states.reshape(-1, states.shape[-1])[tokens] for states in (args[0], output))
        pass_losses = losses_of(block, rows, targets, log_gates(logits[tokens], block.sigmoid), selected)
        losses[block.name] = losses[block.name] + pass_losses if block.name in losses else pass_losses

    return hook


def losses_of(
    block: Block,
    rows: Float[Tensor, "tokens hidden"],
    targets: Float[Tensor, "tokens hidden"],
    log_gate: Float[Tensor, "tokens experts"],
    selected: tuple[int, ...],
) -> Float[Tensor, " experts"]:
    """The losses of the experts of one block on tokens whose inputs are `rows` and whose outputs should be `targets`."""
    candidates = [expert for expert in range(block.shape.num_experts) if expert not in selected]
    losses = torch.full((block.shape.num_experts,), torch.inf, dtype=torch.float64)
    old = run_experts(block.experts, rows, selected) if selected else rows.new_zeros(0, *rows.shape)
    for chunk in chunks(candidates, block, rows):
        for expert, new in zip(chunk, run_experts(block.experts, rows, chunk), strict=True):
            gates = log_gate[:, [*selected, expert]].softmax(-1)  # G among them
            approximated = (
                torch.einsum("te,eth->th", gates, torch.cat([old, new.unsqueeze(0)]).float()) if selected else new.float()
            )
            losses[expert] = float((targets.float() - approximated).norm(dim=-1).cpu().double().sum())
    return losses


def chunks(ids: list[int], block: Block, rows: Tensor) -> Iterable[list[int]]:
    """`ids` in groups whose inner activations together take about CHUNK_BYTES, each of at least one."""
    widest = max(max(weight.shape) for weight in block.experts.parameters() if weight.ndim > 1)
    number = max(1, CHUNK_BYTES // max(1, len(rows) * widest * rows.element_size()))
    return (ids[start : start + number] for start in range(0, len(ids), number))


@torch.no_grad()
def most_used(model: nn.Module, batches: Iterable[Batch], number: int = 1) -> Experts:
    """The `number` experts of each block that routing picks most often, ascending; of equal counts the lower id is selected."""
    was_training = model.training
    model.eval()
    with Recorder(model) as recorder:
        for batch in batches:
            predictions(model, batch)
    model.train(was_training)
    counts = recorder.routing().counts
    return {name: tuple(sorted(count.argsort(descending=True, stable=True)[:number].tolist())) for name, count in counts.items()}


def selection_flops_estimated(model: nn.Module, batches: Sequence[Batch], passes: int, stride: int = 1) -> float:
    """FLOPs of `passes` passes of `by_reconstruction` over `batches`; with 0 passes, of `most_used`.

    Each is a forward pass, and 2 for each weight of each expert and each token on which the expert is run: every `stride`-th
    without padding, with an encoder-decoder of the prompt in the encoder, of the response in the decoder. From the second pass,
    adding an expert to those selected before takes 2 for each of them, token and hidden size.
    """
    estimate = FlopsEstimate(model)
    forward = sum(estimate.forward(estimate.size(batch)) for batch in batches)
    read, written = (
        sum(-(-int(counted.sum()) // stride) for counted in each)
        for each in ([batch["attention_mask"] for batch in batches], [batch["labels"] != IGNORED for batch in batches])
    )
    experts = 0.0
    for name, block in blocks(model).items():
        tokens = written if is_encoder_decoder(model) and not name.startswith("encoder.") else read
        weights = sum(each.numel() for path, each in block.experts.named_parameters() if each.ndim > 1 and "bias" not in path)
        width = router_rows(block).shape[1]
        sums = sum((block.shape.num_experts - before) * (before + 1) * width for before in range(1, passes))
        experts += 2.0 * tokens * (passes * weights + sums)
    return max(passes, 1) * forward + experts
