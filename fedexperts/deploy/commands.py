"""The commands of a deployment. Heavy packages are imported when one runs."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from logging import INFO, WARNING
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedexperts.deploy import logs
from fedexperts.deploy.logs import LOG, level_of, logging_to
from fedexperts.deploy.processes import private
from fedexperts.errors import BadRun, BadValue
from fedexperts.experiment.console import console, finish, say

if TYPE_CHECKING:
    from fedexperts.deploy.deployment import Federation
    from fedexperts.deploy.status import Status, StatusPage

RunFile = Annotated[Path, typer.Argument(help="The run file (TOML).", show_default=False)]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a setting of the run file: a.b=c. Repeatable.")]
Keys = Annotated[Path | None, typer.Option("--keys", help="The folder that `fedexperts keys` made for this machine.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Use no TLS and no keys: for tests on this machine only.")]
QuietFlag = Annotated[bool, typer.Option("--quiet", "-q", help="Log only warnings and errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log every answer, too.")]


def keys(
    folder: Annotated[Path, typer.Argument(help="The folder to write all keys to.", show_default=False)],
    host: Annotated[
        str | None,
        typer.Option(help="Comma-separated host names and addresses by which clients reach the server.", show_default=False),
    ] = None,
    clients: Annotated[str | None, typer.Option(help="Comma-separated names of the clients.", show_default=False)] = None,
    rotate: Annotated[
        str | None,
        typer.Option(help="Replace the keys of a client, of the server, or of the authority: ca.", show_default=False),
    ] = None,
) -> None:
    """Make the keys of a federation: the server's certificate and a key for each client. Existing keys are kept."""
    require_flower()
    from fedexperts.deploy.keys import make_keys, rotate_keys

    if (rotate is None) == (host is None or clients is None):
        raise BadValue("give --host and --clients to make the keys of a federation, or --rotate alone to replace some")
    with private():
        written = rotate_keys(folder, rotate) if rotate else make_keys(folder, str(host).split(","), str(clients).split(","))
    for path in written:
        say(f"written: {path}")
    if not written:
        say("all keys exist already")


def server(
    run_file: RunFile,
    out: Annotated[Path, typer.Option("--out", help="The results folder.", show_default=False)],
    keys: Keys = None,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 for all networks.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 9092,
    set: Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the results folder, if it holds one.")] = False,
    patience: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for all clients before federation.min_clients suffice.")
    ] = 600,
    status: Annotated[
        str | None, typer.Option(help="host:port for /health, /status and /metrics; by default the next port on 127.0.0.1.")
    ] = None,
    status_token: Annotated[
        Path | None, typer.Option(help="A file with the token that they ask for; needed where others can reach them.")
    ] = None,
    insecure: Insecure = False,
    quiet: QuietFlag = False,
    verbose: Verbose = False,
) -> None:
    """Run federated training with clients on other machines, which join with `fedexperts client`."""
    require_flower()
    from fedexperts import config
    from fedexperts.deploy import server
    from fedexperts.deploy.deployment import Federation
    from fedexperts.deploy.run_log import RunLog
    from fedexperts.deploy.site import expiry_warnings
    from fedexperts.deploy.status import Status, StatusPage, token_in

    settings = config.read(run_file, set or [])
    server.deployed(settings)
    treat_sigterm_as_interrupt()
    home, log = out.with_name(f"{out.name}.flower"), RunLog(Status(run=str(out)))
    federation = Federation(home, host=host, port=port, keys=secured(keys, insecure))
    page = StatusPage(status or f"127.0.0.1:{port + 1 if port < 65535 else port - 1}", token_in(status_token), keys)
    with private():
        with logging_to(home / LOG, level_of(quiet, verbose)), federation, served(page, log.status, federation, status is None):
            for sentence in expiry_warnings(federation.expiries()):
                logs.say(WARNING, sentence)
            if settings.federation.round_seconds is None:
                logs.say(WARNING, server.NO_DEADLINE)
            server.serve(
                settings,
                out,
                federation,
                resume=resume,
                progress=log,
                announce=log.say,
                connected=log.connected,
                patience=patience,
            )
        finish([out], out)


@contextmanager
def served(page: "StatusPage", status: "Status", federation: "Federation", is_optional: bool) -> Iterator[None]:
    """Serves the status of `federation` at `page` inside the block; if `is_optional`, the block goes on where that fails."""
    with ExitStack() as stack:
        try:
            host, number = stack.enter_context(page.serving(status, federation.check, federation.expiries()))
            logs.say(INFO, f"status: {host}:{number}/health, /status and /metrics")
        except BadRun as error:
            if not is_optional:
                raise
            logs.say(WARNING, str(error))
        yield


