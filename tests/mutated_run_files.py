"""Run files as a person, an editor or a script may spoil them: one to three changes of a valid one, from a seed."""

from copy import deepcopy
from random import Random

import tomli_w

VALID = {
    "seed": 0,
    "model": {"name": "tiny", "dtype": "auto", "trust_remote_code": False},
    "method": {"name": "fedmoe", "patience": 3, "profile_rounds": 1},
    "methods": {"flex": {"num_grafted": 1, "training": {"lr": 1e-3}}, "slow": {"name": "fedavg", "training": {"lr": 1e-4}}},
    "training": {
        "train": "full",
        "parts": ["attention", "experts"],
        "rank": 8,
        "alpha": 16.0,
        "lr": 1e-3,
        "schedule": "constant",
        "final_lr": 1e-6,
        "batch_size": 4,
        "local_steps": 2,
        "warmup_steps": 0,
        "gradient_accumulation_steps": 1,
        "optimizer": "adamw",
        "max_grad_norm": 1.0,
        "label_smoothing": 0.1,
        "threads": 1,
        "device": "cpu",
        "precision": "auto",
    },
    "federation": {
        "rounds": 2,
        "clients_per_round": 2,
        "sampling": "random",
        "workers": 1,
        "min_clients": 1,
        "wire_dtype": "float32",
        "server_optimizer": {"name": "fedadam", "lr": 0.01},
        "stop": {"patience": 3, "min_delta": 0.0, "target": 0.9},
    },
    "data": {
        "sources": ["synthetic/copy", {"name": "synthetic/reverse", "task": "back"}],
        "clients": 4,
        "limit": 40,
        "minimum": 4,
        "partition": {"by": "task", "within": {"dirichlet": 0.5}},
        "validation": 0.15,
        "test_examples": 4,
        "max_tokens": 32,
    },
    "devices": {
        "profile": {"mix": {"phone": 1, "laptop_gpu": 1}},
        "utilization": 0.3,
        "deadline_seconds": 1e9,
        "memory_share": {"uniform": [0.5, 1.5]},
        "out_of_memory": "fail",
    },
    "evaluation": {
        "every": 5,
        "generate_tokens": 4,
        "batch_size": 8,
        "split": "test",
        "drift": False,
        "retained": ["synthetic/add"],
    },
    "checkpoint": {"keep": 2, "best": False},
    "track": {},
}

NUMBERS = (0, -1, 1, 2, 3, 7, 100, 10**6, 10**9, 2**31, 2**63 - 1, 2**63, 10**18, 10**30, 10**400, -(10**18))
FLOATS = (0.0, -0.0, 0.5, -0.5, 1.0, 1.5, 1e-300, 1e300, -1e300, 5e-324, float("nan"), float("inf"), float("-inf"))
TEXTS = (
    *(
        "",
        " ",
        "x",
        "0",
        "none",
        "None",
        "true",
        "nan",
        "task",
        "iid",
        "lora",
        "fedavg",
        "cuda",
        "../..",
        "/",
        "~",
        "hub:x/y",
        "synthetic/",
    ),
    *(
        "synthetic/copy",
        "no.csv",
        "a" * 5000,
        "é",
        "日本語",
        "\u202e\u0000x",
        "💥" * 300,
        "a\nb\tc",
        "{prompt}",
        "%s",
        "'\"\\",
        "\ud7ff",
    ),
)


def spoiled(seed: str) -> str:
    """The text of a run file with one to three changes."""
    rng, tree = Random(seed), deepcopy(VALID)
    for _ in range(rng.randint(1, 3)):
        rng.choice((replaced, replaced, replaced, removed, added, swapped))(tree, rng)
    text = tomli_w.dumps(tree)
    return rng.choice(TEXT_CHANGES)(text, rng) if rng.random() < 0.15 else text


def places(tree, path=()):
    """The paths of all values in `tree`, also of its tables and arrays."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items):
        yield (*path, key)
        yield from places(value, (*path, key))


def table_of(tree, path):
    for key in path[:-1]:
        tree = tree[key]
    return tree


def value(rng: Random, depth: int = 0):
    """Any value that TOML can express."""
    kind = rng.randrange(9 if depth < 3 else 6)
    match kind:
        case 0:
            return rng.choice(NUMBERS)
        case 1:
            return rng.choice(FLOATS)
        case 2 | 3:
            return rng.choice(TEXTS)
        case 4:
            return rng.random() < 0.5
        case 5:
            return rng.choice(([], {}, [[]], [{}]))
        case 6:
            return [value(rng, depth + 1) for _ in range(rng.choice((1, 2, 3, 40)))]
        case 7:
            return {
                rng.choice(("name", "by", "uniform", "x", "é", "", "lr", "mix")): value(rng, depth + 1)
                for _ in range(rng.randint(1, 3))
            }
    return deep(rng.choice((5, 40, 100)), rng.random() < 0.5)


def deep(levels: int, tables: bool):
    nested = 1
    for _ in range(levels):
        nested = {"a": nested} if tables else [nested]
    return nested


def replaced(tree, rng: Random) -> None:
    path = rng.choice(list(places(tree)))
    table_of(tree, path)[path[-1]] = value(rng)


def removed(tree, rng: Random) -> None:
    path = rng.choice(list(places(tree)))
    del table_of(tree, path)[path[-1]]


def added(tree, rng: Random) -> None:
    tables = [tree, *(table_of(tree, (*path, "")) for path in places(tree))]
    table = rng.choice([each for each in tables if isinstance(each, dict)])
    names = ("precision", "gradient_accumulation", "learning_rate", "é", "", "a.b", "x" * 3000, "💥", "name", "rounds", "sourcs")
    table[rng.choice(names)] = value(rng)


def swapped(tree, rng: Random) -> None:
    """A value of another setting in the place of one."""
    paths = list(places(tree))
    there, other = rng.choice(paths), rng.choice(paths)
    table_of(tree, there)[there[-1]] = deepcopy(table_of(tree, other)[other[-1]])


def cut(text: str, rng: Random) -> str:
    return text[: rng.randrange(len(text))]


def doubled(text: str, rng: Random) -> str:
    lines = text.splitlines(keepends=True)
    return "".join([*lines, rng.choice(lines), *rng.sample(lines, 2)])


def scrambled(text: str, rng: Random) -> str:
    place = rng.randrange(len(text))
    return (
        text[:place]
        + rng.choice(("[", "]", "{", "=", '"', "\x00", "\ufeff", "é", "\r", "#", "[[", "1e99999999", "9" * 6000))
        + text[place:]
    )


def bottomless(text: str, rng: Random) -> str:
    levels = rng.choice((500, 5_000, 100_000))
    return rng.choice(
        (
            f"x = {'[' * levels}{']' * levels}\n{text}",
            f"{text}\n[{'a.' * levels}b]\n",
            f"x = {'{a=' * levels}1{'}' * levels}\n{text}",
        )
    )


TEXT_CHANGES = (cut, doubled, scrambled, bottomless)
