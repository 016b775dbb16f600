"""Makes a small MoE base: `tiny` from generated examples, `small` from a stream of text and instructions.

Beside the cross-entropy there is a load-balance loss for each layer, so that every expert is used (Fedus et al., "Switch
Transformers", https://arxiv.org/abs/2101.03961, equation 4).
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
from typing import Any, NamedTuple, cast

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
from fedexperts.errors import BadRun
from fedexperts.io.files import locked, write_tensors, write_text
from fedexperts.io.toml import different
from fedexperts.models.load import load, without_bars
from fedexperts.models.measure import card, measure, questions
from fedexperts.models.settings import PretrainSettings, Shape, read_settings
from fedexperts.models.stream import Windows, read_parts, tokens_of
from fedexperts.models.tokenizer import learn_tokenizer, make_tokenizer
from fedexperts.moe.kernel import choose_kernel
from fedexperts.moe.routing import Recorder, balance_loss
from fedexperts.types import Example

RECIPE = "recipe.json"
SETTINGS, STATE, TOKENS, HASHES = "settings.json", "state.safetensors", "tokens.safetensors", "hashes.json"
NO_PART = {"out", "save_every"}
"""Settings that change nothing of the result."""

Feed = Callable[[int, int], Mapping[str, Tensor]]
"""(step, rank) → one worker's part of one batch."""


class Point(NamedTuple):
    """A point of the loss curve, as the first worker saw it."""

    step: int
    loss: float  # mean since the last point
    balance: float  # 1 when all experts are used alike
    seconds: float


def run_file(path: Path, changes: Sequence[str], out: Path | None, console: Console) -> Path:
    """What `fedexperts pretrain` does: makes the base that the TOML file describes, unless it is there, and gives its folder.

    Raises:
        BadValue: the file or a change is not allowed.
        BadRun, BadData: as `pretrain`.
    """
    settings = read_settings(path, [*changes, *([f"out={json.dumps(str(out))}"] if out else [])])
    there = finished(settings)
    folder = pretrain(settings)
    measured = json.loads((folder / RECIPE).read_text())["measured"]
    for group, values in measured.items():
        console.print(
            f"{group}: " + ", ".join(f"{name} {value}" for name, value in values.items()), markup=False, highlight=False
        )
    told = "finished before with these very settings; to make it anew, remove it or give another folder with --out"
    console.print(f"{told if there else 'written'}: {folder}", markup=False, soft_wrap=True, highlight=False)
    return folder


def pretrain(settings: PretrainSettings) -> Path:
    """Makes the base and gives its folder, which `base.load` and transformers both read.

    Until it is finished, what there is of it lies beside it in `.<name>.partial`; the same settings go on from there, to the
    same bits as in one go. The number of steps may change as long as the learning rate has not begun to fall. A base that is
    finished with these very settings stays as it is.

    Raises:
        BadRun: `settings.out` holds anything else, or its partial folder a run with other settings.
        Busy: another process is making it.
        BadData, BadValue: a source is missing, empty, damaged, unknown or no plain text; then nothing was written.
    """
    questions(settings)  # what cannot be asked is told here, not by a worker after the last step
    partial = partial_folder(settings)
    with locked(partial):
        try:
            if not finished(settings):
                begin(partial, settings)
                make(settings)
            if begun_with(partial) == recipe_settings(settings):
                (partial / SETTINGS).unlink()
        finally:
            if not (partial / SETTINGS).exists():  # then nothing there counts
                shutil.rmtree(partial)
    return settings.out


def finished(settings: PretrainSettings) -> bool:
    """Whether `settings.out` holds the base of these very settings already.

    Raises:
        BadRun: it holds another base, or something that no pretraining wrote.
    """
    out = settings.out
    if not out.exists() or not any(out.iterdir()):
        return False
    if not (out / RECIPE).exists():
        raise BadRun(f"{out} holds something other than a pretrained base; choose another folder for out")
    there = json.loads((out / RECIPE).read_text())["settings"]
    if changed := different(there, recipe_settings(settings)):
        raise BadRun(
            f"{out} holds a base made with another {', '.join(changed)}; remove that folder, or give another one with --out"
        )
    return True


