"""Flower's side of a client: it takes messages out of messages and puts answers in. Needs neither torch nor transformers."""

from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import Context, Error
from flwr.app import Message as FlowerMessage
from flwr.clientapp import ClientApp

from fedexperts.engines.flower.codec import from_records, to_records
from fedexperts.engines.message import Message
from fedexperts.errors import FedExpertsError

Answer = Callable[[Message, Mapping[str, Any]], Message]
"""A message, and what Flower knows of the node (its node configuration) → the answer."""
REFUSED = 1000  # the code of an error of ours; Flower's own are below


def client_app(answer: Answer) -> ClientApp:
    """A ClientApp whose every message is a message that `answer` answers, or refuses with a sentence."""
    app = ClientApp()

    @app.query()
    def reply(flower_message: FlowerMessage, context: Context) -> FlowerMessage:
        try:
            return FlowerMessage(
                to_records(answer(from_records(flower_message.content), context.node_config)), reply_to=flower_message
            )
        except FedExpertsError as error:
            return FlowerMessage(Error(REFUSED, str(error)), reply_to=flower_message)

    return app
