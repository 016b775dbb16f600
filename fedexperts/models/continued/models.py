"""The models of continued training, in float32."""

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from fedexperts.errors import BadValue, NoExperts
from fedexperts.models.files import SETTINGS, files_hash, local_folder, location_of, weight_files
from fedexperts.models.load import load_or_explain, require_tokenizer, without_progress_bars
from fedexperts.models.upcycle.checkpoint import HEAD, gguf_file, open_dense
from fedexperts.moe.kernel import choose_kernel
from fedexperts.moe.together import compute_together


def load_start(name: str) -> tuple[nn.Module, PreTrainedTokenizerBase, torch.dtype, str]:
    """The model that training starts from, its tokenizer, the dtype in which it is stored, and the hash of its files.

    Raises:
        BadValue: it cannot be read, or lacks weights.
    """
    where = location_of(name)
    folder = load_or_explain(name, lambda: local_folder(where))
    config: Any = load_or_explain(name, lambda: AutoConfig.from_pretrained(folder))
    if config.to_dict().get("quantization_config"):
        raise BadValue(f"start = {name!r} has quantized weights; give a model in bfloat16, float16 or float32")
    settings = sorted({file for pattern in (*SETTINGS, "chat_template.jinja") for file in folder.glob(pattern)})
    hashed = files_hash([*load_or_explain(name, lambda: weight_files(folder)), *settings])
    tokenizer = load_or_explain(name, lambda: AutoTokenizer.from_pretrained(folder))
    with without_progress_bars():
        kind: Any = AutoModelForCausalLM
        model, found = load_or_explain(name, lambda: kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True))
    if lacking := sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]])):
        raise BadValue(
            f"start = {name!r} lacks the weight {lacking[0]}, or has it in another shape ({len(lacking)} such); give a whole one"
        )
    require_tokenizer(name, tokenizer, model)
    return prepared(model), tokenizer, config.dtype or torch.float32, hashed


def prepared(model: nn.Module) -> nn.Module:
    """`model` with the fastest implementation of its experts, if it has some."""
    try:
        if not compute_together(model):
            choose_kernel(model)
    except NoExperts:
        pass
    return model


def control_hash(name: str) -> str:
    """The hash of the weights of the dense model `name`, which `load_control` has read."""
    path = Path(name).expanduser()
    if gguf := gguf_file(path):
        return files_hash([gguf])
    return files_hash(weight_files(local_folder(str(path) if path.is_dir() else name)))


def load_control(name: str, vocabulary: int) -> nn.Module:
    """The dense model `name`: a folder, a GGUF file, or an id on the hub.

    vocabulary: number of tokens that the other model predicts.

    Raises:
        BadValue: it cannot be read, lacks weights, or has another vocabulary.
    """
    dense = open_dense(name)
    if dense.config.vocab_size != vocabulary:
        raise BadValue(
            f"control = {name!r} has a vocabulary of {dense.config.vocab_size:,} tokens, and the model has {vocabulary:,}; "
            "give the dense model that it was made of"
        )
    model: nn.Module = cast("Any", AutoModelForCausalLM).from_config(dense.config, dtype=torch.float32)
    missing = model.load_state_dict({key: dense.read(key) for key in dense.tensors}, strict=False).missing_keys
    tied = {HEAD} if dense.config.tie_word_embeddings else set()
    if lacking := sorted(set(missing) - tied):
        raise BadValue(
            f"control = {name!r} lacks the weight {lacking[0]}, so it is no dense model of its class; give a dense model"
        )
    cast("Any", model).tie_weights()
    return model


def save_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, folder: Path) -> None:
    """Casts `model` to `dtype` and writes it with its tokenizer, for transformers."""
    with without_progress_bars():
        cast("Any", model).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors lets only the owner read
