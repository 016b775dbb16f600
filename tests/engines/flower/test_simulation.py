"""Where the processes of Flower's simulation listen."""

import os
import signal
import subprocess
import sys

PATIENCE = 500  # seconds
PROGRAM = """
import os
from pathlib import Path
from time import sleep
from fedexperts.engines.flower.simulation import Simulation, ray, ray_state


def below(pid):
    children = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit() and parent(path) == pid]
    return [pid, *(each for child in children for each in below(child))]


def parent(path):
    try:
        return int((path / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def sockets(pid):
    try:
        return {os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir()}
    except OSError:
        return set()


with Simulation(lambda message, node: message, nodes=1) as simulation:
    while not (ray.is_initialized() and any(each["State"] == "ALIVE" for each in ray_state.actors().values())):
        simulation.check()
        sleep(0.1)
    ours = {link for pid in below(os.getpid()) for link in sockets(pid)}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in ours:  # it listens
                print(words[1].partition(":")[0])
"""
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def test_the_simulation_listens_on_this_machine_only():
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, text=True) as process:
        try:
            output, _ = process.communicate(timeout=PATIENCE)
        finally:
            end(process.pid)
    listens = output.split()
    assert len(listens) >= 4  # the driver, the raylet, the GCS and the worker at least
    assert set(listens) <= LOOPBACK


def test_a_simulation_that_is_left_before_ray_has_started_ends():
    program = "from fedexperts.engines.flower.simulation import Simulation\nwith Simulation(print, nodes=1):\n    pass"
    with subprocess.Popen([sys.executable, "-W", "ignore", "-c", program], start_new_session=True) as process:
        try:
            assert process.wait(timeout=PATIENCE) == 0
        finally:
            end(process.pid)


def end(group):
    """Kills what is left of the process group."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return
