"""Messages as Flower's records. Needs neither torch nor transformers: every message starts a process that imports this."""

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedexperts.engines.message import PROTOCOL, VERSION, Message, digest, require_protocol
from fedexperts.errors import BadMessage

ABOUT, PARTS = "message", "parts"  # what the two records are called
MOST_TEXT = 2**22
"""Bytes of what a message says, or tells of its parts: a small message must not unfold into one that fills the memory."""
PACK_BYTES = 2**22
"""Of parts that go as one array: for each, Flower makes two signed requests, whatever its size."""


def to_records(message: Message) -> RecordDict:
    """A record that says what the message says, with its sha256, and one with its parts.

    The parts are tensors as safetensors, which carry any dtype exactly; Flower's own way, over numpy, has no bfloat16.
    """
    head = json.dumps(dict(message.head))
    packs = [*packed(message.parts)]
    sizes = json.dumps([{name: len(message.parts[name]) for name in pack} for pack in packs])
    sha256 = digest(head, message.parts)
    texts = {"head": compressed(head), "sizes": compressed(sizes)}  # names of tensors, mostly
    about = ConfigRecord({"protocol": PROTOCOL, "version": VERSION, **texts, "sha256": sha256})
    arrays = {str(number): array([message.parts[name] for name in pack]) for number, pack in enumerate(packs)}
    return RecordDict({ABOUT: about, PARTS: ArrayRecord(arrays)})


def from_records(records: RecordDict) -> Message:
    """The message that `to_records` made `records` of.

    Raises:
        BadMessage: of another protocol, or not what was sent.
    """
    about, arrays = records.get(ABOUT), records.get(PARTS)  # its `array_records` would hold all of it until the next collection
    if not isinstance(about, ConfigRecord) or not isinstance(arrays, ArrayRecord):
        raise BadMessage("the message holds no message of ours; is the same version of FedExperts on both sides?")
    require_protocol(about.get("protocol"), about.get("version"))
    head = expanded(about.get("head"))
    parts = unpacked(expanded(about.get("sizes")), arrays)
    if parts is None or digest(head, parts) != about.get("sha256"):
        raise BadMessage("its sha256 is not that of what was sent: it was cut off or changed on the way")
    return Message(read_head(head), parts)


def compressed(text: str) -> bytes:
    """Raises BadMessage where it is more than the other side would unfold."""
    data = text.encode()
    if len(data) > MOST_TEXT:
        raise BadMessage(f"what it says has {len(data):,} bytes, and a message may say {MOST_TEXT:,}")
    return zlib.compress(data)


def expanded(data: object) -> str:
    """What `compressed` made `data` of.

    Raises:
        BadMessage: of nothing, or of more than MOST_TEXT.
    """
    unfolding = zlib.decompressobj()
    try:
        text = unfolding.decompress(data, MOST_TEXT) if isinstance(data, bytes) else b""
        if not unfolding.eof or unfolding.unused_data:
            raise BadMessage(f"what it says was cut off or added to, or has more than {MOST_TEXT:,} bytes")
        return text.decode()
    except (zlib.error, UnicodeDecodeError) as error:
        raise BadMessage(f"what it says cannot be read ({type(error).__name__}: {error})") from None


def packed(parts: Mapping[str, bytes]) -> Iterator[list[str]]:
    """The names of `parts`, together as long as they are no more than PACK_BYTES."""
    pack: list[str] = []
    size = 0
    for name, part in parts.items():
        if pack and size + len(part) > PACK_BYTES:
            yield pack
            pack, size = [], 0
        pack.append(name)
        size += len(part)
    if pack:
        yield pack


def array(parts: Sequence[bytes]) -> Array:
    """`parts`, one after the other; one alone is not copied."""
    data = parts[0] if len(parts) == 1 else b"".join(parts)
    return Array("uint8", (len(data),), "safetensors", data)


def unpacked(sizes: str, arrays: ArrayRecord) -> dict[str, bytes] | None:
    """The parts that lie in `arrays`, whose names and bytes `sizes` says; None where that is not what lies there."""
    parts: dict[str, bytes] = {}
    try:
        packs = json.loads(sizes)
        if len(packs) != len(arrays):
            return None
        for number, pack in enumerate(packs):
            data, start = arrays[str(number)].data, 0
            for name, size in pack.items():
                parts[name] = data[start : start + size]
                start += size
            if start != len(data):
                return None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return None
    return parts


def read_head(text: str) -> dict[str, Any]:
    """Raises BadMessage where it is no JSON object."""
    try:
        head = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadMessage(f"what it says cannot be read ({type(error).__name__}: {error})") from None
    if not isinstance(head, dict):
        raise BadMessage(f"what it says is no object: {head!r:.60}")
    return head
