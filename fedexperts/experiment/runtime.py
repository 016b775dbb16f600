"""What the clients of a run work with, from its settings: the same on whichever machine it is made."""

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
    """All clients of the run; below `out` they keep what they keep to themselves."""
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
    """Who is evaluated and who trains, by name: the clients, and the one place that has all their data, where there is one."""
    return {**prepared.server.clients, **prepared.participants}


def task_for(prepared: Prepared) -> ClientTask:
    config = prepared.config
    return ClientTask(prepared.method, config.evaluation, config.federation.rounds, prepared.retained.examples)


def encoder_for(prepared: Prepared) -> Encoder:
    base = prepared.base
    return Encoder(base.tokenizer, prepared.config.data.max_tokens, base.encoder_decoder)


def clock_for(prepared: Prepared) -> Clock:
    """The run's virtual clock. One place that has all data is no device, so a pooled method has none."""
    profiles = {} if prepared.method.centralized else prepared.profiles
    return Clock(profiles, prepared.config.devices.deadline_seconds or inf)


def limits(prepared: Prepared) -> dict[str, int]:
    """Participant → the memory that no job of its may exceed."""
    if prepared.config.devices.out_of_memory == "train anyway":
        return {}
    return {name: client.memory_bytes for name, client in prepared.participants.items() if client.memory_bytes is not None}
