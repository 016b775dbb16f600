"""Which MoE class has exactly the attention, norms and positions of a dense model, and how its tensors are called there."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig

from fedexperts.errors import BadValue
from fedexperts.models.upcycle.parts import FFN, MoE, no_ffn
from fedexperts.models.upcycle.recipes import Recipe

INERT = 32  # neurons of the shared expert, all zero, of a Qwen2-MoE that needs none

SAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_dropout",
    "hidden_act",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
"""Settings that all families and all targets call alike."""

NO_CLASS: Mapping[str, str] = {
    "gemma2": "has norms behind attention and FFN, and caps its logits",
    "gemma3": "has norms behind attention and FFN, and two kinds of positions",
    "gemma3_text": "has norms behind attention and FFN, and two kinds of positions",
    "phi": "computes attention and FFN in parallel, and its FFN has no gate",
    "gpt_neox": "computes attention and FFN in parallel, and its FFN has no gate",
    "gptj": "computes attention and FFN in parallel, and its FFN has no gate",
    "cohere": "computes attention and FFN in parallel",
    "olmo": "has norms without weights",
    "olmo2": "has its norms behind attention and FFN",
    "olmo3": "has its norms behind attention and FFN",
    "smollm3": "has layers without positions",
    "granite": "scales embeddings, residuals and logits",
    "gpt2": "has learned positions, and its FFN has no gate",
    "opt": "has learned positions, and its FFN has no gate",
    "starcoder2": "has an FFN without a gate",
    "stablelm": "has LayerNorms, and turns only a part of each head by its position",
}
"""Dense families that fit no MoE class of transformers that vLLM loads too → why."""


@dataclass(frozen=True)
class Family:
    """A dense family that fits an MoE class exactly."""

    target: str = "mixtral"
    shared_target: str | None = "qwen2_moe"  # the class with a shared expert
    fused: bool = False  # query, key and value in one matrix, gate and up in another
    norm_offset: float = 0.0  # norms multiply by w + norm_offset
    scaled_embeddings: bool = False  # by the root of the hidden size

    def as_llama(self, config: Any, layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a layer under Llama's names and with its meaning."""
        return self.with_plain_norms(unfused(config, layer) if self.fused else layer)

    def with_plain_norms(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`tensors` with norms that multiply by w."""
        if not self.norm_offset:
            return dict(tensors)
        return {name: (w.float() + self.norm_offset).to(w.dtype) if "norm" in name else w for name, w in tensors.items()}


def unfused(config: Any, layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A layer of Phi-3 with the projections of Llama."""
    layer = dict(layer)
    head = config.hidden_size // config.num_attention_heads
    sizes = [config.num_attention_heads * head, *[config.num_key_value_heads * head] * 2]
    parts = layer.pop("self_attn.qkv_proj.weight").split(sizes)
    gate, up = layer.pop("mlp.gate_up_proj.weight").chunk(2)
    attention = {f"self_attn.{name}_proj.weight": part for name, part in zip("qkv", parts, strict=True)}
    return {**layer, **attention, "mlp.gate_proj.weight": gate, "mlp.up_proj.weight": up}


FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(target="qwen2_moe"),
    "qwen3": Family(target="qwen3_moe", shared_target=None),
    "phi3": Family(fused=True),
    "gemma": Family(norm_offset=1.0, scaled_embeddings=True),
}
"""model_type of the dense model → how it is converted."""


