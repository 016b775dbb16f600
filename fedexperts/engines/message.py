"""What travels between server and clients, whoever carries it: values and bytes. Needs no more than the standard library."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from typing import Any

from fedexperts.errors import BadLetter

PROTOCOL = 4
"""Changes with whatever makes letters unreadable to those who do not know of it."""
VERSION = version("fedexperts")


@dataclass(frozen=True)
class Letter:
    """What it says, and what it brings."""

    head: Mapping[str, Any]  # JSON values
    parts: dict[str, bytes]  # who reads it takes them out


def to_bytes(letter: Letter) -> bytes:
    """The length of a manifest, the manifest, the parts."""
    sizes = {name: len(part) for name, part in letter.parts.items()}
    manifest = json.dumps({"protocol": PROTOCOL, "version": VERSION, "head": dict(letter.head), "parts": sizes}).encode()
    return b"".join([len(manifest).to_bytes(8, "big"), manifest, *letter.parts.values()])


def from_bytes(data: bytes) -> Letter:
    """The letter that `to_bytes` made `data` of.

    Raises:
        BadLetter: cut off, or of another protocol.
    """
    end = 8 + int.from_bytes(data[:8], "big")
    if len(data) < max(end, 8):
        raise BadLetter(f"a letter was cut off: {len(data)} bytes came, and its first part alone has {end}; send it again")
    manifest = json.loads(data[8:end])
    require_protocol(manifest["protocol"], manifest["version"])
    parts: dict[str, bytes] = {}
    for name, size in manifest["parts"].items():
        parts[name] = data[end : end + size]
        end += size
    if len(data) != end:
        raise BadLetter(f"a letter was cut off: {len(data)} bytes came of {end}; send it again")
    return Letter(manifest["head"], parts)


def require_protocol(protocol: object, theirs: object) -> None:
    """Raises BadLetter unless `protocol`, which the version `theirs` of the library speaks, is ours."""
    if protocol != PROTOCOL:
        raise BadLetter(
            f"it speaks protocol {protocol} (FedExperts {theirs}), and this side speaks {PROTOCOL} (FedExperts {VERSION}); "
            "install the same version on both"
        )


def digest(head: str, parts: Mapping[str, bytes]) -> str:
    """sha256 of all that a letter holds, in whatever order its parts lie."""
    found = sha256(head.encode())
    for name in sorted(parts):
        found.update(f"\n{len(parts[name])} {name}\n".encode())
        found.update(parts[name])
    return found.hexdigest()
