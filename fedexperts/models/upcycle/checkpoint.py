"""Dense checkpoints, read tensor by tensor, and MoE checkpoints, written shard by shard."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from shutil import copyfile
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from fedexperts.errors import BadValue, shortened
from fedexperts.io.files import write_bytes, write_tensors
from fedexperts.models.files import FETCHED, local_folder, weight_files
from fedexperts.models.load import without_progress_bars
from fedexperts.moe.disk import LazyTensor

SHARD = "model-{:05d}-of-{:05d}.safetensors"
EMBEDDINGS, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass(frozen=True, eq=False)
class Dense:
    """A dense model, of which each tensor is read when it is needed."""

    name: str
    config: Any
    tokenizer: PreTrainedTokenizerBase
    tensors: Mapping[str, LazyTensor | Tensor]
    folder: Path | None  # with its files; None: a GGUF file

    def read(self, name: str) -> Tensor:
        """The tensor called `name`, in the dtype in which it is stored.

        Raises:
            BadValue: the checkpoint lacks it.
        """
        if name not in self.tensors:
            raise BadValue(
                f"{self.name} lacks the weight {name}; give a complete checkpoint with the names that transformers writes"
            )
        return self.tensors[name][...]


def skeleton(config: Any) -> nn.Module:
    """A model in eval mode, on the meta device; its attention needs no mask for a single text."""
    with torch.device("meta"):
        model: nn.Module = cast("Any", AutoModelForCausalLM).from_config(config, attn_implementation="sdpa")
    return model.eval()


def open_dense(name: str) -> Dense:
    """The dense model called `name`: a folder with safetensors or a GGUF file, a GGUF file, or an id on the hub.

    Raises:
        BadValue: there is none, or it cannot be read.
    """
    path = Path(name).expanduser()
    if gguf := gguf_file(path):
        return open_gguf(name, gguf)
    if not path.is_dir() and name.startswith((".", "/", "~")):
        raise BadValue(f"{name} is not a folder; give the folder of a dense model, a GGUF file, or the id of a model on the hub")
    try:
        folder = local_folder(str(path) if path.is_dir() else name)
        config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        files = weight_files(folder)
        tensors = lazy(files) if files[0].suffix == ".safetensors" else None
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise BadValue(
            f"{name} cannot be read ({shortened(str(error))}); give the folder of a dense model, or an id on the hub"
        ) from error
    if tensors is None:
        raise BadValue(f"{name} has its weights in {files[0].name}, which is not read; save it as safetensors with transformers")
    if config.to_dict().get("quantization_config"):
        raise BadValue(f"{name} has quantized weights; give a model in bfloat16, float16 or float32, or a GGUF file")
    if not tokenizer("text", add_special_tokens=False)["input_ids"]:  # so transformers reads a folder without one
        raise BadValue(f"{name} has no tokenizer that reads text; put the model's tokenizer files into its folder")
    return with_embeddings(Dense(name, config, tokenizer, tensors, folder))


def with_embeddings(dense: Dense) -> Dense:
    """`dense`, after its tokenizer was compared with its embeddings.

    Raises:
        BadValue: the tokenizer has tokens without an embedding.
    """
    rows = int(dense.config.vocab_size)
    if len(dense.tokenizer) > rows:
        raise BadValue(
            f"{dense.name} has a tokenizer with {len(dense.tokenizer):,} tokens, but the model has embeddings for {rows:,}; "
            "take the tokenizer that belongs to the model, or resize the model's embeddings and save both"
        )
    return dense


def lazy(files: list[Path]) -> dict[str, LazyTensor | Tensor]:
    """The tensors in safetensors files, unread."""
    tensors: dict[str, LazyTensor | Tensor] = {}
    for file in files:
        checkpoint: Any = safe_open(file, framework="pt", backend="pread")  # a memory map would be read ahead
        tensors |= {key: LazyTensor(checkpoint.get_slice(key)) for key in checkpoint.keys()}  # noqa: SIM118
    return tensors


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that `path` is, or that is the only one in the folder `path`, if the folder has no safetensors.

    Raises:
        BadValue: there are several.
    """
    if path.suffix == ".gguf" and path.is_file():
        return path
    found = sorted(path.glob("*.gguf")) if path.is_dir() and not any(path.glob("*.safetensors")) else []
    if len(found) > 1:
        raise BadValue(f"{path} has {len(found)} GGUF files; give the path of one of them")
    return found[0] if found else None


def open_gguf(name: str, file: Path) -> Dense:
    """The model in a GGUF file, dequantized to bfloat16 by transformers, which reads all of it at once.

    Raises:
        BadValue: the package gguf is missing, or transformers cannot read the file.
    """
    if not find_spec("gguf"):
        raise BadValue(
            f"{name} is a GGUF file, and the package gguf, which reads it, is not installed; install it: pip install gguf"
        )
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    # Releases of transformers that have no GgufConfig always dequantize.
    options: dict[str, Any] = (
        {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
    )
    try:
        with without_progress_bars():
            tokenizer = AutoTokenizer.from_pretrained(**where)
            model = AutoModelForCausalLM.from_pretrained(**where, **options, dtype=torch.bfloat16)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise BadValue(f"{name} cannot be read ({shortened(str(error))}); give a GGUF file that transformers reads") from error
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    config = type(model.config)(**settings)
    return with_embeddings(Dense(name, config, tokenizer, model.state_dict(), None))


@dataclass(eq=False)
class Writer:
    """Writes a checkpoint of `shards` files, one after the other; the index, which makes it a checkpoint, comes last."""

    folder: Path
    shards: int
    dtype: torch.dtype
    files: dict[str, str] = field(default_factory=dict)
    bytes: int = 0

    def cast(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`tensors` in the dtype in which they are written."""
        return {name: tensor.to(self.dtype) for name, tensor in tensors.items()}

    def write(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """The shard `number`, from 0."""
        file = SHARD.format(number + 1, self.shards)
        write_tensors(self.folder / file, tensors)
        self.files |= dict.fromkeys(tensors, file)
        self.bytes += sum(tensor.nbytes for tensor in tensors.values())

    def finish(self) -> None:
        """Writes the index."""
        index = {"metadata": {"total_size": self.bytes}, "weight_map": dict(sorted(self.files.items()))}
        write_bytes(self.folder / "model.safetensors.index.json", json.dumps(index, indent=2).encode())


def copy_settings(dense: Dense, config: Any, folder: Path) -> None:
    """Writes the configuration of the new model, and copies tokenizer, chat template and generation settings."""
    config.save_pretrained(folder)
    if dense.folder is None:
        dense.tokenizer.save_pretrained(folder)
        return
    wanted = [pattern for pattern in FETCHED if pattern not in ("config.json", "*.py")]
    for file in (file for pattern in wanted for file in dense.folder.glob(pattern)):
        copyfile(file, folder / file.name)
