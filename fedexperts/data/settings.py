"""The `data` table of a run file: sources, how they are divided among clients, and how much of them is used."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    StringConstraints,
    model_validator,
)

PLAIN, PLAIN_2 = "plain-1", "plain-2"
"""The plain frames: "plain-1", in which our bases were pretrained, and "plain-2", with answers in the last line of the prompt."""

PLAINS = (PLAIN, PLAIN_2)

Format = Literal["messages", "conversations", "alpaca", "prompt_response", "text_label", "text"]
TooLong = Literal["cut", "drop", "refuse"]
By = Literal["task", "iid", "pathological", "dirichlet", "clusters", "quantity"]
NUMBER_OF: Mapping[str, str] = {
    "dirichlet": "alpha",
    "quantity": "alpha",
    "pathological": "labels_per_client",
    "clusters": "clusters",
}
"""Rule → the key whose value a short form such as `{ dirichlet = 0.5 }` gives."""
KEYS_OF: Mapping[By, tuple[str, ...]] = {
    "task": ("within", "clients_per_task"),
    "iid": (),
    "pathological": ("labels_per_client", "clusters"),
    "dirichlet": ("alpha", "clusters", "draws"),
    "clusters": ("clusters", "alpha", "draws"),
    "quantity": ("alpha",),
}
"""Rule → the keys that have an effect with it."""


class PartitionSettings(BaseModel):
    """How examples are divided among clients.

    by = task: each client has one task; `within` (default: iid) divides a task among its clients.
    by = dirichlet: each label's shares are drawn from Dirichlet(alpha); without labels, clusters of texts take their place.
    by = clusters: the same over `clusters` K-means clusters of texts, whether there are labels or not.
    `draws`, with either: each client draws so many examples with replacement, in its own shares of labels or clusters.
    by = pathological: each client has only `labels_per_client` labels.
    by = quantity: sizes are drawn from Dirichlet(alpha), examples at random.

    Short forms: "iid", { dirichlet = 0.5 }, { quantity = 1.0 }, { pathological = 2 },
    { by = "task", within = { dirichlet = 0.5 } }.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    by: By = "task"
    alpha: float = Field(default=0.5, gt=0)
    labels_per_client: int = Field(default=2, ge=1)
    clusters: int = Field(default=10, ge=1)
    draws: PositiveInt | None = None  # with by = dirichlet or clusters
    clients_per_task: dict[str, PositiveInt] = {}  # with by = task; empty: as even as possible
    within: "PartitionSettings | None" = None  # with by = task

    @model_validator(mode="before")
    @classmethod
    def _expand_short_form(cls, settings: object) -> object:
        if isinstance(settings, str):
            return {"by": settings}
        if isinstance(settings, dict) and "by" not in settings:
            return _long_form(settings)
        return settings

    @model_validator(mode="after")
    def _every_key_has_an_effect(self) -> Self:
        fields = type(self).model_fields
        changed = [name for name in fields if name != "by" and getattr(self, name) != fields[name].default]
        if without_effect := [name for name in changed if name not in KEYS_OF[self.by]]:
            keys = ", ".join(KEYS_OF[self.by]) or "no other key"
            name = without_effect[0]
            raise ValueError(f'{name} has no effect with by = "{self.by}", which takes {keys}; remove it or change by')
        if self.within is not None and self.within.by == "task":
            raise ValueError('within divides one task, so it cannot be by = "task"; choose iid, dirichlet, clusters or another')
        return self


