"""Low-rank adapters: our own for stacked experts, peft's for single matrices (attention, the experts of Switch).

peft computes W + BA for all stacked experts in every forward pass. Our adapter never does: it adds B(Ax) to the outputs of each
expert, with the same grouped products that the experts use. It can also adapt only some of the experts.
"""

import math
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any, TypeGuard, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from fedexperts.errors import BadValue
from fedexperts.moe.anatomy import Block, Experts, blocks
from fedexperts.moe.kernel import IMPLEMENTATION, ROW_BYTES, choose_kernel, fits
from fedexperts.moe.packed import plain
from fedexperts.moe.precision import HALF, compute_dtype, for_product, trained_dtype
from fedexperts.moe.shrink import kept_experts, own_stacks


class ExpertLoRA(nn.Module):
    """The adapter of one stacked matrix: it adds scale * B[e] A[e] to the matrix of each adapted expert e.

    Row s of `a` and `b` belongs to expert `ids[s]`, an index into the stack; the ids ascend.
    """

    ids: Tensor

    def __init__(self, a: Tensor, b: Tensor, scale: float, ids: Iterable[int], num_experts: int, dropout: float = 0.0):
        super().__init__()
        self.a = nn.Parameter(a)  # [adapted, rank, in]
        self.b = nn.Parameter(b)  # [adapted, out, rank]
        self.scale = scale
        self.num_experts = num_experts
        self.dropout = nn.Dropout(dropout)  # of the adapter's inputs, in training
        self.register_buffer("ids", torch.tensor(tuple(ids), device=a.device), persistent=False)

    def extra_repr(self) -> str:
        adapted, rank, _ = self.a.shape
        return f"{adapted} of {self.num_experts} experts, rank {rank}, scale {self.scale:g}"

    def add(self, out: Tensor, rows: Tensor, expert: Tensor, ends: Tensor) -> Tensor:
        """`out` plus the output of the adapter; `rows` are sorted by `expert`, and those of expert e end before `ends[e]`."""
        rows = self.dropout(rows)
        if len(self.ids) == self.num_experts:
            return out.add_(self.output(rows, ends))
        adapted = torch.isin(expert, self.ids)
        adapted_ends = torch.searchsorted(expert[adapted], self.ids, right=True).to(torch.int32)
        return out.index_add(0, adapted.nonzero().squeeze(1), self.output(rows[adapted], adapted_ends))

    def output(self, rows: Tensor, ends: Tensor) -> Tensor:
        """The output of the adapter for rows of adapted experts alone."""
        inner = grouped(rows, self.a.transpose(1, 2), ends) * self.scale
        return grouped(inner, self.b.transpose(1, 2), ends)

    def delta(self) -> Float[Tensor, "adapted out in"]:
        """The change of the weights when the adapter is merged."""
        return torch.bmm(self.b, self.a) * self.scale


def grouped(
    rows: Float[Tensor, "rows fan_in"], weight: Float[Tensor, "experts fan_in fan_out"], ends: Int[Tensor, " experts"]
) -> Float[Tensor, "rows fan_out"]:
    """Each row times the matrix of its expert; one product per expert if torch has no grouped product for this width."""
    rows, weight = for_product(rows, weight)
    if fits(weight):
        return torch.nn.functional.grouped_mm(rows, weight, offs=ends)
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return torch.cat([part @ matrix for part, matrix in zip(rows.split(counts), weight.unbind(), strict=True)])


def grouped_outer(
    rows: Float[Tensor, "rows fan_in"], gradient: Float[Tensor, "rows fan_out"], ends: Int[Tensor, " experts"]
) -> Float[Tensor, "experts fan_in fan_out"]:
    """The gradient of the matrices in `grouped`."""
    gradient, rows = for_product(gradient, rows)
    if fits(rows.unsqueeze(0)) and fits(gradient.unsqueeze(0)):
        return torch.nn.functional.grouped_mm(rows.t(), gradient, offs=ends)
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return torch.stack([left.t() @ right for left, right in zip(rows.split(counts), gradient.split(counts), strict=True)])


