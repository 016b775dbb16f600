"""Jobs over a grid in this process, whose nodes answer late, twice, wrongly or not at all, as a test says."""

import errno
import json
import weakref
from collections import defaultdict
from dataclasses import replace
from itertools import count

import pytest
import torch
from flwr.app import Array, Context, Error, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedexperts.config import RunConfig
from fedexperts.core.ledger import Ledger
from fedexperts.engines import client_store, remote
from fedexperts.engines.base import reorder_and_validate
from fedexperts.engines.client_store import ClientStateStore, own
from fedexperts.engines.flower.client_app import client_app
from fedexperts.engines.flower.codec import ABOUT, PARTS, from_records
from fedexperts.engines.flower.engine import FlowerEngine
from fedexperts.engines.local import ClientRuntime
from fedexperts.engines.message import Message
from fedexperts.engines.remote import Greeting, greeting_message
from fedexperts.engines.serialization import answer_message
from fedexperts.errors import BadRun, BadValue
from fedexperts.experiment import checkpoint, flower, runner
from fedexperts.io.toml import checked
from fedexperts.methods.base import mean_rows
from fedexperts.testing import bare_server
from fedexperts.types import Client, Failure, Job, Patch, Split, Training, Update

CLIENTS = {f"c{number:02d}": Client(f"c{number:02d}", 10 * number, "t") for number in (1, 2, 3, 4)}
SOON = 0.2  # seconds, of a round that ends without all answers


class FakeGrid(Grid):
    """Nodes that answer at once; a reply is there when the test has not said otherwise.

    apps: node → its ClientApp. change: client → what becomes of its replies to jobs: a list of messages, empty for none yet.
    """

    def __init__(self, answer, names):
        self.apps = {node: client_app(lambda message, _, name=name: answer(message, name)) for node, name in enumerate(names, 1)}
        self.change, self.pushed, self.pulled = {}, [], []
        self.replies, self.numbers, self.clock = {}, count(1), count()
        self.after = defaultdict(int)  # message → at which pull of all it is there

    run = property(lambda self: None)

    def set_run(self, run):
        raise NotImplementedError

    def create_message(self, *_, **__):
        raise NotImplementedError

    def send_and_receive(self, *_, **__):
        raise NotImplementedError

    def get_node_ids(self):
        return list(self.apps)

    def push_messages(self, messages):
        return [self.push(message) for message in messages]

    def push(self, message):
        node = message.metadata.dst_node_id
        if node not in self.apps:
            return None
        message.metadata.__dict__["_message_id"] = id = f"m{next(self.numbers)}"
        context = Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={})
        self.replies[id] = [self.apps[node](message, context)]
        if "hello" not in from_records(message.content).head:
            self.pushed.append(id)
            change = self.change.get(node)
            if change:
                self.replies[id] = change(self.replies[id][0])
        return id

    def pull_messages(self, message_ids):
        asked, now = list(message_ids), next(self.clock)
        self.pulled.append(asked)
        found = [reply for id in asked if self.after[id] <= now for reply in self.replies.pop(id, [])]
        for broken in found:
            if isinstance(broken, Exception):
                raise broken
        return found


@pytest.fixture(autouse=True)
def identity():
    """Whoever makes messages has one; Flower sets it where it starts a ServerApp."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


def job(client, round=1, task="train"):
    return Job(client, round, task, f"0/{round}/{client}", {}, Patch({"w": torch.tensor([float(round)])}))


def jobs(*clients, round=1):
    return [job(client, round) for client in clients or CLIENTS]


class ClientContext:
    """Stands for a client's whole side: answers jobs with its number of examples, and keeps a count of them."""

    def __init__(self, folder, names=tuple(CLIENTS)):
        self.runtime = ClientRuntime(
            torch.nn.Linear(1, 1),
            None,
            Training(),
            CLIENTS,
            dict.fromkeys(CLIENTS, Split([], [], [])),
            work,
            ClientStateStore(folder),
        )
        self.grid = FakeGrid(self.answer, names)

    def answer(self, message, name):
        return remote.answer(self.runtime, name, message)

    def engine(self, **settings):
        return FlowerEngine(self.grid, "the run", CLIENTS, **{"in_flight": 4, **settings})


