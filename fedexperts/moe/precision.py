"""Mixed precision: frozen weights as they are stored, trained weights in float32, products in the compute dtype.

A model in float16 or bfloat16 runs under autocast, so that its trained weights can be float32: an update of a step, or the mean
of several clients', is often smaller than the distance between two numbers in bfloat16.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from fedexperts.errors import BadValue
from fedexperts.moe.anatomy import blocks

Precision = Literal["auto", "float32", "bfloat16", "float16"]
HALF = (torch.bfloat16, torch.float16)


def trained_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a weight of this dtype is trained: float32 instead of float16 and bfloat16."""
    return torch.float32 if dtype in HALF else dtype


def compute_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the products of `model`, which `mixed_precision` has set; float32 where it has not."""
    return cast("torch.dtype", getattr(model, "compute_dtype", torch.float32))


def mixed_precision(model: nn.Module, precision: Precision) -> None:
    """Lets the forward passes of `model` compute in `precision`, in place; "auto": in the dtype of its weights.

    Routers compute in the dtype of their own weights, without autocast: some families' are float32 in every model, and a token
    that is routed by rounded scores goes to other experts.

    Raises:
        BadValue: float32 for a model whose weights are not.
    """
    if hasattr(model, "compute_dtype"):  # set when the model was first prepared
        return
    stored = next(weight.dtype for weight in model.parameters() if weight.is_floating_point())
    dtype = stored if precision == "auto" else cast("torch.dtype", getattr(torch, precision))
    if dtype == torch.float32 and stored in HALF:
        raise BadValue(
            f'training.precision = "float32", but the model is {str(stored).removeprefix("torch.")}; set model.dtype = "float32" '
            "too, or leave precision out"
        )
    cast("Any", model).compute_dtype = dtype
    if dtype not in HALF:
        return
    for part in entrances(model):
        cast("Any", part).compute_dtype = dtype
        part.register_forward_pre_hook(enter_autocast, with_kwargs=True)
        part.register_forward_hook(leave_autocast, always_call=True)
    for block in blocks(model).values():
        block.router.register_forward_pre_hook(enter_own_dtype)
        block.router.register_forward_hook(leave_autocast, always_call=True)


def undo_mixed_precision(model: nn.Module) -> None:
    """Lets `model` compute in the dtype of its weights again, in place: as transformers runs a model that it has loaded."""
    for module in (*entrances(model), *(block.router for block in blocks(model).values())):
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in (enter_autocast, enter_own_dtype, leave_autocast)]:
                del hooks[key]
        vars(module).pop("compute_dtype", None)


def entrances(model: nn.Module) -> Iterator[nn.Module]:
    """The modules whose forward is called from outside: the model, and an encoder, which generation runs by itself."""
    yield model
    if cast("Any", model).config.is_encoder_decoder:
        yield cast("Any", model).get_encoder()


def enter_autocast(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    """A forward pre-hook: starts autocast to the compute dtype of `module`."""
    device = next(each.device.type for each in (*args, *named.values()) if isinstance(each, Tensor))
    push(module, torch.autocast("cpu" if device == "meta" else device, compute_dtype(module)))


def enter_own_dtype(router: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A forward pre-hook: suspends autocast, and gives the router the hidden states in the dtype of its weights."""
    hidden, *others = args
    push(router, torch.autocast("cpu" if hidden.device.type == "meta" else hidden.device.type, enabled=False))
    return hidden.to(next(router.parameters()).dtype), *others


def push(module: nn.Module, context: torch.autocast) -> None:
    """Enters `context` until `leave_autocast` is called for the same forward pass of `module`."""
    context.__enter__()
    vars(module).setdefault("autocasts", []).append(context)


def leave_autocast(module: nn.Module, args: Any, output: Any) -> None:
    """A forward hook: leaves what the pre-hook entered, also if forward failed."""
    cast("Any", module).autocasts.pop().__exit__(None, None, None)


def current_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast as it is now on `device`, to be entered again in backward; nothing without it."""
    enabled = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, torch.get_autocast_dtype(device.type)) if enabled else nullcontext()


def for_product(rows: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """`rows` and `weights` in one dtype, for products that autocast does not know: its own, or without it that of `rows`."""
    kind = rows.device.type
    dtype = torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else rows.dtype
    return tuple(each.to(dtype) for each in (rows, *weights))
