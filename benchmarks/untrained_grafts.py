"""What a model still knows once personal experts stand in it, before anything is trained.

    python benchmarks/untrained_grafts.py [RUN.toml] [--grafts 1,2,3]

Each client of the run (by default FLEx's six tasks, runs/flex/superni.toml) selects its experts as FLEx does, by its own text.
Their gates start as the experts' rows of the router, so they add to every token from the start. Scored is what the run calls
retained: in per cent, the base, then the mean over clients with so many grafts a layer. Needs FEDEXPERTS_DATA and `small`.
"""

import argparse
from pathlib import Path
from statistics import fmean
from tempfile import gettempdir

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from fedexperts import config
from fedexperts.core import evaluation
from fedexperts.engines.local import ClientRuntime
from fedexperts.experiment.runtime import encoder_for, runtime_for
from fedexperts.experiment.setup import Prepared, prepare_run
from fedexperts.methods.flex import FLEx
from fedexperts.moe import graft
from fedexperts.moe.anatomy import anatomy
from fedexperts.moe.reconstruction import by_reconstruction
from fedexperts.moe.shrink import shrink
from fedexperts.moe.tuning import prepare
from fedexperts.types import ClientContext


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, default=Path("runs/flex/superni.toml"))
    parser.add_argument("--grafts", default="1,2,3")
    given = parser.parse_args()
    run = config.read(given.run, ["method.name=flex"])
    torch.set_num_threads(run.training.threads)
    prepared = prepare_run(run)
    runtime = runtime_for(prepared, Path(gettempdir()))  # where clients would keep what is theirs; nothing is written
    base = scores(prepared, prepared.base.model)
    table = Table("", *base, title=f"{prepared.base.name}, {len(runtime.clients)} clients of {given.run.name}, nothing trained")
    table.add_row("the base", *(f"{100 * value:.0f}" for value in base.values()))
    for number in map(int, given.grafts.split(",")):
        found = [scores(prepared, grafted(prepared, runtime, client, number)) for client in runtime.clients]
        table.add_row(f"{number} grafted", *(f"{100 * fmean(each[task] for each in found):.0f}" for task in base))
    Console(width=140).print(table)


def grafted(prepared: Prepared, runtime: ClientRuntime, client: str, number: int) -> nn.Module:
    """The base with the personal experts that the client starts from."""
    method = FLEx(num_grafted=number)
    context = ClientContext(runtime.clients[client], runtime.model, runtime.data[client], runtime.encoder, runtime.training, {})
    ids = by_reconstruction(context.model, method.calibration(context), number, method.calibration_stride)
    model = prepare(shrink(context.model, anatomy(context.model).all_experts), runtime.training.tuning, seed="0")
    graft.attach(model, ids, runtime.training.tuning, seed="0")
    return model.eval()


def scores(prepared: Prepared, model: nn.Module) -> dict[str, float]:
    """Task → the run's metric on its retained examples."""
    asked = prepared.config.evaluation
    size = (asked.generate_tokens, asked.batch_size)
    found = evaluation.by_example(model, prepared.retained.examples, encoder_for(prepared), *size)
    return {task: each["value"] for task, each in found.items()}


if __name__ == "__main__":
    main()