def work(job, context):
    before = context.client_state.get("rounds", torch.tensor(0.0))
    context.client_state["rounds"] = before + 1
    metrics = {"before": before.item()}
    return Update(
        job.client, job.round, job.task, Patch({"w": job.patch.tensors["w"] * 2}), context.client.examples, metrics=metrics
    )


@pytest.fixture
def context(tmp_path):
    return ClientContext(tmp_path)


@pytest.fixture
def engine(context):
    engine = context.engine()
    engine.connect()
    return engine


def answers(engine, *clients, round=1):
    return {answer.client: answer for answer in engine.run(jobs(*clients, round=round))}


def failed(client, reason, round=1):
    return Failure(client, round, "train", reason)


def test_every_job_has_its_clients_answer(engine):
    found = answers(engine)
    assert [answer.examples for answer in found.values()] == [10, 20, 30, 40]
    assert all(answer.patch.tensors["w"].item() == 2.0 for answer in found.values())
    assert not engine.dropped


def test_answers_come_in_the_order_of_the_jobs_whichever_is_there_first(context, engine):
    first = len(context.grid.pulled)
    context.grid.after = {"m5": first + 4, "m6": first + 2, "m7": 0, "m8": 0}  # four hellos went before
    assert list(answers(engine)) == ["c01", "c02", "c03", "c04"]
    assert context.grid.pushed == ["m5", "m6", "m7", "m8"]
    assert context.grid.pulled[first:] == [["m5"]] * 5 + [["m6"], ["m7"], ["m8"]], "others stay with Flower until their turn"


@pytest.mark.parametrize("most", [1, 2, 3])
def test_no_more_jobs_are_under_way_than_allowed(context, most):
    engine, taken = context.engine(in_flight=most), []
    engine.connect()
    for number, _ in enumerate(engine.run(taken.append(job) or job for job in jobs())):
        assert len(taken) == min(number + most, 4)
    assert len(taken) == 4


def test_the_server_holds_one_update_at_a_time(engine):
    held, alive = [], []

    def watched(asked):
        for answer in engine.run(asked):
            alive.append(sum(reference() is not None for reference in held))
            held.append(weakref.ref(answer))
            yield answer
            del answer

    server = replace(bare_server([], CLIENTS.values()), weights={"w": torch.zeros(1)}, layout={"w": None})
    ledger = Ledger()
    merged = mean_rows(server, ledger.received(reorder_and_validate(watched, ledger.sent(jobs()))), lambda update: 1.0)
    assert merged.weights["w"].item() == 2.0
    assert alive == [0, 0, 0, 0]


def test_a_reply_that_comes_twice_counts_once(context, engine):
    context.grid.change[2] = lambda reply: [reply, reply]
    assert all(isinstance(answer, Update) for answer in answers(engine).values())
    assert engine.dropped == {"c02": 1}


def test_a_reply_to_nobodys_question_is_dropped(context, engine):
    def stray(reply):
        other = FlowerMessage(reply.content, reply_to=reply)
        other.metadata.__dict__["_reply_to_message_id"] = "m99"
        return [other, reply]

    context.grid.change[3] = stray
    assert all(isinstance(answer, Update) for answer in answers(engine).values())
    assert engine.dropped == {"": 1}


def test_who_does_not_answer_in_time_fails_and_what_it_sends_later_is_dropped(context):
    engine, late = context.engine(seconds=SOON), []
    engine.connect()
    context.grid.change[2] = lambda reply: late.append(reply) or []
    found = answers(engine)
    assert found["c02"] == failed("c02", "it did not answer within federation.round_seconds = 0.2")
    assert [type(answer) for answer in found.values()] == [Update, Failure, Update, Update]
    assert not engine.dropped
    context.grid.change, context.grid.replies[late[0].metadata.reply_to_message_id] = {}, late
    again = answers(engine, round=2)
    assert [(answer.round, type(answer)) for answer in again.values()] == [(2, Update)] * 4
    assert engine.dropped == {"c02": 1}
    answers(engine, round=3)
    assert engine.dropped == {"c02": 1}


