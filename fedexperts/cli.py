"""The `fedexperts` command."""

import errno
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork into worker processes

import typer

from fedexperts.deploy.commands import audit, check, client, keys, server
from fedexperts.errors import BadValue, FedExpertsError
from fedexperts.experiment.console import console, finish, progress, say
from fedexperts.io.toml import renamed_settings_as_notes
from fedexperts.models.continued.command import pretrain
from fedexperts.models.upcycle.command import upcycle

if TYPE_CHECKING:
    from rich.console import RenderableType

app = typer.Typer(
    name="fedexperts",
    help="Federated fine-tuning of Mixture-of-Experts language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

INTERRUPTED = 130
OF_THE_DISK = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR),
    *(errno.EINVAL, errno.EOPNOTSUPP, errno.EIO, errno.ENAMETOOLONG),  # of pseudo file systems, among others
}

RunFile = Annotated[Path, typer.Argument(help="The run file (TOML).", show_default=False)]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a setting of the run file: a.b=c. Repeatable.")]
Out = Annotated[Path | None, typer.Option("--out", help="The results folder; by default results/<name of the run file>.")]
Figures = Annotated[
    Path | None,
    typer.Option(help="Write every figure as such a file to this folder; needs fedexperts\\[png].", show_default=False),
]
QuietFlag = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]


