import json

import pytest

from fedexperts.engines.message import PROTOCOL, Message, digest, from_bytes, to_bytes
from fedexperts.errors import BadMessage

LETTER = Message({"client": "c01", "é": [1, None]}, {"a": b"12345", "b": b"", "c": b"\x00\xff"})


def test_a_letter_comes_out_of_its_bytes_as_it_went_in():
    read = from_bytes(to_bytes(LETTER))
    assert (dict(read.head), dict(read.parts)) == (dict(LETTER.head), dict(LETTER.parts))
    assert list(read.parts) == ["a", "b", "c"]


def test_a_letter_that_is_cut_off_anywhere_is_refused():
    data = to_bytes(LETTER)
    for length in range(len(data)):
        with pytest.raises(BadMessage, match="was cut off"):
            from_bytes(data[:length])


def test_another_protocol_is_refused_with_what_to_do():
    data = to_bytes(Message({}, {}))
    manifest = json.dumps({**json.loads(data[8:]), "protocol": 99, "version": "9.9"}).encode()
    with pytest.raises(BadMessage, match=rf"protocol 99 \(FedExperts 9\.9\), and this side speaks {PROTOCOL} .*install the same"):
        from_bytes(len(manifest).to_bytes(8, "big") + manifest)


def test_a_digest_knows_every_byte_and_name_and_no_order():
    parts = {"a": b"12", "b": b"3"}
    assert digest("{}", parts) == digest("{}", {"b": b"3", "a": b"12"})
    others = [("{ }", parts), ("{}", {"a": b"12", "c": b"3"}), ("{}", {"a": b"1", "b": b"23"}), ("{}", {"a": b"12"})]
    assert len({digest(*other) for other in [("{}", parts), *others]}) == 5
