"""What travels between server and clients, whoever carries it: values and bytes. Needs no more than the standard library."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from typing import Any

from fedexperts.errors import BadMessage

PROTOCOL = 4
"""Changes with whatever makes messages unreadable to those who do not know of it."""
VERSION = version("fedexperts")


@dataclass(frozen=True)
class Message:
    """What it says, and what it brings."""

    head: Mapping[str, Any]  # JSON values
    parts: dict[str, bytes]  # who reads it takes them out


def to_bytes(message: Message) -> bytes:
    """The length of a manifest, the manifest, the parts."""
    sizes = {name: len(part) for name, part in message.parts.items()}
    manifest = json.dumps({"protocol": PROTOCOL, "version": VERSION, "head": dict(message.head), "parts": sizes}).encode()
    return b"".join([len(manifest).to_bytes(8, "big"), manifest, *message.parts.values()])


def from_bytes(data: bytes) -> Message:
    """The message that `to_bytes` made `data` of.

    Raises:
        BadMessage: cut off, or of another protocol.
    """
    end = 8 + int.from_bytes(data[:8], "big")
    if len(data) < max(end, 8):
        raise BadMessage(f"a message was cut off: {len(data)} bytes came, and its first part alone has {end}; send it again")
    manifest = json.loads(data[8:end])
    require_protocol(manifest["protocol"], manifest["version"])
    parts: dict[str, bytes] = {}
    for name, size in manifest["parts"].items():
        parts[name] = data[end : end + size]
        end += size
    if len(data) != end:
        raise BadMessage(f"a message was cut off: {len(data)} bytes came of {end}; send it again")
    return Message(manifest["head"], parts)


def require_protocol(protocol: object, theirs: object) -> None:
    """Raises BadMessage unless `protocol`, which the version `theirs` of the library speaks, is ours."""
    if protocol != PROTOCOL:
        raise BadMessage(
            f"it speaks protocol {protocol} (FedExperts {theirs}), and this side speaks {PROTOCOL} (FedExperts {VERSION}); "
            "install the same version on both"
        )


def digest(head: str, parts: Mapping[str, bytes]) -> str:
    """sha256 of all that a message holds, in whatever order its parts lie."""
    found = sha256(head.encode())
    for name in sorted(parts):
        found.update(f"\n{len(parts[name])} {name}\n".encode())
        found.update(parts[name])
    return found.hexdigest()