def family_of(name: str, config: Any) -> Family:
    """The family of the model called `name`.

    Raises:
        BadValue: it is no dense decoder, or one that fits no MoE class exactly; the sentence says what does not fit.
    """
    settings = config.to_dict()
    kind = str(config.model_type)
    if any(settings.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")):
        raise BadValue(f"{name} ({kind}) is a Mixture of Experts already; give a dense model")
    if kind not in FAMILIES:
        why = NO_CLASS.get(kind, "is of a family that we do not know")
        raise BadValue(f"{name} ({kind}) {why}, so no MoE class fits it exactly; give a model of one of {', '.join(FAMILIES)}")
    if reason := misfit(config, settings):
        raise BadValue(f"{name} ({kind}) has {reason}, which no MoE class has; give another model of {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def misfit(config: Any, settings: Mapping[str, Any]) -> str | None:
    """What no target can represent although the family can otherwise; None: nothing."""
    rope = settings.get("rope_parameters") or {}
    reasons = {
        "biases in its attention": settings.get("attention_bias") and config.model_type != "qwen3",
        "biases in its FFN": settings.get("mlp_bias"),
        "positions that turn only a part of each head": rope.get("partial_rotary_factor", 1) != 1,
        "a sliding window in some layers": settings.get("use_sliding_window"),
        "attention in both directions": settings.get("use_bidirectional_attention"),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


@dataclass(frozen=True, eq=False)
class Target:
    """An MoE model to be written."""

    config: Any  # of transformers
    prefix: str  # of the MoE block in the tensors of a layer on disk
    matrices: tuple[str, str, str]  # names of gate, up and down of an expert on disk
    inert: bool = False  # has a shared expert that does nothing, since its class demands one

    def layer(self, tensors: Mapping[str, Tensor], moe: MoE) -> dict[str, Tensor]:
        """The tensors of a layer as they are stored: those of the dense layer in Llama's names but its FFN, and `moe`."""
        stored = {name: tensor for name, tensor in tensors.items() if not name.startswith("mlp.")}
        stored[f"{self.prefix}.gate.weight"] = moe.router
        for number, expert in enumerate(moe.experts):
            stored |= self._ffn(f"{self.prefix}.experts.{number}", expert)
        shared = no_ffn(INERT, like=moe.experts[0]) if self.inert else moe.shared
        if shared is not None:
            stored |= self._ffn(f"{self.prefix}.shared_expert", shared)
            stored[f"{self.prefix}.shared_expert_gate.weight"] = torch.zeros(1, moe.router.shape[1])
        return stored

    def loaded(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors as transformers has them in memory: the experts in stacks, the block called mlp."""
        names = [f"{self.prefix}.experts.{number}" for number in range(self.config.num_experts)]
        gate, up, down = self.matrices
        weights = [(stored[f"{name}.{gate}.weight"], stored[f"{name}.{up}.weight"]) for name in names]
        stacks = {
            "mlp.experts.gate_up_proj": torch.stack([torch.cat(pair) for pair in weights]),
            "mlp.experts.down_proj": torch.stack([stored[f"{name}.{down}.weight"] for name in names]),
        }
        rest = {name: tensor for name, tensor in stored.items() if not name.startswith(f"{self.prefix}.experts.")}
        return {**{name.replace(f"{self.prefix}.", "mlp."): tensor for name, tensor in rest.items()}, **stacks}

    def _ffn(self, name: str, ffn: FFN) -> dict[str, Tensor]:
        parts = zip(self.matrices, (ffn.gate, ffn.up, ffn.down), strict=True)
        return {f"{name}.{matrix}.weight": weight for matrix, weight in parts}


def target_for(name: str, config: Any, recipe: Recipe) -> Target:
    """The MoE model that `recipe` makes of the dense model with `config`.

    Raises:
        BadValue: its neurons cannot be divided, or no class with a shared expert fits it.
    """
    family = family_of(name, config)
    same = {key: getattr(config, key) for key in SAME}
    rope = {key: value for key, value in config.rope_parameters.items() if key != "partial_rotary_factor"}
    same |= {"rope_parameters": rope, "num_experts_per_tok": recipe.top_k, "output_router_logits": False}
    if family.scaled_embeddings:
        same["tie_word_embeddings"] = False
    kind = family.shared_target if recipe.shared else family.target
    if kind is None:
        raise BadValue(f"{name} ({config.model_type}) fits only Qwen3-MoE, which has no shared expert; leave --shared out")
    width = recipe.width(config.intermediate_size)
    head = head_width(config)
    if kind == "mixtral":
        window = config.to_dict().get("sliding_window")
        sizes = {"intermediate_size": width, "num_local_experts": recipe.num_experts, "head_dim": head}
        made: Any = cast("Any", MixtralConfig)(**same, **sizes, sliding_window=window, router_aux_loss_coef=0.01)
        return Target(made, "block_sparse_moe", ("w1", "w3", "w2"))
    matrices = ("gate_proj", "up_proj", "down_proj")
    sizes = {"moe_intermediate_size": width, "num_experts": recipe.num_experts, "intermediate_size": config.intermediate_size}
    options = {**same, **sizes, "norm_topk_prob": True, "router_aux_loss_coef": 0.01}
    if kind == "qwen3_moe":
        made = cast("Any", Qwen3MoeConfig)(**options, head_dim=head, attention_bias=config.attention_bias)
        return Target(made, "mlp", matrices)
    require_plain_attention(name, config, head)
    shared = recipe.shared or INERT
    made = cast("Any", Qwen2MoeConfig)(**options, shared_expert_intermediate_size=shared, qkv_bias=config.model_type == "qwen2")
    return Target(made, "mlp", matrices, inert=not recipe.shared)


def head_width(config: Any) -> int:
    """The width of an attention head."""
    return int(config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads)


def require_plain_attention(name: str, config: Any, head: int) -> None:
    """Raises BadValue if attention has what Qwen2-MoE, the class with a shared expert, does not have."""
    window = config.model_type != "qwen2" and config.to_dict().get("sliding_window")
    wide = head * config.num_attention_heads != config.hidden_size
    if wide or window:
        reason = f"heads of {head}, which do not fill its hidden size" if wide else f"a sliding window of {window} tokens"
        raise BadValue(
            f"{name} ({config.model_type}) has {reason}, which Qwen2-MoE, the class with a shared expert, does not have; "
            "leave --shared out"
        )
