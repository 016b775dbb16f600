"""Continued training of a model, and of a dense control beside it: on the same batches, with the same schedule.

The weights are float32, as are gradients and the moments of AdamW; matrix products are in bfloat16 or float32. Distillation: the
loss is (1 - d) · cross-entropy + d · KL(control ‖ model) of each token, with the control as it is at that step (Hinton et al.,
"Distilling the knowledge in a neural network", https://arxiv.org/abs/1503.02531, at temperature 1).
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from fedexperts.errors import BadRun, BadValue
from fedexperts.io.files import write_tensors
from fedexperts.models.continued.settings import ContinueSettings
from fedexperts.models.pretrain import learning_rate
from fedexperts.moe.routing import Recorder, balance_loss

STATE = "state.safetensors"
BETAS = (0.9, 0.95)

Batches = Callable[[int], Int[Tensor, "windows tokens"]]
"""Step → its windows."""


class Point(NamedTuple):
    """A point of the curve. Losses are means since the last point, in nats per token; NaN: there is no control."""

    step: int
    tokens: int
    loss: float  # cross-entropy of the model
    control_loss: float
    divergence: float  # KL(control ‖ model), if it is a part of the loss
    balance: float  # the load-balance loss: 1 if all experts are used equally
    bits_per_byte: float  # of some held-out windows
    control_bits_per_byte: float
    seconds: float  # since the start, without measurements


@dataclass(frozen=True, eq=False)
class Trained:
    """The models that are trained together, each with its optimizer."""

    model: nn.Module
    control: nn.Module | None
    optimizers: Mapping[str, torch.optim.AdamW]

    @classmethod
    def of(cls, model: nn.Module, control: nn.Module | None, settings: ContinueSettings) -> "Trained":
        """Freezes the parameters that `settings` name.

        Raises:
            BadValue: a name is in no parameter's name, or nothing is left to train.
        """
        require_names(both(model, control), settings.frozen)
        return cls(model, control, {name: optimizer(each, settings) for name, each in both(model, control).items()})

    @property
    def models(self) -> dict[str, nn.Module]:
        """By name: the model, and the control if there is one."""
        return both(self.model, self.control)


def both(model: nn.Module, control: nn.Module | None) -> dict[str, nn.Module]:
    """The models that exist, by name."""
    return {"model": model, **({"control": control} if control is not None else {})}


def require_names(models: Mapping[str, nn.Module], frozen: Sequence[str]) -> None:
    """Raises BadValue if one of `frozen` is in no parameter's name, or if they leave nothing of a model to train."""
    names = {name: [key for key, _ in model.named_parameters(remove_duplicate=False)] for name, model in models.items()}
    for part in frozen:
        if not any(part in key for keys in names.values() for key in keys):
            raise BadValue(
                f"frozen names {part!r}, which is in no parameter's name; give a part of one, such as {names['model'][0]}"
            )
    for name, keys in names.items():
        if all(any(part in key for part in frozen) for key in keys):
            raise BadValue(f"frozen = {list(frozen)} leaves nothing of the {name} to train; leave some of them out")