def test_late_answers_are_taken_one_at_a_time(context):
    engine, late = context.engine(seconds=SOON), []
    engine.connect()
    context.grid.change = dict.fromkeys((1, 2, 3), lambda reply: late.append(reply) or [])
    answers(engine)
    context.grid.change = {}
    context.grid.replies |= {reply.metadata.reply_to_message_id: [reply] for reply in late}
    first = len(context.grid.pulled)
    answers(engine, round=2)
    assert engine.dropped == dict.fromkeys(("c01", "c02", "c03"), 1)
    assert {len(asked) for asked in context.grid.pulled[first:]} == {1}


def test_an_answer_that_is_there_at_its_turn_counts_though_another_took_all_the_time(context):
    engine = context.engine(seconds=SOON)
    engine.connect()
    context.grid.change[1] = lambda reply: []
    assert [type(answer) for answer in answers(engine).values()] == [Failure, Update, Update, Update]


def test_what_a_client_kept_in_a_job_that_did_not_count_is_gone_in_the_next(context):
    """Or server and client would remember different rounds."""
    engine = context.engine(seconds=SOON)
    engine.connect()
    context.grid.change[2] = lambda reply: [] if len(context.grid.pushed) == 6 else [reply]  # its answer in the second round
    before = [{client: answer.metrics["before"] for client, answer in found.items() if isinstance(answer, Update)}
              for found in (answers(engine, round=round) for round in (1, 2, 3))]  # fmt: skip
    assert [found.get("c01") for found in before] == [0, 1, 2]
    assert [found.get("c02") for found in before] == [0, None, 1]


def test_a_client_whose_disk_is_full_fails_with_that_reason_and_goes_on_from_what_it_had_kept(context, engine, monkeypatch):
    assert answers(engine)["c02"].metrics["before"] == 0
    with monkeypatch.context() as full:
        full.setattr(client_store, "write_tensors", no_room)
        reason = answers(engine, "c02", round=2)["c02"].reason
    assert reason == "OSError: [Errno 28] No space left on device"
    assert answers(engine, round=3)["c02"].metrics["before"] == 1


