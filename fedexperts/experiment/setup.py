"""From settings to a run that can start: the base, the clients with their data and devices, the first server."""

import subprocess
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from shutil import which
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedTokenizerBase

from fedexperts.config import ModelSettings, RunConfig
from fedexperts.core.devices import Profile, memories, trace_hash
from fedexperts.core.evaluation import is_text
from fedexperts.data.clients import (
    Clients,
    Counts,
    Pool,
    Retained,
    load_pool,
    load_retained,
    make_clients,
    own_clients,
    stand_ins,
    without,
)
from fedexperts.engines.remote import Greeting
from fedexperts.errors import BadValue, quoted
from fedexperts.federation import steps
from fedexperts.methods.contract import Method
from fedexperts.models.load import Base, load
from fedexperts.moe import rows
from fedexperts.moe.anatomy import anatomy
from fedexperts.moe.flops import Footprint, footprint, on_meta
from fedexperts.types import METRIC_NAMES, Client, Example, Server, Split, Training

T = TypeVar("T")
Kept = dict[Hashable, T]
MOST_EXAMPLES = 10**7
"""That a client may tell of: the server holds a stand-in for each."""
COUNTS = TypeAdapter(Counts)
REMEDY = "install this version of FedExperts there, or leave it out of data.names"


@dataclass(frozen=True)
class Parts:
    """What runs of several methods have in common: made for the first that asks, then shared. Nobody writes to it.

    Files are read once, so all runs see them as they were then. Only the last few of each kind are held.
    """

    bases: Kept[Base] = field(default_factory=dict)
    pools: Kept[Pool] = field(default_factory=dict)
    retains: Kept[Retained] = field(default_factory=dict)
    divided: Kept[Clients] = field(default_factory=dict)
    responses: Kept[int] = field(default_factory=dict)
    footprints: Kept[Footprint] = field(default_factory=dict)

    def base(self, model: ModelSettings) -> Base:
        return kept(self.bases, 1, model, lambda: load(model.name, model.trust_remote_code))

    def clients(self, config: RunConfig) -> Clients:
        """Raises BadValue where clients bring their own data, and nobody has brought any."""
        data = config.data
        if data.own:
            raise BadValue(
                "data.own = true: each client brings its own data; start `fedexperts server` with this run file, and "
                "`fedexperts client` with --data at each of them, or leave data.own out"
            )
        key = data.model_dump_json(), config.seed, config.evaluation.retained
        return kept(self.divided, 8, key, lambda: make_clients(data, config.seed, self.pool(config)))

    def pool(self, config: RunConfig) -> Pool:
        data = config.data
        key = data.sources, data.limit, config.evaluation.retained
        return kept(self.pools, 2, key, lambda: without(load_pool(data), self.retained(config)))

    def retained(self, config: RunConfig) -> Retained:
        asked = config.evaluation.retained
        return kept(self.retains, 2, asked, lambda: load_retained(asked, config.data))

    def longest_response(self, config: RunConfig) -> int:
        """longest_response of all that the run's clients may get to train on."""
        base, clients = self.base(config.model), self.clients(config)
        key = config.model, config.data.sources, config.data.limit, config.evaluation.retained
        return kept(self.responses, 8, key, lambda: longest_response(base.tokenizer, clients.pool.train))

    def footprint(self, config: RunConfig, grafts: int = 0) -> Footprint:
        """Of the whole model with so many personal experts a layer, on batches as long as they can be."""
        training, base = config.training, self.base(config.model)
        size = (training.batch_size, config.data.max_tokens)
        places = target_places(self.longest_response(config), size, base.encoder_decoder)
        key = config.model, training.tuning, size, training.optimizer, places, grafts
        make = partial(
            footprint, base.model, training.tuning, size, optimizer=training.optimizer, target_places=places, grafts=grafts
        )
        return kept(self.footprints, 8, key, make)

    def profiles(self, config: RunConfig) -> dict[str, Profile]:
        """The device of each client; none where there is no `profile`."""
        return config.devices.profiles(list(self.clients(config)), str(config.seed))

    def memories(self, config: RunConfig, full_bytes: int) -> Mapping[str, int | None]:
        """Bytes of each client's device; `full_bytes`: what training the full model takes."""
        devices, names = config.devices, list(self.clients(config))
        given = {"gb": devices.memory_gb, "share": devices.memory_share, "profiles": self.profiles(config)}
        return memories(names, full_bytes, str(config.seed), **given)


