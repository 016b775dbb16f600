"""What a run file says about data: sources, how they are divided among clients, and how much of them is used."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, StringConstraints, model_validator

By = Literal["task", "iid", "pathological", "dirichlet", "clusters", "quantity"]
NUMBER_OF: Mapping[str, str] = {
    "dirichlet": "alpha",
    "quantity": "alpha",
    "pathological": "labels_per_client",
    "clusters": "clusters",
}
"""The number a short form such as `{ dirichlet = 0.5 }` gives."""
KEYS_OF: Mapping[By, tuple[str, ...]] = {
    "task": ("within", "clients_per_task"),
    "iid": (),
    "pathological": ("labels_per_client", "clusters"),
    "dirichlet": ("alpha", "clusters", "draws"),
    "clusters": ("clusters", "alpha", "draws"),
    "quantity": ("alpha",),
}


class PartitionSettings(BaseModel):
    """How examples are divided among clients.

    by = task: each client has one task; `within` divides a task among its clients (iid unless told).
    by = dirichlet: each label's shares are drawn from Dirichlet(alpha); clusters of texts stand in where nothing has a label.
    by = clusters: the same over `clusters` K-means clusters of texts, labels or not.
    `draws`, with either: each client draws so many with replacement instead, in shares of its own.
    by = pathological: each client has only `labels_per_client` labels.
    by = quantity: sizes are drawn from Dirichlet(alpha), contents at random.

    Short forms: "iid", { dirichlet = 0.5 }, { quantity = 1.0 }, { pathological = 2 },
    { by = "task", within = { dirichlet = 0.5 } }.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    by: By = "task"
    alpha: float = Field(default=0.5, gt=0)
    labels_per_client: int = Field(default=2, ge=1)
    clusters: int = Field(default=10, ge=1)
    draws: PositiveInt | None = None  # with by = dirichlet or clusters
    clients_per_task: dict[str, PositiveInt] = {}  # with by = task; empty: as even as it goes
    within: "PartitionSettings | None" = None  # with by = task

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, given: object) -> object:
        if isinstance(given, str):
            return {"by": given}
        if isinstance(given, dict) and "by" not in given:
            return _long_form(given)
        return given

    @model_validator(mode="after")
    def _every_key_has_an_effect(self) -> Self:
        fields = type(self).model_fields
        changed = [name for name in fields if name != "by" and getattr(self, name) != fields[name].default]
        if idle := [name for name in changed if name not in KEYS_OF[self.by]]:
            keys = ", ".join(KEYS_OF[self.by]) or "no other key"
            raise ValueError(f'{idle[0]} has no effect with by = "{self.by}", which takes {keys}; leave it out or change by')
        if self.within is not None and self.within.by == "task":
            raise ValueError('within divides one task, so it cannot be by = "task"; choose iid, dirichlet, clusters or another')
        return self


def _long_form(given: Mapping[str, Any]) -> dict[str, Any]:
    """`{dirichlet: 0.5}` as `{by: dirichlet, alpha: 0.5}`; whatever else stands there is kept."""
    name = next((name for name in NUMBER_OF if name in given), None)
    if name is None:
        return dict(given)
    others = {key: value for key, value in given.items() if key != name}
    return {"by": name, NUMBER_OF[name]: given[name], **others}


class SourceSettings(BaseModel):
    """One source of examples: a name alone, or a table that says how its rows are read.

    `name` is a set we know ("ag_news", "dolly", "dolly/closed_qa", "superni/task875"), a generated task ("synthetic/sort"),
    a .jsonl, .csv or .parquet file (.gz or not), or "hub:owner/set" (also "hub:" and a local folder) through `datasets`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    test: str | None = None  # a file with the test rows
    config: str | None = None  # of a set on the hub
    split: str = "train"  # of a set on the hub
    test_split: str | None = None  # of a set on the hub; otherwise its test, or else validation, split
    prompt: str | None = None  # a field, or a text with {field}s in it
    response: str | None = None  # a field, or a text with {field}s in it
    label: str | None = None  # the field of the class; without `response` its name is the answer
    task: str | None = None  # results are reported under this name
    metric: str | None = None
    limit: int | None = Field(default=None, ge=1)  # training examples, drawn at random


def _names_are_tables(given: object) -> object:
    """A list of sources, of which each may be a name alone; one source may stand without a list."""
    given = [given] if isinstance(given, str | dict) else given
    if isinstance(given, list | tuple):
        return tuple({"name": source} if isinstance(source, str) else source for source in given)
    return given


Sources = Annotated[tuple[SourceSettings, ...], BeforeValidator(_names_are_tables)]


ClientName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class DataSettings(BaseModel):
    """The `data` table of a run file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sources: Sources = Field(min_length=1)
    clients: int = Field(default=10, ge=1)  # as many as names, where these are given
    names: tuple[ClientName, ...] = ()  # what they are called; else c01, c02, …
    own: bool = (
        False  # each brings its own data (`fedexperts client --data`), read as the source says, of which there is one then
    )
    partition: PartitionSettings = PartitionSettings()
    limit: int | None = Field(default=None, ge=1)  # training examples of each source that sets none itself
    minimum: int = Field(default=4, ge=2)  # examples per client, validation included
    validation: float = Field(default=0.15, gt=0, lt=1)  # share of a client's training examples
    test_examples: int = Field(default=50, ge=1)  # per client, distributed over labels as its training examples are
    max_tokens: int = Field(default=256, ge=4)

    @model_validator(mode="before")
    @classmethod
    def _as_many_as_names(cls, given: object) -> object:
        if isinstance(given, dict) and given.get("names") and "clients" not in given:
            return {**given, "clients": len(given["names"])}
        return given

    @model_validator(mode="after")
    def _every_client_has_one_name(self) -> Self:
        if self.names and len(set(self.names)) != self.clients:
            raise ValueError(f"names gives {len(set(self.names))} different names for {self.clients} clients; give each its own")
        if self.own and not self.names:
            raise ValueError("own = true: clients bring their own data, so only they are known by name; give names too")
        if self.own and (len(self.sources) > 1 or self.sources[0].task is None):
            raise ValueError(
                "own = true takes one source, which says how all clients' rows are read, with a task to report them by"
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
