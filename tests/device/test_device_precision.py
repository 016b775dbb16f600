"""Mixed precision, checkpointed activations and accumulated gradients on another device."""

from dataclasses import replace

import pytest
import torch
from test_families import STEP, trained

from fedexperts.moe import rows
from fedexperts.testing import FAMILIES, tiny_model

every_family = pytest.mark.parametrize("family", FAMILIES)
every_tuning = pytest.mark.parametrize("train", ["full", "lora"])
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation")


@every_tuning
@every_family
def test_a_step_in_bfloat16_is_near_that_of_the_cpu_and_trains_float32(family, train, device):
    """Near: the device's autocast rounds at other places. A router that is not near would send tokens elsewhere."""
    training = replace(STEP, train=train, precision="bfloat16")
    (_, ours, _), (model, theirs, _) = (trained(family, each, training) for each in ("cpu", device))
    assert theirs.loss == pytest.approx(ours.loss, rel=0.02)
    weights = [each for each in model.parameters() if each.requires_grad]
    assert weights and all(each.dtype == torch.float32 and each.device == torch.device(device) for each in weights)


@pytest.mark.parametrize("select", [False, True], ids=["whole", "selective"])
@every_tuning
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "switch_transformers"])
def test_checkpointing_and_accumulation_change_the_weights_as_on_the_cpu(family, train, select, device, near):
    training = replace(STEP, train=train, gradient_checkpointing=True, gradient_accumulation_steps=2, batch_size=2)
    (here, ours, _), (there, theirs, _) = (trained(family, each, training, select=select) for each in ("cpu", device))
    assert near(rows.read(here), rows.read(there))
    assert theirs.routed == ours.routed and theirs.loss == pytest.approx(ours.loss, abs=1e-4)


@every_tuning
def test_a_base_in_bfloat16_stays_so_on_the_device(train, device, monkeypatch):
    monkeypatch.setattr("test_families.tiny_model", lambda family: tiny_model(family).to(torch.bfloat16))
    model, fitted, _ = trained("olmoe", device, replace(STEP, train=train))
    assert {each.dtype for each in model.parameters() if not each.requires_grad} <= {torch.bfloat16}
    assert {each.dtype for each in model.parameters() if each.requires_grad} == {torch.float32}
    assert 0 < fitted.loss < 10 and all(tensor.device.type == "cpu" for tensor in rows.read(model).values())
