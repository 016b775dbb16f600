"""Prepares a run from its settings: the base model, the clients with their data and devices, the first server."""

import subprocess
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from shutil import which
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedTokenizerBase

from fedexperts.config import ModelSettings, RunConfig
from fedexperts.core.devices import Profile, memories, trace_hash
from fedexperts.data.clients import Clients, make_clients
from fedexperts.data.encode import Encoder
from fedexperts.data.own import own_clients
from fedexperts.data.pool import Pool, Retained, load_pool, load_retained, without_retained
from fedexperts.data.settings import PLAINS, with_templates
from fedexperts.data.too_long import fitting
from fedexperts.errors import BadValue
from fedexperts.federation import jobs_for, steps
from fedexperts.methods.contract import Method
from fedexperts.models.files import files_hash
from fedexperts.models.load import Base, load
from fedexperts.moe import factors, rows
from fedexperts.moe.adapter import CONFIG, WEIGHTS, read_adapter, start_from
from fedexperts.moe.anatomy import anatomy
from fedexperts.moe.footprint import Footprint, footprint, on_meta
from fedexperts.moe.memory_by_part import MemoryByPart, memory_by_part
from fedexperts.moe.packing import require_packing
from fedexperts.types import Client, Example, Server, Split, Training

T = TypeVar("T")
Cache = dict[Hashable, T]


@dataclass(frozen=True)
class Parts:
    """Cache of what runs of several methods share: base models, data, footprints. The cached objects are never modified.

    Files are read once, so that all runs see the same content. Only the last few entries of each kind are cached.
    """

    bases: Cache[Base] = field(default_factory=dict)
    pools: Cache[Pool] = field(default_factory=dict)
    retains: Cache[Retained] = field(default_factory=dict)
    divided: Cache[Clients] = field(default_factory=dict)
    responses: Cache[int] = field(default_factory=dict)
    footprints: Cache[Footprint] = field(default_factory=dict)
    load: Callable[..., Base] = load  # models.load.load, or a function with its options

    def base(self, model: ModelSettings) -> Base:
        return cached(self.bases, 1, model, lambda: load_base(model, self.load))

    def clients(self, config: RunConfig) -> Clients:
        """The run's clients with their data.

        Raises:
            BadValue: clients bring their own data, which is only possible with `fedexperts server`.
        """
        data = config.data
        if data.own:
            raise BadValue(
                "data.own = true: each client brings its own data; start `fedexperts server` with this run file, and "
                "`fedexperts client` with --data at each of them, or leave data.own out"
            )
        config = self.with_templates(config)
        key = config.data.model_dump_json(), config.seed, config.evaluation.retained
        return cached(self.divided, 8, key, lambda: make_clients(config.data, config.seed, self.pool(config)))

    def with_templates(self, config: RunConfig) -> RunConfig:
        """`config` with the template of each source in place of "auto", which the tokenizer decides, and of "plain"."""
        data, evaluation = config.data, config.evaluation
        names = {source.template or data.template for source in (*data.sources, *evaluation.retained)}
        chat = "auto" in names and isinstance(self.base(config.model).tokenizer.chat_template, str)
        sources, retained = (with_templates(some, data.template, chat) for some in (data.sources, evaluation.retained))
        update = {
            "data": data.model_copy(update={"sources": sources}),
            "evaluation": evaluation.model_copy(update={"retained": retained}),
        }
        return config.model_copy(update=update)

    def pool(self, config: RunConfig) -> Pool:
        config = self.with_templates(config)
        data = config.data
        key = data.sources, data.limit, config.evaluation.retained, *self.fit_key(config)
        return cached(self.pools, 2, key, lambda: self.fitting(without_retained(load_pool(data), self.retained(config)), config))

    def fit_key(self, config: RunConfig) -> tuple[Hashable, ...]:
        """What decides which examples are too long; nothing if these are cut."""
        data = config.data
        return () if data.too_long == "cut" else (data.too_long, data.max_tokens, config.model)

    def fitting(self, pool: Pool, config: RunConfig) -> Pool:
        """`pool` as `data.too_long` wants it."""
        data = config.data
        if data.too_long == "cut":
            return pool
        base = self.base(config.model)
        return fitting(pool, Encoder(base.tokenizer, data.max_tokens, base.encoder_decoder), data.too_long)

    def retained(self, config: RunConfig) -> Retained:
        config = self.with_templates(config)
        sources = config.evaluation.retained
        return cached(self.retains, 2, sources, lambda: load_retained(sources, config.data))

    def longest_response(self, config: RunConfig) -> int:
        """Tokens of the longest response in the run's training data."""
        base, clients = self.base(config.model), self.clients(config)
        data = config.data
        key = config.model, data.sources, data.template, data.limit, config.evaluation.retained, *self.fit_key(config)
        return cached(self.responses, 8, key, lambda: longest_response(base.tokenizer, clients.pool.train))

    def footprint(self, config: RunConfig, grafts: int = 0) -> Footprint:
        """The footprint of the whole model with `grafts` personal experts per layer, on batches of the maximum length."""
        training, base = config.training, self.base(config.model)
        size = (training.batch_size, config.data.max_tokens)
        places = target_places(self.longest_response(config), size, base.encoder_decoder)
        options: dict[str, Any] = {
            "optimizer": training.optimizer,
            "target_positions": places,
            "grafts": grafts,
            "gradient_checkpointing": training.gradient_checkpointing,
        }
        key = config.model, training.tuning, size, *options.values()
        make = partial(footprint, base.model, training.tuning, size, **options)
        return cached(self.footprints, 8, key, make)

    def profiles(self, config: RunConfig) -> dict[str, Profile]:
        """Client → its device; empty without devices.profile."""
        return config.devices.profiles(list(self.clients(config)), str(config.seed))

    def memories(self, config: RunConfig, full_bytes: int) -> Mapping[str, int | None]:
        """Client → its memory in bytes; `full_bytes`: memory for training the full model."""
        devices, names = config.devices, list(self.clients(config))
        options = {"gb": devices.memory_gb, "share": devices.memory_share, "profiles": self.profiles(config)}
        return memories(names, full_bytes, str(config.seed), **options)


