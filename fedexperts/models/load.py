"""A base model by name: a bundled one, a folder, or one from the hub."""

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

from fedexperts.errors import BadValue, nearest, shortened
from fedexperts.moe.anatomy import blocks
from fedexperts.moe.kernel import choose_kernel

BUNDLED = {"tiny": Path(__file__).parent / "tiny", "small": Path(__file__).parents[2] / "assets" / "small"}
"""`tiny` ships with the package; `small`, the base of the reported runs, is only in a checkout of the repository."""
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
"""Files that, besides the weights, decide the output of a model: its configuration (such as top-k) and its tokenizer."""

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
        """Equal on two machines exactly if they have the same base."""
        return f"{self.hash}{self.config_hash}"


def load(name: str, trust_remote_code: bool = False) -> Base:
    """The base called `name`: "tiny" (ships with the package), "small" (in a checkout), a local folder, or an id on the hub.

    Raises:
        BadValue: there is no such model, it has no tokenizer, or it needs its own code, which is not trusted.
        NoExperts: it has no MoE layers.
    """
    where = location_of(name)
    code: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    config = load_or_explain(name, lambda: AutoConfig.from_pretrained(where, **code))
    kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        blocks(load_or_explain(name, lambda: kind.from_config(config, **code)))  # raises before anything large is fetched
    tokenizer = load_or_explain(name, lambda: AutoTokenizer.from_pretrained(where, **code))
    if not tokenizer("text", add_special_tokens=False)["input_ids"]:  # so transformers reads a folder without one
        raise BadValue(f"model.name = {name!r} has no tokenizer that reads text; put the model's tokenizer files into its folder")
    with without_progress_bars():
        model = load_or_explain(name, lambda: kind.from_pretrained(where, dtype=torch.float32, **code)).eval()
    choose_kernel(model)
    align_parameters(model)
    hashes = files_hash(where, WEIGHTS), files_hash(where, SETTINGS)
    return Base(model, tokenizer, bool(config.is_encoder_decoder), name, *hashes)


def align_parameters(model: nn.Module) -> None:
    """Copies each parameter that does not start at a multiple of 64 bytes to memory that does, as torch allocates it.

    In a file that is mapped into memory tensors start anywhere, and matrix products then differ in their last bits.
    """
    for parameter in model.parameters():
        if parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()


def location_of(name: str) -> str:
    """The location that transformers loads `name` from: an existing folder, or else `name` as an id on the hub.

    Raises:
        BadValue: `name` is a path to a folder that does not exist.
    """
    if name in BUNDLED:
        return str(bundled_folder(name))
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder)
    if name.startswith((".", "/", "~")):
        raise BadValue(
            f"model.name = {name!r} is a folder that does not exist; give an existing folder, tiny, small, or a hub id"
            f"{nearest(name, BUNDLED)}"
        )
    return name


def bundled_folder(name: str) -> Path:
    """The folder of the bundled base `name`.

    Raises:
        BadValue: it does not exist.
    """
    folder = BUNDLED[name]
    if not folder.is_dir():
        raise BadValue(
            f"the base {name!r} is not part of the package, and {folder} does not exist; make it in a checkout of the repository "
            f"with fedexperts pretrain runs/pretrain-{name}.toml, or give the path of its folder"
        )
    return folder


def load_or_explain(name: str, read: Callable[[], T]) -> T:
    """`read()`.

    Raises:
        BadValue: it failed; the sentence says why, and what to set model.name to.
    """
    try:
        return read()
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip()
        if "trust_remote_code" in reason:
            advice = "set model.trust_remote_code = true if you trust its authors"
            raise BadValue(f"model.name = {name!r} brings its own code, which runs only if trusted; {advice}") from error
        first_line = shortened(reason.splitlines()[0].rstrip(".")) if reason else type(error).__name__
        advice = "give tiny, small, a folder that transformers can read, or the id of a model on the hub"
        raise BadValue(f"model.name = {name!r} cannot be loaded ({first_line}); {advice}{nearest(name, BUNDLED)}") from error


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Within the block transformers shows no progress bars, which would interrupt ours."""
    bars = cast("Any", logging)
    enabled = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            bars.enable_progress_bar()


def files_hash(where: str, patterns: Sequence[str]) -> str:
    """sha256 of the names and bytes of all files at `where` that match `patterns`."""
    folder = Path(where) if Path(where).is_dir() else Path(snapshot_download(where, local_files_only=True))
    digest = sha256()
    for file in sorted(file for pattern in patterns for file in folder.glob(pattern)):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(file_digest(stream, "sha256").digest())
    return digest.hexdigest()
