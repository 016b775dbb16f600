"""The device that these tests compare with the CPU: `twin`, or with FEDEXPERTS_TEST_DEVICE=cuda the first graphics card."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import second_device

WANTED = os.environ.get("FEDEXPERTS_TEST_DEVICE", "twin")
NEAR = 1e-6 if WANTED == "twin" else 1e-4
"""How far numbers may be from the CPU's: twin has its kernels, a card has others."""

ALONE = "torch has to know the device before the first backward pass: run `pytest tests/device` by itself, as `make test` does"


@pytest.fixture(scope="session")
def device():
    """The name of the device."""
    if WANTED != "twin":
        if not torch.cuda.is_available():
            pytest.skip(f"FEDEXPERTS_TEST_DEVICE = {WANTED}, and torch sees no graphics card here")
        return "cuda:0"
    if why := second_device.missing():
        pytest.skip(why)
    twin = second_device.load()
    if not second_device.has_backward(twin):
        pytest.fail(ALONE)
    return twin


@pytest.fixture(scope="session")
def near():
    """Whether two tensors, or two dicts of them, are equal but for the kernels' rounding; and on the CPU."""

    def compare(one, other):
        if isinstance(one, torch.Tensor):
            assert one.device.type == other.device.type == "cpu"
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
            gap = (one.double() - other.double()).abs().max().item() if one.numel() else 0.0
            return gap <= NEAR * max(1.0, one.double().abs().max().item() if one.numel() else 0.0)
        assert one.keys() == other.keys()
        return all(compare(one[name], other[name]) for name in one)

    return compare
