"""Weights in fewer bits on their way: what a job brings, and the change that a client answers with (`federation.wire_dtype`).

Both ends call these functions, in one process too, so that every engine rounds alike:

- bfloat16: rounded to nearest, ties to even.
- int8: symmetric, in blocks of 64 consecutive elements of a row (`types.BLOCK`; the last of a row may be shorter), each with its
  scale in float32 beside the codes: scale = max |x| / 127, code = x / scale, rounded to nearest, ties to even. A row is encoded
  alone, so it has the same bits whichever rows travel with it. (float16 would hold no scale below 6e-8, so no small change.)

The server adds a client's change to the weights that it encoded, not to what the client decoded: rounding on the way down is
an error of that job alone, and what is smaller than a step of the codes adds up over rounds.

Only float32 weights are encoded. Integers, row ids and the extra tensors of methods travel as they are: an error in a count, a
probability or a control variate, which both sides keep, has no such bound.
"""

from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from fedexperts.errors import BadMessage, BadValue
from fedexperts.types import BLOCK, Patch, WireDtype, blocks_of

DTYPES = {"bfloat16": torch.bfloat16, "int8": torch.int8}
MOST = 127
"""The largest code, so that the smallest is its negative."""


def encode(patch: Patch, wire_dtype: WireDtype, start: Patch | None = None) -> Patch:
    """`patch` as it travels. start: of an answer, what its job brought: of a weight that is there, the change is encoded.

    Raises:
        BadValue: a weight is of another floating-point dtype than float32, or of the dtype of codes.
    """
    if wire_dtype == "float32":
        return patch
    tensors: dict[str, Tensor] = {}
    scales: list[Tensor] = []
    for name, tensor in patch.tensors.items():
        if tensor.dtype != torch.float32:
            if tensor.is_floating_point() or tensor.dtype == DTYPES[wire_dtype]:
                raise BadValue(
                    f"federation.wire_dtype = {wire_dtype!r} sends weights of float32, and {name} is {tensor.dtype}; leave it out"
                )
            tensors[name] = tensor
            continue
        begun = brought(name, patch, start)
        change = tensor if begun is None else tensor - begun
        if wire_dtype == "bfloat16":
            tensors[name] = change.to(torch.bfloat16)
        else:
            tensors[name], scale = to_int8(change)
            scales.append(scale)
    return Patch(tensors, patch.rows, wire_dtype, torch.cat(scales) if scales else None)


def decode(patch: Patch, wire_dtype: WireDtype, start: Patch | None = None) -> Patch:
    """The weights that `encode` made `patch` of, rounded. start: of an answer, the weights of its job before they were encoded.

    Raises:
        BadMessage: a weight is float32, or there is not one scale for each block.
    """
    encoded = [name for name, tensor in patch.tensors.items() if tensor.dtype == DTYPES.get(wire_dtype)]
    plain = [name for name, tensor in patch.tensors.items() if tensor.dtype == torch.float32]
    if wire_dtype != "float32" and plain:
        raise BadMessage(f"its message has {plain[0]} as float32, and federation.wire_dtype is {wire_dtype!r}")
    number = sum(blocks_of(patch.tensors[name]) for name in encoded) if wire_dtype == "int8" else 0
    scales = torch.empty(0) if patch.scales is None else patch.scales
    if (scales.dtype, tuple(scales.shape)) != (torch.float32, (number,)):
        raise BadMessage(f"its message has scales as {scales.dtype} {[*scales.shape]}, and its weights have {number:,} blocks")
    if wire_dtype == "float32":
        return patch if patch.wire_dtype == wire_dtype else replace(patch, wire_dtype=wire_dtype)
    tensors = dict(patch.tensors)
    for name in encoded:
        begun = brought(name, patch, start)
        codes = tensors[name]
        if wire_dtype == "bfloat16":
            change = codes.float()
        else:
            change = from_int8(codes, scales[: blocks_of(codes)])
            scales = scales[blocks_of(codes) :]
        tensors[name] = change if begun is None else change.add_(begun)
    return Patch(tensors, patch.rows, wire_dtype)


def brought(name: str, patch: Patch, start: Patch | None) -> Tensor | None:
    """The rows of `start` that `patch` has of the weight `name`; None where it lacks one, or they have another shape."""
    if start is None or name not in start.tensors:
        return None
    begun, ids, begun_ids = start.tensors[name], patch.rows.get(name), start.rows.get(name)
    if ids is not None and begun_ids is not None and not torch.equal(ids, begun_ids):
        if not bool(torch.isin(ids, begun_ids).all()):
            return None
        begun = begun[torch.searchsorted(begun_ids, ids)]
    return begun if begun.shape == patch.tensors[name].shape else None


def to_int8(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The codes of `tensor`, int8 in its shape, and the scales of its blocks, float32, row by row. Zeros have scale 0.

    A block with a number that is not finite decodes to NaN.
    """
    blocks = in_blocks(tensor)
    scales = blocks.abs().amax(-1) / MOST
    codes = (blocks / scales[..., None]).nan_to_num_(0.0).clamp_(-MOST, MOST).round_().to(torch.int8)
    return out_of_blocks(codes, tensor), scales.flatten()


def from_int8(codes: Tensor, scales: Tensor) -> Tensor:
    """The numbers that `codes` stand for, float32 in their shape; `scales`: of their blocks."""
    blocks = in_blocks(codes)
    return out_of_blocks(blocks * scales.view(*blocks.shape[:2], 1), codes)


def in_blocks(tensor: Tensor) -> Tensor:
    """The rows of `tensor` filled up with zeros: [rows, blocks, BLOCK]."""
    rows, elements = (len(tensor), prod(tensor.shape[1:])) if tensor.ndim else (1, 1)
    filled = torch.nn.functional.pad(tensor.reshape(rows, elements), (0, -elements % BLOCK))
    return filled.view(rows, -(-elements // BLOCK), BLOCK)


def out_of_blocks(blocks: Tensor, like: Tensor) -> Tensor:
    """The elements of `blocks` without what filled them up, in the shape of `like`."""
    elements = prod(like.shape[1:])
    return blocks.flatten(1)[:, :elements].reshape(like.shape)
