"""Follows docs/deploy.md on three machines: network namespaces of this one, with a link each to a switch. Needs root, and ip.

    python benchmarks/namespaces.py OUT [--rounds 8] [--away 20] [--delay 0.1] [--skew]

Each namespace has its own folder, and its own address for the server's name. The run file and the commands are those of
docs/deploy.md, word for word. `south` reaches the server through a proxy that holds back what passes for DELAY seconds, both
ways. After the second round the link of `north` is down for AWAY seconds. With --skew (Debian's faketime) `north` first has a
clock that is 60 s ahead, and then one that is right. Prints, as JSON, how it ended.
"""

import argparse
import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

DEPLOY = Path(__file__).parents[1] / "docs" / "deploy.md"
COMMAND = Path(sys.executable).with_name("fedexperts")
PORT = 9092
ADDRESSES = {"server": "10.0.0.1", "north": "10.0.0.2", "south": "10.0.0.3", "switch": "10.0.0.9"}
SERVER_OF = {"server": "10.0.0.1", "north": "10.0.0.1", "south": "10.0.0.9"}  # south's is the proxy
ROWS = {"north": 120, "south": 60}
PATIENCE = 900.0
KEYS = "fedexperts keys keys --host fed.example.org,10.0.0.1 --clients north,south"
SERVER = "fedexperts server run.toml --out results/run --keys keys/server --host 0.0.0.0 --port 9092 --resume"
CHECK = "fedexperts check run.toml --data rows.jsonl --keys keys/north --server fed.example.org:9092"
CLIENT = (
    "fedexperts client --name north --server fed.example.org:9092 --keys keys/north --run run.toml "
    "--data rows.jsonl --memory-gb 8"
)
EXPORT = "fedexperts export run --client north --kept clients/north --to my-model"
AUDIT = "fedexperts audit clients/north"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextmanager
def network() -> Iterator[None]:
    """A namespace for each machine and one for the switch; /etc/hosts of each names the server."""
    names = [f"fx-{name}" for name in ADDRESSES]
    try:
        for name in ADDRESSES:
            ip("netns", "add", f"fx-{name}")
            ip("-n", f"fx-{name}", "link", "set", "lo", "up")
        ip("-n", "fx-switch", "link", "add", "bridge", "type", "bridge")
        ip("-n", "fx-switch", "link", "set", "bridge", "up")
        ip("-n", "fx-switch", "addr", "add", f"{ADDRESSES['switch']}/24", "dev", "bridge")
        for name, server in SERVER_OF.items():
            ip("link", "add", "eth0", "netns", f"fx-{name}", "type", "veth", "peer", "name", name, "netns", "fx-switch")
            ip("-n", "fx-switch", "link", "set", name, "master", "bridge", "up")
            ip("-n", f"fx-{name}", "addr", "add", f"{ADDRESSES[name]}/24", "dev", "eth0")
            ip("-n", f"fx-{name}", "link", "set", "eth0", "up")
            hosts = Path("/etc/netns") / f"fx-{name}" / "hosts"
            hosts.parent.mkdir(parents=True)
            hosts.write_text(f"127.0.0.1 localhost\n{server} fed.example.org\n")
        yield
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)


