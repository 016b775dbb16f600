"""The meter of live tensor bytes."""

import torch
from torch import nn

from fedexperts.moe.memory import MemoryMeter

KILO = 256  # floats in a kibibyte


def test_the_peak_is_what_was_alive_at_once():
    with MemoryMeter() as meter:
        first = torch.ones(4 * KILO)
        del first
        second = torch.ones(3 * KILO)
        third = torch.ones(2 * KILO)
        del second, third
    assert meter.peak_bytes == 5 * 1024
    assert meter.bytes == 0


def test_a_view_adds_nothing_and_keeps_its_storage_alive():
    with MemoryMeter() as meter:
        whole = torch.ones(2 * KILO)
        part = whole[:1]
        del whole
        assert meter.bytes == 2 * 1024
        del part
        assert meter.bytes == 0


def test_tensors_that_exist_before_count_once():
    layer = nn.Linear(KILO, 4, bias=False)
    with MemoryMeter(layer, [layer.weight, layer.weight.detach()]) as meter:
        pass
    assert meter.peak_bytes == 4 * 1024


def test_a_step_with_adamw_holds_four_times_the_parameters():
    layer = nn.Linear(KILO, 100, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    for _ in range(2):
        with MemoryMeter(layer, optimizer) as meter:
            layer(torch.ones(1, KILO)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert 400 * 1024 < meter.peak_bytes < 404 * 1024


def test_what_autograd_saves_is_counted():
    weight = torch.ones(1, requires_grad=True)
    with MemoryMeter() as meter:
        out = (torch.ones(KILO) * weight).exp().exp()
        saved = meter.bytes
    assert saved == 3 * 1024 + 0 * len(out)  # ones and two results of exp; the product is gone


def test_a_meter_that_is_done_keeps_nothing_alive():
    meter = MemoryMeter([torch.ones(KILO)])
    with meter:
        pass
    assert meter.owners == ()
    assert not meter.storages


def test_a_peak_that_is_over_stays_the_peak():
    with MemoryMeter() as meter:
        first = torch.ones(4 * KILO)
        del first
        second = torch.ones(KILO)
    assert (meter.peak_bytes, len(second)) == (4 * 1024, KILO)
