"""Flower's side of a client: a ClientApp that reads messages from Flower's, and answers them. Needs no torch, no transformers."""

from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import Context, Error
from flwr.app import Message as FlowerMessage
from flwr.clientapp import ClientApp

from fedexperts.engines.flower.codec import from_records, to_records
from fedexperts.engines.message import Message
from fedexperts.errors import FedExpertsError

Handler = Callable[[Message, Mapping[str, Any]], Message]
"""A message and Flower's configuration of the node → the answer."""
REFUSED = 1000
"""The code of an error of ours; Flower's own are below."""
MOST_LETTERS = 10_000
"""Of such an error; a SuperLink takes no more than 64 KiB of an answer without its objects."""


def client_app(handle: Handler) -> ClientApp:
    """A ClientApp that answers every message by `handle`, or refuses it with the sentence of what that raises."""
    app = ClientApp()

    @app.query()
    def reply(flower_message: FlowerMessage, context: Context) -> FlowerMessage:
        try:
            answer = handle(from_records(flower_message.content), context.node_config)
            return FlowerMessage(to_records(answer), reply_to=flower_message)
        except FedExpertsError as error:
            return FlowerMessage(Error(REFUSED, str(error)[:MOST_LETTERS]), reply_to=flower_message)

    return app
