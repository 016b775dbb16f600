"""The `fedexperts` command."""

import errno
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would die in worker processes

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedexperts.errors import BadValue, FedExpertsError

if TYPE_CHECKING:
    from fedexperts.experiment.progress import Progress

app = typer.Typer(
    name="fedexperts",
    help="Federated fine-tuning of Mixture-of-Experts language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

INTERRUPTED = 130

RunFile = Annotated[Path, typer.Argument(help="The run file (TOML).", show_default=False)]
Set = Annotated[list[str] | None, typer.Option("--set", help="A setting in place of the run file's: a.b=c. Again for more.")]
Out = Annotated[Path | None, typer.Option("--out", help="The results folder; by default results/<name of the run file>.")]
Keys = Annotated[Path | None, typer.Option("--keys", help="This machine's folder of those that `fedexperts keys` made.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Without TLS and keys: for tests, on this machine only.")]
Hush = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]


@app.callback(invoke_without_command=True)
def options(show_version: Annotated[bool, typer.Option("--version", help="Show the version and stop.")] = False) -> None:
    if show_version:
        typer.echo(version("fedexperts"))
        raise typer.Exit


@app.command("run")
def run_command(
    run_file: RunFile,
    set: Set = None,
    out: Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the results folder.")] = False,
    quiet: Hush = False,
) -> None:
    """Run it: progress, a table at the end, a report."""
    from fedexperts import config
    from fedexperts.experiment import runner

    folder = out or Path("results") / run_file.stem
    runner.run(config.read(run_file, set or []), folder, resume=resume, progress=progress(quiet))
    finish([folder], folder)


@app.command()
def compare(
    run_files: Annotated[list[Path], typer.Argument(help="The run files (TOML); each is a setting.", show_default=False)],
    methods: Annotated[
        str,
        typer.Option(
            help="Comma-separated: method, method:key=value:training.lr=value for a variant, or name=method:… to name it."
        ),
    ],
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from the run file's on.")] = 1,
    vary: Annotated[
        list[str] | None,
        typer.Option("--vary", help="A setting with several values, each of which is run: a.b=c,d. Again for a grid."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="How many runs at once, each in a process of its own.")] = 1,
    set: Set = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The results folder; for one run file by default results/<its name>.")
    ] = None,
    quiet: Hush = False,
) -> None:
    """Several methods, over the same data and clients, in one or several settings.

    A run that is done already stays, one that was stopped goes on, one that another process is at is left to it.
    """
    from fedexperts.experiment import sweep

    settings = sweep.read_settings(run_files, set or [], vary or [])
    if out is None and len(run_files) > 1:
        raise BadValue(f"{len(run_files)} run files have no results folder of their own; give one with --out")
    folder = out or Path("results") / run_files[0].stem
    compared = sweep.compare(settings, sweep.read_variants(methods), seeds, folder, progress(quiet), jobs)
    if any(folder.rglob("plan.json")):
        begun = [each for each in compared.folders if (each / "plan.json").exists()]
        finish([*begun, folder], folder)  # what was named in its order, and all else that is there
    for path in compared.left:
        console.print(f"left to the process that is at it: {path}", markup=False, soft_wrap=True, highlight=False)
    for path, reason in compared.failed.items():
        fail(f"{path} failed: {reason}", 1)
    if compared.failed:
        raise typer.Exit(1)


