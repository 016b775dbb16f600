"""Messages as Flower's records. Needs neither torch nor transformers: every message starts a process that imports this."""

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from math import inf

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedexperts.engines.message import PROTOCOL, VERSION, Bytes, Message, digest, read_json, require_protocol, require_size
from fedexperts.errors import BadMessage

ABOUT, PARTS = "message", "parts"  # the names of the two records
MAX_TEXT_BYTES = 2**22
"""Of the head of a message, and of the table of its parts: a small message must not unfold into one that fills the memory."""
PACK_BYTES = 2**22
"""Of parts that travel as one array: for each array Flower makes two signed requests, whatever its size."""


def to_records(message: Message) -> RecordDict:
    """A record with the head of the message and its sha256, and one with its parts.

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


def from_records(records: RecordDict, limit: float = inf) -> Message:
    """The message that `to_records` made `records` of.

    limit: bytes that it may take; a larger one is refused before anything of it is unfolded or copied.

    Raises:
        BadMessage: of another protocol, too large, or not what was sent.
    """
    about, arrays = records.get(ABOUT), records.get(PARTS)  # its `array_records` would hold all of it until the next collection
    if not isinstance(about, ConfigRecord) or not isinstance(arrays, ArrayRecord):
        raise BadMessage("the message holds no message of ours; is the same version of FedExperts on both sides?")
    texts = sum(len(value) for value in about.values() if isinstance(value, bytes))
    require_size(texts + sum(len(array.data) for array in arrays.values()), limit)
    require_protocol(about.get("protocol"), about.get("version"))
    head = decompressed(about.get("head"), limit)
    parts = unpacked(read_json(decompressed(about.get("sizes"), limit)), arrays)
    if parts is None or digest(head, parts) != about.get("sha256"):
        raise BadMessage("its sha256 is not that of what was sent: it was cut off or changed on the way")
    values = read_json(head)
    if not isinstance(values, dict):
        raise BadMessage(f"its head is no JSON object: {values!r:.60}")
    return Message(values, parts)


def compressed(text: str) -> bytes:
    """Raises BadMessage where it is more than the other side would unfold."""
    data = text.encode()
    if len(data) > MAX_TEXT_BYTES:
        raise BadMessage(f"a message's head has {len(data):,} bytes, and {MAX_TEXT_BYTES:,} are allowed; send shorter metrics")
    return zlib.compress(data)


def decompressed(data: object, limit: float = inf) -> str:
    """The text that `compressed` made `data` of.

    Raises:
        BadMessage: it made it of nothing, or of more than `limit` or MAX_TEXT_BYTES.
    """
    unfolding, most = zlib.decompressobj(), int(min(MAX_TEXT_BYTES, limit))
    try:
        text = unfolding.decompress(data, most) if isinstance(data, bytes) else b""
        if not unfolding.eof or unfolding.unused_data:
            raise BadMessage(f"its head was cut off or added to, or has more than {most:,} bytes")
        return text.decode()
    except (zlib.error, UnicodeDecodeError) as error:
        raise BadMessage(f"its head cannot be read ({type(error).__name__}: {error})") from None


def packed(parts: Mapping[str, Bytes]) -> Iterator[list[str]]:
    """The names of `parts`, together as long as these have no more than PACK_BYTES."""
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


def array(parts: Sequence[Bytes]) -> Array:
    """`parts`, one after the other; one alone is not copied if it is bytes."""
    data = bytes(parts[0]) if len(parts) == 1 else b"".join(parts)
    return Array("uint8", (len(data),), "safetensors", data)


def unpacked(packs: object, arrays: ArrayRecord) -> dict[str, Bytes] | None:
    """The parts that lie in `arrays`, by the sizes that `packs` gives for each array; None where these do not fit the arrays."""
    if not isinstance(packs, list) or {*arrays} != {str(number) for number in range(len(packs))}:
        return None
    parts: dict[str, Bytes] = {}
    for number, pack in enumerate(packs):
        data, start = arrays[str(number)].data, 0
        if not isinstance(pack, dict) or not all(type(size) is int and size >= 0 for size in pack.values()):
            return None
        if sum(pack.values()) != len(data):
            return None
        for name, size in pack.items():
            parts[name] = data[start : start + size]
            start += size
    return parts
