"""Freed memory goes back to the system."""

import ctypes
import sys
from pathlib import Path

import pytest
import torch

from fedexperts.io import allocator

if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"):
    pytest.skip("the C library is not glibc 2.33 or later", allow_module_level=True)

PART = 2**20


def resident():
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def with_gaps(size):
    """Tensors between which `size` bytes were freed: glibc keeps them, since what lies above is in use."""
    parts = [torch.ones(PART // 4) for _ in range(2 * size // PART)]
    return parts[1::2]


def test_freed_memory_between_what_is_used_goes_back_if_there_is_much_of_it(monkeypatch):
    with allocator.freed_at_once():
        pass  # sets the thresholds: from here on tensors of PART bytes are not mapped each by itself
    monkeypatch.setattr(allocator, "MOST_KEPT", -1)
    allocator.return_freed()  # what earlier tests left
    monkeypatch.setattr(allocator, "MOST_KEPT", 2**26)
    used = with_gaps(2**25)
    before = resident()
    allocator.return_freed()
    assert resident() > before - 2**24  # little: it stays
    used += with_gaps(2**27)
    before = resident()
    allocator.return_freed()
    assert resident() < before - 2**26
    assert all(bool((part == 1).all()) for part in used)
