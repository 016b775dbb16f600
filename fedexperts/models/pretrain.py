"""Pretrains a small MoE base: `tiny` on generated examples, `small` on a stream of text and instructions.

To the cross-entropy a load-balance loss is added, so that every expert is used (Fedus et al., "Switch Transformers",
https://arxiv.org/abs/2101.03961, equation 4).
"""

import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerBase

from fedexperts.core.training import cross_entropy
from fedexperts.data.encode import Encoder
from fedexperts.data.synthetic import draw_example, sentences
from fedexperts.errors import BadRun, listed
from fedexperts.io.files import locked, write_tensors, write_text
from fedexperts.io.toml import different, with_new_names
from fedexperts.models.load import load, without_progress_bars
from fedexperts.models.measure import card, held_out_examples, measure
from fedexperts.models.settings import RENAMED, PretrainSettings, Shape, read_settings
from fedexperts.models.stream import Windows, read_parts, tokens_of
from fedexperts.models.tokenizer import learn_tokenizer, make_tokenizer
from fedexperts.moe.kernel import choose_kernel
from fedexperts.moe.routing import Recorder, balance_loss
from fedexperts.types import Example

RECIPE = "recipe.json"
SETTINGS, STATE, TOKENS, HASHES = "settings.json", "state.safetensors", "tokens.safetensors", "hashes.json"
NOT_IN_RECIPE = {"out", "save_every"}
"""Settings that do not influence the model."""

Batches = Callable[[int, int], Mapping[str, Tensor]]
"""(step, rank) → the part of the step's batch that the worker trains on."""


class Scheduled(Protocol):
    """Settings with the course of the learning rate, in parts of all steps."""

    @property
    def warmup(self) -> float: ...
    @property
    def decay(self) -> float: ...
    @property
    def final_lr(self) -> float: ...


class Point(NamedTuple):
    """A point of the loss curve, of the first worker."""

    step: int
    loss: float  # mean since the last point
    balance: float  # the load-balance loss: 1 if all experts are used equally
    seconds: float  # since the start


def run_file(path: Path, changes: Sequence[str], out: Path | None, console: Console) -> Path:
    """The command `fedexperts pretrain`: pretrains the base of a TOML file, unless it is finished, and gives its folder.

    Raises:
        BadValue: the file or a change is not allowed.
        BadRun, BadData: as `pretrain`.
    """
    settings = read_settings(path, [*changes, *([f"out={json.dumps(str(out))}"] if out else [])])
    already_finished = finished(settings)
    folder = pretrain(settings)
    measured = json.loads((folder / RECIPE).read_text())["measured"]
    for group, values in measured.items():
        console.print(
            f"{group}: " + ", ".join(f"{name} {value}" for name, value in values.items()), markup=False, highlight=False
        )
    note = "already finished with the same settings; to make it anew, remove it or give another folder with --out"
    console.print(f"{note if already_finished else 'written'}: {folder}", markup=False, soft_wrap=True, highlight=False)
    return folder


def pretrain(settings: PretrainSettings) -> Path:
    """Pretrains the base and gives its folder, which `models.load` and transformers both read.

    Until it is finished, its state is in a folder beside it, `.<name>.partial`; the same settings continue from there, with
    the same bits as without an interruption. The number of steps may change until the learning rate begins to fall. A base that
    is finished with the same settings stays as it is.

    Raises:
        BadRun: `settings.out` holds anything else, or its partial folder a run with other settings.
        Busy: another process is pretraining it.
        BadData, BadValue: a source is missing, empty, damaged, unknown or no plain text; then nothing was written.
    """
    held_out_examples(settings)  # raises for an unknown task now, not in a worker after the last step
    partial = partial_folder(settings)
    with locked(partial):
        try:
            if not finished(settings):
                prepare_or_continue(partial, settings)
                train_and_save(settings)
            if partial_settings(partial) == recipe_settings(settings):
                (partial / SETTINGS).unlink()
        finally:
            if not (partial / SETTINGS).exists():  # then the folder is incomplete
                shutil.rmtree(partial)
    return settings.out


