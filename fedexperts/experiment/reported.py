"""The parts of a server whose clients bring their own data: what they reported of it, validated."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from pydantic import TypeAdapter, ValidationError

from fedexperts.config import RunConfig
from fedexperts.core.devices import Profile
from fedexperts.core.score_errors import is_text
from fedexperts.data.clients import Clients
from fedexperts.data.own import Counts, placeholder_clients
from fedexperts.engines.remote import Greeting
from fedexperts.errors import BadValue, listed, quoted
from fedexperts.experiment.setup import Parts
from fedexperts.models.load import Base
from fedexperts.types import METRIC_NAMES

MOST_EXAMPLES = 10**7
"""Limit of the examples that a client may report: the server keeps a placeholder for each."""
COUNTS = TypeAdapter(Counts)
REMEDY = "install this version of FedExperts there, or leave it out of data.names"


@dataclass(frozen=True)
class CountedParts(Parts):
    """Parts of a run whose clients bring their own data, of which only the counts are known."""

    counts: Mapping[str, Counts] = field(default_factory=dict)

    def clients(self, config: RunConfig) -> Clients:
        source = self.with_templates(config).data.sources[0]
        return placeholder_clients({name: self.counts[name] for name in config.data.names}, source)

    def longest_response(self, config: RunConfig) -> int:
        return max(count.longest_response for count in self.counts.values())


@dataclass(frozen=True)
class ReportedParts(CountedParts):
    """Parts of a server whose clients bring their own data: built from what they reported."""

    devices: Mapping[str, Profile] = field(default_factory=dict)
    memory: Mapping[str, int | None] = field(default_factory=dict)

    def profiles(self, config: RunConfig) -> dict[str, Profile]:
        return dict(self.devices)

    def memories(self, config: RunConfig, full_bytes: int) -> Mapping[str, int | None]:
        return self.memory


def parts_from_counts(config: RunConfig, given: str, load: Callable[..., Base]) -> CountedParts:
    """The parts of a plan with the counts `given`: NAME=TRAIN or NAME=TRAIN:VALIDATION:TEST, with commas between clients.

    Responses are taken to be as long as `data.max_tokens` allows.

    Raises:
        BadValue: other clients than the run's, or what is no count.
    """
    task = str(config.data.sources[0].task)
    numbers = {name: numbers_of(name, text) for name, _, text in (each.partition("=") for each in given.split(","))}
    if {*numbers} != {*config.data.names}:
        raise BadValue(f"--counts is for {listed(numbers)}, and the clients of the run are {listed(config.data.names)}")
    longest = config.data.max_tokens
    counts = {name: Counts({task: train}, held_out, test, longest) for name, (train, held_out, test) in numbers.items()}
    return CountedParts(load=load, counts=counts)


def numbers_of(name: str, text: str) -> tuple[int, int, int]:
    """The numbers of training, validation and test examples in `text`.

    Raises:
        BadValue: it has none, or more than MOST_EXAMPLES.
    """
    train, *others = text.split(":")
    digits = [train, *(others or ["0", "0"])]
    numbers = [int(each) for each in digits if each.isascii() and each.isdigit() and len(each) < 10]
    if len(digits) != 3 or len(numbers) != 3 or not numbers[0] or sum(numbers) > MOST_EXAMPLES:
        raise BadValue(
            f"--counts: {quoted(f'{name}={text}')} is no count; give NAME=TRAIN or NAME=TRAIN:VALIDATION:TEST, such as "
            f"north=1200:200:300, with at most {MOST_EXAMPLES:,} in all"
        )
    return numbers[0], numbers[1], numbers[2]


def parts_from_greetings(greetings: Iterable[Greeting], bases: Parts) -> ReportedParts:
    """The parts that clients reported in `greetings`, with the base models of `bases`.

    Raises:
        BadValue: a client has no data of its own, reported invalid counts, or judges a task by another metric than the others.
    """
    by_client = {greeting.client.name: greeting for greeting in greetings}
    counts = {name: validated_counts(each) for name, each in by_client.items()}
    require_same_metrics(counts)
    return ReportedParts(
        bases=bases.bases,
        counts=counts,
        devices={name: each.profile for name, each in by_client.items() if each.profile},
        memory={name: each.client.memory_bytes for name, each in by_client.items()},
    )


def validated_counts(greeting: Greeting) -> Counts:
    """The validated counts of a greeting.

    Raises:
        BadValue: the client has no data of its own, or reported counts that are not valid.
    """
    client, reported = greeting.client, greeting.counts
    if reported is None:
        raise BadValue(f"{client.name} brought no data of its own (data.own = true); start it with --data")
    try:
        counts = COUNTS.validate_python(reported)
    except ValidationError as error:
        raise BadValue(
            f"{client.name} sent a description of its data that cannot be read ({error.error_count()} mistakes); {REMEDY}"
        ) from None
    sound = counts.train and min([*counts.train.values(), counts.longest_response]) >= 1
    sound = sound and {*counts.metrics.values()} <= {*METRIC_NAMES} and all(map(is_text, (*counts.train, *counts.metrics)))
    if not sound or min(counts.validation, counts.test) < 0 or sum(counts.train.values()) != client.examples:
        raise BadValue(f"{client.name} sent a description of its data that is inconsistent: {quoted(counts)}; {REMEDY}")
    if (total := client.examples + counts.validation + counts.test) > MOST_EXAMPLES:
        raise BadValue(f"{client.name} has {total:,} examples, but at most {MOST_EXAMPLES:,} are allowed; give it fewer")
    return counts


def require_same_metrics(counts: Mapping[str, Counts]) -> None:
    """Raises BadValue if two clients score a task by different metrics, so that their scores cannot be merged."""
    first: dict[str, tuple[str, str]] = {}
    for name, count in counts.items():
        for task, metric in count.metrics.items():
            other, theirs = first.setdefault(task, (name, metric))
            if theirs != metric:
                raise BadValue(
                    f"task {task!r} is scored by {theirs} at {other} and by {metric} at {name}; set data.sources.metric, or give "
                    "both clients rows of one format"
                )