@app.command()
def plan(run_file: RunFile, set: Set = None, json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """What a run would work with, before anything runs: clients, data, memory, and who holds what."""
    from json import dumps

    from fedexperts import config
    from fedexperts.experiment.plan import plan
    from fedexperts.experiment.setup import prepare_run

    planned = plan(prepare_run(config.read(run_file, set or [])))
    if json:
        typer.echo(dumps(planned))
    else:
        for shown in [*plan_tables(planned), *planned["warnings"]]:
            console.print(shown, markup=False)


@app.command("inspect")
def inspect_command(
    model: Annotated[
        str, typer.Argument(help="tiny, small, a config.json, a model folder, or a name on the hub.", show_default=False)
    ],
    keep: Annotated[int | None, typer.Option(help="Experts that a sub-model keeps in each layer.")] = None,
    keep_total: Annotated[int | None, typer.Option(help="Experts that it keeps over all layers.")] = None,
    lora: Annotated[str | None, typer.Option(help="Count adapters: attention, experts, or attention+experts.")] = None,
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 8,
    lora_modules: Annotated[str, typer.Option(help="The attention's projections that get one.")] = "q,k,v,o",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Layers, experts, parameters and bytes of a model, from its configuration alone, and what a sub-model of it costs."""
    from fedexperts.models.summary import inspect, lora_option, render

    found = inspect(model, keep, keep_total, lora_option(lora, rank, lora_modules) if lora else None)
    if json:
        typer.echo(found.to_json())
    else:
        console.print(render(found))


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Results folders, of run or compare.", show_default=False)],
    html: Annotated[Path | None, typer.Option(help="The page; by default report.html in the first folder.")] = None,
    csv: Annotated[Path | None, typer.Option(help="All numbers as CSV.")] = None,
    markdown: Annotated[Path | None, typer.Option("--md", help="The tables as Markdown.")] = None,
    baseline: Annotated[str | None, typer.Option(help="The method that others are compared with.")] = None,
    png: Annotated[Path | None, typer.Option(help="A folder for every figure as a PNG file; needs fedexperts[png].")] = None,
) -> None:
    """One run's report, or several side by side: a page that opens from disk."""
    from fedexperts import report as reports

    made = reports.write(folders, html or folders[0] / "report.html", csv, markdown, baseline, png)
    console.print(reports.table(folders))
    for name in made.unfinished:
        console.print(f"not finished: {name}", markup=False, soft_wrap=True, highlight=False)
    for path in made.written:
        console.print(f"written: {path}", markup=False, soft_wrap=True, highlight=False)


@app.command()
def pretrain(
    run_file: RunFile, set: Set = None, out: Annotated[Path | None, typer.Option("--out", help="The model's folder.")] = None
) -> None:
    """Make a small MoE base from text, instructions and generated tasks; stopped, it goes on where it was; finished, it stays."""
    from fedexperts.models import pretrain as pretraining

    pretraining.run_file(run_file, set or [], out, console)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="The results folder of a run.", show_default=False)],
    to: Annotated[Path, typer.Option(help="The folder to write: one that is not there yet, or is empty.", show_default=False)],
    client: Annotated[str | None, typer.Option(help="A client, whose own model is written in place of the global one.")] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="Only the adapters, for peft, in place of a whole model.")] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="Of a client: adapters merged into the weights, those of personal experts too.")
    ] = False,
    kept: Annotated[
        Path | None, typer.Option(help="Where the client was on another machine: its own folder, the --out it had.")
    ] = None,
) -> None:
    """A model folder to take away: the run's global model, or a client's own, as of the last checkpoint."""
    from fedexperts import export as exports

    kind = exports.export(folder, to, client, adapter, kept, merge)
    how = (
        "peft reads it"
        if kind.adapter
        else "transformers reads it" + (", with trust_remote_code=True" if kind.needs_code else "")
    )
    console.print(f"written: {to} ({how}; its README.md says how)", markup=False, soft_wrap=True, highlight=False)


@app.command()
def generate(
    folder: Annotated[Path, typer.Argument(help="A model folder, as export wrote it.", show_default=False)],
    prompt: Annotated[str, typer.Argument(help="What to ask; the run's own form is put around it.", show_default=False)],
    tokens: Annotated[int | None, typer.Option(min=1, help="Of the answer, at most; by default as many as in the run.")] = None,
    task: Annotated[str | None, typer.Option(help="Whose form the prompt gets, where the run had several tasks.")] = None,
) -> None:
    """Try an exported model: a greedy answer to a prompt."""
    from fedexperts.export.generate import generate

    typer.echo(generate(folder, prompt, tokens, task))


