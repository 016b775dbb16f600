"""Clients' devices: what they hold, and how fast they compute and send."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from random import Random

from fedexperts.errors import BadData, BadValue, nearest

GB = 10**9
MBIT = 10**6 / 8  # in bytes
UTILISATION = 0.4
"""What training sustains of a preset's peak, unless a run file says otherwise: our choice. It is what large runs report for whole
clusters (38 to 43 %: Llama Team, "The Llama 3 Herd of Models", 2024, table 4); a small model on a small device reaches less."""


@dataclass(frozen=True)
class Profile:
    """A client's device."""

    flops_per_second: float  # that training sustains
    down_bytes_per_second: float
    up_bytes_per_second: float
    memory_bytes: int | None = None  # None: as much as it takes

    def seconds(self, bytes_down: int, flops: float, bytes_up: int) -> float:
        """Virtual time of a job: bytes_down / down + flops / flops_per_second + bytes_up / up, one after the other."""
        transfer = bytes_down / self.down_bytes_per_second + bytes_up / self.up_bytes_per_second
        return transfer + flops / self.flops_per_second


# Lines: the world's averages in Ookla's Speedtest Global Index of September 2020, the last of which we found both directions
# (my-financial-wealth.com/2020/10/25/the-global-mobile-and-broadband-internet-speed-ranking).
FIXED = {"down_bytes_per_second": 85.73 * MBIT, "up_bytes_per_second": 45.74 * MBIT}
MOBILE = {"down_bytes_per_second": 35.96 * MBIT, "up_bytes_per_second": 11.22 * MBIT}
DATA_CENTRE = {"down_bytes_per_second": 1000 * MBIT, "up_bytes_per_second": 1000 * MBIT}  # our assumption

# FLOP/s: the peak in fp32 without tensor cores, which is what clients train in here. Memory: all of the device. Which line a
# device is on is our assumption.
PRESETS: Mapping[str, Profile] = {
    # 512 CUDA cores, 1.3 TFLOP/s: Nvidia at Hot Chips 30 (en.wikichip.org/wiki/nvidia/tegra/xavier); 32 GB module
    "jetson_agx_xavier": Profile(1.3e12, **FIXED, memory_bytes=32 * GB),
    # 2048 CUDA cores, 5.3 TFLOP/s: Nvidia, "Jetson AGX Orin Series Technical Brief", 2022; 64 GB module
    "jetson_agx_orin": Profile(5.3e12, **FIXED, memory_bytes=64 * GB),
    # A large phone of 2022 (Snapdragon 8 Gen 1, Adreno 730). Its vendor gives no figure; others say about 2 TFLOP/s
    "phone": Profile(2.0e12, **MOBILE, memory_bytes=12 * GB),
    # GeForce RTX 4060 Laptop: 3072 CUDA cores · 2 · 1.89 GHz = 11.6 TFLOP/s (cputronic.com/gpu/nvidia-geforce-rtx-4060-mobile)
    "laptop_gpu": Profile(11.6e12, **FIXED, memory_bytes=8 * GB),
    # A100 80 GB SXM: 19.5 TFLOP/s: Nvidia, "A100 Tensor Core GPU" data sheet, 2021
    "server_gpu": Profile(19.5e12, **DATA_CENTRE, memory_bytes=80 * GB),
}

MOST = 1e30
"""What any number of a device is below; arithmetic with larger ones could overflow."""

NEEDED = ("flops", "down_mbit", "up_mbit")
KEYS = (*NEEDED, "memory_gb")
A_DEVICE = "a device has flops (FLOP/s that training sustains), down_mbit and up_mbit (Mbit/s) and memory_gb (10⁹ bytes)"


def profiles(given: object, clients: Sequence[str], seed: str, utilisation: float = UTILISATION) -> dict[str, Profile]:
    """The device of each client; none where nothing is given.

    Given is one device for all, a list with one for each client, `{"mix": {preset: weight}}`, drawn for each client, so that
    client `c01` of a seed gets the same however many clients there are, or `{"csv": path}` (see `trace`). A device is the name
    of a preset, whose peak times `utilisation` is what it sustains, or a table of `KEYS`.

    Raises:
        BadValue: anything else; a list or a file with too few devices.
    """
    match given:
        case None:
            return {}
        case {"mix": weights, **rest} if not rest:
            names = mixed(weights)
            drawn = {
                client: Random(f"{seed}/{client}/device").choices(list(names), list(names.values()))[0] for client in clients
            }
            return {client: preset(name, utilisation) for client, name in drawn.items()}
        case {"csv": str(path), **rest} if not rest:
            return trace(Path(path), clients)
        case list() | tuple():
            if len(given) != len(clients):
                raise BadValue(f"devices.profile lists {len(given)} devices for {len(clients)} clients; give one for each client")
            return {client: device(each, utilisation) for client, each in zip(clients, given, strict=True)}
    return dict.fromkeys(clients, device(given, utilisation))


def device(given: object, utilisation: float) -> Profile:
    """The device that a run file names or describes."""
    match given:
        case str():
            return preset(given, utilisation)
        case dict():
            return described(given, "devices.profile")
    raise BadValue(
        f"devices.profile = {given!r} is none of a preset ({', '.join(PRESETS)}), a table of {', '.join(KEYS)}, a list of "
        'these with one for each client, { mix = { phone = 3, laptop_gpu = 1 } } and { csv = "devices.csv" }'
    )


def preset(name: str, utilisation: float) -> Profile:
    """The preset as training uses it."""
    if name not in PRESETS:
        raise BadValue(f"devices.profile: {name!r} is not one of {', '.join(PRESETS)}{nearest(name, PRESETS)}")
    return replace(PRESETS[name], flops_per_second=utilisation * PRESETS[name].flops_per_second)


