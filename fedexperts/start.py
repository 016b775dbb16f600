"""From settings to a run that can start: the base, the clients with their data and devices, the first server."""

import subprocess
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from shutil import which
from typing import Any

from fedexperts.base.load import Base, load
from fedexperts.config import RunConfig
from fedexperts.data.clients import Clients, make_clients
from fedexperts.devices import memories
from fedexperts.federation import steps
from fedexperts.moe import rows
from fedexperts.moe.anatomy import anatomy
from fedexperts.moe.flops import footprint
from fedexperts.moe.shrink import shrink
from fedexperts.moe.tuning import prepare
from fedexperts.types import Method, Server


@dataclass(frozen=True)
class Prepared:
    """A run that can start."""

    config: RunConfig
    method: Method
    label: str  # of the method, in tables
    base: Base
    clients: Clients
    server: Server
    setting: str = ""  # the run file of a comparison, by its name


def prepare_run(config: RunConfig, label: str | None = None, setting: str = "") -> Prepared:
    """The base, the clients' data and the first server.

    Raises:
        BadValue: the model, the data, the devices or the method do not allow the run.
    """
    method = config.build_method()
    base = load(config.model.name, config.model.trust_remote_code)
    clients = make_clients(config.data, config.seed)
    server = first_server(config, base, clients)
    for client in server.clients.values():  # a client that can have no part in it says so now, not in the tenth round
        method.assign(replace(server, task=steps(method, 1)[0][1]), client)
    return Prepared(config, method, label or str(config.method["name"]), base, clients, server, setting)


def first_server(config: RunConfig, base: Base, clients: Clients) -> Server:
    """The server before the first round: the base's weights that will be trained, or fresh adapters."""
    training = config.training.build()
    seed = str(config.seed)
    shape = anatomy(base.model)
    model = prepare(shrink(base.model, shape.all_experts), training.tuning, seed=f"{seed}/start")
    size = (training.batch_size, config.data.max_tokens)
    cost = footprint(base.model, training.tuning, size, optimizer=training.optimizer)
    devices = config.devices
    memory = memories(list(clients), cost.of(shape.all_experts), seed, gb=devices.memory_gb, share=devices.memory_share)
    known = {name: replace(clients.client(name), memory_bytes=memory[name]) for name in clients}
    return Server(weights=rows.read(model), layout=rows.layout(model), anatomy=shape, footprint=cost, clients=known, seed=seed)


def versions(prepared: Prepared) -> dict[str, Any]:
    packages = ("fedexperts", "torch", "transformers", "peft", "safetensors", "tokenizers", "numpy")
    return {
        **{package: version(package) for package in packages},
        "git_commit": git_commit(),
        "model_hash": prepared.base.hash,
        "data_hashes": dict(prepared.clients.hashes),
    }


def git_commit() -> str | None:
    """Of the checkout that the library runs from; None where it runs from none."""
    if not which("git"):
        return None
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return asked.stdout.strip() or None
