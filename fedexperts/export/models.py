"""The models of a run at its last checkpoint: the server's, and each client's as it is scored."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from fedexperts.config import RunConfig
from fedexperts.data.encode import Encoder
from fedexperts.data.settings import PLAIN
from fedexperts.engines.client_store import ClientStateStore
from fedexperts.engines.remote import GREETINGS, read_greetings
from fedexperts.errors import BadRun, BadValue, Damaged, nearest
from fedexperts.experiment import checkpoint
from fedexperts.experiment.reported import parts_from_greetings
from fedexperts.experiment.setup import (
    INPUTS,
    Parts,
    Prepared,
    adapter_hash,
    initial_model,
    load_base,
    prepare_run,
    versions,
)
from fedexperts.export import modeling_fedexperts
from fedexperts.federation import jobs_for
from fedexperts.io.manifest import changed, checkpoints, read_object
from fedexperts.io.toml import checked
from fedexperts.methods.contract import Extension
from fedexperts.methods.personal import parts
from fedexperts.models.load import Base
from fedexperts.moe import factors, graft, kernel, lora, rows
from fedexperts.moe.anatomy import anatomy, blocks
from fedexperts.moe.footprint import Footprint
from fedexperts.moe.precision import HALF, compute_dtype, entrances
from fedexperts.moe.shrink import own_stacks, shrink
from fedexperts.types import ClientContext, Server, Tensors

PERSONAL_EXPERTS = "personal experts and their gates"


@dataclass(frozen=True)
class Run:
    """A results folder with a checkpoint."""

    folder: Path
    config: RunConfig
    plan: Mapping[str, Any]
    versions: Mapping[str, Any]  # content of versions.json
    saved: Path  # its last checkpoint
    round: int  # of the checkpoint

    @property
    def clients(self) -> dict[str, Mapping[str, Any]]:
        """Name → the client's entry in plan.json."""
        return {client["name"]: client for client in self.plan["clients"]}


@dataclass(frozen=True)
class Exported:
    """A model to export."""

    model: nn.Module
    base: Base
    personal: Mapping[str, str] = field(default_factory=dict)  # weight in the client state → the part of the model it belongs to
    added: bool = False  # whether frozen base weights under adapters have changed
    extension: Extension | None = None  # the method's own change of the model's structure
    merged: bool = False  # whether adapters are merged into the weights, which then are those of the model only up to rounding

    @property
    def rounded(self) -> bool:
        """Whether the model computes in float16 or bfloat16."""
        return compute_dtype(self.model) in HALF

    @property
    def changes(self) -> dict[str, Any]:
        """Differences from the base model's class, see modeling_fedexperts.py; empty if transformers can load it directly."""
        changes = {
            "cut": cuts(self.base.model, self.model),
            "grafted": grafts(self.model),
            "linears": {path: {"rank": rank, "scale": scale} for path, rank, scale in lora.linears(self.model)},
            "stacks": stacks(self.model),
        }
        if self.extension is not None:
            changes["extension"] = {"function": self.extension.apply.__name__, "settings": dict(self.extension.settings)}
        if self.rounded and (any(changes.values()) or not self.merged):
            changes["precision"] = precision(self.model, self.base.model)
        return {**changes, "experts": way_through_experts(self.model)} if any(changes.values()) else {}


def open_run(folder: Path, round: int | Literal["best"] | None = None) -> Run:
    """The run in `folder` at the last checkpoint, or at that of `round`, or at the best one.

    Raises:
        BadRun: no run, a run without a checkpoint, or none of `round`.
        Damaged: a file has changed since it was written, or is missing.
    """
    if not (folder / "resolved.json").exists():
        below = sorted(path.parent for path in folder.glob("**/resolved.json")) if folder.is_dir() else []
        ask = f"; it holds {len(below)} runs: give one of them, such as {below[0]}" if below else ""
        raise BadRun(f"{folder} is no results folder of a run{ask or '; give one as fedexperts run wrote it (--out)'}")
    saved = checkpoint.latest(folder)
    if saved is None:
        raise BadRun(
            f"the run in {folder} has no checkpoint yet: it stopped before its first round was done; "
            f"continue it with fedexperts run {folder / 'run.toml'} --out {folder} --resume"
        )
    if round is not None:
        saved = checkpoint.best(folder) if round == "best" else checkpoint.of_round(folder, round)
    if saved is None:
        there = ", ".join(str(int(each.name[:6])) for each in reversed(checkpoints(folder)))
        no_best = "; a best one needs checkpoint.best = true" if round == "best" else ""
        raise BadRun(f"{folder} has no checkpoint of round {round}, only of {there}; give --round with one of these{no_best}")
    if error := next(iter([*changed(folder).values(), checkpoint.damage(folder, saved)]), None):
        raise Damaged(f"{error}, so no model is exported; {checkpoint.REMEDY}")
    config, plan, begun = (read_object(folder / f"{name}.json") for name in ("resolved", "plan", "versions"))
    round = int(checkpoint.state_in(saved)["round"])
    config["data"] = {"template": PLAIN, **config["data"]}  # which all older runs have
    return Run(folder, checked(RunConfig, config), plan, begun, saved, round)