def no_room(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_resumed_server_says_which_answers_it_had_taken(context, tmp_path):
    first = context.engine()
    first.connect()
    answers(first, "c01", "c02", round=1)
    answers(first, "c01", round=2)  # and its server is killed before it has saved this round
    resumed = context.engine(accepted={"c01": own(job("c01", 1)), "c02": own(job("c02", 1))})
    resumed.connect()
    again = answers(resumed, "c01", "c02", round=2)
    assert {client: answer.metrics["before"] for client, answer in again.items()} == {"c01": 1, "c02": 1}


def test_an_error_is_the_clients_failure_in_one_line(context, engine):
    context.grid.change[3] = lambda reply: [FlowerMessage(Error(1, "two\nlines  of trouble"), reply_to=reply_to(reply))]
    assert answers(engine)["c03"] == failed("c03", "two lines of trouble")


def reply_to(reply):
    """A message to which another reply can be made."""
    asked = FlowerMessage(RecordDict(), 1, "query")
    asked.metadata.__dict__["_message_id"] = reply.metadata.reply_to_message_id
    return asked


def of_another_protocol(reply):
    reply.content[ABOUT]["protocol"] = 99


def cut_off(reply):
    data = reply.content[PARTS]["0"].data
    reply.content[PARTS]["0"] = Array("uint8", (len(data) - 2,), "safetensors", data[:-2])


def empty(reply):
    reply.content = RecordDict()


@pytest.mark.parametrize(
    ("how", "reason"),
    [(of_another_protocol, "it speaks protocol 99"), (cut_off, "its sha256 is not that"), (empty, "holds no message of ours")],
)
def test_an_answer_that_cannot_be_read_is_a_failure_that_says_so(context, engine, how, reason):
    context.grid.change[2] = lambda reply: [how(reply) or reply]
    found = answers(engine)
    assert isinstance(found["c02"], Failure)
    assert reason in found["c02"].reason
    assert [type(answer) for answer in found.values()] == [Update, Failure, Update, Update]


def test_an_answer_that_flower_cannot_make_out_fails_its_client_alone_in_its_job_and_when_it_comes_late(context):
    engine, late = context.engine(seconds=SOON), []
    engine.connect()
    context.grid.change = {2: lambda reply: [KeyError("Strange")], 3: lambda reply: late.append(reply) or []}
    found = answers(engine)
    assert found["c02"] == failed("c02", "its answer cannot be made out (KeyError: 'Strange')")
    assert [type(answer) for answer in found.values()] == [Update, Failure, Failure, Update]
    context.grid.change = {}
    context.grid.replies[late[0].metadata.reply_to_message_id] = [ValueError("cut off")]
    assert all(isinstance(answer, Update) for answer in answers(engine, round=2).values())


def test_when_the_grid_dies_while_an_answer_is_fetched_no_client_is_blamed(context):
    def dead():
        if context.grid.pushed:
            raise BadRun("Flower's SuperLink has stopped")

    engine = context.engine(check=dead)
    engine.connect()
    context.grid.change[1] = lambda reply: [ConnectionError("no route")]
    with pytest.raises(BadRun, match="SuperLink has stopped"):
        answers(engine)


def test_what_a_client_says_is_one_printable_line_and_not_endless(context, engine):
    context.grid.change[3] = lambda reply: [FlowerMessage(Error(1, "a\n\x1b[31mb" + 9999 * "c"), reply_to=reply_to(reply))]
    reason = answers(engine)["c03"].reason
    assert reason.startswith("a \N{REPLACEMENT CHARACTER}[31mbcc")
    assert len(reason) == 1000


LETTER = answer_message(Update("c02", 1, "train", Patch({"w": torch.ones(1)}), 20, metrics={"loss": 0.5}))


def with_about(**changes):
    return Message({**LETTER.head, "update": {**LETTER.head["update"], **changes}}, LETTER.parts)


@pytest.mark.parametrize(
    "message",
    [
        with_about(metrics=[]),
        with_about(metrics={"loss": "low"}),
        with_about(metrics={"loss": [1.0]}),
        with_about(metrics={"loss": None}),
        with_about(examples="many"),
        with_about(examples=-1),
        with_about(cost={**LETTER.head["update"]["cost"], "seconds": float("nan")}),
        with_about(cost={**LETTER.head["update"]["cost"], "tokens": -1}),
        with_about(cost=None),
        with_about(round=[1]),
        Message({**LETTER.head, "tensors": {"patch/w": [10**30, 10**30]}}, LETTER.parts),
        Message({**LETTER.head, "tensors": [3]}, LETTER.parts),
        Message({"failure": {"client": "c02", "round": 1, "task": "train", "reason": {"a": 1}}}, {}),
    ],
)
def test_whatever_a_client_writes_it_fails_alone(context, engine, message):
    honest = context.answer
    context.grid.apps[2] = client_app(lambda sent, _: honest(sent, "c02") if "hello" in sent.head else message)
    found = answers(engine)
    assert isinstance(found["c02"], Failure)
    assert "holds no answer that can be read" in found["c02"].reason
    assert [type(answer) for answer in found.values()] == [Update, Failure, Update, Update]


@pytest.mark.parametrize("examples", [0, 19, 10**12])
def test_an_update_that_would_weigh_more_or_less_than_its_client_has_examples_is_a_failure(context, engine, examples):
    honest, lie = context.answer, with_about(examples=examples)
    context.grid.apps[2] = client_app(lambda sent, _: honest(sent, "c02") if "hello" in sent.head else lie)
    said = f"it says it has {examples} training examples, and when it came it had 20"
    assert answers(engine)["c02"] == failed("c02", said)


def test_an_update_that_does_not_fit_its_job_is_a_failure_and_what_its_client_kept_for_it_does_not_count(context, engine):
    honest = context.answer
    wide = answer_message(Update("c02", 1, "train", Patch({"w": torch.ones(2)}), 20))
    context.grid.apps[2] = client_app(lambda sent, _: honest(sent, "c02") if "hello" in sent.head else wide)
    assert answers(engine)["c02"] == failed("c02", "its update has w of shape [2], and [1] would fit its job")
    assert "c02" not in engine.accepted and "c01" in engine.accepted


@pytest.mark.parametrize(
    "told",
    [
        {"client": {"name": ["c03"], "examples": 30}},
        {"client": {"name": "c03", "examples": -30}},
        {"client": {"name": "c03", "examples": 30, "memory_bytes": float("nan")}},
        {"profile": {"flops_per_second": 0, "down_bytes_per_second": 1, "up_bytes_per_second": 1}},
        {"profile": {"flops_per_second": 1e300, "down_bytes_per_second": 1, "up_bytes_per_second": 1}},
        {"versions": 3},
        {"counts": "many"},
    ],
)
def test_a_greeting_of_things_that_cannot_be_is_refused_and_the_others_are_there(context, told):
    message = greeting_message(Greeting(CLIENTS["c03"], None, {}))
    strange = Message({"greeting": {**message.head["greeting"], **told}}, {})
    context.grid.apps[3] = client_app(lambda sent, _: strange)
    with pytest.raises(BadRun, match=r"1 of 4 clients are not there: c03 .*holds no greeting that can be read"):
        context.engine().connect()


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"round": 7}, "it answered for c02 in round 7, train, which was not asked"),
        ({"client": "c03"}, "it answered for c03 in round 1, train, which was not asked"),
        ({"task": "profile"}, "it answered for c02 in round 1, profile, which was not asked"),
        ({"patch": Patch({"own": torch.ones(1)})}, "client c02 would send own, which is not among the weights that it got"),
    ],
)
def test_an_answer_to_something_else_or_with_a_weight_nobody_gave_it_is_a_failure(context, engine, wrong, reason):
    lie = replace(Update("c02", 1, "train", Patch({}), 20), **wrong)
    honest = context.answer
    context.grid.apps[2] = client_app(
        lambda message, _: honest(message, "c02") if "hello" in message.head else answer_message(lie)
    )
    found = answers(engine)["c02"]
    assert isinstance(found, Failure)
    assert found.reason.startswith(reason)


