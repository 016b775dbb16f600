"""How an exported model is asked: the chat template of its folder, and what the model card says of it."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from fedexperts.data.encode import special_tokens


def chat_template(prompts: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template by which a chat server asks as the run did; None where the tasks of `prompts` differ or are plain texts.

    Of a run that did not note its prompts, and where prompts are plain and the base has no chat template: that of the base.
    """
    forms = list(prompts.values())
    plain = not any("chat" in form for form in forms)
    if not forms or (plain and tokenizer.chat_template is None):
        return _text(tokenizer.chat_template)
    if any((form["frame"], form.get("chat")) != (forms[0]["frame"], forms[0].get("chat")) for form in forms):
        return None
    form = forms[0]
    if form["frame"] is None:
        return None
    if not plain:
        return _text(form["chat"]["template"] or tokenizer.chat_template)
    before, after = form["frame"]
    return framed(before, after, start=str(tokenizer.decode(special_tokens(tokenizer)[0])))


def framed(before: str, after: str, start: str = "") -> str:
    """A chat template, in Jinja, that puts each question between `before` and `after`; `start` begins the text."""
    quoted_start, quoted_before, quoted_after = (json.dumps(text) for text in (start, before, after))
    return (
        f"{{{{ {quoted_start} }}}}{{% for message in messages %}}"
        f"{{% if message['role'] == 'user' %}}{{{{ {quoted_before} + message['content'] + {quoted_after} }}}}"
        "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
        "{% else %}{{ message['content'] + '\\n\\n' }}{% endif %}{% endfor %}"
    )


def described(prompts: Mapping[str, Any], served: str | None) -> Iterator[str]:
    """What the card says: how each task is asked, and whether the chat template of the folder does so."""
    if not prompts:
        return
    yield "## How it is asked"
    yield "\n".join(f"- {task}: {_description(form)}" for task, form in prompts.items())
    yield (
        "The chat template of the folder writes this."
        if served is not None
        else "The folder has no chat template that writes this, so write it into the prompt, or use `fedexperts generate`."
    )


def _description(form: Mapping[str, Any]) -> str:
    if form["frame"] is None:
        return "a text that it continues"
    before, after = (json.dumps(text, ensure_ascii=False) for text in form["frame"])
    marks = f"after {before} and before {after}" if any(form["frame"]) else "as it is"
    if "chat" not in form:
        return f"the question {marks}"
    kind = "the base's chat template" if form["chat"]["template"] is None else "the run's own chat template"
    system = form["chat"]["system"]
    return f"the question {marks}, through {kind}{f', with the system message {json.dumps(system)}' if system else ''}"


def _text(template: object) -> str | None:
    """A chat template; a tokenizer may have several by name, which stay as they are."""
    return template if isinstance(template, str) else None
