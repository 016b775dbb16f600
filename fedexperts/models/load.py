"""A base model by name: a bundled one, a folder, or one from the hub.

Weights are read tensor by tensor from their safetensors files into where they stay, in the dtype in which they stay.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.core_model_loading import build_glob_alternation
from transformers.utils import logging

from fedexperts.errors import BadValue, nearest, shortened
from fedexperts.io.allocator import freed_at_once
from fedexperts.models.files import (
    BUNDLED,
    SETTINGS,
    config_file,
    files_hash,
    is_config_file,
    local_folder,
    location_of,
    weight_files,
)
from fedexperts.models.nf4 import packed_on_arrival, require_bitsandbytes
from fedexperts.moe.anatomy import Experts, anatomy, blocks
from fedexperts.moe.disk import LazyTensor, lazy_tensors
from fedexperts.moe.kernel import choose_kernel
from fedexperts.moe.packed import Packed
from fedexperts.moe.shrink import shrunk_class

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

UNPACKED = ("fp8", "mxfp8", "mxfp4")
"""Formats of quantized checkpoints that are read as the values that they stand for."""

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Base:
    """A pretrained model in eval mode, and its tokenizer."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    encoder_decoder: bool
    name: str
    hash: str  # of its weight files
    config_hash: str = ""  # of its configuration and tokenizer
    stored_as: str | None = None  # the format of a quantized checkpoint, such as "fp8", of which this model has the values
    reader: "PartReader | None" = None  # reads what a job needs; `model` has shapes alone then

    @property
    def identity(self) -> str:
        """Equal on two machines exactly if they have the same base."""
        return f"{self.hash}{self.config_hash}"


@dataclass(eq=False)
class PartReader:
    """Reads from the files of a base model what a job needs: only its experts, and all other weights.

    The last part stays, since a client has mostly the same experts again; it is freed before another is read.
    """

    read: Callable[[Experts], nn.Module]
    whole: Experts
    part: tuple[Experts, nn.Module] | None = None

    def __call__(self, experts: Experts) -> nn.Module:
        """The model with `experts`; of these `moe.shrink.shrink` can make sub-models, by their ids in the whole model."""
        experts = {name: tuple(experts.get(name, ids)) for name, ids in self.whole.items()}
        if self.part is None or self.part[0] != experts:
            self.part = None
            model = self.read(experts)
            if experts != self.whole:
                cast("Any", model).read_experts = experts
            self.part = experts, model
        return self.part[1]


def load(
    name: str,
    trust_remote_code: bool = False,
    *,
    dtype: str = "auto",
    revision: str | None = None,
    attention: str | None = None,
    experts: str | None = None,
    quantize: str | None = None,
    on_demand: bool = False,
) -> Base:
    """The base called `name`: "tiny" (ships with the package), "small" (in a checkout), a local folder, or an id on the hub.

    dtype: of the weights: "float32", "bfloat16", "float16", or "auto": as stored; the bundled bases are float32 then.
    revision: branch, tag or commit on the hub. attention, experts: the implementations that transformers uses for them; None: its
    own choice of attention, and the grouped product of experts where their shapes allow it. quantize: "nf4": keeps experts and
    dense linear layers in 4 bits. A checkpoint in one of the formats UNPACKED is read as the values that it stands for.
    on_demand: no weights are read now, but by the `reader` of the base, if the checkpoint allows it.

    Raises:
        BadValue: there is no such model, it has no tokenizer or one with more tokens than the model has embeddings, it lacks
            weights, it needs its own code, which is not trusted, it has no such implementation, it is quantized in a format that
            cannot be read, or bitsandbytes is missing.
        NoExperts: it has no MoE layers.
    """
    if is_config_file(name):
        raise BadValue(
            f"model.name = {name!r} is a configuration without weights, which only fedexperts plan and inspect take; to run it, "
            "give the folder of the model, or its id on the hub"
        )
    where = location_of(name)
    if quantize:
        require_bitsandbytes()
    described = describe(name, trust_remote_code, revision, attention)
    config, skeleton, tokenizer = described.config, described.model, described.tokenizer
    folder = load_or_explain(name, lambda: local_folder(where, revision))
    files = load_or_explain(name, lambda: weight_files(folder))
    wanted = DTYPES.get(dtype, torch.float32 if name in BUNDLED else None)
    config_hash = files_hash(sorted(file for pattern in SETTINGS for file in folder.glob(pattern)))

    weights = partial(read_weights, folder, files, config, skeleton, wanted, described.options, quantize)

    def read(only: Experts) -> nn.Module:
        return ready(name, where, partial(weights, only), experts)

    if on_demand and quantize is None and described.stored_as is None and files[0].suffix == ".safetensors":
        cast_parameters(skeleton, wanted or stored_dtype(config, files)).eval()
        choose_kernel(skeleton, experts)
        reader, hashed = PartReader(read, anatomy(skeleton).all_experts), files_hash(files)
        return Base(skeleton, tokenizer, bool(config.is_encoder_decoder), name, hashed, config_hash, reader=reader)
    with ThreadPoolExecutor(1) as beside:
        in_turn = beside.submit(files_hash, files)  # at the same time, so that each file is read from the disk once
        model = read({})
        hashed = in_turn.result()
    return Base(model, tokenizer, bool(config.is_encoder_decoder), name, hashed, config_hash, described.stored_as)