def experts_forward(self: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward pass of stacked experts with their adapters, which transformers calls as one of its implementations."""
    tokens, top_k = top_k_index.shape
    expert, order = torch.sort(top_k_index.reshape(-1), stable=True)
    out = expert_outputs(self, hidden[order // top_k], expert)
    inverse_order = torch.empty_like(order)
    inverse_order[order] = torch.arange(len(order), device=order.device)
    weighted = (out * top_k_weights.reshape(-1)[order].unsqueeze(1))[inverse_order]
    return weighted.view(tokens, top_k, -1).sum(dim=1).to(hidden.dtype)


def expert_outputs(self: Any, rows: Float[Tensor, "rows hidden"], expert: Int[Tensor, " rows"]) -> Float[Tensor, "rows hidden"]:
    """The unweighted outputs of stacked experts, with or without adapters, for rows that are sorted by their `expert`."""
    ends = ends_of(expert, self.num_experts)
    inner = activated(self, projected(self, first_matrix(self), rows, expert, ends))
    return normed(self, projected(self, "down_proj", inner, expert, ends))


def ends_of(expert: Int[Tensor, " rows"], num_experts: int) -> Int[Tensor, " experts"]:
    """The end of the rows of each expert, as grouped products take it; rows are sorted by `expert`."""
    return torch.searchsorted(expert, torch.arange(num_experts, device=expert.device), right=True).to(torch.int32)


def require_casts(model: nn.Module) -> None:
    """Gives trained stacks, which are float32, to the experts function that casts them, if `model` computes in another dtype."""
    if compute_dtype(model) in HALF and any(not block.is_switch for block in blocks(model).values()):
        cast("Any", model).set_experts_implementation(IMPLEMENTATION)


def first_matrix(self: Any) -> str:
    """The name of the stacked matrix that reads the inputs of the experts."""
    return "gate_up_proj" if self.has_gate else "up_proj"


def projected(self: Any, name: str, rows: Tensor, expert: Tensor, ends: Tensor) -> Tensor:
    """Sorted rows times the stacked matrix `name`, plus its adapter and its biases."""
    weight = getattr(self, name)
    out = grouped(rows, weight if self.is_transposed else weight.transpose(1, 2), ends_in_stack(self, ends, len(weight)))
    adapters = self.lora if "lora" in self._modules else {}
    out = adapters[name].add(out, rows, expert, ends) if name in adapters else out
    return out.add_(getattr(self, f"{name}_bias")[rows_in_stack(self, expert)]) if self.has_bias else out


def ends_in_stack(self: Any, ends: Int[Tensor, " experts"], stacked: int) -> Int[Tensor, " {stacked}"]:
    """`ends` for a stack of `stacked` matrices of which the experts use the rows `stack_ids`: the others get no rows."""
    if "stack_ids" not in self._buffers:
        return ends
    before = torch.searchsorted(self.stack_ids, torch.arange(stacked, device=ends.device), right=True)
    return torch.cat([ends.new_zeros(1), ends])[before]


def rows_in_stack(self: Any, expert: Int[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    """The row of each of the experts `expert` in their stacks, which they may share with a larger model."""
    return self.stack_ids[expert] if "stack_ids" in self._buffers else expert


def activated(self: Any, first: Tensor) -> Tensor:
    """The activation of the outputs of the first matrix, gated if the experts have a gate."""
    return cast("Tensor", self._apply_gate(first) if self.has_gate else self.act_fn(first))


def normed(self: Any, out: Tensor) -> Tensor:
    """The outputs of the experts after their norm, if they have one."""
    return cast("Tensor", self.post_expert_norm(out)) if self.has_post_expert_norm else out


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


def rank_step(dtype: torch.dtype) -> int:
    """The number of which the rank of an adapter of stacked experts must be a multiple: 4 in fp32, 8 in bf16."""
    return ROW_BYTES // dtype.itemsize


def check_rank(rank: int, dtype: torch.dtype, setting: str = "training.rank") -> None:
    """Raises BadValue if adapters of stacked experts cannot have this rank."""
    step = rank_step(dtype)
    if rank < 1 or rank % step:
        raise BadValue(
            f"{setting} = {rank}, but adapters of stacked experts in {str(dtype).removeprefix('torch.')} "
            f"need a multiple of {step}; try {max(step, round(rank / step) * step)}"
        )


def matrices(experts: nn.Module) -> list[str]:
    """Names of the stacked matrices of `experts`, without biases."""
    return [name for name, value in experts.named_parameters(recurse=False) if value.ndim == 3]


def attach_experts(
    model: nn.Module, rank: int, alpha: float, seed: str, adapt: Experts | None = None, dropout: float = 0.0
) -> None:
    """Puts an adapter on every stacked matrix of all experts, or of those in `adapt` (MoE block → indices into its stacks).

    B starts at zero. A depends on `seed`, block, matrix and expert alone, so an expert has the same A in the full model and in
    each sub-model. Experts that are modules (Switch) get none.

    Raises:
        BadValue: a rank that adapters of stacked experts cannot have.
    """
    stacked = {name: block for name, block in blocks(model).items() if not block.is_switch}
    original_ids = kept_experts(model)
    for name, block in stacked.items():
        ids = tuple(range(len(original_ids[name]))) if adapt is None else tuple(sorted(adapt.get(name, ())))
        seeds = [f"{seed}/{name}/{original_ids[name][expert]}" for expert in ids]
        adapters = {
            matrix: expert_lora(block, matrix, ids, rank, alpha, seeds, dropout) for matrix in matrices(block.experts) if ids
        }
        block.experts.lora = nn.ModuleDict(adapters)
    if stacked:
        cast("Any", model).set_experts_implementation(IMPLEMENTATION)


def expert_lora(
    block: Block, matrix: str, ids: tuple[int, ...], rank: int, alpha: float, seeds: list[str], dropout: float = 0.0
) -> ExpertLoRA:
    """A new adapter of one stacked matrix for the experts `ids`, with a seed for the A of each."""
    weight = cast("Tensor", getattr(block.experts, matrix))
    check_rank(rank, weight.dtype)
    transposed = bool(cast("Any", block.experts).is_transposed)
    fan_in, fan_out = (weight.shape[1], weight.shape[2]) if transposed else (weight.shape[2], weight.shape[1])
    a = torch.stack([uniform((rank, fan_in), f"{seed}/{matrix}", weight) for seed in seeds])
    b = weight.new_zeros(len(ids), fan_out, rank, dtype=trained_dtype(weight.dtype))
    return ExpertLoRA(a, b, alpha / rank, ids, block.shape.num_experts, dropout)


def is_linear(module: object) -> bool:
    """Whether `module` is a linear layer, without or with an adapter."""
    return isinstance(module, nn.Linear) or is_adapted(module)


def is_adapted(module: object) -> TypeGuard[Any]:
    """Whether `module` is a linear layer with peft's adapter; there is none before peft is imported, which takes seconds."""
    theirs = sys.modules.get("peft.tuners.lora")
    return theirs is not None and isinstance(module, theirs.Linear)


def attach_linears(model: nn.Module, names: Mapping[str, str], rank: int, alpha: float, seed: str, dropout: float = 0.0) -> None:
    """Puts peft's adapter on linear layers; B starts at zero, and A is drawn from `seed` and a name: `names` is path → name."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    config = LoraConfig(r=rank, lora_alpha=cast("int", alpha), lora_dropout=dropout, init_lora_weights=False)
    for path, name in names.items():
        base = model.get_submodule(path)
        with torch.device("meta"):  # so that peft draws nothing from torch's global generator
            layer: Any = Linear(base, "default", config=config, r=rank, lora_alpha=cast("int", alpha))
        weight = cast("Tensor", base.weight)
        layer.lora_A["default"].weight = nn.Parameter(uniform((rank, layer.in_features), f"{seed}/{name}", weight))
        layer.lora_B["default"].weight = nn.Parameter(
            weight.new_zeros(layer.out_features, rank, dtype=trained_dtype(weight.dtype))
        )
        model.set_submodule(path, layer)


def uniform(shape: tuple[int, int], seed: str, like: Tensor) -> Tensor:
    """An initial A from U(-1/sqrt(in), 1/sqrt(in)), as in peft, drawn from `seed`; empty on the meta device."""
    dtype = trained_dtype(like.dtype)
    if like.is_meta:
        return like.new_empty(shape, dtype=dtype)
    generator = torch.Generator().manual_seed(Random(seed).getrandbits(63))
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator).to(like.device, dtype)


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """`model`, whose adapters are merged into its weights and removed, in place; weights that it shares are not written."""
    own_stacks(model)
    stacks = [module for module in model.modules() if isinstance(module._modules.get("lora"), nn.ModuleDict)]
    for experts in stacks:
        merge_stack(experts)
    if stacks:
        choose_kernel(model)
    for path, layer in [(path, module) for path, module in model.named_modules() if is_adapted(module)]:
        base: Any = layer.get_base_layer()
        merged = (base.weight + layer.get_delta_weight("default")).to(base.weight.dtype)
        base.weight = nn.Parameter(merged, requires_grad=False)
        model.set_submodule(path, base)
    if hasattr(model, "peft_config"):  # peft's injection left it
        del model.peft_config
    return model


def merge_stack(experts: nn.Module) -> None:
    """Merges the adapters of one block's stacked experts into their weights and removes them."""
    for name, adapter in cast("nn.ModuleDict", experts.lora).items():
        assert isinstance(adapter, ExpertLoRA)
        add_to_stack(experts, name, adapter.ids, adapter.delta())
    del experts.lora


def add_to_stack(experts: nn.Module, name: str, ids: Tensor, delta: Float[Tensor, "adapted out in"]) -> None:
    """Replaces the stacked matrix `name` by a new parameter: its values, plus `delta` for the experts `ids`."""
    weight = plain(getattr(experts, name))
    added, ids = weight.detach().clone(), rows_in_stack(experts, ids)
    added[ids] = (weight[ids] + (delta.transpose(1, 2) if experts.is_transposed else delta)).to(weight.dtype)
    setattr(experts, name, nn.Parameter(added, requires_grad=False))


@torch.no_grad()
def add_to_base_weights(model: nn.Module, products: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
    """Adds to the frozen weights what merging adapters would add; the model's own adapters stay.

    `products` are pairs of an A of the model, which stands for its weight, and the product BA to add to it, times the scale.
    Weights that the model shares are not written.
    """
    product_of = {id(a): product for a, product in products}
    for layer in [module for module in model.modules() if is_adapted(module)]:
        if (product := product_of.get(id(layer.lora_A["default"].weight))) is not None:
            base: Any = layer.get_base_layer()
            added = (base.weight + layer.scaling["default"] * product).to(base.weight.dtype)
            base.weight = nn.Parameter(added, requires_grad=False)
    for experts in [block.experts for block in blocks(model).values() if "lora" in block.experts._modules]:
        for name, adapter in cast("nn.ModuleDict", experts.lora).items():
            assert isinstance(adapter, ExpertLoRA)
            if (product := product_of.get(id(adapter.a))) is not None:
                add_to_stack(experts, name, adapter.ids, adapter.scale * product)


def beneath(model: nn.Module, base: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Each frozen weight of `model` under an adapter, and what `base`, of which it is made, has in its place.

    Personal experts, which `base` does not have, are left out.
    """
    there = dict(base.named_modules())
    for path, module in model.named_modules():
        if path in there and is_adapted(module):
            yield module.get_base_layer().weight, there[path].weight
        elif path in there and isinstance(adapters := module._modules.get("lora"), nn.ModuleDict):
            yield from ((getattr(module, name), getattr(there[path], name)) for name in adapters)


def linears(model: nn.Module) -> list[tuple[str, int, float]]:
    """Path, rank and scale of each linear layer of `model` that has an adapter."""
    layers = [(path, module) for path, module in model.named_modules() if is_adapted(module)]
    return [(path, layer.r["default"], layer.scaling["default"]) for path, layer in layers]


def save_adapter(model: nn.Module, bare: nn.Module, folder: Path, base: str) -> None:
    """Writes the adapters of `model`, and its routers if they are trained, as an adapter of peft.

    Args:
        bare: the model without adapters; peft wraps it, so it cannot be used afterwards.
        base: the name of the base model that the adapter refers to.

    Raises:
        BadValue: there are no adapters, or they have several ranks or scales.
    """
    from peft import LoraConfig, get_peft_model

    ours = {path: cast("Any", model.get_submodule(path)) for path, _, _ in linears(model)}
    stacked = [
        (f"{name}.experts", matrix, cast("ExpertLoRA", adapter))
        for name, block in blocks(model).items()
        if "lora" in block.experts._modules
        for matrix, adapter in cast("nn.ModuleDict", block.experts.lora).items()
    ]
    sizes = {(rank, scale) for _, rank, scale in linears(model)} | {(lora.a.shape[1], lora.scale) for _, _, lora in stacked}
    if len(sizes) != 1:
        raise BadValue(
            "the model has no adapters, or adapters of several ranks, but an adapter of peft has one rank; leave out --adapter"
        )
    ((rank, scale),) = sizes
    routers = {f"{name}.{router_name(block)}": block.router for name, block in blocks(model).items() if is_trained(block.router)}
    config = LoraConfig(
        r=rank,
        lora_alpha=cast("int", scale * rank),  # which need not be whole
        target_modules=sorted(ours),
        target_parameters=sorted(f"{path}.{matrix}" for path, matrix, _ in stacked),
        modules_to_save=sorted(routers) or None,
        bias="none",
        base_model_name_or_path=base,
        task_type="SEQ_2_SEQ_LM" if cast("Any", model).config.is_encoder_decoder else "CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # peft draws weights, which are overwritten below
        warnings.simplefilter("ignore", FutureWarning)  # it calls transformers by a deprecated name
        wrapped: Any = get_peft_model(cast("Any", bare), config)
    theirs = dict(wrapped.get_base_model().named_modules())
    with torch.no_grad():
        for path, layer in ours.items():
            theirs[path].lora_A["default"].weight = layer.lora_A["default"].weight  # as it is: peft's may be rounded to bfloat16
            theirs[path].lora_B["default"].weight = layer.lora_B["default"].weight
        for path, matrix, adapter in stacked:
            wrapper = next(wrapper for wrapper in nested_wrappers(theirs[path]) if wrapper.parameter_name == matrix)
            wrapper.lora_A["default"].weight = nn.Parameter(a_to_peft(expand_to_all_experts(adapter.a, adapter)))
            wrapper.lora_B["default"].weight = nn.Parameter(b_to_peft(expand_to_all_experts(adapter.b, adapter)))
        for path, router in routers.items():
            theirs[path].modules_to_save["default"].load_state_dict(router.state_dict(), assign=True)
    wrapped.save_pretrained(folder, save_embedding_layers=False)


def router_name(block: Block) -> str:
    """The name of the router within the block."""
    return next(name for name, child in block.module.named_children() if child is block.router)


def is_trained(module: nn.Module) -> bool:
    """Whether any parameter of `module` is trained."""
    return any(parameter.requires_grad for parameter in module.parameters())


def nested_wrappers(wrapper: Any) -> Iterator[Any]:
    """peft's wrappers of the matrices of one block's experts, of which each contains the next."""
    from peft.tuners.lora import ParamWrapper

    while isinstance(wrapper, ParamWrapper):
        yield wrapper
        wrapper = wrapper.base_layer


def expand_to_all_experts(factor: Float[Tensor, "adapted x y"], adapter: ExpertLoRA) -> Float[Tensor, "experts x y"]:
    """A factor of an adapter with a row for each expert: zeros for those without an adapter."""
    return factor.new_zeros(adapter.num_experts, *factor.shape[1:]).index_copy(0, adapter.ids, factor.detach())


def a_to_peft(a: Float[Tensor, "experts rank in"]) -> Float[Tensor, "experts_rank in"]:
    """peft's A; row `e * rank + r` is rank r of expert e."""
    return a.reshape(-1, a.shape[2])


def b_to_peft(b: Float[Tensor, "experts out rank"]) -> Float[Tensor, "out rank_experts"]:
    """peft's B; column `r * experts + e` is rank r of expert e."""
    return b.permute(1, 2, 0).reshape(b.shape[1], -1)


def a_from_peft(a: Float[Tensor, "experts_rank in"], experts: int) -> Float[Tensor, "{experts} rank in"]:
    """A view of peft's A, by expert."""
    return a.view(experts, -1, a.shape[1])


def b_from_peft(b: Float[Tensor, "out rank_experts"], experts: int) -> Float[Tensor, "{experts} out rank"]:
    """A view of peft's B, by expert: in B, unlike in A, the expert is the fastest-varying index."""
    return b.view(b.shape[0], -1, experts).permute(2, 0, 1)