def begin(partial: Path, settings: PretrainSettings) -> None:
    """Brings the partial folder to where training can start or go on."""
    if (partial / SETTINGS).exists():
        check_same(partial, settings)
    else:
        prepare(partial, settings)
    write_text(partial / SETTINGS, json.dumps(recipe_settings(settings)))  # comes last: where it lies, the rest is whole


def begun_with(partial: Path) -> dict[str, Any] | None:
    """The settings that the partial folder was last worked on with; None: what it holds does not count."""
    path = partial / SETTINGS
    return json.loads(path.read_text()) if path.exists() else None


def make(settings: PretrainSettings) -> None:
    """Trains, in all workers, and saves."""
    with tempfile.TemporaryDirectory() as meeting:
        if settings.workers == 1:
            work(0, settings, meeting)
        else:
            cast("Any", torch.multiprocessing).spawn(work, (settings, meeting), nprocs=settings.workers)


def partial_folder(settings: PretrainSettings) -> Path:
    out = settings.out.absolute()
    return out.parent / f".{out.name}.partial"


def recipe_settings(settings: PretrainSettings) -> dict[str, Any]:
    """The settings that the result depends on, as JSON."""
    return settings.model_dump(mode="json", exclude=NO_PART)


def check_same(partial: Path, settings: PretrainSettings) -> None:
    """Whether these settings may go on from what the partial folder holds.

    Raises:
        BadRun: it was begun with others, or its number of steps can no longer change.
    """
    there, wanted = json.loads((partial / SETTINGS).read_text()), recipe_settings(settings)
    if changed := different({**there, "steps": 0}, {**wanted, "steps": 0}):
        raise BadRun(f"{partial} was begun with another {', '.join(changed)}; set it as it was, or remove that folder")
    behind, fewest = steps_behind(partial), min(there["steps"], settings.steps)
    if there["steps"] != settings.steps and behind > flat_until(fewest, settings):
        raise BadRun(
            f"{partial} is at step {behind}, where the learning rate of {fewest} steps has begun to fall; "
            f"set steps = {there['steps']} as it was, or remove that folder"
        )


def prepare(partial: Path, settings: PretrainSettings) -> None:
    """Writes the tokenizer and, for a stream, all tokens: made once for all workers."""
    longest, stream = settings.model.max_positions, settings.stream
    if stream is None:
        make_tokenizer(longest).save_pretrained(partial)
        return
    parts, hashes = read_parts(stream, settings.seed)
    written = [example for part in ("texts", "instructions") for example in parts.get(part, ())]
    tokenizer = learn_tokenizer(longest, stream.merges, (example.prompt + example.response for example in written))
    tokens = tokens_of(stream, tokenizer, parts)
    write_tensors(partial / TOKENS, tokens)
    write_text(partial / HASHES, json.dumps(hashes))
    tokenizer.save_pretrained(partial)


def work(rank: int, settings: PretrainSettings, meeting: str) -> None:
    """One process's part; the first one saves and measures."""
    torch.set_num_threads(settings.threads)
    if settings.workers > 1:
        where = f"file://{meeting}/gloo"
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=settings.workers)

    partial = partial_folder(settings)
    tokenizer = AutoTokenizer.from_pretrained(partial)
    model = make_model(settings.model, tokenizer, settings.seed)
    curve = train(model, feed(settings, tokenizer, partial), settings, rank, partial)

    if settings.workers > 1:
        dist.destroy_process_group()
    if rank == 0:
        save(model, tokenizer, settings, curve, partial)


def feed(settings: PretrainSettings, tokenizer: PreTrainedTokenizerBase, partial: Path) -> Feed:
    """The batches of the mixture or of the stream."""
    if settings.stream is None:
        encoder = Encoder(tokenizer, settings.model.max_positions)
        return lambda step, rank: encoder.batch(mixed(step, rank, settings))
    return Windows(load_file(partial / TOKENS), settings, settings.stream).batch


def make_model(shape: Shape, tokenizer: PreTrainedTokenizerBase, seed: int) -> OlmoeForCausalLM:
    """A random model; torch's global generator is left as it was."""
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