def of_server(run: Run) -> Exported:
    """The server's model, with separate adapters. Needs the base model, but no data.

    Raises:
        BadRun: the base model has changed, or no update has been merged into the server's weights.
    """
    config = run.config
    base, method = load_base(config.model), config.build_method()
    require_same(run, {"model_hash": base.hash, "config_hash": base.config_hash, "adapter_hash": adapter_hash(config)})
    shape, seed, tuning = anatomy(base.model), f"{config.seed}/start", config.training.tuning
    start = initial_model(config, method, base)
    weights, method_state = checkpoint.tensors(run.saved)
    server = Server(weights, rows.layout(start), shape, Footprint(0, {}, 0), {}, str(config.seed), method_state)
    model = method.global_model(base.model, tuning, server, seed)
    changed = base_changed(base.model, model)
    if not changed and not has_changed(rows.read(start), weights):
        raise BadRun(
            f"the server of {run.folder} still holds the base as it was after round {run.round}: nothing has been merged into it "
            f"({config.method['name']}); take a client's model with --client, such as {next(iter(run.clients))}"
        )
    return Exported(model.eval(), base, added=changed)


def base_changed(base: nn.Module, model: nn.Module) -> bool:
    """Whether a frozen weight under an adapter of `model` differs from the weight of `base`."""
    return any(not torch.equal(ours, theirs) for ours, theirs in lora.beneath(model, base))


def has_changed(start: Tensors, weights: Tensors) -> bool:
    """Whether trained weights differ from `start`; of an adapter whose B is zero, as at the start, A does not count."""
    changed = {name for name, tensor in weights.items() if not torch.equal(start[name], tensor)}
    return bool(changed - {a for a, b in factors.pairs(weights).items() if not weights[b].any()})


def of_client(run: Run, name: str, kept: Path | None = None) -> Exported:
    """The client's model, built from the weights that the server sends for an evaluation and from the client state.

    kept: the client's own folder, if it ran on another machine than the server.

    Raises:
        BadValue: an unknown client; or data or a model that cannot be loaded.
        BadRun: the base model or the data have changed, the client does not take part in the run, or its state is missing.
    """
    if name not in run.clients:
        raise BadValue(f"{run.folder} has no client {name!r}, only {', '.join(run.clients)}{nearest(name, run.clients)}")
    client_store = store_of(run, name, kept)
    prepared = prepare_run(run.config, parts=parts_of(run))
    now = versions(prepared)
    require_same(run, {each: now[each] for each in INPUTS})
    server = checkpoint.restored(run.saved, prepared.server)
    job = next(jobs_for(replace(server, task="evaluate"), prepared.method, [server.clients[name]]), None)
    if job is None:
        raise BadRun(f"client {name} has no model in {run.folder}: its method assigned nothing to it; leave out --client")
    client_state = client_store.load(job)
    model = own_stacks(prepared.method.build_model(job, context_of(prepared, server, name, client_state))).eval()
    part = parts(rows.layout(model))
    personal = {each: PERSONAL_EXPERTS if graft.is_personal(each) else part[each] for each in client_state if each in part}
    added = base_changed(shrink(prepared.base.model, job.experts), model)
    return Exported(model, prepared.base, personal, added, prepared.method.extension(job))


def store_of(run: Run, name: str, kept: Path | None) -> ClientStateStore:
    """The client state store of the run; `kept`: the folder of `name` on its own machine.

    Raises:
        BadRun: the state is on another machine, or is not that of the checkpoint.
    """
    folder = run.folder.resolve()
    if kept is None:
        if folder.with_name(f"{folder.name}.flower").exists():  # created by `fedexperts server` for Flower's files
            raise BadRun(
                f"{run.folder} ran over several machines, and what {name} keeps to itself lies on its own; copy the folder there "
                "and give --kept, or take the global model (leave out --client)"
            )
        if run.saved != checkpoint.latest(run.folder):  # an older checkpoint has the client states of its own round
            return ClientStateStore(run.saved / "clients")
        checkpoint.require_client_state(run.folder, name)
        if error := checkpoint.client_state_error(run.folder, run.saved, name):
            raise Damaged(f"{error}, so the model of {name} is not exported; {checkpoint.REMEDY}")
        if keeps_state(run, name) and not (run.folder / "clients").exists():  # a copy of a server's folder, or a part of a run's
            raise BadRun(
                f"{run.folder} lacks what {name} kept to itself ({run.config.method['name']}), so its model would be another; "
                "where the client ran on its own machine, give its folder with --kept"
            )
        return ClientStateStore(run.folder / "clients")
    named = run.folder / "id"
    run_folder = kept / named.read_text() if named.exists() else None
    if run_folder is None or not run_folder.is_dir():
        raise BadRun(f"{kept} holds nothing of the run in {run.folder}; give the --out that {name} had with fedexperts client")
    client_store, accepted = ClientStateStore(run_folder / "clients"), checkpoint.accepted_in(run.saved).get(name, "")
    stored = [path.stem for path in client_store.versions(name)]
    if stored and accepted not in stored:
        raise BadRun(
            f"the checkpoint in {run.folder} needs the state of {name} after {accepted or 'no job'}, but {kept} has it after "
            f"{', '.join(stored)}; copy the results folder again"
        )
    return client_store


