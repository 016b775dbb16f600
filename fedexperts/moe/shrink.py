"""Sub-models that keep only some experts: shrunk in memory, saved, loaded, and read from a part of a checkpoint."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from fedexperts.errors import BadValue, listed, nearest
from fedexperts.moe.anatomy import Anatomy, Block, BlockShape, Experts, anatomy, blocks
from fedexperts.moe.disk import lazy_tensors
from fedexperts.moe.kernel import IMPLEMENTATION

STACK_IDS = "stack_ids"
"""Buffer of experts whose stacks are shared with a larger model: the rows that belong to them, int64 [experts], ascending."""


def check(anatomy: Anatomy, experts: Experts) -> None:
    """Raises BadValue if a sub-model with `experts` cannot run.

    It cannot with an unknown block or expert, with fewer experts than the router picks per token, or with a part of a group.
    """
    for name, ids in experts.items():
        if name not in anatomy.blocks:
            raise BadValue(f"{name!r} is no MoE block of this model; give names of its blocks{nearest(name, anatomy.blocks)}")
        _check_block(name, anatomy.blocks[name], ids)


def shrink(model: nn.Module, experts: Experts, share_stacks: bool = False) -> nn.Module:
    """A sub-model of `model` with only `experts` in each MoE block that they name; the router picks among these.

    All other parameters and buffers are shared with `model`, not copied, so a sub-model costs only the memory of its experts.
    Blocks that are absent from `experts`, or keep all their experts, are shared too. `kept_experts` in the config of the
    sub-model has the ids of its experts in the original model, also after shrinking several times.

    share_stacks: the sub-model also shares the stacked weights of experts, and `stack_ids` says which of their rows it uses, so
    that a process which has the whole model needs no memory for it. For experts that are not trained; the outputs are the same.

    Raises:
        BadValue: the sub-model cannot run (see `check`).
    """
    experts = _of_those_read(model, experts)
    check(anatomy(model), experts)
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    small = copy.deepcopy(model, memo=shared)
    vars(small).pop("read_experts", None)  # its ids are its own
    _cut_all(small, experts, share_stacks)
    return small


def _of_those_read(model: nn.Module, experts: Experts) -> Experts:
    """`experts` of a model of which only some experts were read (`read_experts`), as ids among these.

    Raises:
        BadValue: an expert that was not read.
    """
    read = getattr(model, "read_experts", None)
    if read is None:
        return experts
    for name, ids in experts.items():
        if missing := sorted(set(ids) - set(read.get(name, ids))):
            raise BadValue(f"{name} needs expert {missing[0]}, and only {listed(read[name])} were read; read the model anew")
    return {name: tuple(read[name].index(expert) for expert in ids) if name in read else ids for name, ids in experts.items()}


def own_stacks(model: nn.Module) -> nn.Module:
    """`model` with copies of the rows that it uses in place of shared stacks, in place: as `shrink` makes it by default."""
    for block in blocks(model).values():
        ids = block.experts._buffers.pop(STACK_IDS, None)
        if ids is not None:
            for path, _ in list(block.experts.named_parameters(recurse=False)):
                _replace(block.experts, path, 0, ids.tolist())
    return model


def kept_experts(model: nn.Module) -> Experts:
    """The experts of `model`, by their ids in the original model."""
    recorded = getattr(model.config, "kept_experts", {})  # only a shrunk model's config has it
    return {name: tuple(recorded.get(name, ids)) for name, ids in anatomy(model).all_experts.items()}


def save(model: nn.Module, folder: Path | str) -> None:
    """Writes `model`, shrunk or whole, as a folder from which `load` restores it exactly; transformers can read a whole one."""
    cast("PreTrainedModel", model).save_pretrained(folder)


def load(folder: Path | str) -> nn.Module:
    """The model in `folder`, with the experts that it had when it was saved."""
    return load_part(folder, {})


def load_part(folder: Path | str, experts: Experts) -> nn.Module:
    """`shrink(load(folder), experts)`, without reading other experts from disk.

    Raises:
        BadValue: the sub-model cannot run, or `folder` is no checkpoint of which a part can be read.
    """
    folder = Path(folder)
    config, model_class = _description(folder)
    saved_experts = {name: tuple(ids) for name, ids in vars(config).pop("kept_experts", {}).items()}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise BadValue(f"{folder} has no safetensors files; give a model folder as transformers' save_pretrained writes it")
    with torch.device("meta"):
        skeleton = model_class(copy.deepcopy(config))
    _cut_all(skeleton, saved_experts)
    check(anatomy(skeleton), experts)

    original_ids = _original_ids(kept_experts(skeleton), experts)
    model, report = shrunk_class(model_class, original_ids).from_pretrained(
        None,
        config=config,
        state_dict=lazy_tensors(files, skeleton, experts),
        dtype=config.dtype or torch.float32,
        output_loading_info=True,
    )
    if report["missing_keys"] or report["mismatched_keys"]:
        names = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        raise BadValue(f"{folder} lacks {names[0]} or has it in another shape ({len(names)} such); save the model anew")
    model.__class__ = model_class  # unlike the class that cuts while loading, this one can be pickled
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return cast("nn.Module", model)


def _description(folder: Path) -> tuple[Any, Any]:
    """The config in `folder` and the class of its model."""
    if not (folder / "config.json").exists():
        raise BadValue(f"{folder} has no config.json; give a model folder as transformers' save_pretrained writes it")
    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None):  # only a quantized model's config has it
        raise BadValue(f"{folder} has quantized weights, of which no part can be read; give a checkpoint in bf16, fp16 or fp32")
    name = (config.architectures or ["no architecture"])[0]
    if not hasattr(transformers, name):  # transformers imports its classes on access, so there is no list to search
        raise BadValue(f"{folder} has a {name}, which is no class of transformers; give a model of one of its classes")
    return config, getattr(transformers, name)


def shrunk_class(model_class: Any, experts: Experts) -> Any:
    """A subclass whose models are created with only `experts`, so that transformers sees no tensor of another shape."""

    def init(self: Any, config: Any, *args: Any, **options: Any) -> None:
        model_class.__init__(self, config, *args, **options)
        _cut_all(self, experts)
        for block in blocks(self).values():
            if block.is_switch:  # else transformers would initialize config.num_experts experts; all of ours are read
                cast("Any", block.module)._is_hf_initialized = True

    # transformers reads the source of __module__ to see which implementations of experts a class allows.
    attributes = {"__init__": init, "__module__": model_class.__module__, "__qualname__": model_class.__qualname__}
    return type(model_class.__name__, (model_class,), attributes)


def _check_block(name: str, shape: BlockShape, ids: Sequence[int]) -> None:
    if list(ids) != sorted(set(ids)) or not all(0 <= expert < shape.num_experts for expert in ids):
        raise BadValue(
            f"{name} was given experts {listed(ids)}; give ids from 0 to {shape.num_experts - 1}, ascending, each once"
        )
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
            f"{name} was given experts {listed(ids)}, but its router first picks among {shape.groups} groups of "
            f"{shape.group_size} neighboring experts and compares whole groups; keep all or none of a group"
        )


@torch.no_grad()
def _cut_all(model: nn.Module, experts: Experts, share_stacks: bool = False) -> None:
    """Cuts `model` in place; every cut tensor is replaced by a copy of the part that is kept, or stays shared."""
    original_ids = kept_experts(model)
    for name, block in blocks(model).items():
        if name in experts and len(experts[name]) < block.shape.num_experts:
            _cut(block, experts[name], share_stacks and block.shape.stacked)
    if any(STACK_IDS in block.experts._buffers for block in blocks(model).values()):
        cast("Any", model).set_experts_implementation(IMPLEMENTATION)  # transformers' own know no stack_ids
    cast("Any", model.config).kept_experts = {name: list(ids) for name, ids in _original_ids(original_ids, experts).items()}


def _original_ids(all_ids: Experts, experts: Experts) -> Experts:
    """The original ids of `experts`, of a model whose experts have the original ids `all_ids`; an absent block keeps all."""
    return {name: tuple(ids[expert] for expert in experts.get(name, range(len(ids)))) for name, ids in all_ids.items()}


def _cut(block: Block, ids: Sequence[int], share_stacks: bool) -> None:
    """Cuts the router and the experts of `block` to the experts `ids`."""
    shape = block.shape
    if share_stacks and STACK_IDS not in block.experts._buffers:
        device = next(block.experts.parameters()).device
        block.experts.register_buffer(STACK_IDS, torch.arange(shape.num_experts, device=device), persistent=False)
    shared = {f"experts.{path}" for path, _ in block.experts.named_parameters(recurse=False)} if share_stacks else set()
    for path, axis in block.expert_axes().items():
        if path not in shared:
            _replace(block.module, path, axis, ids)
    if isinstance(block.experts, nn.ModuleDict):
        kept_modules = [block.experts[f"expert_{expert}"] for expert in ids]
        block.experts.clear()
        block.experts.update({f"expert_{index}": expert for index, expert in enumerate(kept_modules)})
    for module in (block.module, block.router, block.experts):
        if "num_experts" in vars(module):
            cast("Any", module).num_experts = len(ids)
    if shape.groups > 1:
        router = cast("Any", block.router)
        router.num_group = len(ids) // shape.group_size
        router.topk_group = min(router.topk_group, router.num_group)


def _replace(module: nn.Module, path: str, axis: int, ids: Sequence[int]) -> None:
    """Replaces the tensor at `path` below `module` by a copy of its parts `ids` along `axis`."""
    parent, _, name = path.rpartition(".")
    owner = module.get_submodule(parent)
    tensor: Tensor = getattr(owner, name)
    part = tensor.detach().index_select(axis, torch.tensor(ids, device=tensor.device))
    is_parameter = isinstance(tensor, nn.Parameter)
    setattr(owner, name, nn.Parameter(part, requires_grad=tensor.requires_grad) if is_parameter else part)
    if isinstance(owner, nn.Linear):
        owner.out_features = len(ids)