def finished(settings: PretrainSettings) -> bool:
    """Whether `settings.out` already holds the base of these settings.

    Raises:
        BadRun: it holds another base, or something else.
    """
    out = settings.out
    if not out.exists() or not any(out.iterdir()):
        return False
    if not (out / RECIPE).exists():
        raise BadRun(f"{out} holds something other than a pretrained base; choose another folder for out")
    recorded = with_new_names(json.loads((out / RECIPE).read_text())["settings"], RENAMED)
    if changed := different(recorded, recipe_settings(settings)):
        raise BadRun(
            f"{out} holds a base made with another {listed(changed)}; remove that folder, or give another one with --out"
        )
    return True


def prepare_or_continue(partial: Path, settings: PretrainSettings) -> None:
    """Makes the partial folder ready for training to start or to continue."""
    recorded = partial_settings(partial)
    if recorded is None:
        prepare(partial, settings)
    else:
        check_continues(partial, recorded, settings)
    write_text(partial / SETTINGS, json.dumps(recipe_settings(settings)))  # last: if it exists, the rest is complete


def partial_settings(partial: Path) -> dict[str, Any] | None:
    """The settings with which the partial folder was last continued; None if it is incomplete."""
    path = partial / SETTINGS
    return with_new_names(json.loads(path.read_text()), RENAMED) if path.exists() else None


def train_and_save(settings: PretrainSettings) -> None:
    """Trains in all workers and saves the finished base."""
    with tempfile.TemporaryDirectory() as rendezvous:
        if settings.workers == 1:
            run_worker(0, settings, rendezvous)
        else:
            cast("Any", torch.multiprocessing).spawn(run_worker, (settings, rendezvous), nprocs=settings.workers)


def partial_folder(settings: PretrainSettings) -> Path:
    """The folder with the state of an unfinished base."""
    out = settings.out.absolute()
    return out.parent / f".{out.name}.partial"


def recipe_settings(settings: PretrainSettings) -> dict[str, Any]:
    """The settings on which the model depends, as JSON."""
    return settings.model_dump(mode="json", exclude=NOT_IN_RECIPE)


def check_continues(partial: Path, recorded: dict[str, Any], settings: PretrainSettings) -> None:
    """Raises BadRun if `settings` cannot continue the partial folder, which was begun with the settings `recorded`.

    They cannot if they differ, except for a number of steps that changes before the learning rate begins to fall.
    """
    if changed := different({**recorded, "steps": 0}, {**recipe_settings(settings), "steps": 0}):
        raise BadRun(f"{partial} was begun with another {listed(changed)}; set the old value again, or remove that folder")
    completed, fewest_steps = completed_steps(partial), min(recorded["steps"], settings.steps)
    if recorded["steps"] != settings.steps and completed > decay_start(fewest_steps, settings):
        raise BadRun(
            f"{partial} is at step {completed}, where the learning rate of {fewest_steps} steps has begun to fall; "
            f"set steps = {recorded['steps']} again, or remove that folder"
        )


def prepare(partial: Path, settings: PretrainSettings) -> None:
    """Writes the tokenizer and, for a stream, all tokens, which all workers read."""
    max_tokens, stream = settings.model.max_positions, settings.stream
    if stream is None:
        make_tokenizer(max_tokens).save_pretrained(partial)
        return
    parts, hashes = read_parts(stream, settings.seed)
    human_texts = [example for part in ("texts", "instructions") for example in parts.get(part, ())]
    tokenizer = learn_tokenizer(max_tokens, stream.merges, (example.prompt + example.response for example in human_texts))
    tokens = tokens_of(stream, tokenizer, parts)
    write_tensors(partial / TOKENS, tokens)
    write_text(partial / HASHES, json.dumps(hashes))
    tokenizer.save_pretrained(partial)


