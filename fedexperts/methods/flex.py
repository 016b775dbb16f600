"""FLEx: clients share adapters of the frozen MoE and graft personal experts onto it, which never leave them.

Liu, Pan, Wang, Yao, Tang, Wang, Shi, "FLEx: Personalized Federated Learning for Mixture-of-Experts LLMs via Expert Grafting",
https://arxiv.org/abs/2506.00965. What it leaves open is marked (ours).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Literal

import torch
from torch import Tensor, nn

from fedexperts.core.training import fit, load_weights, stratified_first_n, sub_model
from fedexperts.errors import BadData, BadValue
from fedexperts.methods.adapters import attention_adapters
from fedexperts.methods.base import Count, all_experts, answer, by_examples, entries, mean_rows, with_flops
from fedexperts.methods.contract import Declaration, Method
from fedexperts.methods.personal import update_client_state
from fedexperts.methods.public_text import fingerprint, read_public_text, windows
from fedexperts.moe import factors, graft, lora, rows
from fedexperts.moe.anatomy import Experts, anatomy
from fedexperts.moe.logits import is_encoder_decoder
from fedexperts.moe.packed import Packed
from fedexperts.moe.reconstruction import Batch, by_reconstruction, most_used, selection_flops_estimated
from fedexperts.types import Assignment, Client, ClientContext, Job, Server, Tensors, Training, Update

GRAFTED = "grafted"
"""`grafted/<block>` in the client state: ids of the experts that the personal experts were copied from, int64 [grafts]."""

PACKED_TOKENS = 1024
"""Tokens of a batch of the selection with a model whose weights are packed, counted as max_tokens an example."""


@dataclass(frozen=True)
class FLEx(Method):
    """The server averages the trained weights of the base model (attention adapters in the paper), never personal experts.

    num_grafted: personal experts per layer.
    select: the experts that personal experts are copied from: those that reconstruct the layer best on the client's text
    ("reconstruction") or on `public_text`, the same for all clients ("shared"); those that the client's text uses most
    ("most_used"); or "random".
    calibration_examples: training examples for the selection, at most, in proportion to each task's share (ours); or windows of
    `public_text`.
    """

    num_grafted: Count = 1
    select: Literal["reconstruction", "random", "most_used", "shared"] = "reconstruction"
    calibration_examples: Count = 128
    calibration_stride: Count = 2  # uses every n-th token; 1: all, as in the paper (2 is ours and halves the time)
    public_text: str | None = None  # path of a text file on every client, for "shared"

    def declare(self) -> Declaration:
        return Declaration(
            job_extra=("public_text",),
            client_state=(f"{GRAFTED}/",),
            keeps_weights=True,
            personal_experts=self.num_grafted,
            local_files=("public_text",),
            training=attention_adapters,
        )

    def build_model(self, job: Job, context: ClientContext) -> nn.Module:
        """The whole model with the client's personal experts, once they are selected."""
        model = sub_model(job, context)
        if ids := grafted_ids(context.client_state):
            graft.attach(model, ids, context.training.tuning, seed=job.seed)
        return load_weights(model, job, context)

    def assign(self, server: Server, client: Client) -> Assignment:
        """The whole model; its trained weights are sent.

        Raises:
            BadValue: more personal experts than a layer has experts, a run that trains the experts themselves, a rank that
                adapters of personal experts do not support, or `select = "shared"` without `public_text` or vice versa.
        """
        fewest = min(block.num_experts for block in server.anatomy.blocks.values())
        if self.num_grafted > fewest:
            raise BadValue(f"method.num_grafted = {self.num_grafted}, but a layer has {fewest} experts; give at most as many")
        if any(block and not rows.router_of(name, server.layout) for name, block in server.layout.items()):
            raise BadValue(
                'flex leaves the pretrained experts as they are, but the run trains them; set training.train = "lora" and '
                'training.parts = ["attention"] (a comparison does so by itself, unless a variant says otherwise)'
            )
        adapters = factors.pairs(server.weights)
        if adapters and any(block.stacked for block in server.anatomy.blocks.values()):
            lora.check_rank(factors.rank_of(server.weights), server.weights[next(iter(adapters))].dtype)
        if (self.select == "shared") != (self.public_text is not None):
            raise BadValue('method.select = "shared" and method.public_text go together; give both, or neither')
        if self.public_text is None:
            return all_experts(server)
        return replace(all_experts(server), extra={"public_text": fingerprint(read_public_text(self.public_text))})

    def train(self, job: Job, context: ClientContext) -> Update:
        """Trains personal experts and gates, which the client keeps, together with the shared weights, which it sends.

        In its first job the client selects the experts to graft, with the base model.
        """
        flops = 0.0
        if not grafted_ids(context.client_state):
            ids, flops = self.selection(job, context)
            context.client_state.update(as_state(ids))
        model = self.build_model(job, context)
        fitted = fit(model, context, seed=job.seed)
        update_client_state(job, context, model)
        return answer(job, context, model, replace(fitted, cost=with_flops(fitted.cost, flops)))

    def round_flops(self, model: nn.Module, batch: Batch, training: Training) -> float:
        """With the selection of a client's first round."""
        number = 0 if self.select == "random" else -(-self.calibration_examples // training.batch_size)
        return super().round_flops(model, batch, training) + self.selection_flops(model, [batch] * number)

    def selection_flops(self, model: nn.Module, batches: Sequence[Batch]) -> float:
        """FLOPs of the selection on `batches`."""
        passes = 0 if self.select == "most_used" else self.num_grafted
        return selection_flops_estimated(model, batches, passes, self.calibration_stride)

    def selection(self, job: Job, context: ClientContext) -> tuple[Experts, float]:
        """The experts to copy the personal experts from, and the estimated FLOPs of the selection.

        Raises:
            BadData: no examples for the selection, or another public text than the server's.
        """
        if self.select == "random":
            rng, blocks = Random(f"{job.seed}/graft"), anatomy(context.model).blocks
            ids = {name: rng.sample(range(each.num_experts), self.num_grafted) for name, each in blocks.items()}
            return {name: tuple(sorted(drawn)) for name, drawn in ids.items()}, 0.0
        if self.public_text is not None and not torch.equal(
            fingerprint(read_public_text(self.public_text)), job.extra["public_text"]
        ):
            raise BadData(f"method.public_text = {self.public_text!r} is another text here than the server's; give all the same")
        batches = self.calibration(context)
        if self.select == "most_used":
            return most_used(context.model, batches, self.num_grafted), self.selection_flops(context.model, batches)
        selected = by_reconstruction(context.model, batches, self.num_grafted, self.calibration_stride)
        return selected, self.selection_flops(context.model, batches)

    def calibration(self, context: ClientContext) -> list[Batch]:
        """The examples or windows for the selection, in batches of the run's size.

        Those of a model with packed weights have about PACKED_TOKENS tokens, where that is more (ours): each batch unpacks all
        experts, whatever its size.

        Raises:
            BadData: there are none.
        """
        if self.public_text is not None:
            examples = windows(read_public_text(self.public_text), self.calibration_examples, is_encoder_decoder(context.model))
        else:
            examples = stratified_first_n(context.data.train, self.calibration_examples)
        if not examples:
            raise BadData(
                f"client {context.client.name} has no training examples to select its experts by; give it some, or leave it out"
            )
        size = context.training.batch_size
        if any(isinstance(weight, Packed) for weight in context.model.parameters()):
            size = max(size, PACKED_TOKENS // context.encoder.max_tokens)
        return [context.encoder.batch(examples[start : start + size]) for start in range(0, len(examples), size)]

    def merge(self, server: Server, updates: Iterable[Update]) -> Server:
        """The mean of the shared weights, by examples."""
        return mean_rows(server, updates, by_examples)


def as_state(ids: Experts) -> dict[str, Tensor]:
    """`ids` as entries of the client state."""
    return {f"{GRAFTED}/{name}": torch.tensor(experts) for name, experts in ids.items()}


def grafted_ids(client_state: Tensors) -> dict[str, tuple[int, ...]]:
    """The inverse of `as_state`; empty before the client's selection."""
    return {block: tuple(ids.tolist()) for block, ids in entries(GRAFTED, client_state).items()}
