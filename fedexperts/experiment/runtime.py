"""The client runtime of a run, built from its settings alone, so that it is the same on every machine."""

from math import inf
from pathlib import Path
from random import Random

from fedexperts.config import RunConfig
from fedexperts.core.ledger import Clock
from fedexperts.data.encode import Encoder
from fedexperts.engines.client_store import ClientStateStore
from fedexperts.engines.local import ClientRuntime
from fedexperts.errors import BadValue
from fedexperts.experiment.client_task import ClientTask
from fedexperts.experiment.control import needs_validation
from fedexperts.experiment.setup import Prepared
from fedexperts.moe.device import find_devices
from fedexperts.types import Client


def runtime_for(prepared: Prepared, out: Path) -> ClientRuntime:
    """The runtime of all clients of the run, on the first device that it names; client states are stored in `out`/clients.

    Raises:
        BadValue: this machine does not have the devices that the run names.
    """
    return ClientRuntime(
        model=prepared.base.model,
        encoder=encoder_for(prepared),
        training=prepared.training,
        clients=everyone(prepared),
        data=prepared.data,
        task=task_for(prepared),
        client_store=ClientStateStore(out / "clients"),
        profiles=clock_for(prepared).profiles,
        limits=limits(prepared),
        device=find_devices(prepared.config.training.device)[0],
        reader=prepared.base.reader,
    )


def devices_of(config: RunConfig) -> tuple[str, ...]:
    """The devices that the run's clients on this machine compute on. Those of Flower's simulation see reserved cards alone.

    Raises:
        BadValue: this machine does not have them, or Flower's simulation would not show them.
    """
    device, simulated = config.training.device, config.federation.engine == "flower"
    if simulated and (not isinstance(device, str) or ":" in device):
        raise BadValue(
            f'training.device = {device!r} names cards, but with federation.engine = "flower" Ray assigns them; set "cuda" and '
            "federation.gpus_per_worker"
        )
    if simulated and not config.federation.gpus_per_worker and device in ("auto", "cuda"):
        if device == "cuda":
            raise BadValue(
                'training.device = "cuda", but with federation.engine = "flower" workers see only the cards that Ray reserves '
                "for them; set federation.gpus_per_worker above 0, or leave the device out"
            )
        return ("cpu",)
    return find_devices(device)


def everyone(prepared: Prepared) -> dict[str, Client]:
    """All clients and participants by name: of centralized training also the one that has all clients' data."""
    return {**prepared.server.clients, **prepared.participants}


def task_for(prepared: Prepared) -> ClientTask:
    config = prepared.config
    return ClientTask(
        prepared.method,
        config.evaluation,
        config.federation.rounds,
        retained=prepared.retained.examples,
        validates=needs_validation(config),
        evaluated=frozenset(evaluated_clients(prepared)),
        predictions=config.predictions,
        own_data=config.data.own,
    )


def evaluated_clients(prepared: Prepared) -> dict[str, Client]:
    """The clients that evaluations score: all, or `evaluation.clients` of them, drawn once from the seed."""
    clients, number = prepared.server.clients, prepared.config.evaluation.clients
    if number is None or number >= len(clients):
        return dict(clients)
    chosen = {*Random(f"{prepared.config.seed}/evaluation").sample(list(clients), number)}
    return {name: client for name, client in clients.items() if name in chosen}


def encoder_for(prepared: Prepared) -> Encoder:
    base = prepared.base
    return Encoder(base.tokenizer, prepared.config.data.max_tokens, base.encoder_decoder)


def clock_for(prepared: Prepared) -> Clock:
    """The run's virtual clock. Centralized training has none, because it does not run on a client's device."""
    profiles = {} if prepared.method.centralized else prepared.profiles
    return Clock(profiles, prepared.config.devices.deadline_seconds or inf)


def limits(prepared: Prepared) -> dict[str, int]:
    """Participant → the memory limit of its jobs; empty if jobs above it are executed anyway."""
    if prepared.config.devices.out_of_memory == "train anyway":
        return {}
    return {name: client.memory_bytes for name, client in prepared.participants.items() if client.memory_bytes is not None}
