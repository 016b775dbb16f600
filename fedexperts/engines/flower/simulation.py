"""Flower's own simulation, on Ray: processes on this machine that play its nodes."""

import logging
from queue import Empty, Queue
from threading import Event, Thread
from typing import Any, Self

import ray
import ray._private.state as ray_state  # these two are of the one version that Flower pins
import ray._private.worker as ray_worker
from flwr.serverapp import Grid
from flwr.simulation import run_simulation

from fedexperts.engines.flower.client_app import Handler, client_app
from fedexperts.engines.flower.server_app import server_app
from fedexperts.errors import BadRun

STOP_SECONDS = 5.0
"""For the simulation to end by itself; processes that still work then are killed."""


class Simulation:
    """`nodes` nodes, which `workers` processes play in turn: the next free one answers a message by `handle`.

    Each process takes `cpus` cores and `gpus` graphics cards (0.25: four share one), and sees no other cards than its own. When
    one dies another takes its place and gets the message again; a message that kills two is answered with an error. The grid is
    open inside `with`.
    """

    grid: Grid

    def __init__(self, handle: Handler, nodes: int, *, workers: int = 1, cpus: int = 1, gpus: float = 0.0) -> None:
        self.grids: Queue[Grid] = Queue()  # the one grid, once it is open
        self.over = Event()
        self.error: BaseException | None = None
        self.nodes, self.app = nodes, client_app(handle)
        self.backend: dict[str, dict[str, Any]] = {
            "init_args": {"num_cpus": workers * cpus, "log_to_driver": False, "logging_level": logging.ERROR},
            "client_resources": {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": -1, "max_task_retries": 1},
        }
        self.thread = Thread(target=self.simulate, name="flower", daemon=True)

    def __enter__(self) -> Self:
        logging.getLogger("flwr").setLevel(logging.CRITICAL)  # it logs every message; errors come as replies
        self.thread.start()
        while True:
            self.check()
            try:
                self.grid = self.grids.get(timeout=0.1)
            except Empty:
                continue
            return self

    def __exit__(self, *_: object) -> None:
        ray_worker._worker_logs_enabled = False  # it warns of every process that Flower ends
        self.over.set()
        self.thread.join(STOP_SECONDS)
        if self.thread.is_alive() and ray.is_initialized():  # else it ends by itself as soon as Ray has started
            process: Any = ray_worker.global_worker
            for actor in ray_state.actors():
                process.core_worker.kill_actor(ray.ActorID.from_hex(actor), True)  # not to be restarted
        self.thread.join()
        ray_worker._worker_logs_enabled = True

    def simulate(self) -> None:
        try:
            run_simulation(server_app(self.serve), self.app, self.nodes, backend_config=self.backend)
        except BaseException as error:  # `check` raises it in the thread that waits
            self.error = error

    def serve(self, grid: Grid) -> None:
        """The ServerApp's work: another thread uses its grid until it is over."""
        self.grids.put(grid)
        self.over.wait()

    def check(self) -> None:
        """Raises BadRun when the simulation has ended before its time."""
        if self.error or (self.thread.ident and not self.thread.is_alive()):
            cause = self.error and (self.error.__cause__ or self.error)
            raise BadRun(f"Flower's simulation has stopped: {cause or 'it gave no reason'}; go on with --resume")
