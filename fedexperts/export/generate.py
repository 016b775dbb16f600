"""Greedy answers of an exported model, with prompts in the form of its run."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoTokenizer

from fedexperts.core.evaluation import answer
from fedexperts.data.encode import Encoder
from fedexperts.errors import BadValue, nearest
from fedexperts.export import ABOUT, load
from fedexperts.types import Example, Turn

UNKNOWN: Mapping[str, Any] = {"task": None, "prompts": {}, "max_tokens": 512, "generate_tokens": 32}
"""Defaults for a folder that was not written by an export."""


def generate(
    folder: Path, prompt: str, tokens: int | None = None, task: str | None = None, trust_remote_code: bool = False
) -> str:
    """The model's greedy answer to `prompt`, of at most `tokens` tokens; None: as in its run.

    `prompt` is put into the frame of the `task`'s prompts unless it already has it. task: None: the main task of a client's
    model, or the only task.

    Raises:
        BadValue: no model in `folder`, an unknown task, or several tasks with different frames and no `task`.
    """
    model = load(folder, trust_remote_code)
    known = json.loads((folder / ABOUT).read_text()) if (folder / ABOUT).exists() else UNKNOWN
    config = cast("Any", model).config
    tokenizer = AutoTokenizer.from_pretrained(folder, config=config)
    encoder = Encoder(tokenizer, known["max_tokens"], bool(config.is_encoder_decoder))
    form = prompt_form(known["prompts"], task or known["task"])
    with torch.inference_mode():
        return answer(model, encoded(encoder, form, prompt), encoder, tokens or known["generate_tokens"])[0]


def prompt_form(prompts: Mapping[str, Any], task: str | None) -> Mapping[str, Any]:
    """The form of the `task`'s prompts: its frame and its choices.

    Raises:
        BadValue: an unknown task, or None with several tasks of different forms.
    """
    if task is not None and task in prompts:
        return cast("Mapping[str, Any]", prompts[task])
    if task is not None and prompts:
        raise BadValue(f"task {task!r} is not one of {', '.join(prompts)}{nearest(task, prompts)}")
    forms = list(prompts.values())
    if any((form["frame"], form.get("chat")) != (forms[0]["frame"], forms[0].get("chat")) for form in forms):
        raise BadValue(
            f"this model was trained on {', '.join(prompts)}, whose prompts have different forms; choose one with --task"
        )
    return cast("Mapping[str, Any]", forms[0]) if forms else {"frame": ["", ""], "choices": []}


def encoded(encoder: Encoder, form: Mapping[str, Any], prompt: str) -> Mapping[str, Tensor]:
    """The model's input, as in the run; without a frame, `prompt` is the beginning of a text to continue."""
    if form["frame"] is None and not encoder.encoder_decoder:
        batch = encoder.batch([Example("", prompt, "")])
        return {name: batch[name][:, :-1] for name in ("input_ids", "attention_mask")}  # without the end token
    before, after = form["frame"] or ("", "")
    whole = prompt if prompt.startswith(before) and prompt.endswith(after) else f"{before}{prompt}{after}"
    example = Example(whole, "", "", choices=tuple(form["choices"]))
    if (chat := form.get("chat")) is not None:  # older folders have none
        system = [Turn("system", chat["system"])] if chat["system"] else []
        example = replace(example, turns=(*system, Turn("user", whole)), template=chat["template"])
    return encoder.prompts([example])
