"""Base models without their weights, from their configuration alone: a plan needs no more than shapes and dtypes."""

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fedexperts.models.files import BUNDLED, weight_files
from fedexperts.models.load import DTYPES, Base, cast_parameters, cast_routers, describe, load_or_explain, stored_dtype
from fedexperts.models.nf4 import packed_shape, packed_weights
from fedexperts.moe.kernel import choose_kernel
from fedexperts.moe.packed import as_parameter


def load_shapes(
    name: str,
    trust_remote_code: bool = False,
    *,
    dtype: str = "auto",
    revision: str | None = None,
    attention: str | None = None,
    experts: str | None = None,
    quantize: str | None = None,
) -> Base:
    """The base called `name`, with its weights on the meta device: shapes, dtypes and bytes as `load` gives them; no hashes.

    name: as for `load`, or a configuration, which gets the tokenizer of `tiny`: the path of a config.json, or the name of one of
    those that ship with the package. Of a model on the hub only its configuration and its tokenizer are fetched.

    Raises:
        BadValue, NoExperts: as `load`.
    """
    described = describe(name, trust_remote_code, revision, attention)
    model = stored_as(described.model, DTYPES.get(dtype) or dtype_on_disk(name, described.config), quantize)
    load_or_explain(name, lambda: choose_kernel(model, experts))
    return Base(model, described.tokenizer, bool(described.config.is_encoder_decoder), name, "", stored_as=described.stored_as)


def stored_as(skeleton: nn.Module, dtype: torch.dtype, quantize: str | None) -> nn.Module:
    """`skeleton`, which is on the meta device, with its weights in `dtype`, or packed; in eval mode. Changed in place."""
    cast_routers(cast_parameters(skeleton, dtype).eval())
    for path, rows in packed_weights(skeleton).items() if quantize else ():
        parent, _, name = path.rpartition(".")
        module = skeleton.get_submodule(parent)
        module._parameters[name] = as_parameter(packed_shape(cast("nn.Parameter", module._parameters[name]), rows))
    return skeleton


def dtype_on_disk(name: str, config: Any) -> torch.dtype:
    """The dtype that `load` gives weights where the run says "auto"; float32 if neither configuration nor files tell."""
    if name in BUNDLED:
        return torch.float32
    folder = Path(name).expanduser()
    if isinstance(config.dtype, torch.dtype) or not folder.is_dir():
        return config.dtype or torch.float32
    return load_or_explain(name, lambda: stored_dtype(config, weight_files(folder)))