def client(
    name: Annotated[str, typer.Option(help="The client's name in the run file.", show_default=False)],
    server: Annotated[str, typer.Option(help="The server's host:port.", show_default=False)],
    run: Annotated[Path, typer.Option(help="The run file (TOML), the same as the server's.", show_default=False)],
    keys: Keys = None,
    data: Annotated[list[str] | None, typer.Option(help="A file with the client's own data. Repeatable.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The folder for the client's private state; by default clients/<its name>.")
    ] = None,
    memory_gb: Annotated[float | None, typer.Option(help="The memory of the client's device, in 10⁹ bytes.")] = None,
    profile: Annotated[str | None, typer.Option(help="The client's device: the name of a preset, such as laptop_gpu.")] = None,
    set: Set = None,
    insecure: Insecure = False,
    quiet: QuietFlag = False,
    verbose: Verbose = False,
) -> None:
    """Take part in a run as a client with the data of this machine, until interrupted."""
    require_flower()
    from json import dumps

    from fedexperts.deploy.supervisor import SuperNodeSupervisor

    devices = {key: value for key, value in (("memory_gb", memory_gb), ("profile", profile)) if value is not None}
    folder, level = (out or Path("clients") / name).resolve(), level_of(quiet, verbose)
    options = {"name": name, "run": str(run), "set": set or [], "folder": str(folder), "data": data or [], "devices": devices}
    worker = [sys.executable, "-m", "fedexperts.deploy.client", dumps({**options, "level": level})]
    supervisor = SuperNodeSupervisor(name, server, folder / "flower", secured(keys, insecure), worker)
    treat_sigterm_as_interrupt()
    with private(), logging_to(folder / LOG, level):
        folder.chmod(0o700)  # it may be older, and hold files that others may read
        supervisor.run()


def treat_sigterm_as_interrupt() -> None:
    """Lets SIGTERM, which systemd and Docker send, end this process and its child processes as Ctrl-C does."""
    import signal

    signal.signal(signal.SIGTERM, signal.default_int_handler)


def require_flower() -> None:
    """Raises BadValue if Flower is not installed."""
    from importlib.util import find_spec

    if not find_spec("flwr"):
        raise BadValue('this command needs Flower, which is not installed; install it: pip install "fedexperts[flower]"')


def secured(keys: Path | None, insecure: bool) -> Path | None:
    """`keys`, or None with --insecure.

    Raises:
        BadValue: neither or both were given.
    """
    if (keys is None) != insecure:
        raise BadValue(
            f"{'both' if insecure else 'neither'} of --keys and --insecure given; give --keys, the folder that "
            "`fedexperts keys` made for this machine, or, for tests on one machine, --insecure"
        )
    return keys


def audit(
    folder: Annotated[Path, typer.Argument(help="The folder of a client: its --out.", show_default=False)],
    json: Annotated[bool, typer.Option("--json", help="Print every message as a line of JSON.")] = False,
) -> None:
    """Show what left a client, message by message, and verify that the record of it is as it was written."""
    from json import dumps

    from fedexperts.deploy.sent import audit, sent_table

    audited = audit(folder)
    if json:
        for record in audited.records:
            typer.echo(dumps(record))
    else:
        console.print(sent_table(audited.records))
    for sentence in audited.sentences:
        say(sentence) if not json else typer.echo(sentence, err=True)


def check(
    run_file: RunFile,
    data: Annotated[list[str] | None, typer.Option(help="A file with the client's own data. Repeatable.")] = None,
    server: Annotated[str | None, typer.Option(help="The server's host:port.", show_default=False)] = None,
    keys: Keys = None,
    name: Annotated[
        str | None, typer.Option(help="The client's name in the run file; by default that of its keys.", show_default=False)
    ] = None,
    memory_gb: Annotated[
        float | None, typer.Option(help="The memory of the client's device, in 10⁹ bytes; by default what is free.")
    ] = None,
    set: Set = None,
) -> None:
    """Check at a client's machine, before it takes part: rows, memory, time, keys, server, clock, and the base model."""
    from fedexperts.deploy.check import Site, check

    wrong = 0
    for finding in check(Site(run_file, tuple(data or ()), name, keys, server, set or (), memory_gb)):
        say(f"{'ok' if finding.is_ok else 'to do':6}{finding.about}: {finding.found}")
        wrong += not finding.is_ok
    say("all is in order" if not wrong else f"{wrong} to do")
    if wrong:
        raise typer.Exit(2)
