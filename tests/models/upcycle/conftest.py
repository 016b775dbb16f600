"""Tiny random dense models with a tokenizer of bytes, and texts for them."""

from random import Random

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fedexperts.models.tokenizer import make_tokenizer

VOCABULARY = 320
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def dense_model(family, seed=0, **settings):
    """A random dense model, with weights of 0.3, so that each part of it shows in its logits."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**COMMON, **settings}))
    chance = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=chance))
    return model.eval()


@pytest.fixture
def saved(tmp_path):
    """Saves a dense model of a family with a tokenizer; gives the model and its folder."""

    def save(family, name="dense", seed=0, **settings):
        model = dense_model(family, seed, **settings)
        model.save_pretrained(tmp_path / name)
        make_tokenizer(128).save_pretrained(tmp_path / name)
        return model, tmp_path / name

    return save


@pytest.fixture
def text(tmp_path):
    """A file with random words of some letters."""

    def write(name="text.txt", letters="abcdefgh", words=1500):
        rng = Random(name)
        path = tmp_path / name
        path.write_text(" ".join("".join(rng.choices(letters, k=5)) for _ in range(words)))
        return path

    return write


@pytest.fixture
def logits():
    """The logits of a model for a batch of random tokens."""

    @torch.no_grad()
    def of(model):
        ids = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(7))
        return model(input_ids=ids).logits

    return of
