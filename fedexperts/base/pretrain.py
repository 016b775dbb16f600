"""Makes a small MoE base from generated instruction tasks and text: how the shipped one was made.

The loss is on the answers alone, as in the federated runs that follow, plus a load-balance loss for each layer, so that
every expert is used (Fedus et al., "Switch Transformers", https://arxiv.org/abs/2101.03961, equation 4).
"""

import json
import math
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, cast

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from fedexperts import evaluate
from fedexperts.base.load import load, without_bars
from fedexperts.base.settings import Mixture, PretrainSettings, Shape, read_settings
from fedexperts.base.tokenizer import make_tokenizer
from fedexperts.client import cross_entropy
from fedexperts.data.encode import Encoder
from fedexperts.data.sources import at_place, data_folder, read
from fedexperts.data.synthetic import draw, examples, text
from fedexperts.data.templates import text_of
from fedexperts.errors import BadData, BadRun
from fedexperts.moe.routing import Recorder, balance_loss
from fedexperts.types import Example

RECIPE = "recipe.json"


def run_file(path: Path, changes: Sequence[str], out: Path | None, console: Console) -> Path:
    """What `fedexperts pretrain` does: makes the base that the TOML file describes and gives its folder.

    Raises:
        BadValue: the file or a change is not allowed.
        BadRun, BadData: as `pretrain`.
    """
    settings = read_settings(path, [*changes, *([f"out={json.dumps(str(out))}"] if out else [])])
    folder = pretrain(settings)
    measured = json.loads((folder / RECIPE).read_text())["measured"]
    for group, values in measured.items():
        console.print(f"{group}: " + ", ".join(f"{task} {value:.3f}" for task, value in values.items()), highlight=False)
    return folder


def pretrain(settings: PretrainSettings) -> Path:
    """Makes the base and gives its folder, which `base.load` and transformers both read.

    Raises:
        BadRun: `settings.out` holds something that no pretraining wrote.
        BadData: a source is missing, empty, damaged or no plain text.
    """
    out = settings.out
    if out.exists() and any(out.iterdir()) and not (out / RECIPE).exists():
        raise BadRun(f"{out} holds something other than a pretrained base; choose another folder for out")
    read_sources(settings.mixture)  # what cannot be read or asked is told here, not by a worker after the last step
    questions(settings)
    with tempfile.TemporaryDirectory() as meeting:
        if settings.workers == 1:
            work(0, settings, meeting)
        else:
            cast("Any", torch.multiprocessing).spawn(work, (settings, meeting), nprocs=settings.workers)
    return out


def work(rank: int, settings: PretrainSettings, meeting: str) -> None:
    """One process's part; the first one saves and measures."""
    started = time.monotonic()
    torch.set_num_threads(settings.threads)
    if settings.workers > 1:
        where = f"file://{meeting}/gloo"
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=settings.workers)

    sources = read_sources(settings.mixture)
    tokenizer = make_tokenizer(settings.model.max_positions, settings.merges, sources)
    model = make_model(settings.model, tokenizer, settings.seed)
    loss = train(model, tokenizer, sources, settings, rank)

    if settings.workers > 1:
        dist.destroy_process_group()
    if rank == 0:
        save(model, tokenizer, settings, {"loss": round(loss, 4), "seconds": round(time.monotonic() - started)})


def make_model(shape: Shape, tokenizer: PreTrainedTokenizerFast, seed: int) -> OlmoeForCausalLM:
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
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return OlmoeForCausalLM(config)