def _long_form(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`{dirichlet: 0.5}` as `{by: dirichlet, alpha: 0.5}`; other keys stay as they are."""
    rule = next((rule for rule in NUMBER_OF if rule in settings), None)
    if rule is None:
        return dict(settings)
    others = {key: value for key, value in settings.items() if key != rule}
    return {"by": rule, NUMBER_OF[rule]: settings[rule], **others}


def _template(name: str) -> str:
    """`name`, if it names a template or is one.

    Raises:
        ValueError: it is neither.
    """
    if name in ("auto", "chat", "plain", *PLAINS) or "{{" in name or "{%" in name:
        return name
    raise ValueError(
        f"template = {name[:40]!r} is not one of auto, chat, plain, {', '.join(PLAINS)}, and no chat template in Jinja, "
        "which has {{ }}"
    )


Template = Annotated[str, AfterValidator(_template)]
"""How prompts are asked: "chat" (the tokenizer's chat template), "plain" (the present plain frames, "plain-1"), "plain-1" or
"plain-2" (these), "auto" (chat where the tokenizer has a chat template, else plain), or a chat template in Jinja."""


class SourceSettings(BaseModel):
    """One source of examples: a name alone, or a table that says how its rows are read.

    `name` is a set of the data pack ("ag_news", "dolly", "dolly/closed_qa", "superni/task875"), a generated task
    ("synthetic/sort"), a .json, .jsonl, .csv, .tsv or .parquet file (.gz or not), or "hub:owner/set" (also "hub:" and a local
    folder), which `datasets` loads.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    test: str | None = None  # a file with the test rows
    folder: str | None = None  # where these files are, if there; else in the working directory. A run file sets its own
    config: str | None = None  # of a set on the hub
    split: str = "train"  # of a set on the hub
    test_split: str | None = None  # of a set on the hub; by default its test or else its validation split
    format: Format | None = None  # of the rows; None: told by their fields
    messages: str | None = None  # the field of the conversation; by default messages or conversations
    system: str | None = None  # the system message of rows without one of their own
    template: Template | None = None  # in place of that of `data`
    prompt: str | None = None  # the name of a field, or a text with {field}s in it
    response: str | None = None  # likewise
    label: str | None = None  # the field with the class; without `response`, the name of the class is the response
    task: str | None = None  # the name under which results are reported
    metric: str | None = None
    limit: int | None = Field(default=None, ge=1)  # training examples, drawn at random

    def beside(self, run_file: Path) -> Self:
        """The source with the folder of the run file that names it, if its files are there and not in the working directory."""
        folder = run_file.parent.resolve()
        if self.folder is not None or folder == Path.cwd() or not any((folder / name).is_file() for name in self.files):
            return self
        return self.model_copy(update={"folder": str(folder)})

    @property
    def files(self) -> list[str]:
        """The names that may be those of files."""
        return [self.name, *([self.test] if self.test else [])]

    def path(self, name: str) -> Path:
        """Where the file `name` of this source is."""
        inside = Path(self.folder, name) if self.folder else Path(name)
        return inside if inside.exists() else Path(name)


def _expand_names(sources: object) -> object:
    """Sources as a tuple of tables: each may be a name alone, and a single one may stand without a list."""
    sources = [sources] if isinstance(sources, str | dict) else sources
    if isinstance(sources, list | tuple):
        return tuple({"name": source} if isinstance(source, str) else source for source in sources)
    return sources


Sources = Annotated[tuple[SourceSettings, ...], BeforeValidator(_expand_names)]


ClientName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class DataSettings(BaseModel):
    """The `data` table of a run file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sources: Sources = Field(min_length=1)
    clients: int = Field(default=10, ge=1, le=1_000_000)  # with names: their number
    names: tuple[ClientName, ...] = ()  # of the clients; by default c01, c02, …
    own: bool = False  # each client brings its own data (`fedexperts client --data`), all read as the only source says
    partition: PartitionSettings = PartitionSettings()
    limit: int | None = Field(default=None, ge=1)  # training examples of each source without a limit of its own
    minimum: int = Field(default=4, ge=2)  # examples per client, validation included
    validation: float = Field(default=0.15, gt=0, lt=1)  # share of a client's training examples
    test_examples: int = Field(default=50, ge=1)  # per client, with the label shares of its training examples
    max_tokens: int = Field(default=256, ge=4, le=1_000_000)
    too_long: TooLong = "cut"  # what becomes of examples with more than max_tokens tokens
    template: Template = "auto"  # of prompts

    @model_validator(mode="before")
    @classmethod
    def _as_many_as_names(cls, settings: object) -> object:
        if isinstance(settings, dict) and settings.get("names") and "clients" not in settings:
            return {**settings, "clients": len(settings["names"])}
        return settings

    @model_validator(mode="after")
    def _every_client_has_one_name(self) -> Self:
        if self.names and len(set(self.names)) != self.clients:
            raise ValueError(f"names gives {len(set(self.names))} different names for {self.clients} clients; give each its own")
        if self.own and not self.names:
            raise ValueError("own = true lets clients bring their own data, so the server must know their names; set names too")
        if self.own and (len(self.sources) > 1 or self.sources[0].task is None):
            raise ValueError(
                "own = true needs exactly one source, which says how all clients' rows are read, with a task; set both"
            )
        return self

    @model_validator(mode="after")
    def _every_client_has_a_task(self) -> Self:
        counts = self.partition.clients_per_task
        if counts and sum(counts.values()) != self.clients:
            raise ValueError(
                f"clients_per_task gives {sum(counts.values())} clients, but clients = {self.clients}; make them equal"
            )
        return self


def with_templates(sources: Sequence[SourceSettings], default: str, chat: bool = False) -> tuple[SourceSettings, ...]:
    """`sources`, each with its template; `chat`: whether that of "auto" is the tokenizer's chat template."""
    names = {"auto": "chat" if chat else PLAIN, "plain": PLAIN}
    chosen = (source.template or default for source in sources)
    return tuple(
        source.model_copy(update={"template": names.get(template, template)})
        for source, template in zip(sources, chosen, strict=True)
    )
