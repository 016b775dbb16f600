"""Clients' devices: memory, compute speed and bandwidth."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from random import Random

from fedexperts.errors import BadData, BadValue, nearest

GB = 10**9
MBIT = 10**6 / 8  # in bytes
UTILIZATION = 0.4
"""Default share of a preset's peak FLOP/s that training sustains (our choice): what large runs report for whole clusters
(38 to 43 %: Llama Team, "The Llama 3 Herd of Models", 2024, table 4); a small model on a small device reaches less."""


@dataclass(frozen=True)
class Profile:
    """A client's device."""

    flops_per_second: float  # sustained in training
    down_bytes_per_second: float
    up_bytes_per_second: float
    memory_bytes: int | None = None  # None: unlimited

    def seconds(self, bytes_down: int, flops: float, bytes_up: int) -> float:
        """Virtual seconds of a job: bytes_down / down + flops / flops_per_second + bytes_up / up, without overlap."""
        transfer = bytes_down / self.down_bytes_per_second + bytes_up / self.up_bytes_per_second
        return transfer + flops / self.flops_per_second


# Connections: world averages of Ookla's Speedtest Global Index of September 2020, the last of which we found both directions
# (my-financial-wealth.com/2020/10/25/the-global-mobile-and-broadband-internet-speed-ranking).
FIXED = {"down_bytes_per_second": 85.73 * MBIT, "up_bytes_per_second": 45.74 * MBIT}
MOBILE = {"down_bytes_per_second": 35.96 * MBIT, "up_bytes_per_second": 11.22 * MBIT}
DATA_CENTER = {"down_bytes_per_second": 1000 * MBIT, "up_bytes_per_second": 1000 * MBIT}  # our assumption

# FLOP/s: the fp32 peak without tensor cores, since clients train in fp32. Memory: the whole device's. Which connection a
# device has is our assumption.
PRESETS: Mapping[str, Profile] = {
    # 512 CUDA cores, 1.3 TFLOP/s: Nvidia at Hot Chips 30 (en.wikichip.org/wiki/nvidia/tegra/xavier); 32 GB module
    "jetson_agx_xavier": Profile(1.3e12, **FIXED, memory_bytes=32 * GB),
    # 2048 CUDA cores, 5.3 TFLOP/s: Nvidia, "Jetson AGX Orin Series Technical Brief", 2022; 64 GB module
    "jetson_agx_orin": Profile(5.3e12, **FIXED, memory_bytes=64 * GB),
    # A large phone of 2022 (Snapdragon 8 Gen 1, Adreno 730). Its vendor gives no figure; others say about 2 TFLOP/s
    "phone": Profile(2.0e12, **MOBILE, memory_bytes=12 * GB),
    # GeForce RTX 4060 Laptop: 3072 CUDA cores · 2 · 1.89 GHz = 11.6 TFLOP/s (cputronic.com/gpu/nvidia-geforce-rtx-4060-mobile)
    "laptop_gpu": Profile(11.6e12, **FIXED, memory_bytes=8 * GB),
    # GeForce RTX 4090: 82.6 TFLOP/s: Nvidia, "Ada GPU Architecture" (white paper), 2022, appendix A; 24 GB
    "desktop_gpu": Profile(82.6e12, **FIXED, memory_bytes=24 * GB),
    # A100 80 GB SXM: 19.5 TFLOP/s: Nvidia, "A100 Tensor Core GPU" data sheet, 2021
    "server_gpu": Profile(19.5e12, **DATA_CENTER, memory_bytes=80 * GB),
}

MOST = 1e30
"""Upper bound of every number of a device; larger numbers could overflow."""

NEEDED = ("flops", "down_mbit", "up_mbit")
KEYS = (*NEEDED, "memory_gb")
A_DEVICE = "a device has flops (FLOP/s that training sustains), down_mbit and up_mbit (Mbit/s) and memory_gb (10⁹ bytes)"