@app.command()
def keys(
    folder: Annotated[Path, typer.Argument(help="The folder for all keys.", show_default=False)],
    host: Annotated[
        str, typer.Option(help="Comma-separated: names and addresses by which clients reach the server.", show_default=False)
    ],
    clients: Annotated[str, typer.Option(help="Comma-separated: the clients' names.", show_default=False)],
) -> None:
    """Make the keys of a federation: the server's certificate, and a key for each client. What is there stays."""
    require_flower()
    from fedexperts.deploy.keys import make_keys

    written = make_keys(folder, host.split(","), clients.split(","))
    for path in written:
        console.print(f"written: {path}", markup=False, soft_wrap=True, highlight=False)
    if not written:
        console.print("all keys are there already", markup=False)


@app.command()
def server(
    run_file: RunFile,
    out: Annotated[Path, typer.Option("--out", help="The results folder.", show_default=False)],
    keys: Keys = None,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 for all networks.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 9092,
    set: Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the results folder, if there is one.")] = False,
    patience: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for all clients before federation.min_clients are enough.")
    ] = 600,
    insecure: Insecure = False,
    quiet: Hush = False,
) -> None:
    """Run it with clients on other machines, which join with `fedexperts client`."""
    require_flower()
    from fedexperts import config
    from fedexperts.deploy import server
    from fedexperts.deploy.deployment import Federation

    told = config.read(run_file, set or [])
    server.deployed(told)
    end_as_if_interrupted()
    home = out.with_name(f"{out.name}.flower")
    with Federation(home, host=host, port=port, keys=secured(keys, insecure)) as federation:
        server.serve(told, out, federation, resume=resume, setting="", progress=progress(quiet), announce=say, patience=patience)
    finish([out], out)


@app.command()
def client(
    name: Annotated[str, typer.Option(help="What the run file calls it.", show_default=False)],
    server: Annotated[str, typer.Option(help="The server's host:port.", show_default=False)],
    run: Annotated[Path, typer.Option(help="The run file (TOML), as the server has it.", show_default=False)],
    keys: Keys = None,
    data: Annotated[list[str] | None, typer.Option(help="A file of its own data. Again for more.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The folder for what it keeps to itself; by default clients/<its name>.")
    ] = None,
    memory_gb: Annotated[float | None, typer.Option(help="Its device's memory in 10⁹ bytes.")] = None,
    profile: Annotated[str | None, typer.Option(help="Its device, by the name of a preset, such as laptop_gpu.")] = None,
    set: Set = None,
    insecure: Insecure = False,
) -> None:
    """Take part in a run with the data of this machine, until interrupted."""
    require_flower()
    from json import dumps

    from fedexperts.deploy.supervisor import SuperNodeSupervisor

    devices = {key: value for key, value in (("memory_gb", memory_gb), ("profile", profile)) if value is not None}
    folder = (out or Path("clients") / name).resolve()
    told = {"name": name, "run": str(run), "set": set or [], "folder": str(folder), "data": data or [], "devices": devices}
    worker = [sys.executable, "-m", "fedexperts.deploy.client", dumps(told)]
    end_as_if_interrupted()
    SuperNodeSupervisor(name, server, folder / "flower", secured(keys, insecure), worker, say).run()


def end_as_if_interrupted() -> None:
    """SIGTERM, which systemd and Docker send, ends this process as Ctrl-C does: with all that it has started."""
    import signal

    signal.signal(signal.SIGTERM, signal.default_int_handler)


def require_flower() -> None:
    """Raises BadValue without the extra."""
    from importlib.util import find_spec

    if not find_spec("flwr"):
        raise BadValue('this needs Flower, which is not installed; install it: pip install "fedexperts[flower]"')


