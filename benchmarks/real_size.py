"""One federated round on a model of real size: the peak of the process, and seconds by part.

    python random-olmoe.py /tmp/olmoe configs/olmoe-1b-7b.json assets/small     # 13.8 GB: random weights in bfloat16
    python benchmarks/real_size.py /tmp/olmoe [--methods fedit,flex] [--set model.quantize=nf4] [--resume]

Two clients, batches of 1 x 64 tokens, LoRA. Each method runs in a process of its own. The lines have the peak of its memory
(VmHWM) as it is and over the bytes of the model's weights on disk, and seconds: loading the model (with the hash of its files), a
client's optimizer step (in FLEx's first round with the selection of personal experts), the merge of the updates (with receiving
them), a checkpoint, an evaluation of a client. The memory that a client's step holds is compared with what `plan` said of it.

--resume: also runs two rounds, kills a second run once its first checkpoint is there, resumes it, and compares the weights.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import wraps
from hashlib import sha256
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RUN = """
seed = 0
training = { train = "lora", lr = 1e-4, batch_size = 1, local_steps = 2, validation_examples = 2, router_aux_loss_coef = 0.0 }
evaluation = { generate_tokens = 2, batch_size = 1 }
[data]
sources = ["synthetic/double", "synthetic/first"]
partition = { by = "task" }
clients = 2
limit = 60
test_examples = 1
max_tokens = 64
"""
METHODS = {
    "fedit": ["training.parts=['attention']"],
    "flex": ["training.parts=['attention']"],
    "hfedmoe": ["training.parts=['attention', 'experts', 'router']", "method.budget=0.25"],
    "fedmoe": ["training.parts=['attention', 'experts']", "method.initial=random", "method.experts_per_layer=16"],
}
"""Method → its settings; of FedMoE 16 of 64 experts per layer, that is 25 %."""


def measured_run(run_file: Path, out: Path, settings: Sequence[str]) -> None:
    """Executes a run in this process and prints its figures as JSON."""
    from fedexperts.config import read
    from fedexperts.experiment import checkpoint, runner, setup
    from fedexperts.report.read import read as read_results

    seconds: dict[str, float] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def run(*args: Any, **named: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **named)
            seconds[name] = time.perf_counter() - started
            return result

        return run

    setup.load_base = timed("load", setup.load_base)
    checkpoint.save = timed("checkpoint", checkpoint.save)
    config = read(run_file, settings)
    runner.run(config, out, resume=out.exists())
    results = read_results(out)
    last = [row for row in results.ledger if row.round == config.federation.rounds]
    trained = [row.seconds for row in last if row.task == "train"]
    round_seconds = next(row.seconds for row in reversed(results.rounds) if row.task == "train")
    seconds["step"] = sum(trained) / len(trained) / config.training.local_steps
    seconds["merge"] = round_seconds - sum(trained)
    seconds["evaluation"] = max(row.seconds for row in last if row.task == "evaluate")
    failed = [row.failed for row in results.ledger if row.failed]
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    held = max(row.peak_bytes for row in last)
    planned = max(sum(each["first_memory"].values()) for each in json.loads((out / "plan.json").read_text())["clients"])
    print(json.dumps({"peak": peak, "held": held, "planned": planned, "seconds": seconds, "failed": failed}))


def child(run_file: Path, out: Path, settings: Sequence[str]) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--child", str(run_file), str(out), *settings]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT)


def weights_hash(out: Path) -> str:
    """sha256 of the weights in the last checkpoint, and of what clients keep."""
    digest = sha256()
    for file in sorted([*out.glob("checkpoint/**/*.safetensors"), *out.glob("clients/**/*.safetensors")]):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def killed_and_resumed(run_file: Path, folder: Path, settings: Sequence[str]) -> str:
    """Compares a run of two rounds with one that is killed after the first and resumed."""
    settings = [*settings, "federation.rounds=2"]
    whole, killed = folder / "whole", folder / "killed"
    child(run_file, whole, settings).communicate()
    victim = child(run_file, killed, settings)
    while victim.poll() is None and not any(killed.glob("checkpoint/**/*.safetensors")):
        time.sleep(0.2)
    time.sleep(0.5)
    os.kill(victim.pid, signal.SIGKILL)
    victim.communicate()
    rounds = len((killed / "rounds.jsonl").read_text().splitlines())
    child(run_file, killed, settings).communicate()
    same = weights_hash(whole) == weights_hash(killed)
    return f"killed after {rounds} of 2 rounds and resumed: {'the same bits' if same else 'OTHER BITS'} ({weights_hash(whole)})"


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        measured_run(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    size = sum(file.stat().st_size for file in options.model.glob("*.safetensors"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run_file = folder / "run.toml"
        run_file.write_text(RUN)
        for method in options.methods.split(","):
            settings = [f"model.name={options.model}", f"method.name={method}", *METHODS[method], *options.settings]
            printed, _ = child(run_file, folder / method, [*settings, "federation.rounds=1"]).communicate()
            figures = json.loads(printed.splitlines()[-1])
            parts = "  ".join(f"{name} {value:.1f} s" for name, value in figures["seconds"].items())
            peak, held, planned = (figures[name] / 1e9 for name in ("peak", "held", "planned"))
            print(
                f"{method:8} peak {peak:.2f} GB = {figures['peak'] / size:.3f} of the weights; a step holds {held:.2f} GB "
                f"(planned {planned:.2f}); failed {len(figures['failed'])}; {parts}",
                flush=True,
            )
            if options.resume:
                print(f"{method:8} {killed_and_resumed(run_file, folder / f'{method}-resumed', settings)}", flush=True)


if __name__ == "__main__":
    main()