def described(given: Mapping[str, object], where: str) -> Profile:
    """The device of a table of `KEYS`; one without memory_gb holds as much as it takes."""
    for key in given:
        if key not in KEYS:
            raise BadValue(f"{where} has {key}, and {A_DEVICE}{nearest(key, KEYS)}")
    for key in NEEDED:
        if key not in given:
            raise BadValue(f"{where} has no {key}; {A_DEVICE}")
    flops, down, up = (above_0(given[key], f"{where} has {key}") for key in NEEDED)
    memory = round(above_0(given["memory_gb"], f"{where} has memory_gb") * GB) if "memory_gb" in given else None
    return Profile(flops, down * MBIT, up * MBIT, memory)


def mixed(weights: object) -> dict[str, float]:
    """Preset → its weight, in the order of their names."""
    if not isinstance(weights, dict) or not weights:
        raise BadValue(
            f"devices.profile.mix = {weights!r} is no table of presets and weights, such as {{ phone = 3, laptop_gpu = 1 }}"
        )
    for name in weights:
        preset(name, UTILISATION)
    return {name: above_0(weights[name], f"devices.profile.mix has {name}") for name in sorted(weights)}


def trace(path: Path, clients: Sequence[str]) -> dict[str, Profile]:
    """The devices in a CSV file with the columns of `KEYS`, an empty memory_gb for as much as it takes; others are not read.

    Where there is a column `client`, a client's row is found by its name; else rows are in the order of the clients. There may
    be more rows than clients.

    Raises:
        BadData: no such file, a column or a row that is missing, or a number that is none.
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
    return {client: described(*row) for client, row in zip(clients, map(cells, rows), strict=False)}


def read_rows(path: Path) -> list[tuple[str, dict[str, str]]]:
    """Where each row stands, and its cells by column."""
    try:
        reader = csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines(), strict=True)
        rows = [(f"{path}, line {reader.line_num}", row) for row in reader]
    except OSError as error:
        raise BadData(f"{path} cannot be read ({error.strerror}); give devices.profile.csv the path of a CSV file") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise BadData(f"{path} is no CSV file in UTF-8 ({error}); mend it") from None
    columns = reader.fieldnames or ()
    if absent := [key for key in KEYS if key not in columns]:
        raise BadData(f"{path} has no column {absent[0]}; its first line names at least {', '.join(KEYS)}")
    if uneven := [where for where, row in rows if None in row or None in row.values()]:
        raise BadData(f"{uneven[0]} has not the {len(columns)} fields of the first line; mend or remove it")
    if not rows:
        raise BadData(f"{path} has no device below its first line; give a row for each client")
    return rows


def cells(row: tuple[str, Mapping[str, str]]) -> tuple[dict[str, object], str]:
    """A row of a trace as a table of `KEYS`, and where it stands."""
    where, found = row
    return {key: number(found[key]) for key in KEYS if found[key].strip() or key != "memory_gb"}, where


def number(text: str) -> float | str:
    """The number that `text` is, where it is one."""
    try:
        return float(text)
    except ValueError:
        return text


def above_0(given: object, what: str) -> float:
    """`given`, where it is a number that a device can have."""
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given < MOST:
        raise BadValue(f"{what} = {given!r:.60}, which no device can have; give a number above 0 and below {MOST:g}")
    return float(given)


def trace_hash(given: object) -> dict[str, str]:
    """The path and sha256 of the file that `profiles` reads for `given`; empty where it reads none."""
    match given:
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
    """Memory in bytes of each client, from gigabytes (10⁹) or from shares of what training the full model takes.

    Either is one number for all, a list with one for each client, or `{"uniform": [low, high]}`; neither: the memory of the
    client's device, and where there are no `profiles` either, no limit.

    Raises:
        BadValue: both were given, a list of another length than there are clients, or bounds the wrong way round.
    """
    if gb is not None and share is not None:
        raise BadValue("devices has both memory_gb and memory_share; give one of them")
    if gb is None and share is None:
        return {client: profiles[client].memory_bytes if profiles else None for client in clients}
    given, unit, key = (gb, GB, "memory_gb") if gb is not None else (share, full_bytes, "memory_share")
    numbers = drawn(given, clients, seed, key)
    return {client: round(number * unit) for client, number in zip(clients, numbers, strict=True)}


def drawn(given: object, clients: Sequence[str], seed: str, key: str) -> list[float]:
    """One number for each client; client `c01` of a seed gets the same number however many clients there are."""
    match given:
        case int() | float():
            return [amount(given, key)] * len(clients)
        case {"uniform": [low, high]}:
            bounds = amount(low, key), amount(high, key)
            if bounds[0] > bounds[1]:
                raise BadValue(f"devices.{key} is uniform from {low} up to {high}, which is less; give the smaller number first")
            return [Random(f"{seed}/{client}/memory").uniform(*bounds) for client in clients]
        case list() | tuple():
            if len(given) != len(clients):
                raise BadValue(f"devices.{key} lists {len(given)} numbers for {len(clients)} clients; give one for each client")
            return [amount(number, key) for number in given]
    raise BadValue(f"devices.{key} = {given!r} is none of a number, a list of numbers, or {{ uniform = [low, high] }}")


def amount(given: object, key: str) -> float:
    """`given`, where it is a number that memory can be."""
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given < MOST:
        raise BadValue(f"devices.{key} has {given!r:.60}, which is no amount of memory; give a number above 0 and below {MOST:g}")
    return float(given)