def test_a_job_for_another_client_is_not_done(context, engine):
    engine.nodes["c01"] = engine.nodes["c02"]
    assert answers(engine, "c01")["c01"] == failed("c01", "a job of c01 came to c02")


def test_a_client_that_is_not_there_fails_and_takes_part_when_it_is(context, tmp_path):
    gone = context.grid.apps.pop(4)
    engine = context.engine()
    engine.connect(seconds=0, fewest=3)
    assert answers(engine)["c04"] == failed("c04", "it is not connected")
    context.grid.apps[9] = gone  # as another node: its name is what counts
    assert isinstance(answers(engine, round=2)["c04"], Update)


def test_a_client_whose_node_has_gone_fails_and_takes_part_again_under_its_name(context, engine):
    gone = context.grid.apps.pop(4)
    assert answers(engine)["c04"] == failed("c04", "it is not connected")
    context.grid.apps[9] = gone
    assert isinstance(answers(engine, round=2)["c04"], Update)


def test_a_second_node_under_a_name_is_refused_as_long_as_the_first_is_there(context, engine):
    context.grid.apps[9] = client_app(lambda message, _: context.answer(message, "c01"))
    answers(engine)
    assert engine.nodes["c01"] == 1
    assert engine.refused[9] == "two nodes say that they are c01; stop one of them"
    del context.grid.apps[1]
    assert isinstance(answers(engine, round=2)["c01"], Update)
    assert (engine.nodes["c01"], engine.refused) == (9, {})


@pytest.mark.parametrize("seconds", [0, None])
def test_too_few_clients_are_an_error_that_names_those_that_are_missing_and_why(tmp_path, seconds):
    context = ClientContext(tmp_path, ["c01", "c02", "x", "y"])
    with pytest.raises(BadRun, match=r"^2 of 4 clients are not there: c03, c04 .*no client of the run is called x; .*start them"):
        context.engine().connect(seconds=seconds, fewest=3)


def test_a_client_with_other_data_is_refused(context):
    other = greeting_message(Greeting(replace(CLIENTS["c03"], examples=7), None, {}))
    context.grid.apps[3] = client_app(lambda message, _: other)
    with pytest.raises(BadRun, match=r"1 of 4 clients are not there: c03 .*examples=7.* this run has .*examples=30"):
        context.engine().connect()


def test_a_dead_grid_is_an_error_and_no_endless_wait(context):
    def dead():
        raise BadRun("Flower's simulation has stopped")

    engine = context.engine(check=dead)
    with pytest.raises(BadRun, match="has stopped"):
        engine.connect()


