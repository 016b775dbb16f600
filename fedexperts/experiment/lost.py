"""What of a run's data its settings lose: tokens that are cut, answers that cannot be given, tests on training examples."""

from collections import Counter
from collections.abc import Iterator, Sequence
from math import ceil

from fedexperts.core.evaluation import way_of
from fedexperts.data.encode import Encoder
from fedexperts.experiment.setup import Prepared
from fedexperts.report.read import Lost
from fedexperts.types import Example

MOST = 2000
"""Examples of a task and split that are looked at, evenly spread over all: a plan takes seconds."""


def lost(prepared: Prepared) -> list[Lost]:
    """What is lost of each task of the run; nothing is known of data that clients bring themselves."""
    return [] if prepared.config.data.own else losses_of(prepared)


def losses_of(prepared: Prepared) -> list[Lost]:
    """What is lost of each task of the examples in `prepared`."""
    config, base = prepared.config, prepared.base
    encoder = Encoder(base.tokenizer, config.data.max_tokens, base.encoder_decoder)
    pool = prepared.clients.pool
    tasks = dict.fromkeys(example.task for example in pool.train)
    train, test = ({task: [each for each in split if each.task == task] for task in tasks} for split in (pool.train, pool.test))
    limit = config.evaluation.generate_tokens
    return [lost_of(task, train[task], test[task], encoder, limit, pool.dropped.get(task, 0)) for task in tasks]


def lost_of(
    task: str, train: Sequence[Example], test: Sequence[Example], encoder: Encoder, generate_tokens: int, dropped: int = 0
) -> Lost:
    """What is lost of one task, of which `dropped` examples are left out already."""
    cuts = encoder.cuts(spread(train))
    seen = {(example.prompt, example.response) for example in train}
    generated = [example for example in spread(test) if way_of(example) == "answer"]
    references = [cut.response - 1 for cut in encoder.cuts(generated)] if generated else []  # without the end token
    return Lost(
        task,
        len(train),
        share([cut.prompt_lost > 0 for cut in cuts]),
        sum(cut.prompt_lost for cut in cuts) / max(sum(cut.prompt for cut in cuts), 1),
        share([cut.response_lost > 0 for cut in cuts]),
        share([length > generate_tokens for length in references]),
        share([(example.prompt, example.response) in seen for example in test]),
        max(Counter(example.response for example in train).values()) / len(train),
        dropped,
    )


def spread(examples: Sequence[Example]) -> Sequence[Example]:
    """At most MOST of `examples`, evenly spread."""
    return examples[:: max(1, ceil(len(examples) / MOST))]


def share(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else 0.0


def percent(share: float) -> str:
    """0.5 as `50%`, and what is not nothing never as `0%`."""
    return "under 1%" if 0 < share < 0.005 else f"{share:.0%}"


def sentences(rows: Sequence[Lost], max_tokens: int, generate_tokens: int) -> Iterator[str]:
    """A warning for each task of which something is lost."""
    for row in rows:
        cut = []
        if row.prompts_cut:
            cut.append(f"{percent(row.prompts_cut)} of the prompts ({percent(row.prompt_tokens_lost)} of their tokens)")
        if row.answers_cut:
            cut.append(f"{percent(row.answers_cut)} of the answers, which then have no end")
        if cut:
            yield f"{row.task}: data.max_tokens = {max_tokens} cuts {' and '.join(cut)}; raise it"
        if row.dropped:
            yield f"{row.task}: examples that are left out since they exceed data.max_tokens = {max_tokens}: {row.dropped}"
        if row.references_cut:
            yield (
                f"{row.task}: {percent(row.references_cut)} of the test references are longer than evaluation.generate_tokens = "
                f"{generate_tokens}; raise it"
            )
        if row.tested_on_training:
            leaked = percent(row.tested_on_training)
            yield f"{row.task}: {leaked} of the test examples are training examples too; take other files"