class Machines:
    """What runs in the namespaces, each with its output in OUT/NAME.log."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.running: list[subprocess.Popen[bytes]] = []

    def start(
        self, machine: str, said: str, *before: str, instead: tuple[str, str] = ("north", "north")
    ) -> subprocess.Popen[bytes]:
        """Starts the command `said` of docs/deploy.md on `machine`; `instead`: a word of it, and another in its place."""
        assert said in DEPLOY.read_text(), f"docs/deploy.md has no line {said}"
        words = [*before, str(COMMAND), *said.replace(*instead).split()[1:]]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(self.out / "tmp" / machine)}
        Path(environment["TMPDIR"]).mkdir(parents=True, exist_ok=True)
        (self.out / machine).mkdir(exist_ok=True)
        with (self.out / f"{machine}.log").open("ab") as log:
            process = subprocess.Popen(
                ["ip", "netns", "exec", f"fx-{machine}", *words],
                cwd=self.out / machine, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.running.append(process)
        return process

    def done(self, *arguments: Any, **options: Any) -> int:
        return self.start(*arguments, **options).wait(PATIENCE)

    def log(self, machine: str) -> str:
        return (self.out / f"{machine}.log").read_text()

    def end(self) -> None:
        for process in self.running:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in self.running:
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


async def proxy(delay: float) -> None:
    """Listens on the switch, and passes on what comes, in order, `delay` seconds later."""

    async def passed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(64)

        async def later() -> None:
            while True:
                due, data = await waiting.get()
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                if not data:
                    return writer.close()
                writer.write(data)
                await writer.drain()

        sending = asyncio.create_task(later())
        with suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                await waiting.put((time.monotonic() + delay, data))
        await waiting.put((time.monotonic() + delay, b""))
        with suppress(ConnectionError):
            await sending

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(ADDRESSES["server"], PORT)
        except OSError:
            writer.close()
            return
        await asyncio.gather(passed(reader, far_writer), passed(far_reader, writer))

    async with await asyncio.start_server(connected, ADDRESSES["switch"], PORT) as server:
        await server.serve_forever()


def until(holds: Callable[[], bool], what: str, machines: Machines) -> None:
    began = time.monotonic()
    while not holds():
        if time.monotonic() > began + PATIENCE:
            raise SystemExit(f"{what} did not happen in {PATIENCE:.0f} s; the server said\n{machines.log('server')[-3000:]}")
        time.sleep(0.2)


def follow(out: Path, machines: Machines, *, rounds: int, away: float, skew: bool) -> dict[str, Any]:
    """The steps of docs/deploy.md, and how they ended."""
    (run_file,) = (
        text for text in re.findall(r"```toml\n(.*?)```", DEPLOY.read_text(), re.DOTALL) if text.startswith("# run.toml")
    )
    for machine in SERVER_OF:
        (out / machine).mkdir()
        (out / machine / "run.toml").write_text(run_file.replace("rounds = 20", f"rounds = {rounds}"))
    for name, number in ROWS.items():
        rows = [{"question": f"{name[0]} {i % 9} + {i % 7} =", "answer": str(i % 9 + i % 7)} for i in range(number)]
        (out / name / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended: dict[str, Any] = {"keys": machines.done("server", KEYS)}
    for name in ROWS:
        shutil.copytree(out / "server" / "keys" / name, out / name / "keys" / name)
    server = machines.start("server", SERVER)
    until(lambda: "waiting for" in machines.log("server"), "a server that waits for its clients", machines)
    ended["check"] = {name: machines.done(name, CHECK, instead=("north", name)) for name in ROWS}
    machines.start("south", CLIENT, instead=("north", "south"))
    if skew:
        before = len(machines.log("north"))
        ahead = machines.start("north", CLIENT, "faketime", "-f", "+60s")
        until(lambda: "clock" in machines.log("north")[before:], "a word about the clock", machines)
        os.killpg(ahead.pid, signal.SIGTERM)
        ahead.wait(60)
        ended["skew"] = next(line for line in machines.log("north")[before:].splitlines() if "clock" in line)
    machines.start("north", CLIENT)
    recorded = out / "server" / "results" / "run" / "rounds.jsonl"
    until(lambda: recorded.exists() and recorded.read_text().count("\n") >= 2, "the second round", machines)
    ip("-n", "fx-switch", "link", "set", "north", "down")
    time.sleep(away)
    ip("-n", "fx-switch", "link", "set", "north", "up")
    ended["server"] = server.wait(PATIENCE)
    results = out / "server" / "results" / "run"
    lines = [json.loads(line) for line in (results / "rounds.jsonl").read_text().splitlines()]
    ended["rounds"] = [(line["round"], round(line["seconds"], 1), line["failed"]) for line in lines]
    shutil.copytree(results, out / "north" / "run")
    ended["export"] = machines.done("north", EXPORT)
    ended["audit"] = machines.done("north", AUDIT)
    return ended


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("out", type=Path)
    options.add_argument("--rounds", type=int, default=8)
    options.add_argument("--away", type=float, default=20.0)
    options.add_argument("--delay", type=float, default=0.1)
    options.add_argument("--skew", action="store_true")
    given = options.parse_args()
    given.out = given.out.resolve()
    given.out.mkdir(parents=True)
    with network():
        machines = Machines(given.out)
        script = f"import asyncio; from benchmarks.namespaces import proxy; asyncio.run(proxy({given.delay}))"
        between = subprocess.Popen(["ip", "netns", "exec", "fx-switch", sys.executable, "-c", script], cwd=DEPLOY.parents[1])
        try:
            print(json.dumps(follow(given.out, machines, rounds=given.rounds, away=given.away, skew=given.skew), indent=1))
        finally:
            machines.end()
            between.kill()


if __name__ == "__main__":
    main()
