"""Tiny random models of every supported family, with batches, clients and servers: no download, CPU, under a second."""

from collections.abc import Iterable, Mapping, Sequence
from random import Random
from typing import Any, cast

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

from fedexperts.data.encode import Encoder
from fedexperts.moe import rows
from fedexperts.moe.anatomy import Anatomy, BlockShape, Experts, anatomy, blocks
from fedexperts.moe.footprint import Footprint, footprint
from fedexperts.moe.shrink import shrink
from fedexperts.moe.tuning import prepare
from fedexperts.types import Client, ClientContext, Example, Server, Split, Training

VOCABULARY = 64
_PAD, _FIRST_WORD = 0, 3  # 1 and 2 begin and end a sequence

_ALL: Mapping[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": _PAD, "bos_token_id": 1, "eos_token_id": 2}
_DECODER: Mapping[str, Any] = {
    **_ALL,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_LATENT_ATTENTION: Mapping[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
_DENSE_FIRST: Mapping[str, Any] = {
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}

# Config keys of each family for the number of experts and the number per token, and its other required keys.
_SPECIFIC: Mapping[str, tuple[str, str | None, Mapping[str, Any]]] = {
    "mixtral": ("num_local_experts", "num_experts_per_tok", {"intermediate_size": 24}),
    "qwen2_moe": (
        "num_experts",
        "num_experts_per_tok",
        {"intermediate_size": 48, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
    ),
    "qwen3_moe": (
        "num_experts",
        "num_experts_per_tok",
        {"intermediate_size": 48, "moe_intermediate_size": 16, "head_dim": 8, "norm_topk_prob": True},
    ),
    "olmoe": ("num_experts", "num_experts_per_tok", {"intermediate_size": 16}),
    "deepseek_v2": (
        "n_routed_experts",
        "num_experts_per_tok",
        {**_DENSE_FIRST, **_LATENT_ATTENTION, "topk_method": "greedy"},
    ),
    "deepseek_v3": ("n_routed_experts", "num_experts_per_tok", {**_DENSE_FIRST, **_LATENT_ATTENTION}),
    "phimoe": ("num_local_experts", "num_experts_per_tok", {"intermediate_size": 24, "input_jitter_noise": 0.0}),
    "gpt_oss": (
        "num_local_experts",
        "num_experts_per_tok",
        {"intermediate_size": 16, "head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
    "granitemoe": ("num_local_experts", "num_experts_per_tok", {"intermediate_size": 16}),
    "ernie4_5_moe": (
        "moe_num_experts",
        "moe_k",
        {"intermediate_size": 48, "moe_intermediate_size": 16, "moe_layer_start_index": 1, "moe_num_shared_experts": 1},
    ),
    "glm4_moe": ("n_routed_experts", "num_experts_per_tok", {**_DENSE_FIRST, "head_dim": 8}),
    "switch_transformers": (
        "num_experts",
        None,  # always one
        {
            "d_model": 32,
            "d_ff": 24,
            "d_kv": 8,
            "num_heads": 4,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "decoder_start_token_id": _PAD,
            "dropout_rate": 0.0,
            "router_jitter_noise": 0.0,
        },
    ),
}

FAMILIES: tuple[str, ...] = tuple(_SPECIFIC)
"""The model types that the tests cover."""


def tiny_config(family: str, num_experts: int = 8, top_k: int = 2, **overrides: Any) -> Any:
    """The config of `tiny_model`; `overrides` are keys of the family's config."""
    experts_key, top_k_key, specific = _SPECIFIC[family]
    common = _ALL if family == "switch_transformers" else _DECODER
    chosen = {experts_key: num_experts, **({top_k_key: top_k} if top_k_key else {})}
    return AutoConfig.for_model(family, **{**common, **specific, **chosen, **overrides})


def tiny_model(family: str, num_experts: int = 8, top_k: int = 2, seed: int = 0, **overrides: Any) -> nn.Module:
    """A random model of `family` in eval mode, the same for the same arguments; torch's generator is left unchanged.

    Its routers clearly prefer some experts (those of a fresh model are often zero), and their bias, if any, is not zero.
    Its dimensions suit grouped_mm. Training is deterministic, except for PhiMoE's router.
    """
    config = tiny_config(family, num_experts, top_k, **overrides)
    kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cast("nn.Module", kind.from_config(config))
        _wake_routers(model)
    return model.eval()


def tiny_batch(family: str, batch_size: int = 2, tokens: int = 12, padding: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """Input for `tiny_model`; all sequences but the first end with `padding` masked positions."""
    chance = torch.Generator().manual_seed(seed)
    ids = torch.randint(_FIRST_WORD, VOCABULARY, (batch_size, tokens), generator=chance)
    mask = torch.ones_like(ids)
    mask[1:, tokens - padding :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    if family == "switch_transformers":
        labels = labels.flip(0)  # the answer's padding is not the question's
    return {"input_ids": ids.masked_fill(mask == 0, _PAD), "attention_mask": mask, "labels": labels}


def tiny_experts(model: nn.Module, seed: int = 0) -> Experts:
    """A legal sub-model: some experts of each MoE block of `model`, one more in each block, never all."""
    chance = torch.Generator().manual_seed(seed)
    chosen = {}
    for index, (name, shape) in enumerate(anatomy(model).blocks.items()):
        fewest = -(-shape.fewest // shape.group_size) if shape.groups > 1 else shape.fewest
        units = shape.groups if shape.groups > 1 else shape.num_experts
        size = shape.group_size if shape.groups > 1 else 1
        number = fewest + index % (units - fewest) if units > fewest else units
        chosen_units = torch.randperm(units, generator=chance)[:number].tolist()
        chosen[name] = tuple(sorted(unit * size + offset for unit in chosen_units for offset in range(size)))
    return chosen


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word for each token of a tiny model, `w3` … `w63`."""
    special = ["<pad>", "<s>", "</s>"]
    words = [*special, *(f"w{number}" for number in range(len(special), VOCABULARY))]
    tokenizer = Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}, unk_token="<pad>"))
    cast("Any", tokenizer).pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrap = cast("Any", PreTrainedTokenizerFast)
    return cast("PreTrainedTokenizerFast", wrap(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>"))


def tiny_examples(number: int, task: str = "echo", seed: int = 0) -> list[Example]:
    """Prompts of one to five random words; the answer is the prompt's last two."""
    rng = Random(f"{task}/{seed}")
    texts = [[f"w{rng.randrange(_FIRST_WORD, VOCABULARY)}" for _ in range(rng.randint(1, 5))] for _ in range(number)]
    return [Example(" ".join(words), " ".join(words[-2:]), task) for words in texts]


def tiny_context(model: nn.Module, client: Client, training: Training, seed: int = 0) -> ClientContext:
    """The context of `client`: with `client.examples` training, 6 validation and 4 test examples."""
    drawn = tiny_examples(client.examples + 10, client.task or "echo", seed)
    data = Split(train=drawn[:-10], validation=drawn[-10:-4], test=drawn[-4:])
    two_sided = bool(cast("Any", model).config.is_encoder_decoder)
    return ClientContext(client, model, data, Encoder(tiny_tokenizer(), 16, two_sided), training, client_state={})


def tiny_server(model: nn.Module, clients: Iterable[Client], training: Training, seed: str = "0") -> Server:
    """A server that trains all weights of `model`, or fresh adapters, as set in `training`."""
    shape = anatomy(model)
    start = prepare(shrink(model, shape.all_experts), training.tuning, seed=f"{seed}/start")
    cost = footprint(model, training.tuning, (training.batch_size, 16), optimizer=training.optimizer)
    known = {client.name: client for client in clients}
    return Server(rows.read(start), rows.layout(start), shape, cost, known, seed)


def bare_server(shapes: Sequence[BlockShape], clients: Iterable[Client], expert_bytes: int = 1, dense_bytes: int = 0) -> Server:
    """A server without weights, with blocks `0`, `1`, …: enough for selecting experts."""
    blocks = {str(number): shape for number, shape in enumerate(shapes)}
    cost = Footprint(dense_bytes, dict.fromkeys(blocks, expert_bytes), activation_bytes=0)
    return Server({}, {}, Anatomy(blocks), cost, {client.name: client for client in clients})


def flop_counter() -> FlopCounterMode:
    """torch's counter of floating point operations, with the kernels that it does not know: grouped products, attention on CPUs.

    Fused attention computes queries * keys again in backward, as torch counts it for the kernels of graphics cards.
    """
    aten = torch.ops.aten

    def grouped(left: Sequence[int], right: Sequence[int], *_: object, **__: object) -> int:
        return 2 * left[-2] * left[-1] * right[-1]

    def attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: object, **__: object) -> int:
        return int(sdpa_flop_count(query, key, value))

    def attention_backward(gradient: Sequence[int], query: Any, key: Any, value: Any, *_: object, **__: object) -> int:
        return int(sdpa_backward_flop_count(gradient, query, key, value))

    kernels = {
        aten._grouped_mm: grouped,
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    return FlopCounterMode(display=False, custom_mapping=kernels)


@torch.no_grad()
def _wake_routers(model: nn.Module) -> None:
    for block in blocks(model).values():
        for path, _ in block.expert_axes().items():
            tensor = dict([*block.module.named_parameters(), *block.module.named_buffers()])[path]
            if not path.startswith("experts."):
                tensor.normal_(0, 0.5 if path.endswith("weight") else 0.1)
