"""Settings as trees of values: former names, nearest names and one sentence for a mistake."""

import pytest
from pydantic import BaseModel, ConfigDict

from fedexperts.errors import BadValue
from fedexperts.io.toml import RenamedSetting, checked, flattened, keys, with_new_names, with_settings, without_none


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")

    learning_rate: float = 1.0
    steps: int = 3


class Row(BaseModel):
    model_config = ConfigDict(extra="forbid")

    text: str = ""
    label: int = 0


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    inner: Inner = Inner()
    rows: tuple[Row, ...] = ()


RENAMED = {"inner.rate": "inner.learning_rate", "title": "name"}


def mistake(tree):
    with pytest.raises(BadValue) as raised:
        checked(Outer, tree)
    assert len(str(raised.value)) <= 300
    return str(raised.value)


def test_former_names_are_replaced_in_their_place_and_in_the_order_of_the_file():
    tree = {"title": "a", "inner": {"steps": 1, "rate": 0.5}}
    renamed = with_new_names(tree, RENAMED)
    assert list(renamed) == ["name", "inner"]
    assert renamed == {"name": "a", "inner": {"steps": 1, "learning_rate": 0.5}}
    assert tree == {"title": "a", "inner": {"steps": 1, "rate": 0.5}}
    assert with_new_names(renamed, RENAMED) == renamed
    assert with_new_names({"inner": 3}, RENAMED) == {"inner": 3}, "no table: for the validation to refuse"


def test_a_former_name_is_warned_of_where_that_is_wanted():
    with pytest.warns(RenamedSetting, match=r"^inner\.rate is now called inner\.learning_rate; the former name still works$"):
        with_new_names({"inner": {"rate": 1}}, RENAMED, warn=True)


def test_both_names_of_a_setting_at_once_are_refused():
    with pytest.raises(
        BadValue, match=r"inner\.rate is the former name of inner\.learning_rate, and both are set; remove inner\.rate$"
    ):
        with_new_names({"inner": {"rate": 1, "learning_rate": 2}}, RENAMED)


def test_an_abbreviation_is_recognized_in_both_directions():
    assert mistake({"name": "a", "inner": {"lr": 1}}).endswith("did you mean inner.learning_rate?")
    assert mistake({"name": "a", "inner": {"some_things": 1, "steps": 3}}).startswith("inner.some_things is not a setting")


def test_a_setting_is_found_in_another_table():
    assert mistake({"name": "a", "steps": 1}) == "steps is not a setting; did you mean inner.steps?"


def test_an_unknown_setting_like_no_other_gets_those_of_its_table():
    assert mistake({"name": "a", "inner": {"xyz": 1}}).endswith("settings there are inner.learning_rate, inner.steps")
    assert mistake({"name": "a", "rows": [{"xyz": 1}]}) == ("rows.0.xyz is not a setting; settings there are text, label")


def test_a_missing_setting_and_a_value_of_another_type_are_named():
    assert mistake({}) == "name is missing; add it to the file"
    assert mistake({"name": "a", "inner": {"steps": "y" * 9000}}).startswith("inner.steps = 'yyy")


def test_a_setting_from_the_shell_replaces_a_value_by_a_table_where_it_must():
    assert with_settings({"inner": 3}, ["inner.steps=2", "name=plain text"]) == {"inner": {"steps": 2}, "name": "plain text"}


def test_keys_of_tables_and_of_lists_of_tables_have_full_names():
    assert list(keys(Outer)) == [
        *("name", "inner", "inner.learning_rate", "inner.steps"),
        *("rows", "rows.text", "rows.label"),
    ]


def test_nothing_that_is_none_is_left_at_any_depth():
    assert without_none({"a": None, "b": [{"c": None, "d": 1}], "e": ({"f": None},), "g": 0}) == {
        "b": [{"d": 1}],
        "e": [{}],
        "g": 0,
    }


def test_flattened_settings_have_full_names():
    assert flattened({"a": {"b": {"c": 1}}, "d": [{"e": 2}]}) == {"a.b.c": 1, "d": [{"e": 2}]}
