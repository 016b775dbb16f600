"""Smaller models that keep only some experts: cut in memory, saved, loaded, read in part from disk."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from fedexperts.errors import BadValue, nearest
from fedexperts.moe.anatomy import Anatomy, Block, BlockShape, Experts, anatomy, blocks
from fedexperts.moe.disk import lazy_tensors


def check(anatomy: Anatomy, experts: Experts) -> None:
    """Whether a sub-model with `experts` can run.

    Raises:
        BadValue: an unknown block or expert, fewer experts than the router picks per token, or a group in part.
    """
    for name, ids in experts.items():
        if name not in anatomy.blocks:
            raise BadValue(f"{name!r} is no MoE block of this model{nearest(name, anatomy.blocks)}")
        _check_block(name, anatomy.blocks[name], ids)


def shrink(model: nn.Module, experts: Experts) -> nn.Module:
    """`model` with, in each MoE block named in `experts`, only those; its router chooses among the kept.

    All other parameters and buffers are shared with `model`, not copied, so a shrunk model costs only its experts.
    A block that is absent, or keeps all its experts, stays as it is, shared too. The config of the result says which
    experts of the first model it holds (`kept_experts`), also after several cuts.

    Raises:
        BadValue: `experts` are no legal sub-model (see `check`).
    """
    check(anatomy(model), experts)
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    small = copy.deepcopy(model, memo=shared)
    _cut_all(small, experts)
    return small


def kept_experts(model: nn.Module) -> Experts:
    """The experts that `model` holds, by their ids in the model it was cut from."""
    before = getattr(model.config, "kept_experts", {})  # only a shrunk model's config has it
    return {name: tuple(before.get(name, ids)) for name, ids in anatomy(model).all_experts.items()}


def save(model: nn.Module, folder: Path | str) -> None:
    """Write `model`, shrunk or whole, as a folder that `load` gives back exactly; transformers reads it when it is whole."""
    cast("PreTrainedModel", model).save_pretrained(folder)


def load(folder: Path | str) -> nn.Module:
    """The model in `folder`, with the experts it was saved with."""
    return load_part(folder, {})


def load_part(folder: Path | str, experts: Experts) -> nn.Module:
    """`shrink(load(folder), experts)`, but no other expert is read from disk or held in memory.

    Raises:
        BadValue: `experts` are no legal sub-model, or `folder` is no checkpoint of which a part can be read.
    """
    folder = Path(folder)
    config, model_class = _description(folder)
    held = {name: tuple(ids) for name, ids in vars(config).pop("kept_experts", {}).items()}
    with torch.device("meta"):
        skeleton = model_class(copy.deepcopy(config))
    _cut_all(skeleton, held)
    check(anatomy(skeleton), experts)

    chosen = _choose(kept_experts(skeleton), experts)
    model, report = _sub_class(model_class, chosen).from_pretrained(
        None,
        config=config,
        state_dict=lazy_tensors(folder, skeleton, experts),
        dtype=config.dtype or torch.float32,
        output_loading_info=True,
    )
    if report["missing_keys"] or report["mismatched_keys"]:
        odd = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        raise BadValue(f"{folder} lacks {odd[0]} or has it in another shape ({len(odd)} such); save the model anew")
    model.__class__ = model_class  # the class that cuts while loading has done its work; this one can be pickled
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return cast("nn.Module", model)


def _description(folder: Path) -> tuple[Any, Any]:
    """The config in `folder` and the class of its model."""
    if not (folder / "config.json").exists():
        raise BadValue(f"{folder} has no config.json; give a model folder as transformers' save_pretrained writes it")
    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None):  # only a quantised model's config has it
        raise BadValue(f"{folder} holds quantised weights, of which no part can be read; give a checkpoint in bf16, fp16 or fp32")
    name = (config.architectures or ["no architecture"])[0]
    if not hasattr(transformers, name):  # transformers looks its classes up when asked, so there is no list to search
        raise BadValue(f"{folder} is a {name}, which transformers does not have; give a model of transformers' own classes")
    return config, getattr(transformers, name)


def _sub_class(model_class: Any, experts: Experts) -> Any:
    """A class whose models are born with only `experts`: transformers then sees no tensor of another shape."""

    def init(self: Any, config: Any, *args: Any, **options: Any) -> None:
        model_class.__init__(self, config, *args, **options)
        _cut_all(self, experts)
        for block in blocks(self).values():
            if block.is_switch:  # transformers would initialise config.num_experts of them; ours all come from disk
                cast("Any", block.module)._is_hf_initialized = True

    # transformers reads the source of __module__ to learn which experts implementations a class allows.
    same = {"__init__": init, "__module__": model_class.__module__, "__qualname__": model_class.__qualname__}
    return type(model_class.__name__, (model_class,), same)


def _check_block(name: str, shape: BlockShape, ids: Sequence[int]) -> None:
    if list(ids) != sorted(set(ids)) or not all(0 <= expert < shape.num_experts for expert in ids):
        raise BadValue(f"{name} was given experts {list(ids)}; give ids from 0 to {shape.num_experts - 1}, ascending, each once")
    if len(ids) < shape.fewest:
        raise BadValue(
            f"{name} would keep {len(ids)} of its {shape.num_experts} experts, but its router needs {shape.fewest} to pick "
            f"{shape.top_k} per token; keep at least {shape.fewest} experts in this layer"
        )
    if shape.groups > 1 and any(
        len(set(ids) & set(range(first, first + shape.group_size))) not in (0, shape.group_size)
        for first in range(0, shape.num_experts, shape.group_size)
    ):
        raise BadValue(
            f"{name} was given experts {list(ids)}, but its router first picks among {shape.groups} groups of "
            f"{shape.group_size} neighbours and compares whole groups; keep all or none of a group"
        )


@torch.no_grad()
def _cut_all(model: nn.Module, experts: Experts) -> None:
    """Cut in place; every cut tensor is replaced by a copy of its kept part."""
    held = kept_experts(model)
    for name, block in blocks(model).items():
        if name in experts and len(experts[name]) < block.shape.num_experts:
            _cut(block, experts[name])
    cast("Any", model.config).kept_experts = {name: list(ids) for name, ids in _choose(held, experts).items()}


def _choose(held: Experts, experts: Experts) -> Experts:
    """Those of `held` that stand at the positions `experts`; a block that is absent keeps all."""
    return {name: tuple(ids[expert] for expert in experts.get(name, range(len(ids)))) for name, ids in held.items()}


def _cut(block: Block, ids: Sequence[int]) -> None:
    shape = block.shape
    for path, axis in block.expert_axes().items():
        _replace(block.module, path, axis, ids)
    if isinstance(block.experts, nn.ModuleDict):
        kept = [block.experts[f"expert_{expert}"] for expert in ids]
        block.experts.clear()
        block.experts.update({f"expert_{index}": expert for index, expert in enumerate(kept)})
    for module in (block.module, block.router, block.experts):
        if "num_experts" in vars(module):
            cast("Any", module).num_experts = len(ids)
    if shape.groups > 1:
        router = cast("Any", block.router)
        router.num_group = len(ids) // shape.group_size
        router.topk_group = min(router.topk_group, router.num_group)


def _replace(module: nn.Module, path: str, axis: int, ids: Sequence[int]) -> None:
    parent, _, name = path.rpartition(".")
    owner = module.get_submodule(parent)
    tensor: Tensor = getattr(owner, name)
    kept = tensor.detach().index_select(axis, torch.tensor(ids, device=tensor.device))
    is_parameter = isinstance(tensor, nn.Parameter)
    setattr(owner, name, nn.Parameter(kept, requires_grad=tensor.requires_grad) if is_parameter else kept)
    if isinstance(owner, nn.Linear):
        owner.out_features = len(ids)
