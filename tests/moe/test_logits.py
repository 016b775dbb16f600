import pytest
import torch

from fedexperts.moe.logits import IGNORED, predictions
from fedexperts.testing import FAMILIES, tiny_batch, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_predictions_are_the_logits_before_each_target_and_leave_out_places_without_one(family):
    model = tiny_model(family).eval()
    batch = tiny_batch(family, 2, 12, padding=0)
    batch["labels"][:, :7] = IGNORED
    batch["labels"][0, 9:] = IGNORED
    with torch.no_grad():
        logits, targets = predictions(model, batch)
        inputs = batch if family == "switch_transformers" else {key: batch[key] for key in ("input_ids", "attention_mask")}
        whole = model(**inputs).logits

    shift = 0 if family == "switch_transformers" else 1
    predicted = (targets != IGNORED).nonzero()
    labeled = (batch["labels"] != IGNORED).nonzero()
    assert len(predicted) == len(labeled) == 2 + 5
    torch.testing.assert_close(logits[targets != IGNORED], whole[labeled[:, 0], labeled[:, 1] - shift])
    assert torch.equal(targets[targets != IGNORED], batch["labels"][batch["labels"] != IGNORED])
    if family != "switch_transformers":
        assert logits.shape[1] == targets.shape[1] == 5


def test_a_batch_without_any_target_has_no_predictions():
    batch = tiny_batch("olmoe")
    batch["labels"][:] = IGNORED
    logits, targets = predictions(tiny_model("olmoe"), batch)
    assert logits.shape == (2, 0, 64) and targets.shape == (2, 0)