def load_base(model: ModelSettings, load: Callable[..., Base] = load) -> Base:
    """The base model of a run, as `load` loads it."""
    return load(
        model.name,
        model.trust_remote_code,
        dtype=model.dtype,
        revision=model.revision,
        attention=model.attention,
        experts=model.experts,
        quantize=model.quantize,
    )


@dataclass(frozen=True)
class OwnDataParts(Parts):
    """Parts of a client with its own data: it sees only its own data."""

    name: str = ""
    files: tuple[str, ...] = ()

    def clients(self, config: RunConfig) -> Clients:
        config = self.with_templates(config)

        def make() -> Clients:
            fit = partial(self.fitting, config=config)
            return own_clients(self.name, self.files, config.data, config.seed, self.retained(config), fit)

        return cached(self.divided, 8, (config.data.model_dump_json(), config.seed, config.evaluation.retained), make)


def cached(store: Cache[T], most: int, key: Hashable, make: Callable[[], T]) -> T:
    """The entry of `store` for `key`, created by `make` if it is missing; the oldest of `most` entries is removed first."""
    if key not in store:
        if len(store) == most:
            del store[next(iter(store))]
        store[key] = make()
    return store[key]


def longest_response(tokenizer: PreTrainedTokenizerBase, examples: Iterable[Example]) -> int:
    """Tokens of the longest response among `examples`, including the end token; of a conversation, of all answers together."""
    different = {(example.turns, example.template, example.response): example for example in examples}
    return max(Encoder(tokenizer, 4).targets(list(different.values())))


