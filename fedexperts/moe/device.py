"""The devices of torch: which a setting names, which there are, and what has to hold around work on one."""

import copy
import gc
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedexperts.errors import BadValue

Devices = str | tuple[str, ...]
"""The setting: "auto", or the name of a device, or the names of several."""

_NAME = re.compile(r"cpu|cuda(:\d+)?|mps")
_ALLOWED = 'give "auto", "cpu", "cuda", "cuda:1" (a card by its number), "mps", or a list of devices of one type'


def validated_devices(value: object) -> object:
    """Validates that `value` is the setting of a device, and returns it, a list as a tuple.

    Raises:
        BadValue: it is not, or a list has devices of several types: which client is on which would depend on who is free.
    """
    if value == "auto":
        return value
    given = value if isinstance(value, list | tuple) else [value]
    names = [name for name in given if isinstance(name, str) and _NAME.fullmatch(name)]
    if not names or len(names) < len(given):
        raise BadValue(f"training.device = {value!r:.80} is no device; {_ALLOWED}")
    if len({name.partition(":")[0] for name in names}) > 1:
        raise BadValue(f"training.device = {value!r:.80} has devices of several types, which give other bits; {_ALLOWED}")
    return tuple(names) if isinstance(value, list | tuple) else value


def available() -> tuple[str, ...]:
    """The devices of this machine."""
    cards = [f"cuda:{number}" for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    return ("cpu", *cards, *(["mps"] if torch.backends.mps.is_available() else []))


def find_devices(setting: Devices) -> tuple[str, ...]:
    """The devices that `setting` names, on this machine; "auto": the first card, else mps, else the CPU; "cuda": the first card.

    Raises:
        BadValue: one that this machine does not have.
    """
    there = available()
    if setting == "auto":
        return (there[1] if len(there) > 1 else "cpu",)
    names = (setting,) if isinstance(setting, str) else setting
    chosen = tuple("cuda:0" if name == "cuda" else name for name in names)
    if missing := [name for name in chosen if name not in there]:
        raise BadValue(
            f"training.device names {missing[0]}, and this machine has {', '.join(there)}; name what there is, or set "
            'training.device = "auto"'
        )
    return chosen


def kind_of(devices: Sequence[str]) -> str:
    """What the bits of a result depend on: the type of the `devices` of this machine, with the model of graphics cards."""
    kinds = {f"cuda ({torch.cuda.get_device_name(name)})" if name.startswith("cuda") else name for name in devices}
    return ", ".join(sorted(kinds))


def device_of(model: nn.Module) -> torch.device:
    """The device of the weights of `model`, which are all on one."""
    return next(model.parameters()).device


def on_device(model: nn.Module, device: str) -> nn.Module:
    """`model` itself if it is on `device`; otherwise a copy of it there. Tied weights stay tied."""
    here, there = device_of(model), torch.device(device)
    if here.type == there.type and here.index == (here.index if there.index is None else there.index):
        return model
    if there.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; without it cuBLAS may vary
    return with_tensors(model, lambda tensor: tensor.detach().to(there))


def with_tensors(model: nn.Module, make: Callable[[Tensor], Tensor]) -> nn.Module:
    """A twin of `model` with `make(tensor)` of each of its parameters and buffers; tied parameters stay tied."""
    memo: dict[int, Any] = {id(buffer): make(buffer) for buffer in model.buffers()}
    for old in model.parameters():
        memo[id(old)] = nn.Parameter(make(old.detach()), requires_grad=old.requires_grad)
    return copy.deepcopy(model, memo)


def to_device(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """`tensors` on `device`; those that are there are not copied."""
    return {name: tensor.to(device) for name, tensor in tensors.items()}


@contextmanager
def working_on(device: torch.device) -> Iterator[None]:
    """On a graphics card: makes it the current one, and has torch take deterministic kernels, and warn where it has none."""
    if device.type != "cuda":
        yield
        return
    before, only_warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.cuda.device(device):
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warned)


def generator_states(device: torch.device) -> tuple[Tensor, ...]:
    """The states of torch's global generators: the CPU's, and that of `device` if it is another."""
    if device.type in ("cpu", "meta"):
        return (torch.get_rng_state(),)
    module: Any = torch.get_device_module(device)
    return torch.get_rng_state(), module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)


def set_generator_states(states: Sequence[Tensor], device: torch.device) -> None:
    """Sets what `generator_states` gave for `device`."""
    torch.set_rng_state(states[0])
    for state in states[1:]:
        module: Any = torch.get_device_module(device)
        module.set_rng_state(state) if device.type == "mps" else module.set_rng_state(state, device)


@contextmanager
def kept_generators(device: torch.device) -> Iterator[None]:
    """Afterwards torch's global generators, of the CPU and of `device`, are as before."""
    states = generator_states(device)
    try:
        yield
    finally:
        set_generator_states(states, device)


def out_of_memory(error: Exception, device: torch.device) -> str | None:
    """What a job on `device` needed when it ran out of its memory, and what helps; None if `error` is another one."""
    said = " ".join(str(error).split())
    if not isinstance(error, torch.OutOfMemoryError) and not (isinstance(error, RuntimeError) and "out of memory" in said):
        return None
    asked, total, free = (
        match.group(1) if (match := re.search(pattern, said)) else None
        for pattern in (
            r"[Tt]ried to allocate ([\d.]+ \w+)",
            r"(?:capacity of|max allowed:) ([\d.]+ \w+)",
            r"([\d.]+ \w+) is free",
        )
    )
    need = f"it needed {asked or 'more'} beyond what it had"
    has = f", and {device} has {total}" if total else ""
    left = f", {free} of it free" if total and free else ""
    return (
        f"out of memory on {device}: {need}{has}{left}; lower training.batch_size or data.max_tokens, give the card fewer "
        'federation.workers, or set training.gradient_checkpointing or model.quantize = "nf4"'
    )


def release(device: torch.device) -> None:
    """Gives the memory that torch keeps for later on a card or on mps back to it."""
    if device.type in ("cuda", "mps"):
        gc.collect()  # a failure's frames may be in circles
        torch.get_device_module(device).empty_cache()
