"""A base model by name: one of ours, a folder, or one from the hub."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from fedexperts.errors import BadValue, nearest
from fedexperts.moe.anatomy import blocks
from fedexperts.moe.kernel import choose_kernel

OURS = {"tiny": Path(__file__).parent / "tiny", "small": Path(__file__).parents[2] / "assets" / "small"}
"""`tiny` ships with the package; `small`, the base of the reported runs, lies in a checkout of the repository only."""
WEIGHTS = ("*.safetensors", "*.bin")
SETTINGS = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "added_tokens.json",
    "special_tokens_map.json",
)
"""What else decides what a model does with a text: top-k and the rest of its shape, and how text becomes tokens."""

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Base:
    """A pretrained model in fp32, in eval mode, and its tokenizer."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    encoder_decoder: bool
    name: str
    hash: str  # of its weight files
    config_hash: str = ""  # of its configuration and tokenizer

    @property
    def identity(self) -> str:
        """What two machines that work with the same base have alike."""
        return f"{self.hash}{self.config_hash}"


def load(name: str, trust_remote_code: bool = False) -> Base:
    """The base called `name`: "tiny" (ships with the package), "small" (in a checkout), a local folder, or an id on the hub.

    Raises:
        BadValue: there is no such model, or it wants code of its own to be run.
        NoExperts: it has no MoE layers.
    """
    where = place(name)
    code: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    config = load_or_explain(name, lambda: AutoConfig.from_pretrained(where, **code))
    kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        blocks(load_or_explain(name, lambda: kind.from_config(config, **code)))  # raises before anything large is fetched
    tokenizer = load_or_explain(name, lambda: AutoTokenizer.from_pretrained(where, **code))
    if not tokenizer("text", add_special_tokens=False)["input_ids"]:  # what transformers makes of a folder that has none
        raise BadValue(
            f"model.name = {name!r} has no tokenizer that reads text; put the model's tokenizer files beside its weights"
        )
    with without_bars():
        model = load_or_explain(name, lambda: kind.from_pretrained(where, dtype=torch.float32, **code)).eval()
    choose_kernel(model)
    align(model)
    hashes = files_hash(where, WEIGHTS), files_hash(where, SETTINGS)
    return Base(model, tokenizer, bool(config.is_encoder_decoder), name, *hashes)


def align(model: nn.Module) -> None:
    """Moves parameters to where rows of the processor's width begin, at multiples of 64 bytes, as those made in memory are.

    A file that is mapped into memory has them anywhere, and products then differ in their last bits.
    """
    for parameter in model.parameters():
        if parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()


def place(name: str) -> str:
    """What transformers is to be asked for: a folder that exists, or `name` as an id on the hub."""
    if name in OURS:
        return str(own_folder(name))
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder)
    if name.startswith((".", "/", "~")):
        raise BadValue(
            f"model.name = {name!r} is a folder that does not exist; give an existing folder, tiny, small, or a hub id"
            f"{nearest(name, OURS)}"
        )
    return name


def own_folder(name: str) -> Path:
    """Where the base of ours called `name` lies.

    Raises:
        BadValue: it is not there.
    """
    folder = OURS[name]
    if not folder.is_dir():
        raise BadValue(
            f"the base {name!r} is no part of the package and is not at {folder}; in a checkout of the repository make it with "
            f"fedexperts pretrain runs/pretrain-{name}.toml, or give the path of a folder that has it"
        )
    return folder


def load_or_explain(name: str, read: Callable[[], T]) -> T:
    """What `read` gives, or why it cannot, in one sentence."""
    try:
        return read()
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        reason = str(error)
        if "trust_remote_code" in reason:
            ask = "set model.trust_remote_code = true if you trust them"
            raise BadValue(f"model.name = {name!r} brings its own code, which runs only on trust; {ask}") from error
        first = reason.strip().splitlines()[0].rstrip(".") if reason.strip() else type(error).__name__
        told = "give tiny, small, a folder that transformers can read, or the id of a model on the hub that can be reached"
        raise BadValue(f"model.name = {name!r} cannot be loaded ({first}); {told}{nearest(name, OURS)}") from error


@contextmanager
def without_bars() -> Iterator[None]:
    """No progress bars of transformers, which would break into ours."""
    bars = cast("Any", logging)
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def files_hash(where: str, patterns: Sequence[str]) -> str:
    """sha256 over the names and bytes of all files of these names."""
    folder = Path(where) if Path(where).is_dir() else Path(snapshot_download(where, local_files_only=True))
    digest = sha256()
    for file in sorted(file for pattern in patterns for file in folder.glob(pattern)):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(file_digest(stream, "sha256").digest())
    return digest.hexdigest()
