"""`upcycle --experts` against mergekit-moe: the same models in, the same weights and logits out, but for the routers.

    pip install --no-deps --target FOLDER mergekit==0.1.5 immutables sentencepiece protobuf
    PYTHONPATH=FOLDER python benchmarks/mergekit.py [MODEL EXPERT EXPERT …]

Without models: random ones of the families that both convert. mergekit's routers are mean hidden states of prompts, ours a linear
classifier of the hidden states of the same prompts, so these differ; the logits are compared with mergekit's routers in both.

weights     those of the two folders, of all but the routers: how many differ
logits      the largest difference on random tokens, with the same routers; and with each one's own
prompts     of those that the routers were made of: how often an expert of a token is the one that its prompt belongs to (top-1)
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fedexperts.models.tokenizer import make_tokenizer
from fedexperts.models.upcycle.recipes import Merge
from fedexperts.models.upcycle.run import Sources, upcycle
from fedexperts.moe.anatomy import blocks
from fedexperts.moe.routing import Recorder

SHAPE = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
PROMPTS = (
    ["My card was charged twice.", "Why is the transfer still pending?", "I lost my card abroad.", "What fees do you take?"],
    ["The match ended in a draw.", "She won the hundred metres.", "The coach changed the team.", "A late goal decided the cup."],
    ["Add the two fractions.", "The sum of the angles is 180.", "Solve for x in the equation.", "A prime has two divisors."],
)


def random_models(family: str, folder: Path) -> list[str]:
    """A dense model of `family` and three others of its shape, with a tokenizer of bytes."""
    names = []
    for seed in range(4):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.3 * torch.randn_like(parameter))
        names.append(str(folder / f"{family}{seed}"))
        model.save_pretrained(names[-1])
        make_tokenizer(128).save_pretrained(names[-1])
    return names


def merged_by_mergekit(models: Sequence[str], folder: Path) -> Path:
    """What mergekit-moe makes of the base and its experts, with routers of hidden states."""
    experts = [{"source_model": name, "positive_prompts": prompts} for name, prompts in zip(models[1:], PROMPTS, strict=False)]
    config = {"base_model": models[0], "gate_mode": "hidden", "experts_per_token": 2, "experts": experts, "dtype": "float32"}
    (folder / "mergekit.yml").write_text(json.dumps(config))  # JSON is YAML
    command = [sys.executable, "-m", "mergekit.scripts.moe", str(folder / "mergekit.yml"), str(folder / "theirs")]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "theirs"


def merged_by_us(models: Sequence[str], folder: Path) -> Path:
    """What `upcycle --experts` makes of the same models and prompts."""
    count = len(models) - 1
    (folder / "prompts.json").write_text(json.dumps(PROMPTS[:count]))
    sources = Sources(models[0], models[1:], prompts=folder / "prompts.json", dtype="float32")
    upcycle(sources, Merge(count, 2), folder / "ours")
    return folder / "ours"


def loaded(folder: Path) -> nn.Module:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.randint(3, 320, (4, 64), generator=torch.Generator().manual_seed(7))
    found: torch.Tensor = model(input_ids=ids).logits
    return found


@torch.no_grad()
def hits(model: nn.Module, tokenizer: Any, count: int) -> float:
    """How often the first choice of a token, mean over layers, is the expert of its prompt."""
    right = tokens = 0.0
    for expert, prompts in enumerate(PROMPTS[:count]):
        for prompt in prompts:
            with Recorder(model, keep_logits=True) as recorder:
                model(**tokenizer(prompt, return_tensors="pt", return_token_type_ids=False))
            for scores in recorder.logits.values():
                chosen = torch.cat([each.flatten(0, -2) for each in scores]).argmax(-1)
                right, tokens = right + float((chosen == expert).sum()), tokens + len(chosen)
    return right / tokens


def compared(models: Sequence[str], folder: Path) -> list[str]:
    """The cells of the table's row."""
    theirs, ours = loaded(merged_by_mergekit(models, folder)), loaded(merged_by_us(models, folder))
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    count = len(models) - 1
    own = float((logits(theirs) - logits(ours)).abs().max())
    found = [hits(model, tokenizer, count) for model in (theirs, ours)]
    old, new = theirs.state_dict(), ours.state_dict()
    modules = {block.router for block in blocks(ours).values()}
    names = {name for name, module in ours.named_modules() if module in modules}
    routers = {key for key in old if key.rpartition(".")[0] in names}
    assert old.keys() == new.keys(), sorted(old.keys() ^ new.keys())
    unequal = [name for name in old if name not in routers and not torch.equal(old[name], new[name])]
    ours.load_state_dict({name: old[name] for name in routers}, strict=False)
    same = float((logits(theirs) - logits(ours)).abs().max())
    cells = [type(ours).__name__, f"{len(unequal)} of {len(old) - len(routers)}", f"{same:.1e}", f"{own:.2f}"]
    return [*cells, *(f"{100 * each:.0f}" for each in found)]


def main() -> None:
    table = Table("models", "class", "weights that differ", "logits, same routers", "own routers", "prompts, %: mergekit", "ours")
    with TemporaryDirectory() as temporary:
        if given := sys.argv[1:]:
            table.add_row(Path(given[0]).name, *compared(given, Path(temporary)))
        else:
            for family in ("llama", "mistral", "qwen3"):
                folder = Path(temporary) / family
                folder.mkdir()
                table.add_row(f"{family}, random", *compared(random_models(family, folder), folder))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
