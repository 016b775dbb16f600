"""FLEx: clients share adapters of the frozen MoE, and each grafts personal experts onto it that never leave it.

Liu, Pan, Wang, Yao, Tang, Wang, Shi, "FLEx: Personalized Federated Learning for Mixture-of-Experts LLMs via Expert Grafting",
https://arxiv.org/abs/2506.00965. What it leaves open is marked (ours).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Literal

import torch
from torch import Tensor, nn

from fedexperts.core.training import fit, load_weights, stratified_first_n, sub_model
from fedexperts.errors import BadData, BadValue
from fedexperts.methods.base import Count, all_experts, answer, by_examples, mean_rows, of
from fedexperts.methods.contract import Declaration, Method
from fedexperts.methods.personal import keep
from fedexperts.moe import factors, graft, lora, rows
from fedexperts.moe.anatomy import Experts, anatomy
from fedexperts.moe.logits import is_encoder_decoder
from fedexperts.moe.reconstruction import Batch, by_reconstruction, most_used, selection_flops_estimated
from fedexperts.types import Assignment, Client, ClientContext, Example, Job, Server, Tensors, Update

GRAFTED = "grafted"
"""A client keeps as `grafted/<block>` which experts of a block its personal ones started as: int64 [grafts]."""

WINDOW = 2000
"""Characters of a piece of public text; the tokens that a client reads of it are the run's max_tokens at most."""


@dataclass(frozen=True)
class FLEx(Method):
    """The server averages what the run trains of the model itself (attention adapters in the paper) and knows of nothing else.

    num_grafted: personal experts of each layer.
    select: which experts they start as: those that reconstruct the layer best on the client's own text ("reconstruction") or
    on `public_text`, so the same for all ("shared"); that the client's text uses most ("most_used"); or "random".
    calibration_examples: of the client's training split, at most, to select by, of each task as its share is (ours); of
    `public_text` as many windows.
    """

    num_grafted: Count = 1
    select: Literal["reconstruction", "random", "most_used", "shared"] = "reconstruction"
    calibration_examples: Count = 128
    calibration_stride: Count = 2  # every so many-th token is looked at; 1: all, as in the paper (ours: half the time)
    public_text: str | None = None  # a text file that every client has, for "shared"

    def declare(self) -> Declaration:
        return Declaration(
            job_extra=("public_text",),
            client_state=(f"{GRAFTED}/",),
            keeps_weights=True,
            personal_experts=self.num_grafted,
            local_files=("public_text",),
        )

    def build_model(self, job: Job, context: ClientContext) -> nn.Module:
        """The whole model with the personal experts that the client has selected, if it has."""
        model = sub_model(job, context)
        if ids := grafted_ids(context.client_state):
            graft.attach(model, ids, context.training.tuning, seed=job.seed)
        return load_weights(model, job, context)

    def assign(self, server: Server, client: Client) -> Assignment:
        """The whole model; what the run trains of it travels.

        Raises:
            BadValue: more personal experts than a layer has experts, a run that trains the experts themselves, a rank that
                adapters of personal experts do not take, or a selection by public text that is not there.
        """
        fewest = min(block.num_experts for block in server.anatomy.blocks.values())
        if self.num_grafted > fewest:
            raise BadValue(f"method.num_grafted = {self.num_grafted}, but a layer has {fewest} experts; give at most as many")
        if any(block and not rows.router_of(name, server.layout) for name, block in server.layout.items()):
            raise BadValue(
                'flex leaves the pretrained experts as they are, but the run trains them; set training.train = "lora" and '
                'training.parts = ["attention"]'
            )
        adapters = factors.pairs(server.weights)
        if adapters and any(block.stacked for block in server.anatomy.blocks.values()):
            lora.check_rank(factors.rank_of(server.weights), server.weights[next(iter(adapters))].dtype)
        if (self.select == "shared") != (self.public_text is not None):
            raise BadValue('method.select = "shared" and method.public_text go together; give both, or neither')
        if self.public_text is None:
            return all_experts(server)
        return replace(all_experts(server), extra={"public_text": fingerprint(public(self.public_text))})

    def train(self, job: Job, context: ClientContext) -> Update:
        """The client's round: its personal experts and gates, which it keeps, together with what is shared, which it sends.

        The first time it is asked it selects the experts to graft, by the base as it came.
        """
        flops = 0.0
        if not grafted_ids(context.client_state):
            ids, flops = self.selected(job, context)
            context.client_state.update(as_state(ids))
        model = self.build_model(job, context)
        fitted = fit(model, context, seed=job.seed)
        keep(job, context, model)
        cost = replace(fitted.cost, flops_estimated=fitted.cost.flops_estimated + flops)
        return answer(job, context, model, replace(fitted, cost=cost))

    def selected(self, job: Job, context: ClientContext) -> tuple[Experts, float]:
        """The experts that the client's own start as, and the operations (estimated) that it took to find them.

        Raises:
            BadData: there is nothing to select by, or the public text is not the server's.
        """
        blocks = anatomy(context.model).blocks
        if self.select == "random":
            rng = Random(f"{job.seed}/graft")
            return {
                name: tuple(sorted(rng.sample(range(each.num_experts), self.num_grafted))) for name, each in blocks.items()
            }, 0.0
        if self.public_text is not None and not torch.equal(fingerprint(public(self.public_text)), job.extra["public_text"]):
            raise BadData(f"method.public_text = {self.public_text!r} is another text here than the server's; give all the same")
        batches = self.calibration(context)
        if self.select == "most_used":
            return most_used(context.model, batches, self.num_grafted), selection_flops_estimated(
                context.model, batches, passes=0
            )
        ids = by_reconstruction(context.model, batches, self.num_grafted, self.calibration_stride)
        return ids, selection_flops_estimated(context.model, batches, self.num_grafted, self.calibration_stride)

    def calibration(self, context: ClientContext) -> list[Batch]:
        """What is selected by, in batches of the run's size.

        Raises:
            BadData: there is nothing.
        """
        if self.public_text is not None:
            examples = pieces(public(self.public_text), self.calibration_examples, is_encoder_decoder(context.model))
        else:
            examples = stratified_first_n(context.data.train, self.calibration_examples)
        if not examples:
            raise BadData(
                f"client {context.client.name} has no training examples to select its experts by; give it some, or leave it out"
            )
        size = context.training.batch_size
        return [context.encoder.batch(examples[start : start + size]) for start in range(0, len(examples), size)]

    def merge(self, server: Server, updates: Iterable[Update]) -> Server:
        """What is shared: the mean by examples."""
        return mean_rows(server, updates, by_examples)