def profiles(profile: object, clients: Sequence[str], seed: str, utilization: float = UTILIZATION) -> dict[str, Profile]:
    """Client → its device; empty if `profile` is None.

    `profile` is one device for all clients, a list with one per client, `{"mix": {preset: weight}}`, or `{"csv": path}` (see
    `trace`). A mix is drawn per client: client `c01` of a seed gets the same device for any number of clients. A device is the
    name of a preset, which sustains `utilization` times its peak FLOP/s, or a table of `KEYS`.

    Raises:
        BadValue: any other value; a list or a file with too few devices.
    """
    match profile:
        case None:
            return {}
        case {"mix": weights, **rest} if not rest:
            mix = validated_mix(weights)
            drawn = {client: Random(f"{seed}/{client}/device").choices(list(mix), list(mix.values()))[0] for client in clients}
            return {client: preset(name, utilization) for client, name in drawn.items()}
        case {"csv": str(path), **rest} if not rest:
            return trace(Path(path), clients)
        case list() | tuple():
            if len(profile) != len(clients):
                raise BadValue(
                    f"devices.profile lists {len(profile)} devices for {len(clients)} clients; give one for each client"
                )
            return {client: device(each, utilization) for client, each in zip(clients, profile, strict=True)}
    return dict.fromkeys(clients, device(profile, utilization))


def device(value: object, utilization: float) -> Profile:
    """The device that `value` specifies: the name of a preset, or a table of `KEYS`.

    Raises:
        BadValue: any other value.
    """
    match value:
        case str():
            return preset(value, utilization)
        case dict():
            return from_table(value, "devices.profile")
    raise BadValue(
        f"devices.profile = {value!r} is none of a preset ({', '.join(PRESETS)}), a table of {', '.join(KEYS)}, a list of "
        'these with one for each client, { mix = { phone = 3, laptop_gpu = 1 } } and { csv = "devices.csv" }'
    )


def preset(name: str, utilization: float) -> Profile:
    """The preset `name`, with `utilization` times its peak FLOP/s."""
    if name not in PRESETS:
        raise BadValue(f"devices.profile: {name!r} is not one of {', '.join(PRESETS)}{nearest(name, PRESETS)}")
    return replace(PRESETS[name], flops_per_second=utilization * PRESETS[name].flops_per_second)


def held_by(needed: int) -> list[str]:
    """The presets of devices with at least `needed` bytes of memory, the smallest first."""
    memory = {name: profile.memory_bytes or 0 for name, profile in PRESETS.items()}
    return sorted((name for name in memory if memory[name] >= needed), key=memory.__getitem__)


def from_table(table: Mapping[str, object], where: str) -> Profile:
    """The device in a table of `KEYS`; unlimited memory without memory_gb. `where` names the table in errors.

    Raises:
        BadValue: an unknown or a missing key, or a number that is not allowed.
    """
    for key in table:
        if key not in KEYS:
            raise BadValue(f"{where} has {key}, and {A_DEVICE}{nearest(key, KEYS)}")
    for key in NEEDED:
        if key not in table:
            raise BadValue(f"{where} has no {key}; {A_DEVICE}")
    flops, down, up = (positive(table[key], f"{where} has {key}") for key in NEEDED)
    memory = round(positive(table["memory_gb"], f"{where} has memory_gb") * GB) if "memory_gb" in table else None
    return Profile(flops, down * MBIT, up * MBIT, memory)


def validated_mix(weights: object) -> dict[str, float]:
    """Preset → its weight, sorted by name.

    Raises:
        BadValue: no table, an unknown preset, or a weight that is not above 0.
    """
    if not isinstance(weights, dict) or not weights:
        raise BadValue(
            f"devices.profile.mix = {weights!r} is no table of presets and weights, such as {{ phone = 3, laptop_gpu = 1 }}"
        )
    for name in weights:
        preset(name, UTILIZATION)
    return {name: positive(weights[name], f"devices.profile.mix has {name}") for name in sorted(weights)}


def trace(path: Path, clients: Sequence[str]) -> dict[str, Profile]:
    """The devices in a CSV file with the columns of `KEYS`; an empty memory_gb is unlimited, other columns are ignored.

    With a column `client`, rows are matched by the client's name; without it, they are in the order of the clients. There may
    be more rows than clients.

    Raises:
        BadData: no such file, a missing column or row, or a cell that is not a number.
    """
    rows = read_rows(path)
    if "client" in rows[0][1]:
        names = [row["client"] for _, row in rows]
        if twice := [name for name in names if names.count(name) > 1]:
            raise BadData(f"{path} has client {twice[0]} {names.count(twice[0])} times; keep one row for each client")
        if missing := [client for client in clients if client not in names]:
            raise BadData(f"{path} has no row for client {missing[0]}; give one for each of {', '.join(clients)}")
        rows = [rows[names.index(client)] for client in clients]
    if len(rows) < len(clients):
        raise BadData(f"{path} has {len(rows)} devices for {len(clients)} clients; give a row for each client")
    return {client: from_table(parsed(cells), where) for client, (where, cells) in zip(clients, rows, strict=False)}


