"""Letters as Flower's records. Needs neither torch nor transformers: every message starts a process that imports this."""

import json
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedexperts.engines.letter import PROTOCOL, VERSION, Letter, digest, require_protocol
from fedexperts.errors import BadLetter

ABOUT, PARTS = "letter", "parts"  # what the two records are called


def to_records(letter: Letter) -> RecordDict:
    """A record that says what the letter says, with its sha256, and one with an array for each part.

    The parts are tensors as safetensors, which carry any dtype exactly; Flower's own way, over numpy, has no bfloat16.
    """
    head = json.dumps(dict(letter.head))
    about = ConfigRecord({"protocol": PROTOCOL, "version": VERSION, "head": head, "sha256": digest(head, letter.parts)})
    arrays = {name: Array(*described(part), "safetensors", part) for name, part in letter.parts.items()}
    return RecordDict({ABOUT: about, PARTS: ArrayRecord(arrays)})


def from_records(records: RecordDict) -> Letter:
    """The letter that `to_records` made `records` of.

    Raises:
        BadLetter: of another protocol, or not what was sent.
    """
    about, arrays = records.get(ABOUT), records.get(PARTS)  # its `array_records` would hold all of it until the next collection
    if not isinstance(about, ConfigRecord) or not isinstance(arrays, ArrayRecord):
        raise BadLetter("the message holds no letter of ours; is the same version of FedExperts on both sides?")
    require_protocol(about.get("protocol"), about.get("version"))
    head = str(about.get("head"))
    parts = {name: array.data for name, array in arrays.items()}
    if digest(head, parts) != about.get("sha256"):
        raise BadLetter("its sha256 is not that of what was sent: it was cut off or changed on the way")
    return Letter(read_head(head), parts)


def read_head(text: str) -> dict[str, Any]:
    """Raises BadLetter where it is no JSON object."""
    try:
        head = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadLetter(f"what it says cannot be read ({type(error).__name__}: {error})") from None
    if not isinstance(head, dict):
        raise BadLetter(f"what it says is no object: {head!r:.60}")
    return head


def described(part: bytes) -> tuple[str, tuple[int, ...]]:
    """The dtype and the shape of the only tensor of `part`, as safetensors says them."""
    (tensor,) = json.loads(part[8 : 8 + int.from_bytes(part[:8], "little")]).values()
    return tensor["dtype"], tuple(tensor["shape"])
