"""What a site finds out before it takes part: whether its rows, its machine, its keys and the server fit the run file."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TypeVar

import psutil
import torch

from fedexperts import config
from fedexperts.config import RunConfig
from fedexperts.core.devices import GB
from fedexperts.deploy.processes import require_files
from fedexperts.deploy.site import (
    ServerInfo,
    ask,
    clock_error,
    expiry_in,
    expiry_warnings,
    identity,
    require_own_keys,
    require_same_protocol,
    signed_headers,
)
from fedexperts.engines.message import VERSION
from fedexperts.errors import BadValue, FedExpertsError, listed
from fedexperts.experiment.lost import losses_of, sentences
from fedexperts.experiment.plan import plan, slow_products
from fedexperts.experiment.setup import OwnDataParts, Prepared, prepare_run
from fedexperts.models.load import load
from fedexperts.moe.device import find_devices

T = TypeVar("T")
SIDE = 1024
"""Of the matrices whose product is timed."""


@dataclass(frozen=True)
class Finding:
    """A line of the check: what was looked at, what was found, and whether it is in order."""

    about: str
    found: str
    is_ok: bool = True


@dataclass(frozen=True)
class Site:
    """What a client would be started with. memory_gb: of its device; None: what this machine has free."""

    run_file: Path
    data: tuple[str, ...]
    name: str | None = None
    keys: Path | None = None
    server: str | None = None
    settings: Sequence[str] = ()
    memory_gb: float | None = None


def check(site: Site) -> Iterator[Finding]:
    """The findings at `site`, one after the other; one that is not in order says what to do, and the next go on."""
    owner = yield from keys_found(site)
    info = yield from server_found(site)
    run = yield from attempt("run file", lambda: config.read(site.run_file, site.settings), lambda run: str(site.run_file))
    if run is None:
        return
    name = yield from attempt("name", lambda: name_of(site, run, owner), lambda name: f"{name} is a client of the run")
    if name is None:
        return
    files = ", ".join(site.data)
    prepared = yield from attempt(
        "rows", lambda: prepared_at(site, run, name), lambda _: f"{files} can be read as data.sources says"
    )
    if prepared is None:
        return
    yield from rows_found(prepared, name)
    yield from machine_found(prepared, site.memory_gb)
    yield base_found(prepared, info)


def attempt(about: str, make: Callable[[], T], found: Callable[[T], str]) -> Generator[Finding, None, T | None]:
    """The result of `make`, with what was `found` as a finding; None after a mistake, which is a finding too."""
    try:
        made = make()
    except (FedExpertsError, OSError) as error:
        yield Finding(about, str(error), is_ok=False)
        return None
    yield Finding(about, found(made))
    return made


def keys_found(site: Site) -> Generator[Finding, None, str | None]:
    """Whether the keys are there and readable, whose they are, and when their authority expires; returns whose they are."""
    keys = site.keys
    if keys is None:
        yield Finding("keys", "none given (--keys): fit for tests on one machine only")
        return site.name

    def owner_of() -> str | None:
        require_files(keys, ("ca.pem", "node.key"), site.name or "of the client")
        if site.name is not None:
            require_own_keys(keys, site.name)
        return identity(keys)

    owner = yield from attempt("keys", owner_of, lambda owner: f"of {owner or 'a client that they do not name'}, private")
    expires = yield from attempt("authority", lambda: expiry_in(keys / "ca.pem"), lambda day: f"valid until {day:%Y-%m-%d}")
    for sentence in expiry_warnings({"ca.pem": expires}):
        yield Finding("authority", sentence, is_ok=False)
    return site.name or owner


def server_found(site: Site) -> Generator[Finding, None, ServerInfo | None]:
    """Whether the server answers, can be trusted, knows the key, and has the same version and the same time."""
    if site.server is None:
        yield Finding("server", "not asked (--server host:port)")
        return None
    address, headers = site.server, {}
    if site.keys is not None and (site.keys / "node.key").exists():
        with suppress(BadValue):  # a damaged key, which keys_found has named
            headers = signed_headers(site.keys)

    def answer() -> ServerInfo:
        info = ask(address, site.keys, headers)
        if info is None:
            raise BadValue(f"nobody answers at {address}; start the server, and let its firewall pass this machine")
        require_same_protocol(info, address)
        return info

    info = yield from attempt(
        "server", answer, lambda info: f"{address} answers: FedExperts {info.version or 'of an earlier version'}"
    )
    if info is None:
        return None
    if info.version not in (None, VERSION):
        yield Finding("version", f"here it is {VERSION}: they can work together; install the same when you can")
    error = clock_error(info)
    if info.ahead_seconds is not None:
        way = "ahead of" if info.ahead_seconds > 0 else "behind"
        yield Finding("clock", error or f"{abs(info.ahead_seconds):.1f} s {way} the server's", error is None)
    if headers and info.said is not None and error is None:
        known = bool(info.said.get("registered"))
        what = "copy this client's .pub file to keys/server/clients there, and start the server again"
        yield Finding(
            "registration", "the server knows this key" if known else f"the server does not know this key; {what}", known
        )
    for sentence in expiry_warnings({"the server's certificate": info.expires}):
        yield Finding("certificate", sentence, is_ok=False)
    return info


def name_of(site: Site, run: RunConfig, owner: str | None) -> str:
    """The client that the site is.

    Raises:
        BadValue: it cannot be told, or the run has no such client.
    """
    names = run.data.names
    name = site.name or owner
    if name is None:
        raise BadValue(
            f"which client is this? give --name, one of {listed(names)}" if names else "which client is this? give --name"
        )
    if names and name not in names:
        raise BadValue(f"the run has no client {name}; its clients are {listed(names)}")
    return name


def prepared_at(site: Site, run: RunConfig, name: str) -> Prepared:
    """The run as the client `name` prepares it, with its own rows.

    Raises:
        BadValue: whatever is wrong with the rows, the model or the device.
    """
    if not (run.data.own and site.data):
        given = "and no --data was given" if run.data.own else "but the run file divides its own sources among the clients"
        raise BadValue(
            f"data.own = {str(run.data.own).lower()}, {given}; a site checks its own rows: set data.own, and give --data"
        )
    find_devices(run.training.device)
    parts = OwnDataParts(name=name, files=site.data, load=partial(load, on_demand=True))
    return prepare_run(run, parts=parts)


def rows_found(prepared: Prepared, name: str) -> Iterator[Finding]:
    """The examples that the rows give, what of them is cut, and what the server will be told of them."""
    share, run = prepared.clients.shares[name], prepared.config
    yield Finding("examples", f"{len(share.train)} to train, {len(share.validation)} to validate, {len(share.test)} to test")
    losses = losses_of(prepared)
    lines = [*sentences(losses, run.data.max_tokens, run.evaluation.generate_tokens)]
    for sentence in lines:
        yield Finding("cuts", sentence, is_ok=False)
    if not lines:
        yield Finding("cuts", f"nothing is cut at data.max_tokens = {run.data.max_tokens}")
    told = ", ".join(f"{task} {number}" for task, number in prepared.clients.tasks(name).items())
    yield Finding("told to the server", f"the number of examples of each task ({told}), their metrics, and the longest response")


def machine_found(prepared: Prepared, memory_gb: float | None) -> Iterator[Finding]:
    """Memory, bytes of a round, and an estimate of its time."""
    planned = plan(prepared)
    (client,) = planned["clients"]
    needed = sum(client["first_memory"].values()) or planned["full_bytes"]
    available = free_bytes() if memory_gb is None else round(memory_gb * GB)
    enough = needed <= available
    what = (
        ""
        if enough
        else "; lower training.batch_size or data.max_tokens, set training.gradient_checkpointing, or use another machine"
    )
    whose = "free here" if memory_gb is None else "given"
    yield Finding("memory", f"about {needed / GB:.2f} GB to train, {available / GB:.2f} GB {whose}{what}", enough)
    down, up = client["first_bytes_down"] or planned["full_patch_bytes"], planned["full_patch_bytes"]
    yield Finding("bytes a round", f"{down / 1e6:.2f} MB to this client, at most {up / 1e6:.2f} MB from it")
    device, share = find_devices(prepared.config.training.device)[0], prepared.config.devices.utilization
    speed = flops_per_second(device)
    seconds = planned["round_flops_estimated"] / (speed * share)
    how = f"{speed / 1e9:,.0f} GFLOP/s measured on {device}, of which training sustains {share:.0%} (devices.utilization)"
    yield Finding("time of a round", f"at most about {seconds:,.0f} s to train, estimated: {how}")
    for sentence in slow_products(prepared):
        yield Finding("products", sentence, is_ok=False)


def free_bytes() -> int:
    """Bytes of memory that this machine can still give to a process, those of its page cache among them."""
    return int(psutil.virtual_memory().available)


def flops_per_second(device: str) -> float:
    """Of a product of two float32 matrices of SIDE · SIDE: 2 · SIDE³ operations; the best of three."""
    left, right = (torch.ones(SIDE, SIDE, device=device) for _ in range(2))
    times = []
    for _ in range(4):  # the first one starts what a device needs
        started = perf_counter()
        float((left @ right)[0, 0])  # waits for it
        times.append(perf_counter() - started)
    return 2.0 * SIDE**3 / min(times[1:])


def base_found(prepared: Prepared, info: ServerInfo | None) -> Finding:
    """The hash of the base model, compared with the server's where that told it."""
    own = prepared.base.identity
    theirs = (info.said or {}).get("model_hash") if info is not None else None
    if theirs is None:
        return Finding("base model", f"{prepared.base.name}, sha256 {own[:16]}…; not compared with the server's")
    if theirs == own:
        return Finding("base model", f"{prepared.base.name}, sha256 {own[:16]}…, as the server's")
    what = "give both sides copies of one folder, or the same model.revision"
    return Finding(
        "base model", f"sha256 {own[:16]}…, and the server's {str(theirs)[:16]}…: their files differ; {what}", is_ok=False
    )