@app.callback(invoke_without_command=True)
def options(show_version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    if show_version:
        typer.echo(f"fedexperts {version('fedexperts')}")
        raise typer.Exit


@app.command()
def init(path: Annotated[Path, typer.Argument(help="The run file to write.")] = Path("quickstart.toml")) -> None:
    """Write a run file to begin with: four generated tasks, eight clients, the base tiny; no download, no data of your own."""
    from fedexperts.io.files import write_text

    if path.exists():
        raise BadValue(f"{path} exists already; give another name, or remove it")
    write_text(path, (Path(__file__).parent / "experiment" / "quickstart.toml").read_text())
    say(f"written: {path}; next: fedexperts compare {path} --methods fedmoe,random_moe,fedavg,local")


@app.command("run")
def run_command(
    run_file: RunFile,
    set: Set = None,
    out: Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the results folder.")] = False,
    quiet: QuietFlag = False,
) -> None:
    """Run federated training: shows progress and a table of results, and writes a report."""
    from fedexperts import config
    from fedexperts.experiment import runner

    folder = out or Path("results") / run_file.stem
    runner.run(config.read(run_file, set or []), folder, resume=resume, progress=progress(quiet))
    finish([folder], folder)


@app.command()
def compare(
    run_files: Annotated[
        list[Path], typer.Argument(help="The run files (TOML), one per experiment setting.", show_default=False)
    ],
    methods: Annotated[
        str,
        typer.Option(
            help="Comma-separated: method, or method:key=value:training.lr=value for a variant, which name=method:… names."
        ),
    ],
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, starting with the run file's.")] = 1,
    vary: Annotated[
        list[str] | None,
        typer.Option("--vary", help="Run each value of a setting: a.b=c,d. Repeat the option for a grid."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Number of runs at the same time, each in its own process.")] = 1,
    set: Set = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The results folder; with one run file by default results/<its name>.")
    ] = None,
    quiet: QuietFlag = False,
) -> None:
    """Compare several methods on the same data and clients, in one or several settings.

    Finished runs are kept, interrupted runs continue, and runs that another process is executing are skipped.
    """
    from fedexperts.experiment import sweep

    settings = sweep.read_settings(run_files, set or [], vary or [])
    if out is None and len(run_files) > 1:
        raise BadValue(f"{len(run_files)} run files were given without a results folder; give one with --out")
    folder = out or Path("results") / run_files[0].stem
    compared = sweep.compare(settings, sweep.read_variants(methods, sweep.named(settings)), seeds, folder, progress(quiet), jobs)
    if any(folder.rglob("plan.json")):
        started = [run for run in compared.folders if (run / "plan.json").exists()]
        finish([*started, folder], folder)  # the runs of this comparison in its order, then all others in the folder
    for path in compared.left:
        say(f"skipped, since another process is executing it: {path}")
    for path, reason in compared.failed.items():
        fail(f"{path} failed: {reason}", 1)
    if compared.failed:
        raise typer.Exit(1)


@app.command()
def plan(
    run_file: RunFile,
    set: Set = None,
    counts: Annotated[
        str | None,
        typer.Option(
            help="With data.own: the examples of each client (train:validation:test), such as north=1200,south=300:50:60."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a run would do, without running it: clients, data, memory, and the experts of each client."""
    from json import dumps

    from fedexperts import config
    from fedexperts.experiment.plan import plan
    from fedexperts.experiment.plan_tables import plan_tables
    from fedexperts.experiment.reported import parts_from_counts
    from fedexperts.experiment.setup import Parts, prepare_run
    from fedexperts.models.shapes import load_shapes

    settings = config.read(run_file, set or [])
    if settings.data.own != (counts is not None):
        raise BadValue(
            "data.own = true: the examples are at the clients; give how many each has with --counts, such as "
            f"{','.join(f'{name}=1000' for name in settings.data.names[:8])}, or run `fedexperts check` at each of them"
            if settings.data.own
            else "--counts was given, but the clients of the run do not bring their own data; set data.own, or leave it out"
        )
    parts = parts_from_counts(settings, counts, load_shapes) if counts is not None else Parts(load=load_shapes)
    planned = plan(prepare_run(settings, parts=parts))
    if json:
        typer.echo(dumps(planned))
    else:
        for part in [*plan_tables(planned), *planned["warnings"]]:
            console.print(part, markup=False)


@app.command("inspect")
def inspect_command(
    model: Annotated[
        str,
        typer.Argument(
            help="tiny, small, a config.json or the name of a shipped one (olmoe-1b-7b), a model folder, or a hub id.",
            show_default=False,
        ),
    ],
    keep: Annotated[int | None, typer.Option(help="Also show a sub-model with this many experts in each layer.")] = None,
    keep_total: Annotated[int | None, typer.Option(help="Also show a sub-model with this many experts over all layers.")] = None,
    lora: Annotated[
        str | None, typer.Option(help="Also count LoRA adapters on: attention, experts, or attention+experts.")
    ] = None,
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 8,
    lora_modules: Annotated[str, typer.Option(help="The attention projections that get an adapter.")] = "q,k,v,o",
    memory: Annotated[
        bool, typer.Option("--memory", help="Show instead the memory to train it, and the presets of devices that hold it.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="With --memory: examples of a batch.")] = 1,
    max_tokens: Annotated[int, typer.Option(min=2, help="With --memory: tokens of an example.")] = 512,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the layers, experts, parameters and bytes of a model and of a sub-model, from its configuration alone."""
    from fedexperts.models import requirements, summary
    from fedexperts.moe.tuning import Tuning

    adapters = summary.lora_option(lora, rank, lora_modules) if lora else None
    if memory:
        tuning, batch = adapters or Tuning(), (batch_size, max_tokens)
        rows = list(requirements.requirements(model, tuning, batch, keep, keep_total))
        show(requirements.render(rows, tuning, batch), requirements.to_json(rows) if json else None)
    else:
        inspection = summary.inspect(model, keep, keep_total, adapters)
        show(summary.render(inspection), inspection.to_json() if json else None)


def show(tables: "RenderableType", json: str | None) -> None:
    """Prints `json` if it is wanted, or else the tables."""
    if json is None:
        console.print(tables)
    else:
        typer.echo(json)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Results folders of run or compare.", show_default=False)],
    html: Annotated[Path | None, typer.Option(help="The page to write; by default report.html in the first folder.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write all numbers to this CSV file.")] = None,
    markdown: Annotated[Path | None, typer.Option("--md", help="Write the tables to this Markdown file.")] = None,
    baseline: Annotated[str | None, typer.Option(help="The method that the others are compared with.")] = None,
    png: Figures = None,
    svg: Figures = None,
    pdf: Figures = None,
    tex: Annotated[Path | None, typer.Option(help="Write the tables to this LaTeX file; they need booktabs.")] = None,
    single_file: Annotated[
        bool, typer.Option("--single-file", help="Put the code that draws into the page (4.8 MB) instead of a file beside it.")
    ] = False,
) -> None:
    """Write the report of one run or of several side by side: an HTML page that opens from disk."""
    from fedexperts import report as reports

    page = html or folders[0] / "report.html"
    summary = reports.write(folders, page, csv, markdown, baseline, png, tex, svg, pdf, single_file)
    console.print(reports.table(folders))
    for name in summary.unfinished:
        say(f"not finished: {name}")
    for path in summary.written:
        say(f"written: {path}")


@app.command()
def results(
    folders: Annotated[list[Path], typer.Argument(help="Results folders of run or compare.", show_default=False)],
    to: Annotated[Path | None, typer.Option(help="The folder to write; by default tables/ in the first folder.")] = None,
    format: Annotated[str, typer.Option(help="csv or parquet.")] = "csv",
    table: Annotated[list[str] | None, typer.Option("--table", help="Write only this table. Repeatable.")] = None,
) -> None:
    """Write the results of runs as tidy tables, with a row for each seed, round, client and metric."""
    from fedexperts.report import results

    for path in results.results(folders).write(to or folders[0] / "tables", format, table or ()):  # type: ignore[arg-type]  # checked
        say(f"written: {path}")


@app.command()
def watch(
    folders: Annotated[list[Path], typer.Argument(help="Results folders of run or compare.", show_default=False)],
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port of this machine; 0 for any that is free.")] = 8765,
    every: Annotated[int, typer.Option(min=1, help="Seconds between reloads of the page.")] = 10,
    baseline: Annotated[str | None, typer.Option(help="The method that the others are compared with.")] = None,
) -> None:
    """Show the report of runs under way in a browser of this machine, until Ctrl-C."""
    from fedexperts.report.watch import Server, serve

    server = Server(folders, port, every, baseline)
    say(f"open {server.url} in a browser of this machine; Ctrl-C ends this command and no run")
    serve(server)


app.command()(pretrain)
app.command()(upcycle)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="The results folder of a run.", show_default=False)],
    to: Annotated[Path, typer.Option(help="The folder to write; it must be new or empty.", show_default=False)],
    client: Annotated[str | None, typer.Option(help="Export the own model of this client instead of the global model.")] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="Export only the adapters, in peft's format.")] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="With --client: merge all adapters, also of personal experts, into the weights.")
    ] = False,
    kept: Annotated[
        Path | None, typer.Option(help="The client's own folder (its --out), if the client ran on another machine.")
    ] = None,
    round: Annotated[
        str | None, typer.Option(help="Of the checkpoint to export, or best; by default the last one.", show_default=False)
    ] = None,
) -> None:
    """Export a model of a checkpoint as a folder: the global model, or the model of one client."""
    from fedexperts import export as exports

    kind = exports.export(folder, to, client, adapter, kept, merge, exports.round_of(round))
    reader = "peft" if kind.adapter else "transformers, with trust_remote_code=True" if kind.needs_code else "transformers"
    say(f"written: {to} (for {reader}; its README.md shows how to load it)")


