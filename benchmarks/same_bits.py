"""Hashes of what runs of every method give: final weights, what clients keep, ledger, scores. For refactors, before and after.

    python benchmarks/same_bits.py OUT.json [method …]
    python benchmarks/same_bits.py --compare BEFORE.json AFTER.json

Each method makes three rounds over four clients on `tiny`, with full weights or LoRA, as it needs; some of them also under a
server optimizer, scored before aggregation, with retained examples and drift. It uses nothing of the library but
`fedexperts.run`, so that it runs on older versions, too (PYTHONPATH names another checkout). Seconds are left out, and so are
the names of clients' and methods' state, which may be renamed, but not their bits.
"""

import json
import sys
import tempfile
from hashlib import sha256
from pathlib import Path

from safetensors.torch import load_file

import fedexperts

LORA = {"train": "lora", "rank": 8, "dropout": 0.1}
ATTENTION = {**LORA, "parts": ["attention"]}
BOUNDED = {"memory_share": {"uniform": [0.95, 1.3]}, "profile": {"mix": {"phone": 1, "laptop_gpu": 1}}}
PAPER = {"absolute_floor": 0.05}  # the default of usage_floor changed on purpose after c22e646


def tree(method: dict, training: dict | None = None, devices: dict | None = None, **more: dict) -> dict:
    """A run file."""
    return {
        "seed": 3,
        "model": {"name": "tiny"},
        "method": method,
        "training": {"lr": 1e-3, "batch_size": 4, "local_steps": 3, "validation_examples": 8, **(training or {})},
        "federation": {"rounds": 3, "clients_per_round": 3, **more.get("federation", {})},
        "devices": devices or {},
        "evaluation": {"every": 2, "generate_tokens": 8, **more.get("evaluation", {})},
        "data": {
            "sources": ["synthetic/room", "synthetic/double"],
            "clients": 4,
            "limit": 120,
            "test_examples": 8,
            "max_tokens": 64,
        },
    }


def runs() -> dict[str, dict]:
    """Every run by its name."""
    full = ("fedavg", "fedprox", "scaffold", "fedper", "fedrep", "ditto", "local", "centralized")
    adapters = ("fedit", "ffa_lora", "fedsa_lora", "flora", "flexlora", "hetlora", "random_expert")
    found = {name: tree({"name": name}) for name in full}
    found |= {name: tree({"name": name}, LORA) for name in adapters}
    found |= {name: tree({"name": name}, devices=BOUNDED) for name in ("fedmoe", "random_moe", "seer_moe", "pfl_moe")}
    found["fedmoe patient"] = tree({"name": "fedmoe", "patience": 1, "neighbors": 1}, LORA, BOUNDED)
    found["fedavg sub-model"] = tree({"name": "fedavg", "experts_per_layer": 6})
    found["hfedmoe"] = tree({"name": "hfedmoe", "budget": 0.25, **PAPER})
    found["hfedmoe lora"] = tree({"name": "hfedmoe", "budget": 0.5, "aggregate": "selective", "absolute_floor": 0.03}, LORA)
    found["flex"] = tree({"name": "flex"}, ATTENTION)
    found["flex two"] = tree({"name": "flex", "num_grafted": 2, "select": "random"}, {"parts": ["attention"]})
    ranks = {"ranks": [8, 4]}
    found |= {f"{name} ranks": tree({"name": name, **ranks}, LORA) for name in ("flora", "flexlora", "hetlora")}
    for optimizer in ("fedavgm", "fedadam", "fedyogi", "fedadagrad"):
        found[f"fedavg {optimizer}"] = tree({"name": "fedavg"}, federation={"server_optimizer": {"name": optimizer}})
    before = {"score": "before_aggregation", "retained": ["synthetic/sort"], "drift": True}
    for name in ("fedavg", "fedmoe", "local", "centralized"):
        found[f"{name} before"] = tree({"name": name}, devices=BOUNDED if name == "fedmoe" else None, evaluation=before)
    for name in ("flex", "flora", "fedsa_lora", "hetlora"):
        found[f"{name} before"] = tree({"name": name}, ATTENTION, evaluation=before)
    found["fedmoe two workers"] = tree({"name": "fedmoe"}, devices=BOUNDED, federation={"workers": 2})
    return found


def bits(path: Path, by_name: bool) -> str:
    """sha256 of the tensors of a file, with their names or only sorted by their own bits."""
    tensors = load_file(path)
    each = sorted(
        f"{name if by_name else ''}{tensor.dtype}{list(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes()
        for name, tensor in tensors.items()
    )
    return sha256(b"".join(each)).hexdigest()[:16]


def lines(path: Path) -> str:
    """sha256 of the lines of a log without what a clock on the wall measured."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    for line in found:
        line.pop("seconds", None)
    return sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def hashes(folder: Path) -> dict[str, str]:
    """What a results folder holds."""
    saved = max(path.parent for path in (folder / "checkpoint").glob("*/state.json"))
    state = sorted(path for path in saved.glob("*.safetensors") if path.name != "weights.safetensors")
    last = {path.parent.name: path for path in sorted((folder / "clients").glob("*/*.safetensors"))}
    return {
        "weights": bits(saved / "weights.safetensors", True),
        "method_state": bits(state[0], False),
        "client_state": sha256("".join(bits(last[name], False) for name in sorted(last)).encode()).hexdigest()[:16],
        **{name: lines(folder / f"{name}.jsonl") for name in ("ledger", "evals", "rounds")},
    }


def main() -> None:
    if sys.argv[1] == "--compare":
        before, after = (json.loads(Path(name).read_text()) for name in sys.argv[2:])
        differ = [f"{run}: {part}" for run in before for part in before[run] if after.get(run, {}).get(part) != before[run][part]]
        print(f"{len(before)} runs, {sum(map(len, before.values()))} hashes, {len(differ)} differ", *differ, sep="\n")
        raise SystemExit(bool(differ))
    out, wanted = Path(sys.argv[1]), sys.argv[2:]
    found: dict[str, dict[str, str]] = {}
    for name, run in runs().items():
        if not wanted or name.split()[0] in wanted:
            with tempfile.TemporaryDirectory() as folder:
                found[name] = hashes(fedexperts.run(run, Path(folder) / "run"))
            print(name, found[name], flush=True)
            out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