def target_places(longest: int, batch: tuple[int, int], encoder_decoder: bool) -> int:
    """The largest number of positions with a target in a batch of (examples, tokens each) whose responses have `longest` tokens.

    Responses follow their prompts, so that in the worst case no two of them overlap; the labels of an encoder-decoder all start
    at the first position.
    """
    examples, tokens = batch
    return min(longest if encoder_decoder else examples * longest, tokens)


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to start."""

    config: RunConfig
    method: Method
    label: str  # of the method, in tables
    base: Base
    clients: Clients
    server: Server
    profiles: Mapping[str, Profile]  # by client; empty without devices.profile
    training: Training
    participants: Mapping[str, Client]  # clients that train: all, or the single one of centralized training
    data: Mapping[str, Split]  # of clients and participants
    setting: str = ""  # name of the run file in a comparison
    retained: Retained = Retained()
    personal_bytes: int = 0  # memory of a client's personal experts, in addition to the footprint of its job
    memory: MemoryByPart = MemoryByPart({}, {})  # of training the model, by what it holds


def prepare_run(config: RunConfig, label: str | None = None, setting: str = "", parts: Parts | None = None) -> Prepared:
    """Loads the base model and the clients' data and creates the first server, reusing what `parts` has cached.

    Raises:
        BadValue: the model, the data, the devices or the method do not allow the run.
    """
    method = config.build_method()
    require_server_optimizer(config, method)
    require_robust_merging(config, method)
    parts = parts or Parts()
    base, clients = parts.base(config.model), parts.clients(config)
    if config.training.packing:
        require_packing(base.model)
    profiles, cost = parts.profiles(config), parts.footprint(config)
    full = cost.of(anatomy(base.model).all_experts)
    server = first_server(config, method, base, clients, cost, parts.memories(config, full))
    require_sent(config, method, server)
    for client in server.clients.values():  # a client that cannot take part raises now, not in round 10
        method.assign(replace(server, task=steps(method, 1)[0][1]), client)
    label, training = label or str(config.method["name"]), config.training
    known, retained = server.clients, parts.retained(config)
    grafts = method.declare().personal_experts
    largest = parts.footprint(config, grafts=grafts)
    own = largest.of(anatomy(base.model).all_experts) - full
    memory = memory_by_part(base.model, training.tuning, training.optimizer, largest.activation_bytes, grafts)
    given = (config, method, label, base, clients, server, profiles, training, known, clients, setting, retained, own, memory)
    prepared = Prepared(*given)
    return centralized(prepared) if method.centralized else prepared


def require_server_optimizer(config: RunConfig, method: Method) -> None:
    """Raises BadValue for a server optimizer around a method that does not support one."""
    name = config.method["name"]
    if config.federation.server_optimizer is not None and "server_optimizer" not in method.declare().wrappers:
        raise BadValue(
            f"federation.server_optimizer goes on from the weights that a merge gives, and {name} gives none that it could go on "
            f"from; leave it out (in a comparison {name}:federation.server_optimizer.name=none), or take another method"
        )


def require_robust_merging(config: RunConfig, method: Method) -> None:
    """Raises BadValue for robust merging around a method whose merge is no mean of weights that clients send alike."""
    declared = method.declare()
    if config.federation.robust is not None and ("robust_merging" not in declared.wrappers or declared.lowers_rank):
        raise BadValue(
            f"federation.robust needs a merge that is a mean of weights, and that of {config.method['name']} is none; leave it "
            "out, or take another method"
        )


def centralized(prepared: Prepared) -> Prepared:
    """`prepared` with a single participant that has all clients' data and unlimited memory.

    In a round it takes as many steps as the sampled clients would take together. The clients are evaluated as usual.
    """
    clients, training = prepared.clients, prepared.training
    pool = clients.as_one_client()
    number = min(prepared.config.federation.clients_per_round or len(clients), len(clients))
    return replace(
        prepared,
        training=replace(training, local_steps=training.local_steps * number),
        participants={name: pool.client(name) for name in pool},
        data=replace(clients, shares={**clients.shares, **pool.shares}),
    )


def first_server(
    config: RunConfig, method: Method, base: Base, clients: Clients, cost: Footprint, memory: Mapping[str, int | None]
) -> Server:
    """The server before the first round: with the base model's trained weights, or with fresh adapters."""
    seed = str(config.seed)
    shape = anatomy(base.model)
    model = initial_model(config, method, base)
    known = {name: replace(clients.client(name), memory_bytes=memory[name]) for name in clients}
    return Server(rows.take(model), rows.layout(model), shape, cost, known, seed, wire_dtype=config.federation.wire_dtype)


