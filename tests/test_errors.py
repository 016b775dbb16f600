"""The parts of error sentences."""

from fedexperts.errors import listed, nearest, shortened


def test_the_nearest_name_is_offered_and_none_that_is_far():
    assert nearest("fedmoee", ["fedavg", "fedmoe"]) == "; did you mean fedmoe?"
    assert nearest("xyz", ["fedavg", "fedmoe"]) == ""


def test_a_long_list_shows_its_first_names_and_their_number():
    assert listed(["a", "b"]) == "a, b"
    assert listed(range(8)) == "0, 1, 2, 3, 4, 5, 6, 7"
    assert listed(range(9)) == "0, 1, 2, 3, 4, 5, 6, 7, … (9 in all)"
    assert len(listed(["x" * 500] * 500, limit=3)) < 150


def test_a_long_text_is_cut_and_its_lines_are_joined():
    assert shortened("two\nlines ") == "two lines"
    assert shortened("x" * 100) == "x" * 100
    assert shortened("x" * 101) == "x" * 99 + "…"
