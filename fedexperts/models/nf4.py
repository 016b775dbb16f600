"""Weights in 4 bits: nf4 with one scale for 64 values, in the layout of bitsandbytes, which unpacks them.

Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023, https://arxiv.org/abs/2305.14314, section 3.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from math import prod
from typing import Any, cast

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.modules.module import register_module_parameter_registration_hook

from fedexperts.errors import BadValue
from fedexperts.moe.anatomy import blocks
from fedexperts.moe.lora import matrices
from fedexperts.moe.packed import Packed, as_parameter

BLOCK = 64
"""Values that share a scale, their largest absolute value."""
AT_ONCE = 2**17
"""Number of values that are packed at a time: what it takes beside the result stays in the cache of a core."""
CELLS = 64
"""Cells per unit of the table by which `nearest_codes` finds codes; each has at most one bound between two codes."""


@dataclass(frozen=True)
class NF4:
    """Codes of 4 bits, two in a byte, and scales in float32."""

    def unpack(self, codes: Tensor, scales: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The tensor of `shape`, [*rows, *unit]; a unit fills whole blocks, the last of them with zeros."""
        if codes.is_meta or isinstance(codes, FakeTensor):  # shapes without data
            return codes.new_empty(shape, dtype=dtype)
        require_bitsandbytes()
        padded, row = codes.shape[-1] * 2, prod(shape[codes.ndim - 1 :])
        # With AVX512 bitsandbytes 0.50.2 gives wrong values if the last axis is no multiple of the block; here it always is.
        flat = torch.ops.bitsandbytes.dequantize_4bit(
            codes.reshape(-1), scales.reshape(-1), BLOCK, "nf4", (codes.numel() * 2 // padded, padded), dtype
        )
        return cast("Tensor", flat[:, :row].reshape(shape))


def pack(weight: Tensor, rows: int) -> Packed:
    """`weight` in 4 bits, in which the parts along its first `rows` axes (experts) are packed each by itself."""
    units = weight.detach().reshape(prod(weight.shape[:rows]), -1)
    padding = -units.shape[1] % BLOCK
    flat = nn.functional.pad(units, (0, padding)) if padding else units
    packed = [packed_blocks(part) for part in flat.reshape(-1).split(AT_ONCE)]
    codes, scales = (torch.cat(parts).view(*weight.shape[:rows], -1) for parts in zip(*packed, strict=True))
    return Packed(codes, scales, NF4(), tuple(weight.shape[rows:]), weight.dtype)


def packed_shape(weight: Tensor, rows: int) -> Packed:
    """What `pack` makes of `weight`, which is on the meta device, where it stays."""
    blocks_per_unit = -(-prod(weight.shape[rows:]) // BLOCK)
    codes, scales = (
        torch.empty((*weight.shape[:rows], size), dtype=dtype, device="meta")
        for size, dtype in ((blocks_per_unit * BLOCK // 2, torch.uint8), (blocks_per_unit, torch.float32))
    )
    return Packed(codes, scales, NF4(), tuple(weight.shape[rows:]), weight.dtype)


def packed_blocks(flat: Float[Tensor, " values"]) -> tuple[UInt8[Tensor, " bytes"], Float[Tensor, " scales"]]:
    """The codes of `flat`, whole blocks of values, and their scales; bitwise those of bitsandbytes, which takes 7 times as long
    on a CPU."""
    groups = flat.view(-1, BLOCK).float()
    scales = groups.abs().amax(dim=1)
    codes = nearest_codes((groups * (1 / scales.clamp(min=1e-38)).unsqueeze(1)).clamp(-1, 1).view(-1)).view(-1, 2)
    return (codes[:, 0] << 4) | codes[:, 1], scales


def nearest_codes(shares: Float[Tensor, " values"]) -> UInt8[Tensor, " values"]:
    """The code nearest to each of `shares`, which lie between -1 and 1."""
    lowest, bound = (each.to(shares.device) for each in code_table())
    cell = ((shares + 1) * CELLS).to(torch.int32)
    return lowest.index_select(0, cell) + (shares > bound.index_select(0, cell)).view(torch.uint8)


@cache
def code_table() -> tuple[Tensor, Tensor]:
    """For each cell of width 1 / CELLS from -1 on: its lowest code, and the bound above which the next code begins."""
    from bitsandbytes.functional import get_4bit_type

    codes: Tensor = get_4bit_type("nf4", device="cpu")  # type: ignore[no-untyped-call]
    bounds = (codes[1:] + codes[:-1]) / 2
    starts = torch.arange(2 * CELLS + 1) / CELLS - 1
    lowest = (bounds < starts.unsqueeze(1)).sum(dim=1)
    return lowest.to(torch.uint8), torch.cat([bounds, torch.tensor([2.0])])[lowest]


def packed_weights(model: nn.Module) -> dict[str, int]:
    """Path of each weight of `model` that is stored in 4 bits → its number of axes of rows: 1 of stacked experts, else 0.

    These are the matrices of experts and all other linear layers but routers, the output head, and gates, which have one row.
    """
    model_blocks = blocks(model).values()
    stacks = {
        f"{block.name}.experts.{matrix}": 1 for block in model_blocks if not block.is_switch for matrix in matrices(block.experts)
    }
    others = {id(module) for block in model_blocks for module in block.router.modules()}
    others.add(id(cast("Any", model).get_output_embeddings()))
    linears = {
        f"{path}.weight": 0
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) not in others and module.out_features > 1
    }
    return stacks | linears


@contextmanager
def packed_on_arrival(kind: Any) -> Iterator[Any]:
    """Within the block, a subclass of the model class `kind` whose weights are packed as soon as they are set.

    So at no time more than one stack of experts is there unpacked.
    """
    targets: dict[tuple[int, str], int] = {}

    def init(self: Any, config: Any, *args: Any, **options: Any) -> None:
        kind.__init__(self, config, *args, **options)
        for path, rows in packed_weights(self).items():
            parent, _, name = path.rpartition(".")
            targets[id(self.get_submodule(parent)), name] = rows

    def pack_parameter(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        rows = targets.get((id(module), name))
        if rows is None or parameter is None or parameter.is_meta or isinstance(parameter, Packed):
            return None
        packed = as_parameter(pack(parameter, rows))
        cast("Any", packed)._is_hf_initialized = True  # else transformers would initialize it
        return packed

    # transformers reads the source of __module__ to see which implementations of experts a class allows.
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    handle = register_module_parameter_registration_hook(cast("Any", pack_parameter))  # torch types it as without a result
    try:
        yield type(kind.__name__, (kind,), {"__init__": init, **names})
    finally:
        handle.remove()


@cache
def require_bitsandbytes() -> None:
    """Imports bitsandbytes, which adds its operations to torch.

    Raises:
        BadValue: it is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise BadValue(
            'model.quantize = "nf4" needs bitsandbytes, which is not installed; install it (pip install "fedexperts[quant]"), or '
            "leave quantize out"
        )
    import bitsandbytes  # noqa: F401