def train(model: OlmoeForCausalLM, feed: Feed, settings: PretrainSettings, rank: int, partial: Path) -> list[Point]:
    """Trains in place, from where the partial folder has got to; the loss over the steps."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=settings.weight_decay, fused=True
    )
    curve = load_state(model, optimizer, partial)
    behind, before = (curve[-1].step, curve[-1].seconds) if curve else (0, 0.0)
    every = min(settings.save_every, max(1, settings.steps // 20))
    started = time.monotonic()
    losses: list[float] = []
    model.train()
    with progress(rank) as bar:
        steps = bar.add_task("pretraining", total=settings.steps, completed=behind, loss=math.nan)
        for step in range(behind, settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * schedule(step, settings)
            batch = feed(step, rank)
            with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16"):
                with Recorder(model, keep_logits=True) as recorder:
                    loss = cross_entropy(model, batch)
                uneven = balance_loss(recorder)
            optimizer.zero_grad()
            cast("Any", loss + settings.router_aux_loss_coef * uneven).backward()
            if settings.workers > 1:
                average_gradients(model)
            nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
            optimizer.step()
            losses.append(loss.item())
            bar.update(steps, advance=1, loss=fmean(losses))
            if (step + 1) % every == 0 or step + 1 == settings.steps:
                curve.append(Point(step + 1, fmean(losses), uneven.item(), before + time.monotonic() - started))
                losses = []
                if rank == 0:
                    save_state(model, optimizer, curve, partial)
                bar.console.log(f"step {step + 1}: loss {curve[-1].loss:.4f}, balance {curve[-1].balance:.3f}")
    return curve


def save_state(model: nn.Module, optimizer: torch.optim.AdamW, curve: Sequence[Point], partial: Path) -> None:
    """All that going on needs, in one file; its curve says how far it has got."""
    tensors = {"curve": torch.tensor([list(point) for point in curve], dtype=torch.float64)}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        tensors |= {f"{key}/{name}": state[key] for key in ("exp_avg", "exp_avg_sq")} | {f"weight/{name}": parameter}
    write_tensors(partial / STATE, tensors)


@torch.no_grad()
def load_state(model: nn.Module, optimizer: torch.optim.AdamW, partial: Path) -> list[Point]:
    """Puts the saved state into model and optimiser; the curve so far, empty at the start."""
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


def steps_behind(partial: Path) -> int:
    """How far the partial folder has got."""
    if not (partial / STATE).exists():
        return 0
    with safe_open(partial / STATE, framework="pt") as state:
        return int(state.get_tensor("curve")[-1, 0])


def flat_until(steps: int, settings: PretrainSettings) -> float:
    """The step at which the learning rate begins to fall."""
    return max(settings.warmup, 1 - settings.decay) * steps


def schedule(step: int, settings: PretrainSettings) -> float:
    """Part of the full learning rate: a linear rise, all of it, then a cosine."""
    warmup, flat = settings.warmup * settings.steps, flat_until(settings.steps, settings)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if step <= flat:
        return 1.0
    done = (step - flat) / (settings.steps - flat)
    return settings.final_lr + (1 - settings.final_lr) * (1 + math.cos(math.pi * done)) / 2


def mixed(step: int, rank: int, settings: PretrainSettings) -> list[Example]:
    """One worker's part of one batch of generated examples: training prompts only."""
    mixture, size = settings.mixture, settings.batch_size // settings.workers
    kind = Random(f"{settings.seed}/pretrain/{step}").random()  # the same for all workers
    if kind < mixture.text_share:
        return sentences(size, f"{settings.seed}/{step}/{rank}")
    rng = Random(f"{settings.seed}/pretrain/{step}/{rank}")
    exposed_share = mixture.exposed_share if step >= mixture.exposed_from * settings.steps else 0.0

    def next_example() -> Example:
        tasks = mixture.exposed if rng.random() < exposed_share else mixture.tasks
        return draw_example(rng.choice(tasks), rng, "train")

    return [next_example() for _ in range(size)]


def average_gradients(model: nn.Module) -> None:
    """Every worker's gradients become the mean of all workers'."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, torch.split(flat, [gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def save(
    model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerBase, settings: PretrainSettings, curve: list[Point], partial: Path
) -> None:
    """The finished folder, there in one step."""
    out = settings.out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        new = Path(scratch) / "new"
        with without_bars():
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
            file.chmod(0o644)  # safetensors writes for the owner alone
        new.rename(out)  # refused where something came to lie there meanwhile


def progress(rank: int) -> Progress:
    """A bar on the first worker's terminal, and none elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}"), console=Console(stderr=True, quiet=rank > 0))