def keeps_state(run: Run, name: str) -> bool:
    """Whether client `name` keeps weights of its model to itself, and has done so in the run."""
    declared = run.config.build_method().declare()
    return bool(declared.keeps_weights or declared.personal_experts) and bool(checkpoint.accepted_in(run.saved).get(name))


def parts_of(run: Run) -> Parts | None:
    """Parts from the greetings of clients that bring their own data; None if the run file defines the data.

    Raises:
        BadRun: the file of greetings is missing.
    """
    if not run.config.data.own:
        return None
    if not (run.folder / GREETINGS).exists():
        raise BadRun(f"{run.folder} has no {GREETINGS}, the descriptions of the clients' data; copy the whole folder")
    return parts_from_greetings(read_greetings(run.folder / GREETINGS), Parts())


def context_of(prepared: Prepared, server: Server, name: str, client_state: dict[str, Tensor]) -> ClientContext:
    base, config = prepared.base, prepared.config
    encoder = Encoder(base.tokenizer, config.data.max_tokens, base.encoder_decoder)
    return ClientContext(server.clients[name], base.model, prepared.data[name], encoder, prepared.training, client_state)


def require_same(run: Run, now: Mapping[str, Any]) -> None:
    """Raises BadRun if the model or the data have changed since the run started."""
    if changed := [INPUTS[key] for key in now if run.versions.get(key, now[key]) != now[key]]:  # older runs recorded fewer
        raise BadRun(f"{run.folder} was made with other files: {' and '.join(changed)} changed since; restore them")


def cuts(base: nn.Module, model: nn.Module) -> dict[str, Any]:
    """Block → how it was cut, for blocks of `model` with fewer experts than in `base`."""
    whole, cut_blocks = blocks(base), {}
    for name, block in blocks(model).items():
        shape = block.shape
        if shape.num_experts == whole[name].shape.num_experts:
            continue
        router = cast("Any", block.router)
        cut_blocks[name] = {
            "num_experts": shape.num_experts,
            "router": lora.router_name(block),
            "axes": {path: axis for path, axis in block.expert_axes().items() if not path.startswith("experts.lora.")},
            "router_groups": {} if shape.groups == 1 else {key: vars(router)[key] for key in ("num_group", "topk_group")},
        }
    return cut_blocks


def grafts(model: nn.Module) -> dict[str, Any]:
    """Block → its number of personal experts and the width of its tokens."""
    return {
        path.removesuffix(f".{graft.CHILD}"): {"number": module.own_gate.out_features, "hidden": module.own_gate.in_features}
        for path, module in model.named_modules()
        if isinstance(module, graft.Grafted)
    }


def stacks(model: nn.Module) -> dict[str, Any]:
    """Path of stacked experts → matrix → its adapters."""
    return {
        path: {
            matrix: {"rank": adapter.a.shape[1], "scale": adapter.scale, "ids": adapter.ids.tolist()}
            for matrix, adapter in module.lora.items()
        }
        for path, module in model.named_modules()
        if isinstance(module._modules.get("lora"), nn.ModuleDict)
    }


def precision(model: nn.Module, base: nn.Module) -> dict[str, Any]:
    """How a model whose products are rounded computes: dtypes, the weights in float32, and the modules that change autocast."""
    stored = cast("Any", base).dtype
    whole = [name for name, weight in model.named_parameters() if weight.dtype == torch.float32 != stored]
    inside = {id(module) for module in entrances(model)}
    return {
        "compute": str(compute_dtype(model)).removeprefix("torch."),
        "weights": str(stored).removeprefix("torch."),
        "float32": whole,
        "entrances": [path for path, module in model.named_modules() if id(module) in inside],
        "routers": [f"{name}.{lora.router_name(block)}" for name, block in blocks(model).items()],
    }


def way_through_experts(model: nn.Module) -> str | None:
    """transformers' name of the experts implementation of `model`; None if its experts are not stacked (Switch)."""
    if all(block.is_switch for block in blocks(model).values()):
        return None
    used = str(cast("Any", model).config._experts_implementation)
    return modeling_fedexperts.IMPLEMENTATION if used == kernel.IMPLEMENTATION else used
