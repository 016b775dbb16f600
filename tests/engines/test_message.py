"""Messages as bytes, and which JSON they may hold."""

import json

import pytest

from fedexperts.engines.message import MAX_DEPTH, PROTOCOL, Message, depth, digest, from_bytes, read_json, to_bytes
from fedexperts.errors import BadMessage

MESSAGE = Message({"client": "c01", "é": [1, None]}, {"a": b"12345", "b": b"", "c": b"\x00\xff"})


def test_a_message_comes_out_of_its_bytes_as_it_went_in():
    read = from_bytes(to_bytes(MESSAGE))
    assert (dict(read.head), dict(read.parts)) == (dict(MESSAGE.head), dict(MESSAGE.parts))
    assert list(read.parts) == ["a", "b", "c"]


def test_a_message_that_is_cut_off_anywhere_is_refused():
    data = to_bytes(MESSAGE)
    for length in range(len(data)):
        with pytest.raises(BadMessage, match="was cut off"):
            from_bytes(data[:length])


def test_bytes_after_the_last_part_are_refused():
    data = to_bytes(MESSAGE)
    with pytest.raises(BadMessage, match=f"{len(data) + 1} bytes came of {len(data)}"):
        from_bytes(data + b"\0")


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


@pytest.mark.parametrize("text", ["9223372036854775807", "-9223372036854775808", "1e400", "NaN", '"\\ud83d\\ude00"', "[[{}]]"])
def test_json_that_can_be_written_again_is_read(text):
    assert json.dumps(read_json(text)) == json.dumps(json.loads(text))


@pytest.mark.parametrize(
    "text",
    ["9223372036854775808", "-9223372036854775809", "1" + "0" * 400, "-" + "9" * 5000, '"\\udfff"', '{"\\ud800": 1}', "[", ""],
)
def test_numbers_of_more_than_64_bits_halves_of_characters_and_broken_json_are_refused(text):
    with pytest.raises(BadMessage, match=r"^its JSON cannot be read"):
        read_json(f'{{"a": [{text}]}}' if len(text) > 1 else text)


def test_a_whole_number_is_refused_with_how_long_it_is():
    with pytest.raises(BadMessage, match="a whole number of 5,000 digits, and 64 bits are allowed"):
        read_json("9" * 5000)


@pytest.mark.parametrize("levels", [1, MAX_DEPTH, MAX_DEPTH + 1, 900, 100_000])
def test_lists_and_objects_may_lie_so_deep_inside_each_other_and_no_deeper(levels):
    for text in ("[" * levels + "]" * levels, '{"a":' * levels + "1" + "}" * levels):
        if levels <= MAX_DEPTH:
            assert depth(read_json(text)) == levels
        else:
            with pytest.raises(BadMessage, match=r"^its JSON (has lists and objects more than 32 deep|cannot be read)"):
                read_json(text)


def test_a_message_with_such_json_is_refused():
    data = to_bytes(Message({"a": 10**30}, {}))
    with pytest.raises(BadMessage, match="31 digits"):
        from_bytes(data)
