"""The neurons of a feed-forward network divided into experts by their co-activation, and a router fitted to them.

As in MoEfication (Zhang et al., 2022, https://arxiv.org/abs/2110.01786) and LLaMA-MoE (Zhu et al., 2024,
https://arxiv.org/abs/2406.16554): neurons that are active on the same tokens form an expert. Ours: neurons that are always on or
make attention sinks are shared, and the router is fitted in closed form.
"""

from dataclasses import dataclass
from random import Random

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from fedexperts.models.upcycle.parts import FFN, Activation, MoE, States

LOGIT_STD = 0.05  # of the router: weights stay near 1/k, as the dense model has them
SINK = 4.0  # a neuron whose output exceeds so many median norms of the layer's output makes (or undoes) an attention sink
UNUSUAL = 5.0  # median norms of the layer's output, above which a token is a sink itself and no example for router and experts
RIDGE = 1e-2  # of the mean eigenvalue
ROUNDS = 6  # of k-means
CLUSTERED = 2048  # tokens by which neurons are clustered


@dataclass(frozen=True, eq=False)
class Neurons:
    """How the neurons of a network behave on a calibration text."""

    output: Float[Tensor, "tokens neurons"]  # norm of what the neuron adds to the layer's output
    layer: Float[Tensor, " tokens"]  # norm of the layer's output
    sink: Bool[Tensor, " neurons"]

    @property
    def usual(self) -> Bool[Tensor, " tokens"]:
        """Tokens that are no attention sinks."""
        return self.layer < UNUSUAL * self.layer.median()

    def always_on(self) -> Float[Tensor, " neurons"]:
        """Mean share of each neuron in the energy of all neurons on a token."""
        energy = self.output[self.usual].pow(2)
        return (energy / energy.sum(1, keepdim=True).clamp(min=1e-30)).mean(0)


def observe(ffn: FFN, hidden: Float[Tensor, "tokens neurons"]) -> Neurons:
    """`hidden`: the activations of `ffn`. Sinks: neurons that on some token exceed SINK times the median output of the layer."""
    output = hidden.abs() * ffn.down.float().norm(dim=0)
    layer = (hidden @ ffn.down.float().T).norm(dim=1)
    return Neurons(output, layer, output.amax(0) > SINK * layer.median())


