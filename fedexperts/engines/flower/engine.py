"""Jobs over a Flower grid: which answer belongs to which job, and what happens to late, broken and missing ones."""

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from math import inf
from time import monotonic, sleep

from flwr.app import Message as FlowerMessage
from flwr.app import MessageType
from flwr.serverapp import Grid as Grid

from fedexperts.engines.base import answer_limit, outline, printable
from fedexperts.engines.flower.client_app import REFUSED
from fedexperts.engines.flower.codec import from_records, to_records
from fedexperts.engines.message import Message
from fedexperts.engines.remote import Greeting, greeting_request, job_request, read_greeting
from fedexperts.engines.serialization import read_answer
from fedexperts.errors import BadMessage, BadRun, listed
from fedexperts.types import Client, Failure, Job, Update

POLL_SECONDS = 0.05
LIFETIME_SECONDS = 30 * 24 * 3600.0
"""After which Flower drops a message. Whether an answer is late is for us to say."""
GREETING_BYTES = 2**22
"""That a client's greeting may take."""
log = logging.getLogger(__name__)

Fetch = Callable[[str, int], Iterable[FlowerMessage]]
"""Fetches the replies to a message of that id; raises BadMessage where one takes more than so many bytes."""


@dataclass(frozen=True)
class SentJob:
    """A job under way, without its numbers."""

    job: Job
    message_id: str | None  # None: its client has no node
    deadline: float  # on the monotonic clock
    node: int | None = None
    connection: object = None  # the connection of the node that it was sent over

    @property
    def limit(self) -> int:
        """Bytes that its answer may take."""
        return answer_limit(self.job)

    def failed(self, reason: str) -> Failure:
        return Failure(self.job.client, self.job.round, self.job.task, printable(reason))


