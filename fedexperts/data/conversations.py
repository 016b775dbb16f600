"""From a row with a conversation to its turns: `messages` of {role, content}, or `conversations` of {from, value} (ShareGPT)."""

from collections.abc import Mapping
from typing import Any

from fedexperts.data.fields import Row, field_text, field_value
from fedexperts.errors import BadData, listed
from fedexperts.types import Turn

ROLES: Mapping[str, str] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
}
"""Role of a message, as data sets call it → the role that chat templates know."""

FIELDS = ("messages", "conversations")
"""Where conversations are, unless the settings name a field."""

KEYS = (("role", "content"), ("from", "value"))
"""The fields of a message: its role and its text."""

PLAIN_CHAT = """\
{%- for message in messages %}
{%- if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n### Response:\\n' }}
{%- else %}{{ message['content'] + eos_token + '\\n\\n' }}{% endif %}
{%- endfor %}"""
"""The plain frame of conversations, "plain-1": that of Alpaca for each question."""


def conversation_field(row: Row) -> str:
    """The field of a row that has its conversation."""
    return next((field for field in FIELDS if field in row), FIELDS[0])


def turns_of(row: Row, field: str, system: str | None = None) -> tuple[Turn, ...]:
    """The turns up to the last answer. The first is the system's message, if there is one: the row's own, or else `system`.

    Raises:
        BadData: there is no conversation with a question and an answer, or a message that cannot be read.
    """
    messages = field_value(row, field)
    if not isinstance(messages, list):
        kind = type(messages).__name__
        raise BadData(f"its field {field} is a {kind}, but a conversation is a list of messages; correct or remove the row")
    if not messages:
        raise BadData(f"its field {field} is empty; give it messages or remove the row")
    turns = [turn for number, message in enumerate(messages, 1) if (turn := _turn(message, number))]
    while turns and turns[-1].role != "assistant":
        turns.pop()
    own = turns[:1] if turns and turns[0].role == "system" else _system(row, system)
    turns = turns[1:] if turns and turns[0].role == "system" else turns
    if len(turns) < 2 or turns[0].role != "user" or any(turn.role == "system" for turn in turns):
        order = listed([turn.role for turn in (*own, *turns)], 4) or "none"
        raise BadData(
            f"the roles of its {field} up to the last answer are {order}, but after at most one system message a user asks and an"
            " assistant answers; correct or remove the row"
        )
    return (*own, *turns)


def _turn(message: Any, number: int) -> Turn | None:
    """A message as a turn; None for a system message without text.

    Raises:
        BadData: it is none of ours, or has no text.
    """
    if not isinstance(message, dict):
        raise BadData(f"its message {number} is a {type(message).__name__}, but a message has a role and a content; correct it")
    role_key, content_key = next((keys for keys in KEYS if keys[0] in message), KEYS[0])
    message = {**message, content_key: _joined(message.get(content_key))} if content_key in message else message
    try:
        name = field_text(message, role_key)
        role = ROLES.get(name.strip().lower())
        if role == "system" and not str(message.get(content_key) or "").strip():
            return None
        text = field_text(message, content_key)
    except BadData as error:
        raise BadData(f"message {number}: {error}") from error
    if role is None:
        raise BadData(f"message {number}: its role is {name[:40]!r}, but known are {listed(ROLES)}; correct or remove the row")
    return Turn(role, text)


def _joined(content: Any) -> Any:
    """The text of a content that is a list of parts, all of them texts, as some interfaces write it; else `content`."""
    if not isinstance(content, list) or not content:
        return content
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
    return "".join(map(str, texts)) if all(isinstance(text, str) for text in texts) else content


def _system(row: Row, system: str | None) -> list[Turn]:
    """The system message of a row whose messages have none: that of its field `system`, or else of the settings."""
    text = str(row.get("system") or "").strip() or system
    return [Turn("system", text)] if text else []