def secured(keys: Path | None, insecure: bool) -> Path | None:
    """Raises BadValue unless exactly one of the two was given."""
    if (keys is None) != insecure:
        raise BadValue(
            "give either --keys, the folder that `fedexperts keys` made for this machine, or --insecure, for tests on one machine"
        )
    return keys


def say(sentence: str) -> None:
    console.print(sentence, markup=False, soft_wrap=True, highlight=False)


def progress(quiet: bool) -> "Progress":
    from fedexperts.experiment.progress import Quiet, Shown

    return Quiet() if quiet else Shown(console)


def finish(folders: Sequence[Path], out: Path) -> None:
    """The table and the report that a run ends with."""
    from fedexperts import report as reports

    made = reports.write(folders, html=out / "report.html", csv=out / "report.csv", markdown=out / "report.md")
    console.print(reports.table(folders))
    for path in made.written:
        console.print(f"written: {path}", markup=False, soft_wrap=True, highlight=False)


def plan_tables(planned: dict[str, Any]) -> list[Table]:
    """The plan for people."""
    model, unit = planned["model"], 1e6
    blocks = model["blocks"].values()
    budgets = any(client["budget"] is not None for client in planned["clients"])
    head = Table(title=Text(f"{planned['method']} on {model['name']}"), show_header=False)
    head.add_row("parameters", f"{model['parameters']:,}")
    head.add_row("MoE layers", f"{len(model['blocks'])}")
    head.add_row("experts", f"{sum(block['num_experts'] for block in blocks)}")
    head.add_row("memory to train it all (estimated)", f"{planned['full_bytes'] / unit:.1f} MB")
    if planned["personal_bytes"]:
        head.add_row("beside it, personal experts (estimated)", f"{planned['personal_bytes'] / unit:.1f} MB")
    if budgets:
        head.add_row("of it, while backward reaches no expert (estimated)", f"{planned['fixed_bytes'] / unit:.1f} MB")
        head.add_row("of it, for each expert that backward reaches", f"{planned['reached_bytes'] / unit:.3f} MB")
    head.add_row("what is trained, one way", f"{planned['full_patch_bytes'] / unit:.1f} MB")
    head.add_row("a client's round on all of it, at most (estimated)", f"{planned['round_flops_estimated'] / 1e9:,.0f} GFLOP")
    table = Table(title="Clients", caption=f"first job: {planned['clients'][0]['first_task']}; memory and bytes in MB (10⁶)")
    added = ("budget",) if budgets else ()  # of experts that backward reaches
    for name in ("client", "task", "train", "val", "test", "memory", "fit", "first job", "sent", *added):
        table.add_column(name, justify="left" if name in ("client", "task") else "right", no_wrap=name != "task", overflow="fold")
    for client in planned["clients"]:
        memory = client["memory_bytes"]
        table.add_row(
            client["name"],
            Text(client["task"]),
            *(str(client[key]) for key in ("examples", "validation", "test")),
            "any" if memory is None else f"{memory / unit:.1f}",
            "all" if client["full_fits"] else str(client["experts_fit"]),
            f"{client['first_experts']} experts" if client["first_experts"] else "none",
            f"{client['first_bytes_down'] / unit:.1f}",
            *("any" if client[name] is None else str(client[name]) for name in added),
        )
    return [head, table]


def main() -> None:
    """Exit codes: 0 done, 2 the user's mistake, 1 ours or runs of a comparison that failed, 130 interrupted."""
    try:
        app()
    except FedExpertsError as error:
        sys.exit(fail(str(error), 2))
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR):
            raise
        sys.exit(fail(f"{error.filename or 'a file'} cannot be written ({error.strerror}); free it, or give another folder", 2))
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer says nothing then
            fail("interrupted; what is whole is saved: run goes on with --resume, others by themselves", INTERRUPTED)
        raise


def fail(sentence: str, code: int) -> int:
    print(f"fedexperts: {sentence}", file=sys.stderr)
    return code
