"""The pool of a run: the examples of all its sources, without repeats; and the examples that show retained knowledge.

Two examples are repeats of each other if their prompts are equal up to case and white space (or, where there is no prompt, their
responses). A training example that repeats another training example, or a test example of any source, is left out.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedexperts.data.settings import DataSettings, SourceSettings
from fedexperts.data.sources import Source, load, sample_examples
from fedexperts.data.templates import Frame
from fedexperts.errors import BadData, BadValue, listed, nearest
from fedexperts.types import METRIC_NAMES, Example


@dataclass(frozen=True)
class Pool:
    """All examples that can be divided among clients, without repeats, and the sha256 of each source they came from."""

    train: tuple[Example, ...]
    test: tuple[Example, ...]
    hashes: Mapping[str, str]
    left_out: int = 0  # number of examples that repeated others
    dropped: Mapping[str, int] = field(default_factory=dict)  # task → training and test examples that were too long
    frames: Mapping[str, Frame | None] = field(default_factory=dict)  # task → what its prompts begin and end with
    sources: Mapping[str, str] = field(default_factory=dict)  # task → the names of its sources


@dataclass(frozen=True)
class Retained:
    """Examples that show what a model still knows, on which no client trains; and the sha256 of each source they came from."""

    examples: tuple[Example, ...] = ()
    hashes: Mapping[str, str] = field(default_factory=dict)


def load_pool(settings: DataSettings) -> Pool:
    """The examples of all sources, without repeats.

    Raises:
        BadValue: a metric that does not exist.
        BadData: sources that cannot be read or that add no example, or different tasks of the same name.
    """
    for source_settings in settings.sources:
        check_metric(source_settings)
    sources = [load(source, settings) for source in settings.sources]
    _require_explicit_shared_tasks(settings.sources, sources)
    _require_consistent_tasks(sources)
    train = [example for source in sources for example in source.train]
    test = [example for source in sources for example in source.test]
    pool = deduplicated_pool(train, test, {source.name: source.hash for source in sources})
    _require_examples_of_each_source(sources, pool)
    return replace(pool, frames=_merged_frames(sources), sources=_names_of_sources(sources))


def load_retained(sources: Sequence[SourceSettings], settings: DataSettings) -> Retained:
    """Test examples of `sources`, drawn at random up to the limit of each; each source is one task.

    If a source sets no metric, its examples with choices are scored by likelihood.

    Raises:
        BadValue: a metric that does not exist.
        BadData: sources that cannot be read, have no test examples, or mix metrics.
    """
    for source_settings in sources:
        check_metric(source_settings)
    loaded = [_one_test_task(source_settings, load(source_settings, settings)) for source_settings in sources]
    _require_consistent_tasks(loaded)
    examples = deduplicated_pool([], [example for source in loaded for example in source.test]).test
    return Retained(examples, {f"retained/{source.name}": source.hash for source in loaded})


def without_retained(pool: Pool, retained: Retained) -> Pool:
    """`pool` without the training examples that repeat an example of `retained`."""
    retained_keys = {duplicate_key(example) for example in retained.examples}
    train = tuple(example for example in pool.train if duplicate_key(example) not in retained_keys)
    return replace(pool, train=train, left_out=pool.left_out + len(pool.train) - len(train))


def deduplicated_pool(train: Sequence[Example], test: Sequence[Example], hashes: Mapping[str, str] | None = None) -> Pool:
    """`train` and `test` without repeats: of repeats the first stays, in the place of the last, or else the test example."""
    tests = {duplicate_key(example): example for example in reversed(test)}
    trains = {duplicate_key(example): example for example in reversed(train) if duplicate_key(example) not in tests}
    left_out = len(train) + len(test) - len(tests) - len(trains)
    return Pool(tuple(reversed(trains.values())), tuple(reversed(tests.values())), dict(hashes or {}), left_out)


def duplicate_key(example: Example) -> str:
    """Equal for two examples that repeat each other: the prompt, or else the response, in one case and with single blanks."""
    return " ".join((example.prompt or example.response).casefold().split())


def check_metric(source: SourceSettings) -> None:
    """Raises BadValue if the metric of `source` does not exist."""
    if source.metric is not None and source.metric not in METRIC_NAMES:
        suggestion = nearest(source.metric, METRIC_NAMES)
        raise BadValue(f"metric {source.metric!r} of source {source.name} is not one of {', '.join(METRIC_NAMES)}{suggestion}")


def tasks_of(source: Source) -> list[str]:
    """The tasks of a source, in the order of their first examples."""
    return list(dict.fromkeys(example.task for example in (*source.train, *source.test)))


def _one_test_task(settings: SourceSettings, source: Source) -> Source:
    """`source` with a sample of its test examples alone, as one task."""
    if not source.test:
        raise BadData(f"source {source.name} has no test examples, and only those are scored as retained; give it a test split")
    tasks = tasks_of(source)
    task = settings.task or (tasks[0] if len(tasks) == 1 else settings.name)
    test = [
        replace(example, task=task, metric=settings.metric or ("likelihood" if example.choices else example.metric))
        for example in sample_examples(source.test, settings.limit, source.name)
    ]
    return replace(source, train=[], test=test)


def _merged_frames(sources: Iterable[Source]) -> dict[str, Frame | None]:
    """The frame of each task; an empty one where its sources have different frames."""
    frames: dict[str, Frame | None] = {}
    for source in sources:
        for task, frame in source.frames.items():
            frames[task] = frame if frames.setdefault(task, frame) == frame else ("", "")
    return frames


def _names_of_sources(sources: Iterable[Source]) -> dict[str, str]:
    """Task → the names of the sources that have examples of it."""
    names: dict[str, list[str]] = {}
    for source in sources:
        for task in tasks_of(source):
            names.setdefault(task, []).append(source.name)
    return {task: ", ".join(dict.fromkeys(some)) for task, some in names.items()}


def _require_examples_of_each_source(sources: Sequence[Source], pool: Pool) -> None:
    """Raises BadData for a source whose rows all have the same prompt, or none of whose training examples is in `pool`."""
    in_pool = {id(example) for example in pool.train}
    for source in sources:
        examples = [*source.train, *source.test]
        if len(examples) > 1 and len({duplicate_key(example) for example in examples}) == 1:
            raise BadData(
                f"source {source.name} has {len(examples)} rows, all with the same prompt, and repeats count once;"
                " give rows that differ, or a prompt that names the field in which they differ"
            )
        if not any(id(example) in in_pool for example in source.train):
            raise BadData(f"source {source.name} has no training example that no other source or test set has; remove it")


def _require_explicit_shared_tasks(settings: Sequence[SourceSettings], sources: Sequence[Source]) -> None:
    """Raises BadData for two sources with the same task, unless both set that task in the run file."""
    first: dict[str, SourceSettings] = {}
    for source_settings, source in zip(settings, sources, strict=True):
        for task in tasks_of(source):
            other = first.setdefault(task, source_settings)
            if other is not source_settings and not (other.task and source_settings.task):
                raise BadData(
                    f"sources {other.name} and {source_settings.name} both have a task {task}; write task = … in each:"
                    " two names, or the same one if they are one task"
                )


def _require_consistent_tasks(sources: Sequence[Source]) -> None:
    """Raises BadData for a task with two metrics, templates or lists of classes, or with a metric that does not fit it."""
    metrics: dict[str, tuple[str, str]] = {}
    templates: dict[str, tuple[tuple[bool, str | None], str]] = {}
    classes: dict[str, tuple[tuple[str, ...], str]] = {}
    for source in sources:
        for example in (*source.train, *source.test):
            metric, metric_source = metrics.setdefault(example.task, (example.metric, source.name))
            if metric != example.metric:
                raise BadData(
                    f"task {example.task} has metric {metric} in source {metric_source} and {example.metric} in source"
                    f" {source.name}; write the same metric = … in each, or another task = …"
                )
            template = bool(example.turns), example.template
            first_template, template_source = templates.setdefault(example.task, (template, source.name))
            if template != first_template:
                raise BadData(
                    f"task {example.task} is asked through one template in source {template_source} and through another in source"
                    f" {source.name}; write the same template = … in each, or another task = …"
                )
            if metric == "likelihood" and example.response not in example.choices:
                raise BadData(
                    f"task {example.task} of source {source.name} is scored by likelihood, which needs choices with the right "
                    "answer among them; give rows with choices and gold, or another metric"
                )
            if example.label is None:
                continue
            names, names_source = classes.setdefault(example.task, (example.choices, source.name))
            if names != example.choices:
                raise BadData(
                    f"task {example.task} has {len(names)} classes ({listed(names, 3)}) in source {names_source} and"
                    f" {len(example.choices)} ({listed(example.choices, 3)}) in source {source.name}; write another task = … in"
                    " one, or put all rows into one file"
                )