@dataclass(frozen=True)
class Own(Parts):
    """Of a client that brings its own data: it knows no other, and no other's."""

    name: str = ""
    files: tuple[str, ...] = ()

    def clients(self, config: RunConfig) -> Clients:
        def make() -> Clients:
            return own_clients(self.name, self.files, config.data, config.seed, self.retained(config))

        return kept(self.divided, 8, (config.data.model_dump_json(), config.seed, config.evaluation.retained), make)


@dataclass(frozen=True)
class Told(Parts):
    """Of a server whose clients bring their own data: it knows what they have told it."""

    counts: Mapping[str, Counts] = field(default_factory=dict)
    devices: Mapping[str, Profile] = field(default_factory=dict)
    memory: Mapping[str, int | None] = field(default_factory=dict)

    def clients(self, config: RunConfig) -> Clients:
        return stand_ins({name: self.counts[name] for name in config.data.names})

    def longest_response(self, config: RunConfig) -> int:
        return max(count.longest_response for count in self.counts.values())

    def profiles(self, config: RunConfig) -> dict[str, Profile]:
        return dict(self.devices)

    def memories(self, config: RunConfig, full_bytes: int) -> Mapping[str, int | None]:
        return self.memory


def told_by(greetings: Iterable[Greeting], bases: Parts) -> Told:
    """What `greetings` tell, with the base models of `bases`.

    Raises:
        BadValue: a client brought no data of its own, or says what cannot be, or two judge a task by different metrics.
    """
    found = {greeting.client.name: greeting for greeting in greetings}
    counts = {name: counted(each) for name, each in found.items()}
    require_same_metrics(counts)
    return Told(
        bases=bases.bases,
        counts=counts,
        devices={name: each.profile for name, each in found.items() if each.profile},
        memory={name: each.client.memory_bytes for name, each in found.items()},
    )


def counted(greeting: Greeting) -> Counts:
    """Raises BadValue when it brought no data of its own, or says what cannot be."""
    client, told = greeting.client, greeting.counts
    if told is None:
        raise BadValue(f"{client.name} brought no data of its own (data.own = true); start it with --data")
    try:
        counts = COUNTS.validate_python(told)
    except ValidationError as error:
        raise BadValue(
            f"{client.name} tells of its data what cannot be read ({error.error_count()} mistakes); {REMEDY}"
        ) from None
    sound = counts.train and min([*counts.train.values(), counts.longest_response]) >= 1
    sound = sound and {*counts.metrics.values()} <= {*METRIC_NAMES} and all(map(is_text, (*counts.train, *counts.metrics)))
    if not sound or min(counts.validation, counts.test) < 0 or sum(counts.train.values()) != client.examples:
        raise BadValue(f"{client.name} tells of data that cannot be: {quoted(counts)}; {REMEDY}")
    if client.examples + counts.validation + counts.test > MOST_EXAMPLES:
        raise BadValue(
            f"{client.name} tells of {client.examples:,} examples, and a client may have {MOST_EXAMPLES:,}; give it fewer"
        )
    return counts


def require_same_metrics(counts: Mapping[str, Counts]) -> None:
    """Raises BadValue where two clients judge one task by different metrics, so that their scores cannot be merged."""
    first: dict[str, tuple[str, str]] = {}
    for name, count in counts.items():
        for task, metric in count.metrics.items():
            other, theirs = first.setdefault(task, (name, metric))
            if theirs != metric:
                raise BadValue(
                    f"task {task!r} is judged by {theirs} at {other} and by {metric} at {name}; set data.sources.metric, or give "
                    "both clients rows of one format"
                )


def kept(store: Kept[T], most: int, key: Hashable, make: Callable[[], T]) -> T:
    """What `store` has for `key`; where it has nothing, the oldest makes room before it is made."""
    if key not in store:
        if len(store) == most:
            del store[next(iter(store))]
        store[key] = make()
    return store[key]


def longest_response(tokenizer: PreTrainedTokenizerBase, examples: Iterable[Example]) -> int:
    """Tokens of the longest response among `examples`, its end token included."""
    responses = list({example.response for example in examples})
    return max(map(len, tokenizer(responses, add_special_tokens=False, verbose=False)["input_ids"])) + 1


def target_places(longest: int, batch: tuple[int, int], encoder_decoder: bool) -> int:
    """The most places with a target that a batch of (examples, tokens each) can have when no response is above `longest`.

    The responses of a batch stand where their prompts end, so at worst no two of them at the same places; the labels of an
    encoder-decoder all begin at the first.
    """
    examples, tokens = batch
    return min(longest if encoder_decoder else examples * longest, tokens)


