"""Flower's side of a client: it takes letters out of messages and puts answers in. Needs neither torch nor transformers."""

from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from fedexperts.engines.flower.codec import from_records, to_records
from fedexperts.engines.message import Letter
from fedexperts.errors import FedExpertsError

Answer = Callable[[Letter, Mapping[str, Any]], Letter]
"""A letter, and what Flower knows of the node (its node configuration) → the answer."""
REFUSED = 1000  # the code of an error of ours; Flower's own are below


def client_app(answer: Answer) -> ClientApp:
    """A ClientApp whose every message is a letter that `answer` answers, or refuses with a sentence."""
    app = ClientApp()

    @app.query()
    def reply(message: Message, context: Context) -> Message:
        try:
            return Message(to_records(answer(from_records(message.content), context.node_config)), reply_to=message)
        except FedExpertsError as error:
            return Message(Error(REFUSED, str(error)), reply_to=message)

    return app
