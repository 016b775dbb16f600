"""What a client's device holds."""

from collections.abc import Sequence
from math import inf
from random import Random

from fedexperts.errors import BadValue

GB = 10**9


def memories(
    clients: Sequence[str], full_bytes: int, seed: str, *, gb: object = None, share: object = None
) -> dict[str, int | None]:
    """Memory in bytes of each client, from gigabytes (10⁹) or from shares of what training the full model takes.

    Either is one number for all, a list with one for each client, or `{"uniform": [low, high]}`; neither: no limit.

    Raises:
        BadValue: both were given, a list of another length than there are clients, or bounds the wrong way round.
    """
    if gb is not None and share is not None:
        raise BadValue("devices has both memory_gb and memory_share; give one of them")
    if gb is None and share is None:
        return dict.fromkeys(clients)
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
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given < inf:
        raise BadValue(f"devices.{key} has {given!r}, which is no amount of memory; give a number above 0")
    return float(given)
