"""The grid of a SuperLink, which holds one message at a time, and each of its arrays once."""

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from time import monotonic
from typing import cast

import httpx
from flwr.app import Message as FlowerMessage
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PushAppMessagesRequest
from flwr.supercore.constant import PULL_MAX_TIME
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf, make_push_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)
from flwr.supercore.run import Run
from flwr.superlink.grid import HttpGrid

from fedexperts.errors import BadRun

AT_ONCE = 8
"""Objects that are made ready to be sent at a time; none has more than 5 MB."""


class Lent(HttpGrid):
    """A grid whose SuperLink may be there and answer no more.

    Flower's own makes all objects of a message before it sends the first, and has all before it makes a message of them, so it
    holds a message twice.

    Raises:
        BadRun: the SuperLink has not answered for as long as it is asked.
    """

    def get_nodes(self) -> Iterable[NodeInfo]:
        with answering(self._addr):
            return super().get_nodes()

    def push_messages(self, messages: Iterable[FlowerMessage]) -> Iterable[str]:
        with answering(self._addr):
            return super().push_messages(messages)

    def _try_push_messages(self, run_id: int, messages: Iterable[FlowerMessage]) -> list[str]:
        return [name for message in messages for name in self.push(run_id, message)]

    def push(self, run: int, message: FlowerMessage) -> list[str]:
        """The id of `message`, which has been sent."""
        head, client = message_to_proto(remove_content_from_message(message)), self._runtime_client
        objects = get_all_nested_objects(message)
        trees = [get_object_tree(message)]
        asked = client.PushMessages(PushAppMessagesRequest(messages_list=[head], message_object_trees=trees))
        send = make_push_object_fn_protobuf(client.PushObject, self.node, run, asked.session_id)
        wanted = set(asked.objects_to_push)
        rest = (name for name in objects if name in wanted)
        while some := list(islice(rest, AT_ONCE)):
            push_objects({name: objects[name] for name in some}, send)
            drop_responses()
        return list(asked.message_ids)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[FlowerMessage]:
        with answering(self._addr):
            client, run = self._runtime_client, cast(Run, self._run).run_id
            found = client.PullMessages(PullAppMessagesRequest(message_ids=message_ids))
            pull = make_pull_object_fn_protobuf(client.PullObject, self.node, run)
            messages: list[FlowerMessage] = []
            for head, tree in zip(found.messages_list, found.message_object_trees, strict=True):
                name = head.metadata.message_id
                received = ConfirmMessageReceivedRequest(node=self.node, run_id=run, message_object_id=name)
                try:
                    message = cast(FlowerMessage, inflated(tree, pull))
                except ObjectPullError:
                    raise
                except Exception:  # it has come and is none: nobody will ask for it again
                    client.ConfirmMessageReceived(received)
                    raise
                client.ConfirmMessageReceived(received)
                message.metadata.__dict__["_message_id"] = name
                messages.append(message)
            return messages


def inflated(tree: ObjectTree, pull: Callable[[str], bytes]) -> InflatableObject:
    """What `tree` is the table of contents of; of each array, the pieces are pulled, joined and let go of before the next."""
    objects: dict[str, InflatableObject] = {}
    joined: set[str] = set()
    until = monotonic() + PULL_MAX_TIME

    def pulled(names: list[str]) -> dict[str, bytes]:
        return pull_objects(names, pull, max_time=max(0.0, until - monotonic()))

    for node in iterate_object_tree(tree):
        pieces = [child.object_id for child in node.children if not child.children]
        if pieces and len(pieces) == len(node.children) and node.object_id not in objects:
            objects[node.object_id] = inflate_object_from_contents(node.object_id, pulled([node.object_id, *pieces]))
            joined.update(pieces)
            drop_responses()
    rest = [node.object_id for node in iterate_object_tree(tree) if node.object_id not in joined | objects.keys()]
    return inflate_object_from_contents(tree.object_id, pulled(rest), objects=objects)


def drop_responses() -> None:
    """Frees what has come and gone: httpx's responses and their streams hold each other, and with them up to 5 MB each."""
    gc.collect(1)  # they are young; a whole collection takes a while


@contextmanager
def answering(address: str) -> Iterator[None]:
    try:
        yield
    except httpx.TransportError as error:
        reason = f"Flower's SuperLink at {address} answers no more ({type(error).__name__}); go on with --resume"
        raise BadRun(reason) from error