def initial_model(config: RunConfig, method: Method, base: Base) -> nn.Module:
    """The global model before the first round: with fresh adapters, or with those of `model.adapter`.

    Raises:
        BadValue: `model.adapter` is no adapter, or does not fit those of the run.
    """
    tuning = config.training.tuning
    model = method.global_model(base.model, tuning, None, seed=f"{config.seed}/start")
    if config.model.adapter is not None:
        start_from(model, read_adapter(Path(config.model.adapter)), tuning)
    return model


def require_sent(config: RunConfig, method: Method, server: Server) -> None:
    """Raises BadValue if clients would not receive the adapters that the run starts from."""
    first = replace(server, round=1, task="train")
    if config.model.adapter is None or method.setup_tasks:  # methods with setup tasks assign experts, and send all they have
        return
    for job in jobs_for(first, method, server.clients.values()):
        for name in factors.rank_axes(server.weights):
            block, ids = server.layout[name], job.patch.rows.get(name)
            whole = block is None or ids is None or ids.tolist() == list(job.experts[block])
            if name not in job.patch.tensors or not whole:
                raise BadValue(
                    f"model.adapter: the clients of {config.method['name']} start from adapters of their own, since it does not "
                    f"send them {name}; take another method, such as fedit, or leave model.adapter out"
                )


def adapter_hash(config: RunConfig) -> str | None:
    """sha256 of the adapter that the run starts from; None without one.

    Raises:
        BadValue: it is missing.
    """
    if config.model.adapter is None:
        return None
    return files_hash([read_adapter(Path(config.model.adapter)).folder / name for name in (CONFIG, WEIGHTS)])


def without_weights(prepared: Prepared) -> Prepared:
    """`prepared` with shapes in place of weights, for use once the server and the engine have the weights that they need."""
    base = replace(prepared.base, model=on_meta(prepared.base.model))
    return replace(prepared, base=base, server=replace(prepared.server, weights={}))


INPUTS = {
    "model_hash": "the model's weights",
    "config_hash": "the model's configuration or tokenizer",
    "adapter_hash": "the adapter that the run started from",
    "data_hashes": "the data",
    "template_hashes": "how prompts are asked (data.template, or the tokenizer's chat template)",
    "text_hash": "a file that the method names",
}
"""Hashes among the `versions` of a run's input files; a run is resumed and exported only if they are unchanged."""


def versions(prepared: Prepared) -> dict[str, Any]:
    """The content of versions.json: package versions, the git commit, and hashes of the run's inputs."""
    config = prepared.config
    packages = ("fedexperts", "torch", "transformers", "peft", "safetensors", "tokenizers", "numpy")
    return {
        **{package: version(package) for package in packages},
        "git_commit": git_commit(),
        "model_hash": prepared.base.hash,
        "config_hash": prepared.base.config_hash,
        "adapter_hash": adapter_hash(config),
        "data_hashes": {
            **prepared.clients.hashes,
            **prepared.retained.hashes,
            **trace_hash(config.devices.profile),
        },
        "template_hashes": template_hashes(config, prepared.base),
        "text_hash": local_files_hash(prepared),
    }


def template_hashes(config: RunConfig, base: Base) -> dict[str, str]:
    """Source → its template: "plain-1", "plain-2", or the sha256 of a chat template."""
    chosen = Parts(bases={config.model: base}).with_templates(config).data.sources
    jinja = {source.name: base.tokenizer.chat_template if source.template == "chat" else source.template for source in chosen}
    return {name: text if text in PLAINS else sha256(str(text).encode()).hexdigest() for name, text in jinja.items()}


def local_files_hash(prepared: Prepared) -> str | None:
    """sha256 of the method's local files, which every machine has; None without such files."""
    settings = prepared.config.method
    paths = [path for name in prepared.method.declare().local_files if (path := settings.get(name)) is not None]
    return sha256(b"".join(Path(path).read_bytes() for path in paths)).hexdigest() if paths else None


def git_commit() -> str | None:
    """The commit of the checkout that the library runs from; None without one."""
    if not which("git"):
        return None
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return head.stdout.strip() or None