@dataclass(frozen=True)
class Described:
    """A model as its configuration describes it."""

    config: Any
    model: nn.Module  # on the meta device
    tokenizer: PreTrainedTokenizerBase
    stored_as: str | None  # the format of a quantized checkpoint
    options: dict[str, Any]  # of transformers, with which it was built


def describe(name: str, trust_remote_code: bool = False, revision: str | None = None, attention: str | None = None) -> Described:
    """The model called `name`, or of a config.json, from its configuration and tokenizer; see `load`, which says what is raised.

    Of the hub nothing else is fetched. A config.json has no tokenizer, and gets that of `tiny`.
    """
    code: dict[str, Any] = {"trust_remote_code": trust_remote_code, **({"revision": revision} if revision else {})}
    options = {"attn_implementation": attention} if attention else {}
    if is_config_file(name):
        config, words = AutoConfig.for_model(**config_file(name)), str(BUNDLED["tiny"])
    else:
        words = location_of(name)
        config = load_or_explain(name, lambda: AutoConfig.from_pretrained(words, **code))
    stored_as = load_or_explain(name, lambda: read_as_values(config))
    kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        skeleton = load_or_explain(name, lambda: kind.from_config(config, trust_remote_code=trust_remote_code, **options))
        blocks(skeleton)  # raises before anything large is fetched
    tokenizer = load_or_explain(name, lambda: AutoTokenizer.from_pretrained(words, **code))
    if not is_config_file(name):
        require_tokenizer(name, tokenizer, skeleton)
    return Described(config, skeleton, tokenizer, stored_as, options)


def ready(name: str, where: str, weights: Callable[[], nn.Module], experts: str | None) -> nn.Module:
    """The model that `weights` reads, in eval mode, as clients use it. experts: their implementation, see `load`.

    Raises:
        BadValue: it cannot be read, or has no such implementation.
    """
    with without_progress_bars(), freed_at_once():
        model = load_or_explain(name, weights).eval()
    cast("Any", model).name_or_path = where  # which peft writes into an adapter's configuration
    load_or_explain(name, lambda: choose_kernel(model, experts))
    align_parameters(model)
    cast_routers(model)
    return model


def read_as_values(config: Any) -> str | None:
    """Lets transformers read a quantized checkpoint as the values that it stands for; returns its format, None if it has none.

    Raises:
        BadValue: a format of which it cannot.
    """
    settings = vars(config).get("quantization_config")
    if settings is None:
        return None
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    method = str(settings.get("quant_method"))
    if method not in UNPACKED:
        raise BadValue(
            f"its weights are quantized ({method}), and of quantized checkpoints only {', '.join(UNPACKED)} can be read; give "
            "one of these, or one in bfloat16, float16 or float32"
        )
    config.quantization_config = {**settings, "dequantize": True}
    return method