def config(tiny_tree, **federation):
    return checked(RunConfig, {**tiny_tree, "federation": {**tiny_tree["federation"], "engine": "flower", **federation}})


def play(message, name):
    return flower.play(message, {"partition-id": int(name[1:]) - 1})


def saved(out):
    return checkpoint.latest(out).name, (checkpoint.latest(out) / "weights.safetensors").read_bytes()


def test_below_the_quorum_a_run_stops_and_resumed_it_ends_with_the_bits_of_one_that_never_did(tiny_tree, tmp_path):
    grid, two = FakeGrid(play, CLIENTS), config(tiny_tree, min_clients=2)
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    runner.run(two, undisturbed, engine=flower.over(grid))

    grid.pushed = []
    lost = 4 + 2 + 2 + 4 + 1  # the answer to this job: evaluations before the first and after the second round ask all four
    grid.change = dict.fromkeys(grid.apps, lambda reply: [] if len(grid.pushed) == lost else [reply])
    late = config(tiny_tree, min_clients=2, round_seconds=SOON)
    with pytest.raises(
        BadRun,
        match=r"^round 3: 1 of 2 clients failed, .*round_seconds = 0\.2, and federation\.min_clients = 2 must answer; .*--resume",
    ):
        runner.run(late, out, engine=flower.over(grid))
    assert checkpoint.latest(out).name == "000002-train"

    grid.change = {}
    runner.run(two, out, resume=True, engine=flower.over(grid))
    assert saved(out) == saved(undisturbed)
    assert saved(out)[0] == "000003-train"


def test_above_the_quorum_a_run_goes_on_without_those_that_failed(tiny_tree, tmp_path):
    grid = FakeGrid(play, CLIENTS)
    grid.change = {1: lambda reply: [FlowerMessage(Error(1, "no"), reply_to=reply_to(reply))]}
    out = runner.run(config(tiny_tree, clients_per_round=4, min_clients=3), tmp_path / "out", engine=flower.over(grid))
    assert checkpoint.latest(out).name == "000003-train"
    assert '"failed": {"c01": "no"}' in (out / "rounds.jsonl").read_text()


def test_what_comes_twice_and_who_fails_stand_in_the_results_folder(tiny_tree, tmp_path):
    grid = FakeGrid(play, CLIENTS)
    grid.change = {1: lambda reply: [reply, reply], 2: lambda reply: [KeyError("Strange")]}
    everyone = config(tiny_tree, rounds=1, clients_per_round=4)
    out = runner.run(everyone, tmp_path / "out", engine=flower.over(grid))
    dropped = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    assert {"client": "c01", "round": 1, "task": "train"} in dropped
    assert {line["client"] for line in dropped} == {"c01"}
    (line,) = map(json.loads, (out / "rounds.jsonl").read_text().splitlines())
    assert line["failed"] == {"c02": "its answer cannot be made out (KeyError: 'Strange')"}


@pytest.mark.parametrize(
    ("federation", "said"),
    [
        ({"clients_per_round": 2, "min_clients": 3}, "federation.min_clients = 3, but a round asks .* = 2; lower the one"),
        ({"engine": "local", "round_seconds": 5}, 'federation.round_seconds = 5 needs federation.engine = "flower"'),
        ({"engine": "local", "gpus_per_worker": 0.5}, 'federation.gpus_per_worker = 0.5 needs federation.engine = "flower"'),
    ],
)
def test_settings_that_go_together_with_no_other_are_refused(tiny_tree, federation, said):
    with pytest.raises(BadValue, match=said):
        config(tiny_tree, **federation)


def test_who_has_no_flower_is_told_how_to_get_it(tiny_tree, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "find_spec", lambda name: None)
    with pytest.raises(BadValue, match=r'^federation\.engine = "flower" needs Flower.*pip install "fedexperts\[flower\]"'):
        runner.run(config(tiny_tree), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_more_graphics_cards_than_there_are_cannot_be_asked_for(tiny_tree, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(BadValue, match=r"federation\.gpus_per_worker = 0\.25, but this machine has 0; lower it"):
        runner.run(config(tiny_tree, gpus_per_worker=0.25), tmp_path / "out")
