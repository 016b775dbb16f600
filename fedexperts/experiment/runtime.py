"""The client runtime of a run, built from its settings alone, so that it is the same on every machine."""

from math import inf
from pathlib import Path

from fedexperts.core.ledger import Clock
from fedexperts.data.encode import Encoder
from fedexperts.engines.client_store import ClientStateStore
from fedexperts.engines.local import ClientRuntime
from fedexperts.experiment.client_task import ClientTask
from fedexperts.experiment.setup import Prepared
from fedexperts.types import Client


def runtime_for(prepared: Prepared, out: Path) -> ClientRuntime:
    """The runtime of all clients of the run; client states are stored in `out`/clients."""
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
    )


def everyone(prepared: Prepared) -> dict[str, Client]:
    """All clients and participants by name: of centralized training also the one that has all clients' data."""
    return {**prepared.server.clients, **prepared.participants}


def task_for(prepared: Prepared) -> ClientTask:
    config = prepared.config
    return ClientTask(prepared.method, config.evaluation, config.federation.rounds, prepared.retained.examples)


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
