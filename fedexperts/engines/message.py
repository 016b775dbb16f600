"""Messages between server and clients, of values and bytes, over any carrier. Needs no more than the standard library."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from typing import Any

from fedexperts.errors import BadMessage

PROTOCOL = 8
"""Raised by every change that makes messages unreadable to a version without it."""
VERSION = version("fedexperts")
MAX_DEPTH = 32
"""How many lists and objects of a message's JSON may lie inside each other: writing them again recurses."""
MAX_DIGITS = 19
"""Of a whole number in a message's JSON, which has 64 bits: one of 400 digits fits no float, one of 5,000 cannot be printed."""


Bytes = bytes | memoryview


@dataclass(frozen=True)
class Message:
    """A head of JSON values, and named parts of bytes."""

    head: Mapping[str, Any]
    parts: dict[str, Bytes]  # who reads them takes them out


def to_bytes(message: Message) -> bytes:
    """The length of a manifest (8 bytes, big endian), the manifest (JSON), the parts."""
    sizes = {name: len(part) for name, part in message.parts.items()}
    manifest = json.dumps({"protocol": PROTOCOL, "version": VERSION, "head": dict(message.head), "parts": sizes}).encode()
    return b"".join([len(manifest).to_bytes(8, "big"), manifest, *message.parts.values()])


def from_bytes(data: bytes) -> Message:
    """The message that `to_bytes` made `data` of; its parts are views of `data`.

    Raises:
        BadMessage: cut off, of another protocol, or with JSON that `read_json` refuses.
    """
    end = 8 + int.from_bytes(data[:8], "big")
    if len(data) < max(end, 8):
        raise BadMessage(f"a message was cut off: {len(data)} bytes came, and its first part alone has {end}; send it again")
    manifest = read_json(data[8:end])
    require_protocol(manifest["protocol"], manifest["version"])
    parts: dict[str, Bytes] = {}
    view = memoryview(data)
    for name, size in manifest["parts"].items():
        parts[name] = view[end : end + size]
        end += size
    if len(data) != end:
        raise BadMessage(f"a message was cut off: {len(data)} bytes came of {end}; send it again")
    return Message(manifest["head"], parts)


def read_json(text: str | bytes) -> Any:
    """The JSON value in `text`.

    Raises:
        BadMessage: it is no JSON, more than MAX_DEPTH deep, or holds a whole number of more than 64 bits or a string that no file
            can hold.
    """
    try:
        value = json.loads(text, parse_int=whole_number)
        if depth(value) > MAX_DEPTH:
            raise BadMessage(f"its JSON has lists and objects more than {MAX_DEPTH} deep inside each other")
        json.dumps(value, ensure_ascii=False).encode()  # which half of a surrogate pair fails
    except (ValueError, RecursionError) as error:
        raise BadMessage(f"its JSON cannot be read ({type(error).__name__}: {error})") from None
    return value


def whole_number(digits: str) -> int:
    """Raises ValueError where it has more than 64 bits."""
    if len(digits.lstrip("-")) > MAX_DIGITS or not -(2**63) <= int(digits) < 2**63:
        raise ValueError(f"a whole number of {len(digits):,} digits, and 64 bits are allowed")
    return int(digits)


def depth(value: object) -> int:
    """How many lists and objects lie inside each other."""
    levels, inside = 0, [value]
    while inside := [each for each in inside if isinstance(each, dict | list)]:
        levels += 1
        inside = [child for each in inside for child in (each.values() if isinstance(each, dict) else each)]
    return levels


def require_protocol(protocol: object, sender_version: object) -> None:
    """Raises BadMessage unless `protocol`, which version `sender_version` of the library speaks, is ours."""
    if protocol != PROTOCOL:
        raise BadMessage(
            f"it speaks protocol {protocol} (FedExperts {sender_version}), and this side speaks {PROTOCOL} "
            f"(FedExperts {VERSION}); install the same version on both"
        )


def require_size(size: int, limit: float) -> None:
    """Raises BadMessage where an answer, of which `size` bytes are known, is larger than `limit`, what its job allows."""
    if size > limit:
        raise BadMessage(
            f"its answer takes at least {size:,} bytes, and its job allows {limit:,.0f}; install the server's version of "
            "FedExperts and of the method on the client"
        )


def digest(head: str, parts: Mapping[str, Bytes]) -> str:
    """sha256 of all that a message holds, in whatever order its parts lie."""
    checksum = sha256(head.encode())
    for name in sorted(parts):
        checksum.update(f"\n{len(parts[name])} {name}\n".encode())
        checksum.update(parts[name])
    return checksum.hexdigest()