def optimizer(model: nn.Module, settings: ContinueSettings) -> torch.optim.AdamW:
    """The optimizer of the parameters that are not frozen; the others need no gradient from now on."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in settings.frozen))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=settings.lr, betas=BETAS, weight_decay=settings.weight_decay, fused=True)


class Losses(NamedTuple):
    """Of a batch, each a mean over its parts."""

    loss: float
    control_loss: float
    divergence: float
    balance: float


def train(
    trained: Trained,
    batches: Batches,
    settings: ContinueSettings,
    steps: int,
    folder: Path,
    measure: Callable[[nn.Module], float],
    on_point: Callable[[Point], None] = lambda point: None,
) -> list[Point]:
    """Trains in place, from the state in `folder` if there is one, up to `steps`; returns the curve.

    measure: bits per byte of a model, taken at each point of the curve, when the state is saved too.

    Raises:
        BadRun: a loss, a gradient or what is measured is not finite.
    """
    curve = load_state(trained, folder)
    completed, seconds = (curve[-1].step, curve[-1].seconds) if curve else (0, 0.0)
    since: list[Losses] = []
    for step in range(completed, steps):
        started = time.monotonic()
        with seeded(settings.seed, step):
            losses, norms = train_step(trained, batches(step), settings, learning_rate(step, steps, settings))
        seconds += time.monotonic() - started
        since.append(losses)
        found = {"loss": losses.loss, **({"loss of the control": losses.control_loss} if trained.control else {})}
        require_finite({**found, **{f"gradient of the {name}": norm for name, norm in norms.items()}}, step + 1, folder)
        if (step + 1) % settings.save_every == 0 or step + 1 == steps:
            means = Losses(*(fmean(values) for values in zip(*since, strict=True)))
            bits = {name: measure(model) for name, model in trained.models.items()}
            require_finite({f"bits per byte of the {name}": value for name, value in bits.items()}, step + 1, folder)
            tokens = (step + 1) * settings.step_tokens
            curve.append(Point(step + 1, tokens, *means, bits["model"], bits.get("control", float("nan")), seconds))
            save_state(trained, curve, folder)
            on_point(curve[-1])
            since = []
    return curve


@contextmanager
def seeded(seed: int, step: int) -> Iterator[None]:
    """Within the block torch draws (dropout, jitter of routers) from a generator that seed and step alone decide."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(sha256(f"{seed}/{step}".encode()).digest()[:7], "big"))
        yield


def require_finite(values: Mapping[str, float], step: int, folder: Path) -> None:
    """Raises BadRun if one of `values` is not finite."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise BadRun(f"the {name} is not finite in step {step}; lower lr, remove {folder} and start again")


def train_step(
    trained: Trained, windows: Int[Tensor, "windows tokens"], settings: ContinueSettings, rate: float
) -> tuple[Losses, dict[str, float]]:
    """One step of each optimizer, at `rate` times the learning rate, on one batch; the losses, and the norm of each gradient."""
    for model in trained.models.values():
        model.train()
    losses, norms = gradients(trained, windows, settings), {}
    for name, each in trained.optimizers.items():
        for group in each.param_groups:
            group["lr"] = settings.lr * rate
        norms[name] = float(nn.utils.clip_grad_norm_(trained.models[name].parameters(), settings.max_grad_norm))
        each.step()
        each.zero_grad()
    return losses, norms


def gradients(trained: Trained, windows: Int[Tensor, "windows tokens"], settings: ContinueSettings) -> Losses:
    """Adds the gradients of a batch to those of the models, part by part."""
    parts = windows.chunk(settings.gradient_accumulation_steps)
    found = []
    for part in parts:
        target = None
        control_loss = float("nan")
        if trained.control is not None:
            with autocast(settings):
                target = logits_of(trained.control, part)
                loss = cross_entropy(target, part)
            cast("Any", loss / len(parts)).backward()
            target, control_loss = target.detach(), loss.item()
        found.append(Losses(*model_losses(trained.model, part, target, settings, len(parts))._replace(control_loss=control_loss)))
    return Losses(*(fmean(values) for values in zip(*found, strict=True)))


def model_losses(
    model: nn.Module,
    windows: Int[Tensor, "windows tokens"],
    target: Float[Tensor, "windows positions vocabulary"] | None,
    settings: ContinueSettings,
    parts: int,
) -> Losses:
    """The losses of the model on a part of a batch, after the backward pass of their sum. target: the control's logits."""
    with autocast(settings):
        logits, balance = logits_and_balance(model, windows)
    loss = cross_entropy(logits, windows)
    total, divergence = loss, torch.zeros(())
    if settings.distill and target is not None:
        divergence = kl(target, logits)
        total = (1 - settings.distill) * loss + settings.distill * divergence
    cast("Any", (total + settings.router_aux_loss_coef * balance) / parts).backward()
    return Losses(loss.item(), float("nan"), divergence.item(), balance.item())


