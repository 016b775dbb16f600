"""Your own model folder: any Mixture-of-Experts model of transformers with its tokenizer; here a tiny new Mixtral.

    python examples/own_model.py

Such a folder needs config.json, the weights and a tokenizer, as `save_pretrained` writes them; MoE layers are found by their
structure. The model here starts from random weights and learns two generated tasks. It takes half a minute; all results are in
results/own-model.
"""

from pathlib import Path

import torch
from rich import print
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

import fedexperts
from fedexperts import report
from fedexperts.data import synthetic
from fedexperts.export import export
from fedexperts.models.summary import inspect, render

TASKS = ("room", "feeling")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer trained on the texts of the tasks."""
    texts = [f"{example.prompt}{example.response}" for task in TASKS for example in synthetic.examples(task, 300, seed=0)]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # so that it can encode any text
    special = ["<pad>", "<s>", "</s>"]
    made.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def make_model(folder: Path) -> None:
    """Saves a Mixtral with two layers of eight experts, top-2, and its tokenizer in `folder`."""
    tokenizer = make_tokenizer()
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,  # of one expert
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    out = Path("results/own-model")
    base, taken = out / "base", out / "global"
    if not base.exists():
        make_model(base)
    print(render(inspect(base, keep=4)))  # the MoE layers, and what a client with four experts per layer would hold

    run = {
        "model": {"name": str(base)},
        "method": {"name": "fedmoe", "profile_rounds": 1},
        "training": {"lr": 3e-3, "batch_size": 16, "local_steps": 20},
        "federation": {"rounds": 6},
        "devices": {"memory_share": {"uniform": [1.0, 1.6]}},
        "evaluation": {"every": 3, "generate_tokens": 8},
        "data": {
            "sources": [f"synthetic/{task}" for task in TASKS],
            "clients": 4,
            "limit": 300,
            "test_examples": 20,
            "max_tokens": 32,
        },
    }
    folder = fedexperts.run(run, out / "run", resume=True)
    report.write([folder], html=folder / "report.html")
    print(report.table([folder]))

    if not taken.exists():
        export(folder, taken)  # the global model: a plain transformers folder, independent of fedexperts
    model, tokenizer = AutoModelForCausalLM.from_pretrained(taken), AutoTokenizer.from_pretrained(taken)
    print(f"{type(model).__name__} with {model.num_parameters():,} parameters, {len(tokenizer)} tokens, in {taken}")