@dataclass(frozen=True)
class Prepared:
    """A run that can start."""

    config: RunConfig
    method: Method
    label: str  # of the method, in tables
    base: Base
    clients: Clients
    server: Server
    profiles: Mapping[str, Profile]  # of the clients; none without devices.profile
    training: Training
    participants: Mapping[str, Client]  # who may be asked to train: the clients, or the one place that has all their data
    data: Mapping[str, Split]  # of clients and participants
    setting: str = ""  # the run file of a comparison, by its name
    retained: Retained = Retained()
    personal_bytes: int = 0  # memory that a client's personal experts take beside the footprint of what it was sent


def prepare_run(config: RunConfig, label: str | None = None, setting: str = "", parts: Parts | None = None) -> Prepared:
    """The base, the clients' data and the first server; of `parts` whatever is there already.

    Raises:
        BadValue: the model, the data, the devices or the method do not allow the run.
    """
    method = config.build_method()
    require_steps(config, method)
    parts = parts or Parts()
    base, clients = parts.base(config.model), parts.clients(config)
    profiles, cost = parts.profiles(config), parts.footprint(config)
    full = cost.of(anatomy(base.model).all_experts)
    memory = parts.memories(config, full)
    server = first_server(config, method, base, clients, cost, memory)
    for client in server.clients.values():  # a client that can have no part in it says so now, not in the tenth round
        method.assign(replace(server, task=steps(method, 1)[0][1]), client)
    label, training = label or str(config.method["name"]), config.training
    known, retained = server.clients, parts.retained(config)
    own = parts.footprint(config, grafts=method.declare().personal_experts).of(anatomy(base.model).all_experts) - full
    prepared = Prepared(config, method, label, base, clients, server, profiles, training, known, clients, setting, retained, own)
    return centralized(prepared) if method.centralized else prepared


def require_steps(config: RunConfig, method: Method) -> None:
    """Raises BadValue for a server optimiser around a method whose merge gives nothing that it could go on from."""
    name = config.method["name"]
    if config.federation.server_optimizer is not None and "server_optimizer" not in method.declare().wrappers:
        raise BadValue(
            f"federation.server_optimizer goes on from the weights that a merge gives, and {name} gives none that it could go on "
            f"from; leave it out (in a comparison {name}:federation.server_optimizer.name=none), or take another method"
        )


def centralized(prepared: Prepared) -> Prepared:
    """`prepared` with a single participant: it has all clients' data, and no limit of memory, and takes in a round as many
    steps as those who would be asked take together. Evaluated are the clients as ever.
    """
    clients, training = prepared.clients, prepared.training
    pool = clients.together()
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
    """The server before the first round: the base's weights that will be trained, or fresh adapters."""
    seed = str(config.seed)
    shape = anatomy(base.model)
    model = method.global_model(base.model, config.training.tuning, None, seed=f"{seed}/start")
    known = {name: replace(clients.client(name), memory_bytes=memory[name]) for name in clients}
    return Server(weights=rows.take(model), layout=rows.layout(model), anatomy=shape, footprint=cost, clients=known, seed=seed)


def without_weights(prepared: Prepared) -> Prepared:
    """`prepared` once the server and the engine have the weights that they need: of them it has only the shapes."""
    base = replace(prepared.base, model=on_meta(prepared.base.model))
    return replace(prepared, base=base, server=replace(prepared.server, weights={}))


INPUTS = {
    "model_hash": "the model's weights",
    "config_hash": "the model's configuration or tokenizer",
    "data_hashes": "the data",
    "text_hash": "a file that the method names",
}
"""What `versions` tells of files that a run works with: it goes on, and is exported, only with the same."""


def versions(prepared: Prepared) -> dict[str, Any]:
    config = prepared.config
    packages = ("fedexperts", "torch", "transformers", "peft", "safetensors", "tokenizers", "numpy")
    return {
        **{package: version(package) for package in packages},
        "git_commit": git_commit(),
        "model_hash": prepared.base.hash,
        "config_hash": prepared.base.config_hash,
        "data_hashes": {
            **prepared.clients.hashes,
            **prepared.retained.hashes,
            **trace_hash(config.devices.profile),
        },
        "text_hash": local_files_hash(prepared),
    }


def local_files_hash(prepared: Prepared) -> str | None:
    """sha256 of the files that the method has on every machine; None where it has none."""
    settings = prepared.config.method
    paths = [path for name in prepared.method.declare().local_files if (path := settings.get(name)) is not None]
    return sha256(b"".join(Path(path).read_bytes() for path in paths)).hexdigest() if paths else None


def git_commit() -> str | None:
    """Of the checkout that the library runs from; None where it runs from none."""
    if not which("git"):
        return None
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return asked.stdout.strip() or None