def require_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase, skeleton: nn.Module) -> None:
    """Raises BadValue if `tokenizer` reads no text, or knows tokens that the model has no embedding for."""
    if not tokenizer("text", add_special_tokens=False)["input_ids"]:  # so transformers reads a folder without one
        raise BadValue(f"model.name = {name!r} has no tokenizer that reads text; put the model's tokenizer files into its folder")
    rows = cast("Any", skeleton).get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise BadValue(
            f"model.name = {name!r} has a tokenizer with {len(tokenizer):,} tokens, but the model has embeddings for {rows:,}; "
            "take the tokenizer that belongs to the model, or resize the model's embeddings and save both"
        )


def read_weights(
    folder: Path,
    files: Sequence[Path],
    config: Any,
    skeleton: nn.Module,
    dtype: torch.dtype | None,
    chosen: dict[str, Any],
    quantize: str | None = None,
    experts: Experts | None = None,
) -> nn.Module:
    """The model of `config` with the weights in `files`, each read into the memory where it stays.

    skeleton: the model on the meta device. dtype: None: as stored. chosen: further options of transformers' from_pretrained.
    quantize: each weight is packed as it is read. experts: of the MoE blocks that it names only these are read.

    Raises:
        BadValue: weights are missing, or have another shape.
    """
    kept_dtype = dtype or stored_dtype(config, files)
    options = {"config": config, "dtype": kept_dtype, "output_loading_info": True, **chosen}
    kind: Any = shrunk_class(type(skeleton), experts) if experts else type(skeleton)
    as_values = vars(config).get("quantization_config") is not None
    in_turn = one_at_a_time() if quantize or as_values else nullcontext()
    with packed_on_arrival(kind) if quantize else nullcontext(kind) as loaded, in_turn:
        if files[0].suffix == ".safetensors":
            tensors = lazy_tensors(files, cast("PreTrainedModel", skeleton), experts or {})
            tensors = with_dtype(tensors, kept_dtype) if as_values else tensors
            model, report = loaded.from_pretrained(None, state_dict=tensors, **options)
        else:
            model, report = loaded.from_pretrained(folder, weights_only=True, **options)
    model.__class__ = type(skeleton)
    if as_values:
        model._weight_conversions = None  # else transformers would quantize again what it saves
    if missing := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
        raise BadValue(f"{folder} lacks the weight {missing[0]}, or has it in another shape ({len(missing)} such)")
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return cast("nn.Module", model)


def with_dtype(tensors: Mapping[str, LazyTensor], dtype: torch.dtype) -> dict[str, LazyTensor]:
    """`tensors` of a quantized checkpoint; those without a scale, which transformers would not cast, are read in `dtype`."""
    halves = {name for name, each in tensors.items() if each.get_dtype() in ("BF16", "F16")}
    return {
        name: replace(each, dtype=dtype) if name in halves and f"{name}_scale_inv" not in tensors else each
        for name, each in tensors.items()
    }


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Within the block transformers reads a tensor when it sets it; else its threads read ahead, up to the whole model."""
    variable = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def stored_dtype(config: Any, files: Sequence[Path]) -> torch.dtype:
    """The dtype in which weights are stored: that of the configuration, or else of the first floating-point tensor."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    if files[0].suffix == ".safetensors":
        with safe_open(files[0], framework="pt") as file:
            names = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118  (safetensors' object is no dict)
        return torch.bfloat16 if "BF16" in names else torch.float16 if "F16" in names else torch.float32
    return torch.float32


def cast_parameters(skeleton: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`skeleton` with its parameters in the dtype in which they are loaded, in place: some that transformers names stay float32.

    Buffers, such as the frequencies of positions, stay as they are.
    """
    kept = cast("Any", skeleton)._get_dtype_plan(dtype)
    keeps = build_glob_alternation(list(kept))[0].search if kept else lambda name: None
    for name, parameter in skeleton.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if keeps(name) else dtype)
    return skeleton


def cast_routers(model: nn.Module) -> None:
    """Casts the routers of Switch to the dtype to which they would cast themselves in their first forward pass."""
    for block in blocks(model).values():
        if block.is_switch:
            cast("Any", block.router).classifier.to(cast("Any", block.router).dtype)


def align_parameters(model: nn.Module) -> None:
    """Copies each parameter that does not start at a multiple of 64 bytes to memory that does, as torch allocates it.

    In a file that is mapped into memory tensors start anywhere, and matrix products then differ in their last bits.
    """
    for parameter in model.parameters():
        if not isinstance(parameter, Packed) and parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()


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