def read_rows(path: Path) -> list[tuple[str, dict[str, str]]]:
    """(file and line, column → cell) of each row."""
    try:
        reader = csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines(), strict=True)
        rows = [(f"{path}, line {reader.line_num}", row) for row in reader]
    except OSError as error:
        raise BadData(f"{path} cannot be read ({error.strerror}); give devices.profile.csv the path of a CSV file") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise BadData(f"{path} is no CSV file in UTF-8 ({error}); correct it") from None
    columns = reader.fieldnames or ()
    if absent := [key for key in KEYS if key not in columns]:
        raise BadData(f"{path} has no column {absent[0]}; its first line names at least {', '.join(KEYS)}")
    if uneven := [where for where, row in rows if None in row or None in row.values()]:
        raise BadData(f"{uneven[0]} does not have the {len(columns)} fields of the first line; correct or remove it")
    if not rows:
        raise BadData(f"{path} has no device below its first line; give a row for each client")
    return rows


def parsed(cells: Mapping[str, str]) -> dict[str, object]:
    """A row of a trace as a table of `KEYS`."""
    return {key: number(cells[key]) for key in KEYS if cells[key].strip() or key != "memory_gb"}


def number(text: str) -> float | str:
    """`text` as a number; unchanged if it is not one."""
    try:
        return float(text)
    except ValueError:
        return text


def positive(value: object, what: str) -> float:
    """Validates that `value` is a number above 0 and below `MOST`, and returns it."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < MOST:
        raise BadValue(f"{what} = {value!r:.60}, which no device can have; give a number above 0 and below {MOST:g}")
    return float(value)


def trace_hash(profile: object) -> dict[str, str]:
    """Path → sha256 of the CSV file that `profiles` reads for `profile`; empty if it reads none."""
    match profile:
        case {"csv": str(path)}:
            return {path: sha256(Path(path).read_bytes()).hexdigest()}
    return {}


def memories(
    clients: Sequence[str],
    full_bytes: int,
    seed: str,
    *,
    gb: object = None,
    share: object = None,
    profiles: Mapping[str, Profile] | None = None,
) -> dict[str, int | None]:
    """Client → its memory in bytes, from gigabytes (10⁹ bytes) or from shares of what training the full model takes.

    Either is one number for all clients, a list with one per client, or `{"uniform": [low, high]}`; without both, it is the
    memory of the client's device, or None (unlimited) without `profiles`.

    Raises:
        BadValue: both are set, a list of the wrong length, or the lower bound is above the upper bound.
    """
    if gb is not None and share is not None:
        raise BadValue("devices has both memory_gb and memory_share; give one of them")
    if gb is None and share is None:
        return {client: profiles[client].memory_bytes if profiles else None for client in clients}
    numbers, unit, key = (gb, GB, "memory_gb") if gb is not None else (share, full_bytes, "memory_share")
    by_client = zip(clients, per_client(numbers, clients, seed, key), strict=True)
    return {client: round(number * unit) for client, number in by_client}


def per_client(numbers: object, clients: Sequence[str], seed: str, key: str) -> list[float]:
    """One number per client; client `c01` of a seed draws the same number for any number of clients."""
    match numbers:
        case int() | float():
            return [amount(numbers, key)] * len(clients)
        case {"uniform": [low, high]}:
            bounds = amount(low, key), amount(high, key)
            if bounds[0] > bounds[1]:
                raise BadValue(f"devices.{key} is uniform from {low} up to {high}, which is less; give the smaller number first")
            return [Random(f"{seed}/{client}/memory").uniform(*bounds) for client in clients]
        case list() | tuple():
            if len(numbers) != len(clients):
                raise BadValue(f"devices.{key} lists {len(numbers)} numbers for {len(clients)} clients; give one for each client")
            return [amount(number, key) for number in numbers]
    raise BadValue(f"devices.{key} = {numbers!r} is none of a number, a list of numbers, or {{ uniform = [low, high] }}")


def amount(value: object, key: str) -> float:
    """Validates that `value` is an amount of memory, above 0 and below `MOST`, and returns it."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < MOST:
        raise BadValue(f"devices.{key} has {value!r:.60}, which is no amount of memory; give a number above 0 and below {MOST:g}")
    return float(value)
