"""Names of devices, and what holds around work on one."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from fedexperts.errors import BadValue
from fedexperts.moe import device
from fedexperts.testing import tiny_model

CPU = torch.device("cpu")


@pytest.fixture
def two_cards(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda name: "NVIDIA H200")


@pytest.fixture
def no_cards(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.parametrize("setting", ["auto", "cpu", "cuda", "cuda:12", "mps", ("cuda:0", "cuda:1"), ("cuda",)])
def test_what_a_setting_may_name(setting):
    assert device.validated_devices(setting) == setting
    if isinstance(setting, tuple):
        assert device.validated_devices(list(setting)) == setting


@pytest.mark.parametrize("setting", ["gpu", "cuda:", "cpu:0", "", [], ["auto"], ["cuda", 1], 0, None, True, "cuda:1 "])
def test_anything_else_is_refused(setting):
    with pytest.raises(BadValue, match=r"^training.device = .* is no device; give \"auto\", \"cpu\", \"cuda\", \"cuda:1\""):
        device.validated_devices(setting)


def test_devices_of_several_types_are_refused():
    with pytest.raises(BadValue, match="has devices of several types, which give other bits"):
        device.validated_devices(["cpu", "cuda:0"])


def test_auto_is_a_card_where_there_is_one(two_cards):
    assert device.find_devices("auto") == device.find_devices("cuda") == ("cuda:0",)
    assert device.find_devices(("cuda:1", "cuda")) == ("cuda:1", "cuda:0")
    assert device.find_devices("cpu") == ("cpu",)
    assert device.kind_of(("cuda:0", "cuda:1")) == "cuda (NVIDIA H200)"
    with pytest.raises(BadValue, match=r"names cuda:2, and this machine has cpu, cuda:0, cuda:1"):
        device.find_devices(("cuda:0", "cuda:2"))


def test_auto_is_the_cpu_without_any_other(no_cards):
    assert device.find_devices("auto") == ("cpu",)
    assert device.kind_of(("cpu",)) == "cpu"
    for name in ("cuda", "mps"):
        with pytest.raises(BadValue, match="and this machine has cpu; name what there is"):
            device.find_devices(name)


def test_auto_is_mps_where_that_is_all(no_cards, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device.find_devices("auto") == device.find_devices("mps") == ("mps",)


def test_a_model_moves_as_a_copy_and_only_if_it_has_to():
    model = tiny_model("olmoe")
    assert device.on_device(model, "cpu") is model
    there = device.on_device(model, "meta")
    assert device.device_of(there) == torch.device("meta") and device.device_of(model) == CPU
    assert device.on_device(there, "meta") is there


def test_generators_are_put_back():
    before = torch.get_rng_state()
    with device.kept_generators(CPU):
        states = device.generator_states(CPU)
        first = torch.rand(3)
        device.set_generator_states(states, CPU)
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_work_on_a_card_is_deterministic_and_only_that(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    with device.working_on(CPU):
        assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(KeyError), device.working_on(torch.device("cuda:1")):
        assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()


ON_CUDA = """CUDA out of memory. Tried to allocate 2.50 GiB. GPU 1 has a total capacity of 79.15 GiB of which 1.25 GiB is free.
Including non-PyTorch memory, this process has 77.89 GiB memory in use."""
ON_MPS = """MPS backend out of memory (MPS allocated: 8.01 GB, other allocations: 1.00 GB, max allowed: 9.07 GB).
Tried to allocate 256.00 MB on private pool."""


def test_a_lack_of_memory_says_what_was_needed_what_there_is_and_what_helps():
    said = device.out_of_memory(torch.OutOfMemoryError(ON_CUDA), torch.device("cuda:1"))
    assert said.startswith(
        "out of memory on cuda:1: it needed 2.50 GiB beyond what it had, and cuda:1 has 79.15 GiB, 1.25 GiB of it free; lower "
        "training.batch_size or data.max_tokens"
    )
    assert len(said) <= 300
    assert "needed 256.00 MB beyond what it had, and mps has 9.07 GB; " in device.out_of_memory(
        RuntimeError(ON_MPS), torch.device("mps")
    )
    assert "it needed more beyond" in device.out_of_memory(RuntimeError("CUDA error: out of memory"), torch.device("cuda:0"))


@pytest.mark.parametrize("error", [RuntimeError("shapes"), KeyError("out of memory"), ValueError("x")])
def test_other_errors_are_no_lack_of_memory(error):
    assert device.out_of_memory(error, CPU) is None


def test_memory_is_given_back_to_a_card_alone(monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    device.release(CPU)
    assert emptied == []
    device.release(torch.device("cuda:0"))
    assert emptied == [1]


def test_the_device_of_a_model_is_that_of_its_weights():
    assert device.device_of(nn.Linear(1, 1, device="meta")) == torch.device("meta")
