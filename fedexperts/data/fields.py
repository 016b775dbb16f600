"""Fields of a row as text: what is missing, null or empty is refused, each with its own sentence."""

from collections.abc import Mapping
from string import Formatter
from typing import Any

from fedexperts.errors import BadData, listed

Row = Mapping[str, Any]


def fill_template(row: Row, template: str) -> str:
    """`template` with its {field}s filled in; if it has none, it is the name of a field, whose text is given."""
    names = template_fields(template)
    return template.format_map({name: field_text(row, name) for name in names}) if names else field_text(row, template)


def template_fields(template: str) -> list[str]:
    """The names of the {field}s in `template`."""
    return [name for _, name, _, _ in Formatter().parse(template) if name]


def field_text(row: Row, field: str) -> str:
    """A field as text.

    Raises:
        BadData: it is missing, null, blank, or no text or number.
    """
    value = field_value(row, field)
    if isinstance(value, list | tuple | dict | bytes):
        raise BadData(f"its field {field} is a {type(value).__name__}, but text is needed; write it as text or remove the row")
    text = str(value)
    if not text.strip():
        raise BadData(f"its field {field} is empty; fill it in or remove the row")
    return text


def field_value(row: Row, field: str) -> Any:
    """A field of any type.

    Raises:
        BadData: it is missing or null.
    """
    if field not in row:
        names = [name for name in row if name != "label_name"]  # which may be ours
        raise BadData(f"it has no field {field}, only {listed(names, 3)}; add it or name another field")
    if is_missing(row[field]):
        raise BadData(f"its field {field} is null; give it a value or remove the row")
    return row[field]


def is_missing(value: object) -> bool:
    """Whether a table has nothing there: None, or the NaN that pandas writes for it."""
    return value is None or (isinstance(value, float) and value != value)
