"""Trying an exported model: a prompt in the form of its run's, a greedy answer."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoTokenizer

from fedexperts.core.evaluation import answer
from fedexperts.data.encode import Encoder
from fedexperts.errors import BadValue, nearest
from fedexperts.export import ABOUT, load
from fedexperts.types import Example

UNKNOWN: Mapping[str, Any] = {"task": None, "prompts": {}, "max_tokens": 512, "generate_tokens": 32}
"""Of a folder that no export wrote."""


def generate(
    folder: Path, prompt: str, tokens: int | None = None, task: str | None = None, trust_remote_code: bool = False
) -> str:
    """The model's answer to `prompt`, of at most `tokens` tokens; None: as many as its run let it have.

    `prompt` is put between what all prompts of the `task` begin and end with; one that has both already is taken as it is. None
    is the main task of a client's model, or the only one there is.

    Raises:
        BadValue: no model there, no such task, or several to choose from.
    """
    model = load(folder, trust_remote_code)
    known = json.loads((folder / ABOUT).read_text()) if (folder / ABOUT).exists() else UNKNOWN
    config = cast("Any", model).config
    tokenizer = AutoTokenizer.from_pretrained(folder, config=config)
    encoder = Encoder(tokenizer, known["max_tokens"], bool(config.is_encoder_decoder))
    asked = asking(known["prompts"], task or known["task"])
    with torch.inference_mode():
        return answer(model, encoded(encoder, asked, prompt), encoder, tokens or known["generate_tokens"])[0]


def asking(prompts: Mapping[str, Any], task: str | None) -> Mapping[str, Any]:
    """How the `task` is asked: its frame and its choices.

    Raises:
        BadValue: it is not known, or None of several that are asked differently.
    """
    if task is not None and task in prompts:
        return cast("Mapping[str, Any]", prompts[task])
    if task is not None and prompts:
        raise BadValue(f"task {task!r} is not one of {', '.join(prompts)}{nearest(task, prompts)}")
    forms = list(prompts.values())
    if any(form["frame"] != forms[0]["frame"] for form in forms):
        raise BadValue(f"this model was trained on {', '.join(prompts)}, each asked in its own way; say which with --task")
    return cast("Mapping[str, Any]", forms[0]) if forms else {"frame": ["", ""], "choices": []}


def encoded(encoder: Encoder, asked: Mapping[str, Any], prompt: str) -> Mapping[str, Tensor]:
    """What the model is given, as in the run; where its texts were continued from nothing, the first of one."""
    if asked["frame"] is None and not encoder.encoder_decoder:
        batch = encoder.batch([Example("", prompt, "")])
        return {name: batch[name][:, :-1] for name in ("input_ids", "attention_mask")}  # without the end token
    before, after = asked["frame"] or ("", "")
    whole = prompt if prompt.startswith(before) and prompt.endswith(after) else f"{before}{prompt}{after}"
    return encoder.prompts([Example(whole, "", "", choices=tuple(asked["choices"]))])
