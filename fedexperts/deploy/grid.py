"""The grid of a SuperLink: it has one message in memory at a time, each array of it once, and none that is too large."""

import gc
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from math import inf
from threading import Lock
from time import monotonic
from typing import cast

import httpx
from flwr.app import Array
from flwr.app import Message as FlowerMessage

from fedexperts.deploy.flower_internals import (
    PULL_MAX_TIME,
    ConfirmMessageReceivedRequest,
    HttpGrid,
    InflatableObject,
    NodeInfo,
    ObjectPushError,
    ObjectTree,
    PullAppMessagesRequest,
    PushAppMessagesRequest,
    Run,
    get_all_nested_objects,
    get_object_body,
    get_object_head_values_from_object_content,
    get_object_tree,
    inflate_object_from_contents,
    iterate_object_tree,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
    message_to_proto,
    metadata_from_proto,
    pull_objects,
    push_objects,
    remove_content_from_message,
)
from fedexperts.deploy.link_state import with_framing
from fedexperts.engines.message import require_size
from fedexperts.errors import BadRun

PUSHED_TOGETHER = 8
"""Objects that are made ready to be sent at a time; none has more than 5 MB."""


class SuperLinkGrid(HttpGrid):
    """The grid of a run on a SuperLink that may stop answering.

    Flower's own makes all objects of a message before it sends the first, and has all before it makes a message of them, so it
    has a message in memory twice.

    Raises:
        BadRun: the SuperLink has not answered any of its retries.
    """

    def get_nodes(self) -> Iterable[NodeInfo]:
        with answering(self._addr):
            return super().get_nodes()

    def push_messages(self, messages: Iterable[FlowerMessage]) -> Iterable[str]:
        with answering(self._addr):
            return super().push_messages(messages)

    def _try_push_messages(self, run_id: int, messages: Iterable[FlowerMessage]) -> list[str]:
        return [message_id for message in messages for message_id in self.push(run_id, message)]

    def push(self, run: int, message: FlowerMessage) -> list[str]:
        """The id of `message`, which has been sent; none where its node has given it up before it was there."""
        head, client = message_to_proto(remove_content_from_message(message)), self._runtime_client
        objects = get_all_nested_objects(message)
        trees = [get_object_tree(message)]
        accepted = client.PushMessages(PushAppMessagesRequest(messages_list=[head], message_object_trees=trees))
        send = make_push_object_fn_protobuf(client.PushObject, self.node, run, accepted.session_id)
        missing = set(accepted.objects_to_push)
        rest = (name for name in objects if name in missing)
        try:
            while some := list(islice(rest, PUSHED_TOGETHER)):
                push_objects({name: objects[name] for name in some}, send)
                drop_responses()
        except ObjectPushError:
            return []
        return [each for each in accepted.message_ids if each]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[FlowerMessage]:
        return [message for message_id in message_ids for message in self.fetch(message_id, inf)]

    def fetch(self, message_id: str, limit: float) -> list[FlowerMessage]:
        """The replies to a message that have come since the last call.

        limit: bytes that one may take; no more than that, and one object of Flower's, is fetched.

        Raises:
            BadMessage: a reply is larger. It is given up, and so is one that cannot be read, whatever exception that raises.
        """
        with answering(self._addr):
            client, run = self._runtime_client, cast(Run, self._run).run_id
            replies = client.PullMessages(PullAppMessagesRequest(message_ids=[message_id]))
            pull = make_pull_object_fn_protobuf(client.PullObject, self.node, run)
            messages: list[FlowerMessage] = []
            for head, tree in zip(replies.messages_list, replies.message_object_trees, strict=True):
                received = ConfirmMessageReceivedRequest(node=self.node, run_id=run, message_object_id=head.metadata.message_id)
                try:
                    message = inflated(tree, LimitedPull(pull, limit))
                finally:  # where it cannot be read, too: Flower gives it out only once
                    client.ConfirmMessageReceived(received)
                message.__dict__["_metadata"] = metadata_from_proto(head.metadata)  # the SuperLink's word, not the sender's
                messages.append(message)
            return messages

    def withdraw(self, message_id: str) -> None:
        """Removes a message that its node has not fetched, and whose reply nobody waits for, from the SuperLink's disk."""
        with answering(self._addr):
            run = cast(Run, self._run).run_id
            self._runtime_client.ConfirmMessageReceived(
                ConfirmMessageReceivedRequest(node=self.node, run_id=run, message_object_id=message_id)
            )


class LimitedPull:
    """Pulls the objects of a message, as long as they, and the arrays they make, take no more than `limit` bytes.

    An array names its pieces, and can name one a thousand times. Flower's own framing comes on top.
    """

    def __init__(self, pull: Callable[[str], bytes], limit: float) -> None:
        self.pull, self.limit, self.lock = pull, with_framing(limit), Lock()
        self.deadline = monotonic() + PULL_MAX_TIME
        self.sizes: dict[str, int] = {}  # of the objects that were pulled
        self.pulled = self.joined = 0  # bytes

    def one(self, name: str) -> bytes:
        content = self.pull(name)
        with self.lock:
            self.sizes[name] = len(content)
            self.pulled += len(content)
            require_size(self.pulled, self.limit)
        return content

    def many(self, names: list[str]) -> dict[str, bytes]:
        contents = pull_objects(names, self.one, max_time=max(0.0, self.deadline - monotonic()))
        self.joined += sum(joined_size(content, self.sizes) for content in contents.values())
        require_size(self.joined, self.limit)
        return contents


def joined_size(content: bytes, sizes: Mapping[str, int]) -> int:
    """Bytes of the array that `content` makes of pieces whose `sizes` are known; 0 where it is no array."""
    kind, pieces, _ = get_object_head_values_from_object_content(content)
    if kind != Array.__qualname__:
        return 0
    return sum(sizes.get(pieces[number], 0) for number in json.loads(get_object_body(content, Array))["arraychunk_ids"])


def inflated(tree: ObjectTree, pull: LimitedPull) -> FlowerMessage:
    """The message whose objects `tree` lists; of each array, the pieces are pulled, joined and let go of before the next."""
    objects: dict[str, InflatableObject] = {}
    joined: set[str] = set()
    for node in iterate_object_tree(tree):
        pieces = [child.object_id for child in node.children if not child.children]
        if pieces and len(pieces) == len(node.children) and node.object_id not in objects:
            objects[node.object_id] = inflate_object_from_contents(node.object_id, pull.many([node.object_id, *pieces]))
            joined.update(pieces)
            drop_responses()
    rest = [node.object_id for node in iterate_object_tree(tree) if node.object_id not in joined | objects.keys()]
    message = inflate_object_from_contents(tree.object_id, pull.many(rest), objects=objects)
    if not isinstance(message, FlowerMessage):
        raise TypeError(f"a {type(message).__name__} came, and no message")
    return message


def drop_responses() -> None:
    """Frees what has come and gone: httpx's responses and their streams reference each other, and up to 5 MB each."""
    gc.collect(1)  # they are young; a whole collection takes a while


@contextmanager
def answering(address: str) -> Iterator[None]:
    try:
        yield
    except httpx.TransportError as error:
        reason = f"Flower's SuperLink at {address} answers no more ({type(error).__name__}); go on with --resume"
        raise BadRun(reason) from error