def run_worker(rank: int, settings: PretrainSettings, rendezvous: str) -> None:
    """Trains in one of the worker processes; the first worker also saves and measures."""
    torch.set_num_threads(settings.threads)
    if settings.workers > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}/gloo", rank=rank, world_size=settings.workers)

    partial = partial_folder(settings)
    tokenizer = AutoTokenizer.from_pretrained(partial)
    model = make_model(settings.model, tokenizer, settings.seed)
    curve = train(model, batches(settings, tokenizer, partial), settings, rank, partial)

    if settings.workers > 1:
        dist.destroy_process_group()
    if rank == 0:
        save(model, tokenizer, settings, curve, partial)


def batches(settings: PretrainSettings, tokenizer: PreTrainedTokenizerBase, partial: Path) -> Batches:
    """The batches of the mixture or of the stream."""
    if settings.stream is None:
        encoder = Encoder(tokenizer, settings.model.max_positions)
        return lambda step, rank: encoder.batch(mixture_batch(step, rank, settings))
    return Windows(load_file(partial / TOKENS), settings, settings.stream).batch


def make_model(shape: Shape, tokenizer: PreTrainedTokenizerBase, seed: int) -> OlmoeForCausalLM:
    """A random model, drawn from `seed`; torch's global generator does not change."""
    config = OlmoeConfig(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        hidden_size=shape.hidden,
        intermediate_size=shape.expert_width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
        max_position_embeddings=shape.max_positions,
        tie_word_embeddings=shape.tied,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = OlmoeForCausalLM(config)
    choose_kernel(model)
    return model


def train(model: OlmoeForCausalLM, batches: Batches, settings: PretrainSettings, rank: int, partial: Path) -> list[Point]:
    """Trains `model` in place, from the state in the partial folder if there is one; gives the loss curve."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=settings.weight_decay, fused=True
    )
    curve = load_state(model, optimizer, partial)
    completed, seconds_before = (curve[-1].step, curve[-1].seconds) if curve else (0, 0.0)
    save_every = min(settings.save_every, max(1, settings.steps // 20))
    started = time.monotonic()
    losses: list[float] = []
    model.train()
    with progress(rank) as bar:
        steps = bar.add_task("pretraining", total=settings.steps, completed=completed, loss=math.nan)
        for step in range(completed, settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * schedule(step, settings)
            batch = batches(step, rank)
            with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16"):
                with Recorder(model, keep_logits=True) as recorder:
                    loss = cross_entropy(model, batch)
                balance = balance_loss(recorder)
            optimizer.zero_grad()
            cast("Any", loss + settings.router_aux_loss_coef * balance).backward()
            if settings.workers > 1:
                average_gradients(model)
            nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
            optimizer.step()
            losses.append(loss.item())
            bar.update(steps, advance=1, loss=fmean(losses))
            if (step + 1) % save_every == 0 or step + 1 == settings.steps:
                curve.append(Point(step + 1, fmean(losses), balance.item(), seconds_before + time.monotonic() - started))
                losses = []
                if rank == 0:
                    save_state(model, optimizer, curve, partial)
                bar.console.log(f"step {step + 1}: loss {curve[-1].loss:.4f}, balance {curve[-1].balance:.3f}")
    return curve


def save_state(model: nn.Module, optimizer: torch.optim.AdamW, curve: Sequence[Point], partial: Path) -> None:
    """Writes the weights, the optimizer state and the loss curve, which has the number of completed steps, to one file."""
    tensors = {"curve": torch.tensor([list(point) for point in curve], dtype=torch.float64)}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        tensors |= {f"{key}/{name}": state[key] for key in ("exp_avg", "exp_avg_sq")} | {f"weight/{name}": parameter}
    write_tensors(partial / STATE, tensors)


@torch.no_grad()
def load_state(model: nn.Module, optimizer: torch.optim.AdamW, partial: Path) -> list[Point]:
    """Loads the saved state, if there is one, into model and optimizer; gives the loss curve so far."""
    if not (partial / STATE).exists():
        return []
    tensors = load_file(partial / STATE)
    curve = [Point(int(step), *others) for step, *others in tensors["curve"].tolist()]
    steps = torch.tensor(float(curve[-1].step))
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[f"weight/{name}"])
        moments = {key: tensors[f"{key}/{name}"].clone() for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": steps.clone(), **moments}
    return curve


def completed_steps(partial: Path) -> int:
    """The number of steps that the state in the partial folder has completed."""
    if not (partial / STATE).exists():
        return 0
    with safe_open(partial / STATE, framework="pt") as state:
        return int(state.get_tensor("curve")[-1, 0])


def decay_start(steps: int, settings: Scheduled) -> float:
    """The step at which the learning rate begins to fall."""
    return max(settings.warmup, 1 - settings.decay) * steps


def schedule(step: int, settings: PretrainSettings) -> float:
    """The learning rate of a step as a part of `settings.lr`."""
    return learning_rate(step, settings.steps, settings)


def learning_rate(step: int, steps: int, settings: Scheduled) -> float:
    """The learning rate of one of `steps`, in parts of the highest: it rises linearly, stays constant, falls along a cosine."""
    warmup_end, decay_from = settings.warmup * steps, decay_start(steps, settings)
    if step < warmup_end:
        return (step + 1) / (warmup_end + 1)
    if step <= decay_from:
        return 1.0
    progress = (step - decay_from) / (steps - decay_from)
    return settings.final_lr + (1 - settings.final_lr) * (1 + math.cos(math.pi * progress)) / 2


def mixture_batch(step: int, rank: int, settings: PretrainSettings) -> list[Example]:
    """One worker's part of one batch of generated examples, with training prompts only."""
    mixture, size = settings.mixture, settings.batch_size // settings.workers
    if Random(f"{settings.seed}/pretrain/{step}").random() < mixture.text_share:  # the same decision in all workers
        return sentences(size, f"{settings.seed}/{step}/{rank}")
    rng = Random(f"{settings.seed}/pretrain/{step}/{rank}")
    exposed_share = mixture.exposed_share if step >= mixture.exposed_from * settings.steps else 0.0

    def next_example() -> Example:
        tasks = mixture.exposed if rng.random() < exposed_share else mixture.tasks
        return draw_example(rng.choice(tasks), rng, "train")

    return [next_example() for _ in range(size)]


def average_gradients(model: nn.Module) -> None:
    """Replaces the gradients of each worker by the mean over all workers."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, torch.split(flat, [gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def save(
    model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerBase, settings: PretrainSettings, curve: list[Point], partial: Path
) -> None:
    """Measures the base and writes its folder, which appears in one step."""
    out = settings.out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        new = Path(scratch) / "new"
        with without_progress_bars():
            cast("Any", model).to(torch.bfloat16).save_pretrained(new)
        tokenizer.save_pretrained(new)
        recipe = {
            "loss": round(curve[-1].loss, 4),
            "seconds": round(curve[-1].seconds),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "data": json.loads((partial / HASHES).read_text()) if settings.stream else {},
            "measured": measure(load(str(new)), settings, partial / TOKENS),
            "settings": recipe_settings(settings),
        }
        (new / RECIPE).write_text(json.dumps(recipe, indent=2) + "\n")
        (new / "README.md").write_text(card(recipe, settings))
        lines = [",".join(Point._fields), *(",".join(f"{value:.6g}" for value in point) for point in curve)]
        (new / "loss.csv").write_text("\n".join(lines) + "\n")
        for file in new.iterdir():
            file.chmod(0o644)  # safetensors lets only the owner read
        new.rename(out)  # fails if a folder that is not empty appeared there meanwhile


def progress(rank: int) -> Progress:
    """A progress bar for the first worker, and a silent one for the others."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}"), console=Console(stderr=True, quiet=rank > 0))