def divide(neurons: Neurons, num_experts: int, shared: int, rng: Random) -> tuple[Int[Tensor, " shared"], list[Tensor]]:
    """The ids of the shared neurons, and those of each expert, ascending: sinks are shared first, then those most on."""
    order = (neurons.always_on() + 10.0 * neurons.sink).argsort(descending=True, stable=True)
    rest = order[shared:].sort().values
    seen = neurons.output[neurons.usual]
    seen = seen[:: -(-len(seen) // CLUSTERED)]
    own = cluster(seen[:, rest], num_experts, rng)
    return order[:shared].sort().values, [rest[own == expert] for expert in range(num_experts)]


def cluster(output: Float[Tensor, "tokens neurons"], num_experts: int, rng: Random) -> Int[Tensor, " neurons"]:
    """Expert of each neuron: spherical k-means of the neurons by where they are active, with experts of equal size.

    Raises:
        AssertionError: the number of neurons is no multiple of the number of experts.
    """
    points = normalize(output - output.mean(0), dim=0).T
    size, remainder = divmod(len(points), num_experts)
    assert remainder == 0
    centers = points[rng.sample(range(len(points)), num_experts)]
    for _ in range(ROUNDS):
        own = balanced(points @ centers.T, size)
        centers = normalize(torch.stack([points[own == expert].mean(0) for expert in range(num_experts)]), dim=1)
    return own


def balanced(similarity: Float[Tensor, "neurons experts"], size: int) -> Int[Tensor, " neurons"]:
    """Expert of each neuron: pairs are taken from the most to the least similar until each expert has `size` neurons."""
    num_neurons, num_experts = similarity.shape
    own, left, missing = [-1] * num_neurons, [size] * num_experts, num_neurons
    for pair in similarity.flatten().argsort(descending=True, stable=True).tolist():
        neuron, expert = divmod(pair, num_experts)
        if own[neuron] < 0 and left[expert]:
            own[neuron], left[expert], missing = expert, left[expert] - 1, missing - 1
            if not missing:
                break
    return torch.tensor(own)


def ridge(
    inputs: Float[Tensor, "tokens hidden"],
    targets: Float[Tensor, "tokens experts"],
    std: float,
    weights: Float[Tensor, " tokens"] | None = None,
) -> Float[Tensor, "experts hidden"]:
    """The router whose logits are the ridge regression of `targets` on `inputs`, scaled to the standard deviation `std`.

    weights: of the tokens; None: all alike.
    """
    x, y = inputs.double(), targets.double()
    weighted = x if weights is None else x * weights.double()[:, None]
    gram = weighted.T @ x
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    solution = torch.linalg.solve(gram, weighted.T @ y)
    router: Tensor = solution * (std / (x @ solution).std().clamp(min=1e-30))
    return router.T.float()


@dataclass(frozen=True, eq=False)
class Divided:
    """A network in parts, which add up to it."""

    shared: FFN
    experts: list[FFN]


def norms(divided: Divided, inputs: Float[Tensor, "tokens hidden"], act: Activation) -> Float[Tensor, "tokens experts"]:
    """The norm of what each expert would add; only one expert's output is in memory at a time."""
    return torch.stack([expert.output(inputs, act).norm(dim=1) for expert in divided.experts], dim=1)


def split(ffn: FFN, states: States, num_experts: int, shared: int, top_k: int, rng: Random) -> tuple[MoE, dict[str, float]]:
    """`ffn` as `num_experts` experts and `shared` shared neurons; and the errors of its output with `top_k` experts.

    The weights of a token's experts sum to one, so that down projections are multiplied by top_k. With all experts active the
    router is zero: its weights are equal then, and the layer is exactly the dense one.
    """
    inputs = states.calibration().float()
    neurons = observe(ffn, ffn.activations(inputs, states.act))
    shared_ids, groups = divide(neurons, num_experts, shared, rng)
    divided = Divided(ffn.part(shared_ids), [ffn.part(ids) for ids in groups])

    usual = inputs[neurons.usual]
    added = norms(divided, usual, states.act) / neurons.layer[neurons.usual, None].clamp(min=1e-30)
    router = ridge(usual, added - added.mean(1, keepdim=True), LOGIT_STD)
    facts = errors(divided, router, states, UNUSUAL * float(neurons.layer.median()), top_k, rng)
    facts |= {"sink_neurons": int(neurons.sink.sum()), "sink_neurons_shared": int(neurons.sink[shared_ids].sum())}

    router = torch.zeros_like(router) if top_k == num_experts else router
    experts = [ffn.part(ids, scale=top_k) for ids in groups]
    return MoE(router, experts, ffn.part(shared_ids, scale=2) if shared else None), facts


def errors(
    divided: Divided, router: Float[Tensor, "experts hidden"], states: States, limit: float, top_k: int, rng: Random
) -> dict[str, float]:
    """Mean relative error of the layer's output on held-out tokens, by how the `top_k` experts are chosen.

    routed: by `router`; random: at random; oracle: those that would add the largest norm. Tokens whose output has a norm of
    `limit` or more (sinks) do not count.
    """
    inputs = states.held_out().float()
    added = norms(divided, inputs, states.act)
    draw = torch.rand(added.shape, generator=torch.Generator().manual_seed(rng.getrandbits(63)))
    scores = {"routed": inputs @ router.T, "random": draw, "oracle": added}
    chosen = {kind: torch.zeros_like(added).scatter(1, score.topk(top_k, 1).indices, 1.0) for kind, score in scores.items()}

    left_out = {kind: torch.zeros_like(inputs) for kind in chosen}
    full = divided.shared.output(inputs, states.act)
    for number, expert in enumerate(divided.experts):
        output = expert.output(inputs, states.act)
        full += output
        for kind, mask in chosen.items():
            left_out[kind] += output * (1 - mask[:, number, None])
    size = full.norm(dim=1)
    counted = (size < limit) & (size > 0)
    return {f"error_{kind}": float((each.norm(dim=1) / size)[counted].mean()) for kind, each in left_out.items()}