def logits_and_balance(model: nn.Module, windows: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the load-balance loss; 0 for a dense model."""
    if not has_experts(model):
        return logits_of(model, windows), torch.zeros(())
    with Recorder(model, keep_logits=True) as recorder:
        logits = logits_of(model, windows)
    return logits, balance_loss(recorder)


def has_experts(model: nn.Module) -> bool:
    """Whether the model has MoE blocks."""
    return any("experts" in dict(module.named_children()) for module in model.modules())


def logits_of(model: nn.Module, windows: Int[Tensor, "windows tokens"]) -> Float[Tensor, "windows positions vocabulary"]:
    """The predictions of all tokens but the first of each window."""
    logits: Tensor = model(input_ids=windows, attention_mask=torch.ones_like(windows), use_cache=False).logits
    return logits[:, :-1]


def cross_entropy(logits: Float[Tensor, "windows positions vocabulary"], windows: Int[Tensor, "windows tokens"]) -> Tensor:
    """Mean over all tokens, in nats, in float32."""
    return functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def kl(target: Float[Tensor, "windows positions vocabulary"], logits: Float[Tensor, "windows positions vocabulary"]) -> Tensor:
    """KL(target ‖ logits), the mean over all tokens, in nats, in float32."""
    old, new = (each.float().flatten(0, 1).log_softmax(-1) for each in (target, logits))
    return functional.kl_div(new, old, reduction="batchmean", log_target=True)


def autocast(settings: ContinueSettings) -> torch.autocast:
    """Matrix products in the precision of `settings`."""
    return torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16")


def trained_parameters(trained: Trained) -> Iterator[tuple[str, nn.Parameter, torch.optim.AdamW]]:
    """Each trained parameter with its name, and its optimizer."""
    for name, model in trained.models.items():
        for path, parameter in model.named_parameters():
            if parameter.requires_grad:
                yield f"{name}/{path}", parameter, trained.optimizers[name]


def save_state(trained: Trained, curve: Sequence[Point], folder: Path) -> None:
    """Writes trained weights, moments and the curve, which has the number of completed steps, to one file."""
    tensors = {"curve": torch.tensor([list(point) for point in curve], dtype=torch.float64)}
    for name, parameter, each in trained_parameters(trained):
        state = each.state[parameter]
        tensors |= {f"{key}/{name}": state[key] for key in ("exp_avg", "exp_avg_sq")} | {f"weight/{name}": parameter}
    write_tensors(folder / STATE, tensors)


@torch.no_grad()
def load_state(trained: Trained, folder: Path) -> list[Point]:
    """Loads the saved state, if there is one; returns the curve so far."""
    if not (folder / STATE).exists():
        return []
    tensors = load_file(folder / STATE)
    curve = [Point(int(step), int(tokens), *others) for step, tokens, *others in tensors["curve"].tolist()]
    for name, parameter, each in trained_parameters(trained):
        parameter.copy_(tensors[f"weight/{name}"])
        moments = {key: tensors[f"{key}/{name}"].clone() for key in ("exp_avg", "exp_avg_sq")}
        each.state[parameter] = {"step": torch.tensor(float(curve[-1].step)), **moments}
    return curve


def completed_steps(folder: Path) -> int:
    """The number of steps that the state in `folder` has completed."""
    if not (folder / STATE).exists():
        return 0
    with safe_open(folder / STATE, framework="pt") as state:
        return int(state.get_tensor("curve")[-1, 0])


def steps_for(trained: Trained, windows: Int[Tensor, "windows tokens"], settings: ContinueSettings) -> int:
    """The number of steps of the budget: of tokens, or of minutes, for which the second of two passes over a batch is timed."""
    if settings.tokens is not None:
        return settings.tokens // settings.step_tokens
    assert settings.minutes is not None
    for _ in range(2):
        started = time.monotonic()
        gradients(trained, windows, settings)
        seconds = time.monotonic() - started
    for model in trained.models.values():
        model.zero_grad()
    return max(1, int(settings.minutes * 60 / seconds))
