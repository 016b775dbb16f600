"""Conversations as ids: a chat template is rendered turn by turn, and the ids of the assistant's turns are told from the others.

The text of a special token in a message stays text. Its places are marked in the messages before they are rendered, with
characters for private use, so that the marks survive whatever the template does to a message.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from fedexperts.data.tokens import text_ids
from fedexperts.errors import BadData, BadValue, shortened
from fedexperts.types import Turn

OPEN, CLOSE = "\ue0f0", "\ue0f1"
"""Stand around the text of a special token in a message."""

MARKED = re.compile(f"{OPEN}([^{OPEN}{CLOSE}]*){CLOSE}|[{OPEN}{CLOSE}]")
"""The marked text of a special token, or a mark that a template separated from its other half."""

PROBE = (Turn("user", "Capital?"), Turn("assistant", "Paris"), Turn("user", "Sure?"))
"""A conversation by which a template is known."""


@dataclass(frozen=True)
class RenderedPrompt:
    """The text and the ids before an answer, and which ids are of earlier answers."""

    text: str
    ids: list[int]
    answered: list[bool]


class ChatTemplate:
    """A chat template with its tokenizer. `ends`: the special tokens that end an answer.

    An answer's ids are those that the template adds after its generation prompt, up to the first end token. Prompt and answer
    are tokenized together where the prompt's ids stay the same by that, so that all ids are those of `apply_chat_template`;
    else apart, since a model is to be trained on the prompt ids that it gets for generation. What a template writes into the
    last answer alone (Qwen3: an empty thought) is learned there alone. Where a template refuses or ignores system messages,
    the message stands before the first question, with an empty line between.

    Raises:
        BadValue: the template cannot be rendered, writes no end token after an answer, or is not there.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None, start: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.template = template or tokenizer.chat_template
        self.start = list(start)  # ids that are put before all others
        if not isinstance(self.template, str):
            name = type(tokenizer).__name__
            raise BadValue(f'the tokenizer ({name}) has no chat template, but data.template = "chat" needs one; set "plain"')
        tokens = tokenizer.added_tokens_decoder
        control = [token.content for token in tokens.values() if token.special or self._writes(token.content)]
        self._control = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or "(?!)", re.IGNORECASE)
        self._has_system = True
        self._has_system = self._renders_system()
        self.end, self.ends = self._find_ends({id for id, token in tokens.items() if token.special})

    def prompt(self, turns: Sequence[Turn]) -> RenderedPrompt:
        """What stands before the answer to `turns`.

        Raises:
            BadData: the template refuses the turns, or renders their beginning differently from the beginning alone.
        """
        turns = self._marked(turns)
        answers = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
        rendered = RenderedPrompt("", [], [])
        for index in (*answers, len(turns)):
            text = self._rendered(turns[:index], generation_prompt=True)
            ids = self._extended(rendered, text)
            added = ids[len(rendered.ids) :]
            answer = self._length(added) if rendered.text else 0
            answered = [True] * answer + [False] * (len(added) - answer)
            rendered = RenderedPrompt(text, ids, [*rendered.answered, *answered])
        return rendered

    def answer(self, turns: Sequence[Turn], prompt: RenderedPrompt, response: str) -> list[int]:
        """The ids of `response` after `prompt`, which is `self.prompt(turns)`, with the end token.

        Raises:
            BadData: as `prompt`.
        """
        text = self._rendered(self._marked([*turns, Turn("assistant", response)]))
        ids = self._extended(prompt, text)[len(prompt.ids) :]
        return ids[: self._length(ids)] or [*ids, self.end]

    def whole(self, turns: Sequence[Turn]) -> list[int]:
        """The ids of a whole conversation, with all that the template writes after its last turn.

        Raises:
            BadData: the template refuses the turns.
        """
        return [*self.start, *self._ids(self._rendered(self._marked(turns)))]

    def _marked(self, turns: Sequence[Turn]) -> list[Turn]:
        """`turns` with marks around the text of special tokens, and with a system message that the template can render."""
        if turns[0].role == "system" and not self._has_system:
            turns = [Turn("user", f"{turns[0].content}\n\n{turns[1].content}"), *turns[2:]]
        bare = str.maketrans("", "", OPEN + CLOSE)
        return [Turn(turn.role, self._control.sub(f"{OPEN}\\g<0>{CLOSE}", turn.content.translate(bare))) for turn in turns]

    def _rendered(self, turns: Sequence[Turn], *, generation_prompt: bool = False) -> str:
        tokenizer: Any = self.tokenizer
        options = {"chat_template": self.template, "tokenize": False, "add_generation_prompt": generation_prompt}
        try:
            return str(tokenizer.apply_chat_template([vars(turn) for turn in turns], **options))
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            roles = ", ".join(turn.role for turn in turns[:4])
            reason = shortened(str(error) or type(error).__name__)
            raise BadData(
                f"the chat template cannot render turns of {roles} ({reason}); change them, or data.template"
            ) from error

    def _extended(self, before: RenderedPrompt, text: str) -> list[int]:
        """The ids of `text`, which begins with that of `before` and keeps its ids."""
        if not text.startswith(before.text):
            raise BadData(
                f"the chat template renders {shortened(before.text[-40:])!r} differently once turns follow, so the assistant's "
                'turns cannot be told; give single turns, or set data.template = "plain"'
            )
        ids, known = [*self.start, *self._ids(text)], len(before.ids)
        return ids if ids[:known] == before.ids else before.ids + self._ids(text[len(before.text) :])

    def _ids(self, text: str) -> list[int]:
        """Ids of rendered text: special tokens where the template wrote them, none where a message did."""
        ids: list[int] = []
        for number, piece in enumerate(MARKED.split(text)):
            if not piece:
                continue
            if number % 2:  # halves of the text of a special token are none
                ids += [id for half in text_ids(self.tokenizer, [piece[:1], piece[1:]]) for id in half]
            else:
                ids += self.tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _length(self, ids: Sequence[int]) -> int:
        """How many of `ids` there are up to the first end token, itself included; 0 without one."""
        return next((index for index, id in enumerate(ids, 1) if id in self.ends), 0)

    def _writes(self, token: str) -> bool:
        """Whether the template writes the token, other than as white space."""
        return not token.isspace() and token in str(self.template)

    def _renders_system(self) -> bool:
        try:
            return "Be kind." in self._rendered([Turn("system", "Be kind."), *PROBE[:1]], generation_prompt=True)
        except BadData:
            return False

    def _find_ends(self, special: set[int]) -> tuple[int, frozenset[int]]:
        """The special token that ends an answer, and all that do: the template may end the last answer by another one."""
        last, earlier = self._rendered(PROBE[:2]), self._rendered(PROBE, generation_prompt=True)
        tails = [text.rpartition("Paris")[2] for text in (last, earlier)]
        ends = [next((id for id in self._ids(tail) if id in special), None) for tail in tails]
        found = [end for end in ends if end is not None]
        if not found:
            raise BadValue(
                "the chat template writes no special token after an answer, so answers would never end; set data.template to one "
                "that writes {{ eos_token }} after the content of the assistant's messages"
            )
        return found[0], frozenset(found)
