"""How the benchmarks of engines start each of them, with clients that answer without training."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.idle import idle_runtime
from fedexperts.config import RunConfig
from fedexperts.deploy import server
from fedexperts.deploy.deployment import Federation
from fedexperts.deploy.keys import make_keys
from fedexperts.deploy.processes import child_process, free_port
from fedexperts.engines import local
from fedexperts.engines.flower.simulation import Simulation
from fedexperts.engines.message import Message
from fedexperts.experiment import flower
from fedexperts.experiment.setup import Prepared
from fedexperts.io.toml import checked, to_toml
from fedexperts.models.files import location_of
from fedexperts.types import Engine

ADAPTERS = {"train": "lora", "parts": ["attention"], "attention_modules": ["q_proj", "k_proj", "v_proj"], "rank": 32, "alpha": 64}
SENT: Mapping[str, Mapping[str, Any]] = {"adapters": ADAPTERS, "all weights": {"train": "full"}}
ENGINES = ("local", "simulation", "deployment")
ROUNDS = 5
WIDE = 880  # of an expert: with it `small` has 50 M parameters, 200 MB
CLIENT = """
import json, sys
from pathlib import Path
from fedexperts.deploy.supervisor import SuperNodeSupervisor
options = json.loads(sys.argv[1])
paths = Path(options["home"]), Path(options["keys"])
SuperNodeSupervisor(options["name"], options["server"], *paths, options["worker"]).run()
"""

Start = Callable[[Prepared, Path], AbstractContextManager[Engine]]


def settings(
    sent: str, model: str = "small", clients: int = 3, rounds: int = ROUNDS, score: str = "after_aggregation"
) -> RunConfig:
    return checked(
        RunConfig,
        {
            "model": {"name": model},
            "method": {"name": "fedavg"},
            "training": {"batch_size": 2, "local_steps": 1, **SENT[sent]},
            "federation": {"rounds": rounds, "engine": "flower", "workers": 2},
            "evaluation": {"score": score},
            "data": {
                "sources": ["synthetic/double", "synthetic/first"],
                "names": [f"c{number:02}" for number in range(clients)],
                "limit": 30 * clients,
                "test_examples": 4,
                "max_tokens": 64,
            },
        },
    )


def python(code: str, *arguments: object) -> list[str]:
    """The command of a process of ours."""
    return [sys.executable, "-c", code, *map(str, arguments)]


def in_process(module: str, function: str, *arguments: object) -> Any:
    """The result of a function of `benchmarks.module`, called in a process of its own: each measurement starts from nothing."""
    code = f"import json, sys; from benchmarks import {module}; arguments = json.loads(sys.argv[1])"
    code += f"; print(json.dumps({module}.{function}(*arguments)))"
    done = subprocess.run(python(code, json.dumps(arguments)), stdout=subprocess.PIPE, text=True, check=True)
    result = done.stdout.splitlines()[-1]
    print(function, *arguments, result, flush=True)
    return json.loads(result)


def on_local(prepared: Prepared, out: Path) -> AbstractContextManager[Engine]:
    return local.LocalEngine(idle_runtime(prepared, out), workers=2)


@contextmanager
def on_simulation(prepared: Prepared, out: Path, carried: Callable[[Any], Any] = lambda grid: grid) -> Iterator[Engine]:
    with (
        Simulation(play, len(prepared.config.data.names), workers=2) as simulation,
        flower.over(carried(simulation.grid), simulation.check)(prepared, out) as engine,
    ):
        del prepared  # as in `flower.simulated`
        yield engine


def play(message: Message, node_config: Mapping[str, Any]) -> Message:
    flower.runtime_for = idle_runtime  # in the process that plays clients
    return flower.play(message, node_config)


Join = Callable[[RunConfig, Path, str], AbstractContextManager[None]]


@contextmanager
def on_deployment(prepared: Prepared, out: Path, join: Join, port_for: Callable[[int], int] = int) -> Iterator[Engine]:
    """`join` starts the clients, `port_for` gives them the port that leads to the server's."""
    config, port = prepared.config, free_port()
    names = config.data.names
    make_keys(out / "keys", ["localhost"], names)
    with Federation(out / "federation", port=port, keys=out / "keys" / "server") as federation:
        options = server.engine_options(federation, in_flight=len(names))
        over = flower.over(federation.grid, federation.check, patience=server.PATIENCE_SECONDS, **options)
        with join(config, out, f"localhost:{port_for(port)}"), over(prepared, out) as engine:
            del prepared  # or the base would stay, which the server of a run lets go of
            yield engine


@contextmanager
def joined(config: RunConfig, out: Path, server: str) -> Iterator[None]:
    """The clients as `fedexperts client` starts them: for each a SuperNode, and a worker that stays."""
    with ExitStack() as stack:
        for name in config.data.names:
            home = out / name
            home.mkdir()
            worker = worker_command(config, name, out)
            options = {"name": name, "server": server, "home": str(home), "keys": str(out / "keys" / name), "worker": worker}
            stack.enter_context(child_process(python(CLIENT, json.dumps(options)), home, "client"))
        yield


def worker_command(config: RunConfig, name: str, out: Path) -> list[str]:
    """The command of a client's worker."""
    run = out / "run.toml"
    out.mkdir(exist_ok=True)
    run.write_text(to_toml(config.resolved()))
    options = {"name": name, "run": str(run), "set": [], "folder": str(out / name), "data": [], "devices": {}}
    return python("from benchmarks.idle import worker; worker()", json.dumps(options))


@contextmanager
def played(config: RunConfig, out: Path, server: str) -> Iterator[None]:
    """All clients in one process: ten SuperNodes and what they start would take most of 10 GB."""
    options = {"settings": config.resolved(), "server": server, "keys": str(out / "keys"), "out": str(out)}
    with child_process(python("from benchmarks.idle import nodes; nodes()", json.dumps(options)), out, "nodes"):
        yield


STARTS: Mapping[str, Start] = {
    "local": on_local,
    "simulation": on_simulation,
    "deployment": partial(on_deployment, join=joined),
}


def wide_model(folder: Path) -> Path:
    """A random model of 200 MB with the tokenizer of `small`."""
    config = AutoConfig.from_pretrained(location_of("small"), intermediate_size=WIDE, dtype="float32")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(location_of("small")) / name, folder)
    return folder