def public(name: str) -> str:
    """The text in the file `name`.

    Raises:
        BadValue: no file, or none with text in it.
    """
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        text = ""
    if not text.strip():
        raise BadValue(
            f"method.public_text = {name!r} is no file with text (UTF-8) in it; give a text file that every client has"
        )
    return text


def fingerprint(text: str) -> Tensor:
    """sha256 of it, as a job carries it, so that all select by the same."""
    return torch.tensor(list(sha256(text.encode()).digest()), dtype=torch.uint8)


def pieces(text: str, number: int, read_and_written: bool = False) -> Sequence[Example]:
    """At most `number` pieces of `text`, evenly spread over it; `read_and_written`: each also as its own prompt (ours).

    Else the experts of an encoder would be chosen by a prompt that is empty.
    """
    starts = range(0, len(text), WINDOW)
    chosen = min(number, len(starts))
    spread = (starts[turn * len(starts) // chosen] for turn in range(chosen))
    found = (text[start : start + WINDOW] for start in spread)
    return [Example(piece if read_and_written else "", piece, "public") for piece in found]


def as_state(ids: Experts) -> dict[str, Tensor]:
    """`ids` as a client keeps them."""
    return {f"{GRAFTED}/{name}": torch.tensor(experts) for name, experts in ids.items()}


def grafted_ids(client_state: Tensors) -> dict[str, tuple[int, ...]]:
    """The ids that `as_state` made tensors of; none before the client has selected any."""
    return {block: tuple(ids.tolist()) for block, ids in of(GRAFTED, client_state).items()}