@app.command()
def generate(
    folder: Annotated[Path, typer.Argument(help="A model folder that export wrote.", show_default=False)],
    prompt: Annotated[
        str, typer.Argument(help="The prompt; the prompt template of the run is applied to it.", show_default=False)
    ],
    tokens: Annotated[int | None, typer.Option(min=1, help="Maximum number of new tokens; by default that of the run.")] = None,
    task: Annotated[str | None, typer.Option(help="The task whose prompt template is applied, if the run had several.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code in the folder: for models of methods that bring their own.")
    ] = False,
) -> None:
    """Try an exported model: print its greedy answer to a prompt."""
    from fedexperts.export.generate import generate

    typer.echo(generate(folder, prompt, tokens, task, trust_remote_code))


for command in (keys, check, server, client, audit):
    app.command()(command)


def main() -> None:
    """Exit codes: 0 success; 1 a bug of ours, or a failed run of a comparison; 2 a mistake of the user; 130 interrupted."""
    try:
        with renamed_settings_as_notes():
            app()
    except FedExpertsError as error:
        sys.exit(fail(str(error), 2))
    except OSError as error:
        if error.errno not in OF_THE_DISK:
            raise
        place = error.filename or "a file"
        sys.exit(fail(f"{place} cannot be written ({error.strerror}); free the disk or the path, or give another folder", 2))
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer says nothing then
            fail(
                "interrupted; all complete files are saved: repeat the command to continue, run and server with --resume",
                INTERRUPTED,
            )
        raise


def fail(sentence: str, code: int) -> int:
    """Prints `sentence` to stderr and gives `code` back."""
    print(f"fedexperts: {sentence}", file=sys.stderr)
    return code