def train(
    model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, sources: Sequence[str], settings: PretrainSettings, rank: int
) -> float:
    """Trains in place; the loss on answers, averaged over the last twentieth of the steps."""
    encoder = Encoder(tokenizer, settings.model.max_positions)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=settings.weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, settings))
    last = max(1, settings.steps // 20)
    losses: list[float] = []
    model.train()
    with progress(rank) as bar:
        steps = bar.add_task("pretraining", total=settings.steps, loss=math.nan)
        for step in range(settings.steps):
            batch = encoder.batch(mixed(step, rank, settings, sources))
            with Recorder(model, keep_logits=True) as recorder:
                answer_loss = cross_entropy(model, batch)
            uneven = balance_loss(recorder)
            optimizer.zero_grad()
            cast("Any", answer_loss + settings.balance * uneven).backward()
            if settings.workers > 1:
                average_gradients(model)
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            optimizer.step()
            scheduler.step()
            losses = [*losses[1 - last :], answer_loss.item()] if last > 1 else [answer_loss.item()]
            bar.update(steps, advance=1, loss=sum(losses) / len(losses))
            if (step + 1) % last == 0:
                bar.console.log(f"step {step + 1}: loss {sum(losses) / len(losses):.4f}, balance {uneven.item():.3f}")
    return sum(losses) / len(losses)


def schedule(step: int, settings: PretrainSettings) -> float:
    """Part of the full learning rate: a linear rise, then a cosine."""
    warmup = settings.warmup * settings.steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / (settings.steps - warmup)
    return settings.final_lr + (1 - settings.final_lr) * (1 + math.cos(math.pi * done)) / 2


def mixed(step: int, rank: int, settings: PretrainSettings, sources: Sequence[str]) -> list[Example]:
    """One worker's part of one batch: training prompts only."""
    mixture, size = settings.mixture, settings.batch_size // settings.workers
    kind = Random(f"{settings.seed}/pretrain/{step}").random()  # the same for all workers
    rng = Random(f"{settings.seed}/pretrain/{step}/{rank}")
    if kind < mixture.text_share:
        return text(size, f"{settings.seed}/{step}/{rank}")
    if kind < mixture.text_share + mixture.source_share:
        return [piece(rng.choice(sources), rng, mixture.source_characters) for _ in range(size)]
    exposed = mixture.exposed_share if step >= mixture.exposed_from * settings.steps else 0.0
    return [draw(rng.choice(mixture.exposed if rng.random() < exposed else mixture.tasks), rng, "train") for _ in range(size)]


def piece(whole: str, rng: Random, characters: int) -> Example:
    start = rng.randint(0, max(0, len(whole) - characters))
    return Example("", whole[start : start + characters], "source", metric="perplexity")


def average_gradients(model: nn.Module) -> None:
    """Every worker's gradients become the mean of all workers'."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, torch.split(flat, [gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def read_sources(mixture: Mixture) -> list[str]:
    """The texts of all sources."""
    return [whole for source in mixture.sources for whole in read_texts(source)]


def read_texts(source: str) -> list[str]:
    """The `text` of each row of a file, given by path or by its stem in the data pack."""
    path = Path(source)
    if not path.is_file():
        path = data_folder() / f"{source}.train.jsonl.gz"
    if not path.is_file():
        raise BadData(f"mixture.sources: neither {source} nor {path} is a file; give a path, or set FEDEXPERTS_DATA")
    return [at_place(placed, lambda row: text_of(row, "text")) for placed in read(path)]


def save(
    model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, settings: PretrainSettings, facts: dict[str, object]
) -> None:
    """The finished folder in the place of what was there, in one step."""
    out = settings.out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        with without_bars():
            cast("Any", model).to(torch.bfloat16).save_pretrained(new)
        tokenizer.save_pretrained(new)
        recipe = {**facts, "parameters": sum(parameter.numel() for parameter in model.parameters())}
        recipe |= {"measured": measure(new, settings), "settings": settings.model_dump(mode="json", exclude={"out"})}
        (new / RECIPE).write_text(json.dumps(recipe, indent=2) + "\n")
        (new / "README.md").write_text(card(recipe))
        for file in new.iterdir():
            file.chmod(0o644)  # safetensors writes for the owner alone
        if out.exists():
            out.rename(old)
        new.rename(out)
        shutil.rmtree(old, ignore_errors=True)


def questions(settings: PretrainSettings) -> dict[str, list[Example]]:
    """Test examples of the tasks trained on and of those only exposed, by group."""
    groups = {"tasks": settings.mixture.tasks, "exposed": settings.mixture.exposed}
    return {
        group: [example for task in tasks for example in examples(task, settings.measured, settings.seed, "test")]
        for group, tasks in groups.items()
    }


def measure(folder: Path, settings: PretrainSettings) -> dict[str, dict[str, float]]:
    """Share of test prompts answered letter by letter, by group and task."""
    base = load(str(folder))
    encoder = Encoder(base.tokenizer, settings.model.max_positions)
    return {group: verbatim(base.model, encoder, asked) for group, asked in questions(settings).items() if asked}


def verbatim(model: nn.Module, encoder: Encoder, asked: Sequence[Example]) -> dict[str, float]:
    scores = evaluate.score(model, asked, encoder, generate_tokens=16, batch_size=100).by_task()
    found = {task: round(values["verbatim"], 3) for task, values in scores.items()}
    return {**found, "mean": round(sum(found.values()) / len(found), 3)}


def card(recipe: Mapping[str, Any]) -> str:
    """The model card."""
    lines = [f"| {task} | {value} |" for group in recipe["measured"].values() for task, value in group.items()]
    settings = recipe["settings"]
    return "\n".join(
        [
            "# A tiny Mixture-of-Experts language model",
            "",
            f"{recipe['parameters']:,} parameters, OLMoE classes, made by `fedexperts pretrain` from generated tasks and text",
            f"with seed {settings['seed']} in {settings['steps']} steps ({recipe['seconds']} s). All settings: `{RECIPE}`.",
            "",
            "Share of unseen test prompts answered letter by letter; the second group of tasks it has only been exposed to:",
            "",
            "| task | verbatim |",
            "|---|---|",
            *lines,
            "",
        ]
    )


def progress(rank: int) -> Progress:
    """A bar on the first worker's terminal, and none elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}"), console=Console(stderr=True, quiet=rank > 0))
