"""Whatever a client of a deployment sends over the wire: it fails alone, with a reason that can be read, or does no harm."""

import pytest
from fakegrid import FakeGrid, reply_to
from flwr.app import Message as FlowerMessage
from tampered_examples import examples
from tampered_kinds import Absent
from tampering import WHO, played, tree_of

from fedexperts.core.ledger import Ledger
from fedexperts.engines import remote
from fedexperts.engines.flower.codec import from_records, to_records
from fedexperts.engines.flower.engine import FlowerEngine
from fedexperts.engines.serialization import answer_message, read_answer, read_job
from fedexperts.errors import BadMessage
from fedexperts.experiment import runner
from fedexperts.federation import answers, federate

KINDS = [kind for kind in examples() if "600 MB" not in kind.name]  # which test_bad_answers.py sends
SENT = 140
"""Kinds at least that a message can carry, of the answer to each task; the others no client can write with our code."""
READ_AS_NUMBERS = (
    "labels of a task = {5: [1, 0, 0]}",  # JSON makes a string of the key
    "round = '1'",
    "cost.seconds = True",
    "cost.tokens = True",
    "cost.flops_estimated = True",
)
"""Kinds that the decoder reads as the numbers that they stand for."""


class Replayed:
    """Nodes that answer as honest clients did before, and an engine over them."""

    def __init__(self, task):
        self.task, clients = task, task.server.clients
        self.grid = FakeGrid(self.answer, list(clients))
        self.node = 1 + list(clients).index(WHO)
        self.engine = FlowerEngine(self.grid, "the run", clients, in_flight=3)
        self.engine.connect()

    def answer(self, message, name):
        if "hello" in message.head:
            return remote.answer(self.task.honest.runtime, name, message)
        job = read_job(message)
        return answer_message(self.task.honest.answers[job.client, job.task])

    def failed(self, content):
        """Why the client is left out when it sends `content`: nothing else may come of it."""
        self.grid.change[self.node] = lambda reply: [FlowerMessage(content, reply_to=reply_to(reply))]
        ledger, method, server = Ledger(), self.task.prepared.method, self.task.server
        reports = runner.reports_of(self.task.prepared)
        if self.task.task == "evaluate":
            list(answers(server, method, self.engine, ledger, server.clients.values(), reports))
        else:
            next(federate(server, method, self.engine, ledger, rounds=1, clients_per_round=3, reports=reports))
        failed = {entry.client: entry.failed for entry in ledger.entries}
        reason = failed.pop(WHO)
        assert failed and not any(failed.values())
        return reason


def wired(kind, answer):
    """The records in which a client would send a changed answer.

    Raises:
        Absent: the answer has nothing to be changed, or no message can carry it.
    """
    message = from_records(to_records(answer_message(answer)))
    changed = kind.change(read_answer(message))
    try:
        return to_records(answer_message(changed))
    except (AttributeError, TypeError, ValueError, RuntimeError, OverflowError, RecursionError, BadMessage):
        raise Absent from None


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of torch, when a test makes a sparse tensor
@pytest.mark.parametrize("name", ["fedmoe", "hfedmoe"])
def test_whatever_a_client_sends_it_fails_alone_with_a_reason_or_does_no_harm(method_trees, tmp_path, name):
    for task in played(tree_of(method_trees[name]), tmp_path):
        nodes, sent = Replayed(task), 0
        for kind in KINDS:
            try:
                content = wired(kind, task.answer)
            except Absent:
                continue
            reason = nodes.failed(content)
            sent += 1
            assert kind.harmless or reason or kind.name in READ_AS_NUMBERS, f"{task.task}: {kind.name} is accepted"
            assert reason is None or (reason.isprintable() and len(reason) <= 500)
        assert sent >= SENT
        assert not nodes.engine.dropped
