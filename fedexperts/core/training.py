"""Local training of a client: build the model of a job, fit it to the client's examples, validate it."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from fedexperts.errors import BadData, Undeclared
from fedexperts.moe import rows
from fedexperts.moe.anatomy import Experts, blocks
from fedexperts.moe.backward import SelectiveBackward, Through
from fedexperts.moe.flops import FlopsEstimate
from fedexperts.moe.footprint import checkpoint_activations
from fedexperts.moe.logits import IGNORED, is_encoder_decoder, predictions
from fedexperts.moe.memory import MemoryMeter
from fedexperts.moe.precision import compute_dtype
from fedexperts.moe.routing import Recorder, Routing, balance_loss
from fedexperts.moe.shrink import shrink
from fedexperts.moe.tuning import Tuning, prepare
from fedexperts.types import ClientContext, Cost, Example, Job, Training


@dataclass(frozen=True)
class Fitted:
    """Result of the local steps."""

    loss: float  # mean over the steps, including regularizers
    cost: Cost
    routed: Mapping[str, Sequence[int]] = field(default_factory=dict)  # MoE block → tokens routed to each of its experts
    skipped_steps: int | None = None  # left out since their gradients overflowed; None: the model does not compute in float16

    @property
    def metrics(self) -> dict[str, Any]:
        """Metrics that the client reports: the loss, the tokens per expert if routers were recorded, in float16 skipped steps."""
        optional = {"routed": dict(self.routed) or None, "skipped_steps": self.skipped_steps}
        return {"loss": self.loss, **{name: each for name, each in optional.items() if each is not None}}


@dataclass(frozen=True)
class Validation:
    """Loss and routing of a model on held-out examples."""

    loss: float  # mean cross-entropy per response token, without label smoothing
    routing: Routing
    flops_estimated: float


def sub_model(
    job: Job, context: ClientContext, *, tuning: Tuning | None = None, seed: str | None = None, adapted: Experts | None = None
) -> nn.Module:
    """The base model cut to the experts of `job`, with its trainable parameters or fresh adapters.

    tuning: which weights are trained; None: as set in the run. seed: of the adapters' initialization; None: the job's.
    adapted: the experts that get adapters, by their index in the sub-model; None: all.
    """
    tuning = tuning or context.training.tuning
    small = shrink(context.model, job.experts, share_stacks=tuning.train == "lora" or "experts" not in tuning.trained)
    return prepare(small, tuning, seed=seed or job.seed, only=adapted)


def load_weights(model: nn.Module, job: Job, context: ClientContext) -> nn.Module:
    """Loads the weights of `job`, then those of the client state, into `model`, in place, and returns it.

    Raises:
        Undeclared: a name in the client state has no "/" and is not a trained weight of `model`.
    """
    own = {name: tensor for name, tensor in context.client_state.items() if "/" not in name}
    if own and (unknown := sorted(own.keys() - rows.layout(model).keys())):
        raise Undeclared(
            f"client {context.client.name} keeps {unknown[0]}, which is no trained weight of its model; keep what is no weight "
            'under a name with a "/" that the method declares in client_state'
        )
    rows.write(model, {**job.patch.tensors, **own})
    return model


def examples(context: ClientContext) -> int:
    """Number of training examples of the client, its weight in a mean."""
    return len(context.data.train)


def fit(
    model: nn.Module,
    context: ClientContext,
    *,
    seed: str,
    steps: int | None = None,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    after_backward: Callable[[nn.Module], None] | None = None,
    beside: Iterable[Tensor] = (),
    watch: Callable[[Recorder], Tensor | None] | None = None,
    select_experts: Callable[[Recorder], Experts] | None = None,
    through: Through = "chosen",
) -> Fitted:
    """`steps` (default: the run's local_steps) optimizer steps on the client's training examples, with a new optimizer.

    The loss is the cross-entropy per response token with label smoothing, plus the load-balance loss (FedMoE, section 3.1), plus
    `penalty(model)`. `after_backward` is called with the gradients before they are clipped. `beside`: tensors that the method
    keeps during all steps; they count in the peak memory.

    `watch` is called with the recorded routing of each batch; its result is added to the loss. `select_experts` then returns the
    experts that backward reaches (HFedMoE, equation 15): only they get gradients and are updated, and the optimizer drops its
    state of the others. `through`: the experts through which gradients flow to the layers below (moe/backward.py).

    Routers are recorded if there is a load-balance loss, `watch` or `select_experts`; `routed` then counts the tokens per expert.

    With `gradient_accumulation_steps` = n a step sums the gradients of n batches: its cross-entropy is the mean over the response
    tokens of all of them, as of one large batch; the other terms are means over the batches. Experts are selected per batch.
    """
    # long: a training step in its order; its tensors live in one frame, so that the memory meter sees when they are freed
    training, together = context.training, context.training.gradient_accumulation_steps
    losses, tokens, flops, peak, skipped = [], 0, 0.0, 0, 0
    routed: dict[str, Tensor] = {}
    steps = training.local_steps if steps is None else steps
    looked_at = bool(training.router_aux_loss_coef or watch or select_experts)
    found = blocks(model) if looked_at else None
    model.train()
    if training.gradient_checkpointing:
        checkpoint_activations(model)
    estimate = FlopsEstimate(model)

    encode = context.encoder.packed if training.packing else context.encoder.batch
    drawn = [encode(chosen) for chosen in batches(context.data.train, training.batch_size, steps * together, seed)]
    metered = heaviest(drawn, together)
    with SelectiveBackward(model, through) if select_experts else nullcontext() as selective:
        trained = selective.parameters if selective else [each for each in model.parameters() if each.requires_grad]
        optimizer, scaler = optimizer_for(trained, training), scaler_for(model)
        for step in range(steps):
            step_batches = drawn[step * together : (step + 1) * together]
            step_losses, idle = [], set(trained)
            meter = MemoryMeter(model, optimizer, beside) if step == metered else None
            with meter or nullcontext():
                for batch, share in zip(step_batches, target_shares(step_batches), strict=True):
                    with Recorder(model, keep_logits=True, found=found) if looked_at else nullcontext() as recorder:
                        loss = cross_entropy(model, batch, training.label_smoothing) * share
                    if recorder is not None and training.router_aux_loss_coef:
                        loss = loss + training.router_aux_loss_coef * balance_loss(recorder) / together
                    if penalty is not None:
                        loss = loss + penalty(model) / together
                    if recorder is not None and watch is not None and (added := watch(recorder)) is not None:
                        loss = loss + added / together
                    chosen = None
                    if recorder is not None and selective is not None and select_experts is not None:
                        chosen = select_experts(recorder)
                        selective.choose(chosen)
                        idle &= set(selective.left_out())
                        if batch is step_batches[-1]:
                            forget(optimizer, idle)
                    scaler.scale(loss).backward()
                    step_losses.append(loss.detach())
                    flops += estimate.step(estimate.size(batch), recorder.picks if recorder else None, chosen, through)
                    if recorder is not None:
                        counted = recorder.routing().counts.items()
                        routed = {block: routed.get(block, 0) + counts for block, counts in counted}
                scaler.unscale_(optimizer)
                if after_backward is not None:
                    after_backward(model)
                if training.max_grad_norm:
                    nn.utils.clip_grad_norm_(trained, training.max_grad_norm)
                for group in optimizer.param_groups:
                    group["lr"] = training.lr * training.lr_factor(step)
                scale = scaler.get_scale()
                scaler.step(optimizer)
                scaler.update()
                skipped += scaler.get_scale() < scale
                optimizer.zero_grad(set_to_none=True)
            losses.append(float(sum(step_losses)))
            tokens += sum(seen(model, batch) for batch in step_batches)
            peak = max(peak, meter.peak_bytes) if meter else peak

    model.eval()
    cost = Cost(tokens=tokens, peak_bytes=peak, flops_estimated=flops)
    by_block = {block: counts.tolist() for block, counts in routed.items()}
    return Fitted(sum(losses) / len(losses), cost, by_block, skipped if scaler.is_enabled() else None)


def scaler_for(model: nn.Module) -> torch.amp.GradScaler:
    """Scales losses if `model` computes in float16, whose small gradients would become 0; else it does nothing.

    A step whose gradients overflow is left out, and the scale is halved.
    """
    device = next(model.parameters()).device.type
    return torch.amp.GradScaler(device, enabled=compute_dtype(model) == torch.float16)


def target_shares(step_batches: Sequence[Mapping[str, Tensor]]) -> list[float]:
    """The share of each batch in the response tokens of all of them."""
    counts = [int((batch["labels"] != IGNORED).sum()) for batch in step_batches]
    return [count / max(sum(counts), 1) for count in counts] if len(counts) > 1 else [1.0]


def forget(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Drops the optimizer's state of `parameters`; parameters that are trained again later start with a new state."""
    for parameter in parameters:
        optimizer.state.pop(parameter, None)


def heaviest(drawn: Sequence[Mapping[str, Tensor]], together: int = 1) -> int:
    """The step with the largest batch, including padding, except the first, in which the optimizer's state is created.

    together: number of batches in a step.
    """
    later = range(min(together, len(drawn) - together), len(drawn))
    return max(later, key=lambda index: drawn[index]["input_ids"].numel() + drawn[index]["labels"].numel()) // together


def validate(model: nn.Module, context: ClientContext, chosen: Sequence[Example] | None = None) -> Validation:
    """Loss and routing on `chosen` (default: `validation_examples` of the validation split, see stratified_first_n)."""
    chosen = stratified_first_n(context.data.validation, context.training.validation_examples) if chosen is None else chosen
    size, estimate = context.training.batch_size, FlopsEstimate(model)
    total, count, flops = 0.0, 0, 0.0
    model.eval()
    with torch.no_grad(), Recorder(model) as recorder:
        for start in range(0, len(chosen), size):
            batch = context.encoder.batch(chosen[start : start + size])
            answered = int((batch["labels"] != IGNORED).sum())
            total += float(cross_entropy(model, batch)) * answered
            count += answered
            flops += estimate.forward(estimate.size(batch))
    return Validation(total / max(count, 1), recorder.routing(), flops)


def stratified_first_n(candidates: Sequence[Example], number: int) -> list[Example]:
    """At most `number` of `candidates`, in their order: the first examples of each task, in proportion to its share."""
    totals, seen = Counter(example.task for example in candidates), Counter[str]()
    places = []
    for example in candidates:
        places.append((seen[example.task] + 0.5) / totals[example.task])
        seen[example.task] += 1
    chosen = sorted(range(len(candidates)), key=lambda index: (places[index], index))[:number]
    return [candidates[index] for index in sorted(chosen)]


def batches(chosen: Sequence[Example], size: int, steps: int, seed: str) -> Iterator[list[Example]]:
    """`steps` batches of the examples, shuffled by `seed` and shuffled again after each epoch.

    Raises:
        BadData: there are no examples.
    """
    if not chosen:
        raise BadData("a client has no training examples; give it some, or leave it out")
    rng = Random(seed)
    waiting: list[Example] = []
    for _ in range(steps):
        while len(waiting) < size:
            waiting += rng.sample(list(chosen), len(chosen))
        yield waiting[:size]
        waiting = waiting[size:]


def cross_entropy(model: nn.Module, batch: Mapping[str, Tensor], label_smoothing: float = 0.0) -> Float[Tensor, ""]:
    """Mean cross-entropy over the tokens of the responses."""
    logits, targets = predictions(model, batch)
    return functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(), targets.reshape(-1), ignore_index=IGNORED, label_smoothing=label_smoothing
    )


def seen(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """Number of tokens in a batch, without padding (for an encoder-decoder: of prompts and responses)."""
    written = int((batch["labels"] != IGNORED).sum()) if is_encoder_decoder(model) else 0
    return int(batch["attention_mask"].sum()) + written


def optimizer_for(parameters: list[nn.Parameter], training: Training) -> torch.optim.Optimizer:
    """AdamW (fused, which makes no temporary copies of the parameters) or SGD."""
    if training.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=training.lr, weight_decay=training.weight_decay)
    return torch.optim.AdamW(parameters, lr=training.lr, weight_decay=training.weight_decay, fused=True)
