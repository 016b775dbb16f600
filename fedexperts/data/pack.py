"""The data pack: where it is, which sets it has, and how the rows of each are asked."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedexperts.errors import BadData


@dataclass(frozen=True)
class Pack:
    """A set in the data pack: `<stem>.train.jsonl.gz` and `<stem>.test.jsonl.gz`."""

    train: tuple[str, ...]  # stems of the training files
    kind: str  # of template
    question: str = ""  # the instruction of all its prompts
    test: str = ""  # the stem of the test file, if it is not that of the first training file
    many_tasks: bool = False  # its rows name their tasks


@dataclass(frozen=True)
class Part:
    """A task of a set of many tasks whose template differs from that of the set."""

    kind: str
    question: str = ""  # a shorter instruction than that of the rows, so that more of the text fits
    metric: str | None = None


PACKS: Mapping[str, Pack] = {
    "ag_news": Pack(("restricted/ag_news",), "classification", "What is this news about?"),
    "banking77": Pack(("classify/banking77",), "classification", "What does this customer of a bank want?"),
    "dbpedia14": Pack(("classify/dbpedia14",), "classification", "What kind of thing is this?"),
    "trec6": Pack(("restricted/trec6",), "classification", "What does this question ask for?"),
    "dolly": Pack(("instruct/dolly15k",), "instruction", many_tasks=True),
    "medquad": Pack(("instruct/medquad",), "instruction", many_tasks=True),
    "superni": Pack(("instruct/superni",), "instruction", many_tasks=True),
    "commonsenseqa": Pack(("reasoning/commonsenseqa",), "multiple_choice"),
    "mmlu": Pack(("reasoning/mmlu",), "multiple_choice", many_tasks=True),
    "piqa": Pack(("reasoning/piqa",), "multiple_choice"),
    "commonsenseqa_cloze": Pack(("reasoning/commonsenseqa",), "cloze"),
    "mmlu_cloze": Pack(("reasoning/mmlu",), "cloze", many_tasks=True),
    "piqa_cloze": Pack(("reasoning/piqa",), "cloze"),
    "gsm8k": Pack(("reasoning/gsm8k",), "exact"),
    "mbpp": Pack(("reasoning/mbpp",), "instruction"),
    "gpteacher_code": Pack(("reasoning/gpteacher_code",), "instruction"),
    "books2": Pack(("text/books2a", "text/books2b"), "plain_text", test="text/books2"),
    **{
        stem: Pack((f"text/{stem}",), "plain_text")
        for stem in ("classic_books", "dialogue", "encyclopedic", "openstax", "state_union", "stories", "tinyshakespeare")
    },
    "wikitext2": Pack(("text/wikitext2_valid",), "plain_text"),
}
ALIASES: Mapping[str, str] = {
    "quoref": "superni/task002_quoref_answer_generation",
    "xsum": "superni/task1290_xsum_summarization",
}
PARTS: Mapping[str, Part] = {
    "dolly/closed_qa": Part("instruction", metric="token_f1"),
    "superni/task002_quoref_answer_generation": Part("short_answer", "Answer with a phrase from the passage."),
    "superni/task064_all_elements_except_first_i": Part("exact"),
    "superni/task073_commonsenseqa_answer_generation": Part("closed"),
    "superni/task181_outcome_extraction": Part("short_answer"),
    "superni/task346_hybridqa_classification": Part("closed"),
    "superni/task363_sst2_polarity_classification": Part("closed"),
    "superni/task511_reddit_tifu_long_text_summarization": Part("summary"),
    "superni/task875_emotion_classification": Part("closed"),
    "superni/task1290_xsum_summarization": Part("summary", "Summarize the article in a sentence."),
    "superni/task1510_evalution_relation_extraction": Part("short_answer"),
}


def data_folder() -> Path:
    """The folder of the data pack: FEDEXPERTS_DATA, or else shared/data beside the working directory or the repository.

    Raises:
        BadData: there is none.
    """
    setting = os.environ.get("FEDEXPERTS_DATA")
    repository = Path(__file__).resolve().parents[2]
    candidates = [Path(setting)] if setting else [Path("../shared/data"), repository.parent / "shared" / "data"]
    folder = next((candidate for candidate in candidates if candidate.is_dir()), None)
    if folder is None:
        raise BadData(f"the data pack is not at {candidates[0]}; set FEDEXPERTS_DATA to its folder")
    return folder
