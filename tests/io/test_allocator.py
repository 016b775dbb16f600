"""Freed memory goes back to the system."""

import ctypes
import subprocess
import sys

import pytest

if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"):
    pytest.skip("the C library is not glibc 2.33 or later", allow_module_level=True)

SCRIPT = """
from pathlib import Path

import torch

from fedexperts.io import allocator

PART = 2**20


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def with_gaps(size):
    '''Tensors between which `size` bytes were freed: glibc keeps them, since what lies above is in use.'''
    parts = [torch.ones(PART // 4) for _ in range(2 * size // PART)]
    return parts[1::2]


with allocator.freed_at_once():
    pass  # sets the thresholds: from here on tensors of PART bytes are not mapped each by itself
allocator.MOST_KEPT = 2**26
allocator.return_freed()
used = with_gaps(2**25)
before = resident()
allocator.return_freed()
assert resident() > before - 2**24, "little: it stays"
used += with_gaps(2**27)
before = resident()
allocator.return_freed()
assert resident() < before - 2**26, "much: it goes back"
assert all(bool((part == 1).all()) for part in used)
"""


def test_freed_memory_between_what_is_used_goes_back_if_there_is_much_of_it():
    """In a process of its own: what other tests freed counts, too."""
    ran = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
