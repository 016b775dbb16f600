"""Jobs over a Flower grid: what goes out, whose answer is whose, and what becomes of those that are late, broken or missing."""

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

from fedexperts.engines.base import outline
from fedexperts.engines.flower.client_app import REFUSED
from fedexperts.engines.flower.codec import from_records, to_records
from fedexperts.engines.message import Message
from fedexperts.engines.remote import Greeting, hello, order, read_greeting
from fedexperts.engines.serialization import read_answer
from fedexperts.errors import BadMessage, BadRun
from fedexperts.types import Client, Failure, Job, Update

POLL_SECONDS = 0.05
LIFETIME_SECONDS = 30 * 24 * 3600.0
"""After which Flower drops a message. Whether an answer is late is for us to say."""
MOST_LETTERS = 1000
"""Of a sentence that comes from a client."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sent:
    """A job under way, without its numbers."""

    job: Job
    message_id: str | None  # None: no node could be given it
    until: float  # on the monotonic clock
    node: int | None = None
    since: object = None  # as which connection of the node it was sent

    def failed(self, reason: str) -> Failure:
        return Failure(self.job.client, self.job.round, self.job.task, printable(reason))


class FlowerEngine:
    """Carries jobs over `grid` to nodes that say which of `clients` they are.

    At most `in_flight` jobs are under way. Answers come in the order of their jobs, as they are merged: one that is there
    earlier stays with Flower until its turn, so this process holds one at a time. A client that has not answered `seconds`
    after its job was sent, by then or by its turn, is a Failure. What comes later, twice, or to nobody's question is dropped
    and counted in `dropped`.

    run: what clients need to know of the run. clients: None for one that may say of itself what it likes. accepted: for each
    client the key of its last job whose answer was taken, in a run that is resumed. check: raises when the grid has died.
    names: node → the only client that it may be, where that is known. since: gives for each node something that changes when it
    connects anew, since what it was at is lost then. tell: gets a sentence on who is there and who is refused. note: gets the
    client, round and task of each answer that is dropped.
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
        since: Callable[[], Mapping[int, object]] = dict,
        tell: Callable[[str], None] = log.info,
        note: Callable[[Mapping[str, object]], None] = lambda _: None,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        self.grid, self.about, self.clients = grid, run, clients
        self.in_flight, self.seconds, self.check = in_flight, seconds, check
        self.names, self.since, self.tell, self.poll_seconds = names or {}, since, tell, poll_seconds
        self.note = note
        self.greetings: dict[str, Greeting] = {}
        self.nodes: dict[str, int] = {}  # client → node
        self.refused: dict[int, str] = {}  # node → why it is no client's
        self.greeted: dict[int, object] = {}  # node → as which connection of it
        self.hellos: dict[str, int] = {}  # message → node that has not answered it
        self.asked: dict[str, tuple[str, int, str]] = {}  # message → client, round and task, of all jobs
        self.overdue: set[str] = set()  # messages nobody waits for any more
        self.dropped: Counter[str] = Counter()  # by client; "" for answers to nobody's question

    def connect(self, seconds: float | None = None, fewest: int | None = None) -> None:
        """Waits until every client is there; after `seconds` for no more than `fewest` of them.

        Without `seconds` no node will join later than the others: it ends when they all have answered.

        Raises:
            BadRun: too few are there.
        """
        until = monotonic() + (inf if seconds is None else seconds)
        enough = len(self.clients) if fewest is None else fewest
        told: list[str] = []
        while True:
            self.check()
            self.greet()
            missing = [name for name in self.clients if name not in self.nodes]
            over = monotonic() >= until
            if not missing or (over and len(self.nodes) >= enough):
                return
            settled = seconds is None and len(self.greeted) >= len(self.clients) and not self.hellos
            if over or settled:
                because = f" ({'; '.join(self.refused.values())})" if self.refused else ""
                raise BadRun(
                    f"{len(missing)} of {len(self.clients)} clients are not there: {', '.join(missing)}{because}; "
                    "start them, and go on with --resume"
                )
            if missing != told:
                told = missing
                self.tell(f"waiting for {', '.join(missing)}")
            sleep(self.poll_seconds)

    def greet(self) -> None:
        """Asks nodes that are new who they are, and takes in those that have said so."""
        nodes, since = list(self.grid.get_node_ids()), self.since()
        for node in nodes:
            if node in self.greeted and self.greeted[node] == since.get(node):
                continue
            if message_id := self.push(hello(self.about), node):
                self.hellos = {asked: other for asked, other in self.hellos.items() if other != node} | {message_id: node}
                self.greeted[node] = since.get(node)
        self.greeted = {node: was for node, was in self.greeted.items() if node in nodes}  # one that comes back is asked again
        for message_id, node in list(self.hellos.items()):
            try:
                if message := self.pull(message_id):
                    self.welcome(node, read_greeting(message))
                    del self.hellos[message_id]
            except BadMessage as error:
                self.refuse(node, str(error))
                del self.hellos[message_id]

    def welcome(self, node: int, greeting: Greeting) -> None:
        """Takes `node` for the client that it says it is, unless another node that is there has that name."""
        said = greeting.client
        known = self.clients.get(said.name, f"none of {', '.join(self.clients)}")
        if known is not None and said != known:
            self.refuse(node, f"a node says it is {said}, and this run has {known}; give both sides the same run file and data")
        elif self.names.get(node, said.name) != said.name:
            self.refuse(node, f"a node with the key of {self.names[node]} says it is {said.name}; give each client its own keys")
        elif self.nodes.get(said.name, node) != node and self.nodes[said.name] in self.grid.get_node_ids():
            self.refuse(node, f"two nodes say that they are {said.name}; stop one of them")
            self.greeted.pop(node, None)  # it is asked again: the other may be one that has died
        else:
            self.refused.pop(node, None)
            self.nodes[said.name], self.greetings[said.name] = node, greeting
            self.tell(f"{said.name} is there")

    def refuse(self, node: int, because: str) -> None:
        reason = printable(because)
        if self.refused.get(node) != reason:
            self.tell(f"refused: {self.names.get(node, f'node {node}')}: {reason}")
        self.refused[node] = reason

    def run(self, jobs: Iterable[Job]) -> Iterator[Update | Failure]:
        """One answer for each job, in their order."""
        self.greet()
        rest = iter(jobs)
        under_way: deque[Sent] = deque()
        while True:
            under_way.extend(self.send(job) for job in islice(rest, self.in_flight - len(under_way)))
            if not under_way:
                return
            yield self.receive(under_way.popleft())

    def send(self, job: Job) -> Sent:
        node = self.nodes.get(job.client)
        since = self.since().get(node or 0)  # before it is sent: who connects anew after that has not seen it, or has lost it
        message = order(job, self.about)
        message_id = self.push(message, node) if node is not None else None
        if message_id:
            self.asked[message_id] = job.client, job.round, job.task
        return Sent(outline(job), message_id, monotonic() + self.seconds, node, since)

    def receive(self, sent: Sent) -> Update | Failure:
        """The answer to `sent`, waited for until its time is over."""
        if sent.message_id is None:
            return sent.failed("it is not connected")
        self.drop_late()
        while True:
            over = monotonic() >= sent.until
            anew = sent.since is not None and self.since().get(sent.node or 0, sent.since) != sent.since
            self.check()
            try:
                if message := self.pull(sent.message_id):
                    return self.taken(sent, message)
            except BadMessage as error:
                return sent.failed(str(error))
            if over or anew:
                self.overdue.add(sent.message_id)
                late = f"it did not answer within federation.round_seconds = {self.seconds:g}"
                return sent.failed("it connected anew in the middle of its job" if anew else late)
            sleep(self.poll_seconds)

    def taken(self, sent: Sent, message: Message) -> Update | Failure:
        """The answer in `message`, which the boundary will check, or why it is none.

        Raises:
            BadMessage: it holds none.
        """
        answer, job = read_answer(message), sent.job
        if (answer.client, answer.round, answer.task) != (job.client, job.round, job.task):
            return sent.failed(f"it answered for {answer.client} in round {answer.round}, {answer.task}, which was not asked")
        return answer

    def push(self, message: Message, node: int) -> str | None:
        """The id of the message with `message`; None when there is no such node."""
        message_id = FlowerMessage(to_records(message), node, MessageType.QUERY, ttl=LIFETIME_SECONDS)
        return next(iter(self.grid.push_messages([message_id])), None)

    def pull(self, message_id: str) -> Message | None:
        """The answer to `message_id`, where it has come; what comes twice, or to nobody's question, is dropped and counted.

        Raises:
            BadMessage: it is an error, or cannot be read.
        """
        found: FlowerMessage | None = None
        for reply in self.replies(message_id):
            if found is None and reply.metadata.reply_to_message_id == message_id:
                found = reply
            else:
                self.drop(reply)
        return letter_of(found) if found else None

    def drop_late(self) -> None:
        """Drops and counts what has come after its time, one by one: no two updates are held."""
        for message_id in list(self.overdue):
            try:
                replies = self.replies(message_id)
            except BadMessage:
                replies = []
                self.overdue.discard(message_id)
            for reply in replies:
                self.drop(reply)
                self.overdue.discard(message_id)

    def drop(self, reply: FlowerMessage) -> None:
        """Counts an answer that nobody waits for, unless all it says is that Flower cannot reach the client any more."""
        if reply.has_error() and reply.error.code != REFUSED:
            return
        client, round, task = self.asked.get(reply.metadata.reply_to_message_id, ("", None, None))
        self.dropped[client] += 1
        self.note({"client": client, "round": round, "task": task})
        log.warning("an answer of %s that nobody waits for was dropped", client or "an unknown node")

    def replies(self, message_id: str) -> list[FlowerMessage]:
        """What has come for `message_id` since it was last asked for.

        Raises:
            BadMessage: Flower cannot make it out.
        """
        try:
            return list(self.grid.pull_messages([message_id]))
        except Exception as error:  # a client may have sent any bytes
            self.check()  # unless it is the server's own side that has died
            raise BadMessage(f"its answer cannot be made out ({type(error).__name__}: {error})") from error


def letter_of(reply: FlowerMessage) -> Message:
    """Raises BadMessage with the reason when `reply` is an error, or holds no message."""
    if reply.has_error():
        raise BadMessage(reply.error.reason or f"Flower reports error {reply.error.code} and no reason")
    return from_records(reply.content)


def printable(text: str) -> str:
    """What came from a client as one line that can go to a terminal."""
    line = " ".join(text.split())
    return "".join(message if message.isprintable() else "\N{REPLACEMENT CHARACTER}" for message in line)[:MOST_LETTERS]
