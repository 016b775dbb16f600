import pytest
import torch

from fedexperts.moe.kernel import choose_kernel, fits
from fedexperts.testing import tiny_model


@pytest.mark.parametrize(("width", "kernel"), [(16, "grouped_mm"), (18, "eager")])
def test_experts_are_grouped_where_their_rows_are_whole_16_bytes(width, kernel):
    model = tiny_model("olmoe", intermediate_size=width)
    choose_kernel(model)
    assert model.config._experts_implementation == kernel


def test_experts_of_switch_keep_their_own_way():
    model = tiny_model("switch_transformers")
    before = model.config._experts_implementation
    choose_kernel(model)
    assert model.config._experts_implementation == before


def test_both_inner_dimensions_count_and_the_number_of_experts_does_not():
    assert fits(torch.empty(3, 8, 4)) and not fits(torch.empty(3, 4, 6)) and not fits(torch.empty(3, 6, 4))
    assert not fits(torch.empty(3, 8, 4, dtype=torch.bfloat16))
