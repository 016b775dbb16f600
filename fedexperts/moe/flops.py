"""What a model costs to hold and to run, counted on its real module tree."""

from collections.abc import Mapping
from dataclasses import dataclass

from fedexperts.moe.anatomy import Experts


@dataclass(frozen=True)
class Footprint:
    """Bytes that training a (sub-)model holds in memory: weights, gradients, optimiser state, activations."""

    dense_bytes: int  # of all that is no routed expert and no router row
    expert_bytes: Mapping[str, int]  # MoE block → one expert with its router row
    activation_bytes: int

    def of(self, experts: Experts) -> int:
        """Bytes of the sub-model that holds `experts`."""
        held = sum(len(ids) * self.expert_bytes[block] for block, ids in experts.items())
        return self.dense_bytes + held + self.activation_bytes