class FlowerEngine:
    """Carries jobs over `grid` to nodes that say which of `clients` they are.

    At most `in_flight` jobs are under way. Answers come in the order of their jobs, as they are merged: one that is there
    earlier stays with Flower until its turn, so this process holds one at a time. A client that has not answered `seconds`
    after its job was sent, by then or by its turn, is a Failure, and so is one whose answer takes more bytes than
    `engines.base.answer_limit` allows. What comes later, twice, or in reply to no job is dropped and counted in `dropped`.

    run: what clients need to know of the run, as JSON.
    clients: name → the client; None for one that may describe itself.
    check: raises when the grid has died.
    names: node → the only client that it may be, where that is known.
    connections: returns for each node a value that changes when the node reconnects, since it has lost its job then.
    announce: receives a sentence when a client joins, is missing or is refused.
    on_dropped: receives the client, round and task of each answer that is dropped.
    fetch: fetches replies; by default the grid does, whatever their size, and a large one is refused afterwards.
    withdraw: receives the id of a job's message when its answer is not waited for any more.
    """

    def __init__(
        self,
        grid: Grid,
        run: str,
        clients: Mapping[str, Client | None],
        *,
        in_flight: int,
        seconds: float = inf,
        check: Callable[[], None] = lambda: None,
        names: Mapping[int, str] | None = None,
        connections: Callable[[], Mapping[int, object]] = dict,
        announce: Callable[[str], None] = log.info,
        on_dropped: Callable[[Mapping[str, object]], None] = lambda _: None,
        fetch: Fetch | None = None,
        withdraw: Callable[[str], None] = lambda _: None,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        self.grid, self.run_info, self.clients = grid, run, clients
        self.in_flight, self.seconds, self.check = in_flight, seconds, check
        self.names, self.connections, self.poll_seconds = names or {}, connections, poll_seconds
        self.announce, self.on_dropped = announce, on_dropped
        self.fetch = fetch or (lambda message_id, limit: grid.pull_messages([message_id]))
        self.withdraw = withdraw
        self.greetings: dict[str, Greeting] = {}
        self.nodes: dict[str, int] = {}  # client → node
        self.refused: dict[int, str] = {}  # node → why it is no client's
        self.greeted: dict[int, object] = {}  # node → the connection over which it was asked who it is
        self.pending_greetings: dict[str, int] = {}  # message → node that has not answered it
        self.job_keys: dict[str, tuple[str, int, str]] = {}  # message → client, round and task, of all jobs
        self.overdue: dict[str, int] = {}  # message nobody waits for any more → bytes that its answer may take
        self.dropped: Counter[str] = Counter()  # by client; "" for replies to no job

    def connect(self, seconds: float | None = None, fewest: int | None = None) -> None:
        """Waits until every client is there; after `seconds` for no more than `fewest` of them.

        A client whose key no node may have is not waited for. Without `seconds` no node will join later than the others: it ends
        when they all have answered.

        Raises:
            BadRun: too few are there.
        """
        deadline = monotonic() + (inf if seconds is None else seconds)
        awaited = [name for name in self.clients if not self.names or name in self.names.values()]
        enough = len(awaited) if fewest is None else fewest
        announced: list[str] = []
        if revoked := [name for name in self.clients if name not in awaited]:
            self.announce(f"not waited for, since no key of theirs is registered here: {listed(revoked)}")
        while True:
            self.check()
            self.greet()
            missing = [name for name in awaited if name not in self.nodes]
            over = monotonic() >= deadline
            if not missing or (over and len(self.nodes) >= enough):
                return
            all_answered = seconds is None and len(self.greeted) >= len(awaited) and not self.pending_greetings
            if over or all_answered:
                because = f" ({'; '.join(self.refused.values())})" if self.refused else ""
                raise BadRun(
                    f"{len(missing)} of {len(self.clients)} clients are not there: {', '.join(missing)}{because}; "
                    "start them, and go on with --resume"
                )
            if missing != announced:
                announced = missing
                self.announce(f"waiting for {', '.join(missing)}")
            sleep(self.poll_seconds)

    def greet(self) -> None:
        """Asks new and reconnected nodes who they are, and admits those that have answered."""
        nodes, connections = list(self.grid.get_node_ids()), self.connections()
        for node in nodes:
            if node in self.greeted and self.greeted[node] == connections.get(node):
                continue
            if message_id := self.push(greeting_request(self.run_info), node, GREETING_BYTES):
                for former in [message for message, other in self.pending_greetings.items() if other == node]:
                    del self.pending_greetings[former]
                    self.withdraw(former)
                self.pending_greetings[message_id] = node
                self.greeted[node] = connections.get(node)
        self.greeted = {node: each for node, each in self.greeted.items() if node in nodes}  # one that comes back is asked again
        for message_id, node in list(self.pending_greetings.items()):
            try:
                if message := self.pull(message_id, GREETING_BYTES):
                    self.admit(node, read_greeting(message))
                    del self.pending_greetings[message_id]
            except BadMessage as error:
                self.refuse(node, str(error))
                del self.pending_greetings[message_id]

    def admit(self, node: int, greeting: Greeting) -> None:
        """Takes `node` for the client that it says it is, unless another connected node has that name."""
        client = greeting.client
        expected = self.clients.get(client.name, f"none of {', '.join(self.clients)}")
        if expected is not None and client != expected:
            both = "give both sides the same run file and data"
            self.refuse(node, f"a node says it is {client}, and this run has {expected}; {both}")
        elif self.names.get(node, client.name) != client.name:
            named = f"a node with the key of {self.names[node]} says it is {client.name}"
            self.refuse(node, f"{named}; give each client its own keys")
        elif self.nodes.get(client.name, node) != node and self.nodes[client.name] in self.grid.get_node_ids():
            self.refuse(node, f"two nodes say that they are {client.name}; stop one of them")
            self.greeted.pop(node, None)  # it is asked again: the other may be one that has died
        else:
            self.refused.pop(node, None)
            self.nodes[client.name], self.greetings[client.name] = node, greeting
            self.announce(f"{client.name} is there")

    def refuse(self, node: int, because: str) -> None:
        reason = printable(because)
        if self.refused.get(node) != reason:
            self.announce(f"refused: {self.names.get(node, f'node {node}')}: {reason}")
        self.refused[node] = reason

    def run(self, jobs: Iterable[Job]) -> Iterator[Update | Failure]:
        """One answer for each job, in their order."""
        self.greet()
        self.drop_late()
        rest = iter(jobs)
        under_way: deque[SentJob] = deque()
        while True:
            under_way.extend(self.send(job) for job in islice(rest, self.in_flight - len(under_way)))
            if not under_way:
                return
            yield self.receive(under_way.popleft())

    def send(self, job: Job) -> SentJob:
        node, kept = self.nodes.get(job.client), outline(job)
        connection = self.connections().get(node or 0)  # before it is sent: a node that reconnects after that has lost the job
        message_id = None
        if node is not None and node in self.grid.get_node_ids():  # of a node that has gone Flower would keep the job on its disk
            message_id = self.push(job_request(job, self.run_info), node, answer_limit(kept))
        if message_id:
            self.job_keys[message_id] = job.client, job.round, job.task
        return SentJob(kept, message_id, monotonic() + self.seconds, node, connection)

    def receive(self, sent: SentJob) -> Update | Failure:
        """The answer to `sent`, waited for until its deadline."""
        if sent.message_id is None:
            return sent.failed("it is not connected")
        while True:
            over = monotonic() >= sent.deadline
            connection = self.connections().get(sent.node or 0, sent.connection)
            reconnected = sent.connection is not None and connection != sent.connection
            self.check()
            try:
                if message := self.pull(sent.message_id, sent.limit):
                    return self.answer_in(message, sent)
            except BadMessage as error:
                self.withdraw(sent.message_id)
                return sent.failed(str(error))
            if over or reconnected:
                self.overdue[sent.message_id] = sent.limit
                self.withdraw(sent.message_id)
                late = f"it did not answer within federation.round_seconds = {self.seconds:g}"
                return sent.failed("it reconnected in the middle of its job" if reconnected else late)
            sleep(self.poll_seconds)

    def answer_in(self, message: Message, sent: SentJob) -> Update | Failure:
        """The answer in `message`, which the boundary will check, or a failure where it answers another job.

        Raises:
            BadMessage: it holds no answer.
        """
        job, answer = sent.job, read_answer(message)
        if (answer.client, answer.round, answer.task) != (job.client, job.round, job.task):
            return sent.failed(f"it answered for {answer.client} in round {answer.round}, {answer.task}, which is not its job")
        return answer

    def push(self, message: Message, node: int, limit: int) -> str | None:
        """The id of the message that was sent, with the bytes that its reply may take; None when there is no such node."""
        flower_message = FlowerMessage(to_records(message), node, MessageType.QUERY, ttl=LIFETIME_SECONDS, group_id=str(limit))
        return next(iter(self.grid.push_messages([flower_message])), None)

    def pull(self, message_id: str, limit: int) -> Message | None:
        """The reply to `message_id`, where it has come; what comes twice, or in reply to something else, is dropped and counted.

        Raises:
            BadMessage: it is an error, takes more than `limit` bytes, or cannot be read.
        """
        answer: FlowerMessage | None = None
        for reply in self.replies(message_id, limit):
            if answer is None and reply.metadata.reply_to_message_id == message_id:
                answer = reply
            else:
                self.drop(reply)
        return read_reply(answer, limit) if answer else None

    def drop_late(self) -> None:
        """Drops and counts what has come after its time, one by one: no two updates are in memory."""
        for message_id, limit in list(self.overdue.items()):
            try:
                replies = self.replies(message_id, limit)
            except BadMessage:
                replies = []
                del self.overdue[message_id]
            for reply in replies:
                self.drop(reply)
                self.overdue.pop(message_id, None)

    def drop(self, reply: FlowerMessage) -> None:
        """Counts an answer that nobody waits for, unless all it says is that Flower cannot reach the client any more."""
        if reply.has_error() and reply.error.code != REFUSED:
            return
        client, round, task = self.job_keys.get(reply.metadata.reply_to_message_id, ("", None, None))
        self.dropped[client] += 1
        self.on_dropped({"client": client, "round": round, "task": task})
        log.warning("an answer of %s that nobody waits for was dropped", client or "an unknown node")

    def replies(self, message_id: str, limit: int) -> list[FlowerMessage]:
        """What has come in reply to `message_id` since the last call.

        Raises:
            BadMessage: it takes more than `limit` bytes, or Flower cannot read it.
        """
        try:
            return list(self.fetch(message_id, limit))
        except BadMessage:
            raise
        except Exception as error:  # a client may have sent any bytes
            self.check()  # unless it is the server's own side that has died
            raise BadMessage(f"its answer cannot be read ({type(error).__name__}: {error})") from error


def read_reply(reply: FlowerMessage, limit: int) -> Message:
    """Raises BadMessage with the reason when `reply` is an error, or holds no message of at most `limit` bytes."""
    if reply.has_error():
        raise BadMessage(reply.error.reason or f"Flower reports error {reply.error.code} and no reason")
    return from_records(reply.content, limit)
