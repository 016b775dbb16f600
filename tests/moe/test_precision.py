import pytest
import torch
from torch import nn

from fedexperts.errors import BadValue
from fedexperts.moe.anatomy import anatomy, blocks
from fedexperts.moe.precision import compute_dtype, trained_dtype
from fedexperts.moe.routing import Recorder
from fedexperts.moe.shrink import shrink
from fedexperts.moe.tuning import Tuning, prepare
from fedexperts.testing import FAMILIES, tiny_batch, tiny_model

FULL, LORA = Tuning(), Tuning("lora", ("attention", "experts", "router"), rank=8)
every_family = pytest.mark.parametrize("family", FAMILIES)


def half(family: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A tiny model as transformers loads it in another dtype: ERNIE's and Switch's routers stay in float32."""
    model = tiny_model(family).to(dtype)
    for block in blocks(model).values():
        if family in ("ernie4_5_moe", "switch_transformers"):
            block.router.to(torch.float32)
    return model


def prepared(base: nn.Module, tuning: Tuning) -> nn.Module:
    return prepare(shrink(base, anatomy(base).all_experts), tuning, seed="0")


@every_family
@pytest.mark.parametrize("tuning", [FULL, LORA], ids=["full", "lora"])
def test_what_is_trained_is_float32_and_what_is_frozen_stays_as_it_is(family, tuning):
    base = half(family)
    model = prepared(base, tuning)
    model(**tiny_batch(family)).loss.backward()
    of_base = {parameter.data_ptr(): parameter.dtype for parameter in base.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32, name
            assert parameter.grad is None or parameter.grad.dtype == torch.float32
        else:
            assert of_base[parameter.data_ptr()] == parameter.dtype, name
    assert compute_dtype(model) == torch.bfloat16
    assert {parameter.dtype for parameter in base.parameters()} <= {torch.bfloat16, torch.float32}


@every_family
@pytest.mark.parametrize("tuning", [FULL, LORA], ids=["full", "lora"])
def test_a_model_in_bfloat16_computes_nearly_what_it_does_in_float32(family, tuning):
    base, batch = half(family), tiny_batch(family)
    with torch.no_grad():
        low = prepared(base, tuning).eval()(**batch).logits.float()
        whole = prepared(base.to(torch.float32), tuning).eval()(**batch).logits
    assert float((low - whole).norm() / whole.norm()) < 0.1  # a token near the border between two experts may cross it


def test_products_are_bfloat16_in_a_float32_model_where_precision_says_so():
    model = prepared(tiny_model("olmoe"), Tuning("lora", ("experts",), rank=8, precision="bfloat16"))
    assert {each.dtype for each in model.parameters()} == {torch.float32} and compute_dtype(model) == torch.bfloat16
    seen = []
    block = next(iter(blocks(model).values()))
    block.module.register_forward_hook(lambda module, args, output: seen.append(args[0].dtype))
    q = next(module for name, module in model.named_modules() if name.endswith("q_proj"))
    q.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    model(**tiny_batch("olmoe"))
    assert torch.bfloat16 in seen


def test_routers_compute_in_the_dtype_of_their_weights():
    model = prepared(half("olmoe"), LORA)  # the router is trained, so float32
    with Recorder(model, keep_logits=True) as recorder:
        model(**tiny_batch("olmoe"))
    assert {logits.dtype for passes in recorder.logits.values() for logits in passes} == {torch.float32}


def test_products_in_float32_need_weights_in_float32():
    with pytest.raises(BadValue, match=r'set model\.dtype = "float32"'):
        prepared(half("olmoe"), Tuning(precision="float32"))


def test_weights_in_half_precision_are_trained_in_float32():
    assert [trained_dtype(each) for each in (torch.bfloat16, torch.float16, torch.float32)] == [torch.float32] * 3
