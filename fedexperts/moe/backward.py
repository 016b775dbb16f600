"""Backward that reaches only chosen experts, as in HFedMoE's clients (arXiv 2601.00583, section 4.2).

Masking gradients after backward saves nothing. Here no weight gradient is computed for an expert that is not chosen, none of its
inner activations is stored for backward, and each expert is a separate parameter of the optimizer, which has no state for it.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from fedexperts.errors import BadValue, listed
from fedexperts.moe.anatomy import Block, Experts, blocks
from fedexperts.moe.device import generator_states, kept_generators, set_generator_states
from fedexperts.moe.lora import (
    ExpertLoRA,
    activated,
    ends_in_stack,
    ends_of,
    first_matrix,
    grouped,
    grouped_outer,
    normed,
    projected,
)
from fedexperts.moe.precision import current_autocast

IMPLEMENTATION = "fedexperts_selective"  # the name of our experts function in transformers' registry
CHOOSE = "choose experts between forward and backward"
Through = Literal["chosen", "all"]
"""The experts through which gradients flow to the layers below."""


class SelectiveBackward:
    """Within its `with` block, forward of `model` is unchanged, and backward reaches only the chosen experts.

    `choose` sets them between forward and backward. Outputs of experts that are not chosen are constants in backward: their
    weights get no gradient, and no gradient flows through them to the layers below. A router gets that of a full backward from
    its own layer, since the outputs of all experts are stored for it; what comes from layers above lacks the way through experts
    that are not chosen, so that in the last layer alone it is the full one. All other activations of an expert are freed when it
    is not chosen. (Experts of Switch store none; the chosen ones are computed again.)

    With `through` = "all", gradients do flow through all experts to the layers below, and only the weights of those that are not
    chosen get none: the gradients of all other weights are those of a full backward. Then no activations are freed.
    """

    def __init__(self, model: nn.Module, through: Through = "chosen") -> None:
        self.model = model
        self._parts = {
            name: (_ModuleExperts if block.is_switch else _StackedExperts)(block, through == "all")
            for name, block in blocks(model).items()
        }
        self._undo = ExitStack()

    def __enter__(self) -> "SelectiveBackward":
        model = cast("Any", self.model)
        if any(isinstance(part, _StackedExperts) for part in self._parts.values()):
            self._undo.callback(model.set_experts_implementation, model.get_experts_implementation())
            model.set_experts_implementation(IMPLEMENTATION)
        for part in self._parts.values():
            self._undo.callback(part.leave)
            part.enter()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters for an optimizer: of a trained stack one per expert, which shares its memory; all others as they are."""
        split_ids = {id(parameter) for part in self._parts.values() for parameter in part.split_parameters()}
        whole = [each for each in self.model.parameters() if each.requires_grad and id(each) not in split_ids]
        rows = [row for part in self._parts.values() if isinstance(part, _StackedExperts) for row in part.row_parameters()]
        return [*whole, *rows]

    def choose(self, experts: Experts) -> None:
        """Sets the experts that the next backward reaches, by block; none of a block that is absent.

        Raises:
            BadValue: an unknown block, or ids that are unknown or do not ascend.
        """
        for name, ids in experts.items():
            if name not in self._parts:
                raise BadValue(
                    f"{name} is no MoE block of this model; give names of its blocks, such as {next(iter(self._parts))}"
                )
            number = self._parts[name].number
            if list(ids) != sorted(set(ids)) or not all(0 <= expert < number for expert in ids):
                raise BadValue(f"{name} was given experts {listed(ids)}; give ids from 0 to {number - 1}, ascending, each once")
        for name, part in self._parts.items():
            part.choose(torch.tensor(experts.get(name, ()), dtype=torch.int64, device=part.device))

    def left_out(self) -> Iterator[nn.Parameter]:
        """The trained parameters of all experts that are not chosen, whose optimizer state can be dropped."""
        for part in self._parts.values():
            chosen = set(part.chosen.tolist()) if part.chosen is not None else set()
            for expert in range(part.number):
                if expert not in chosen:
                    yield from part.parameters_of(expert)


class _StackedExperts:
    """The stacked experts of a block. through_all: gradients flow through all of them, chosen or not."""

    def __init__(self, block: Block, through_all: bool) -> None:
        self.experts, self.through_all = block.experts, through_all
        self.number = block.shape.num_experts
        self.device = next(block.experts.parameters()).device
        self.chosen: Tensor | None = None
        self.anchor = torch.zeros((), requires_grad=True, device=self.device)
        self.expert = torch.empty(0, dtype=torch.int64)  # of each pair (token, expert) of the last forward
        self.first_outputs: Tensor | None = None  # of the first matrices for these pairs; after `choose`, of the chosen experts
        self.rng_states: tuple[Tensor, ...] = ()  # of torch's generators before the adapters' dropout drew from them
        self.stacks = dict(self._stacks())  # path of each trained stack below the experts → the stack, and the expert of each row
        self.parameters = {  # path → expert → its row as a separate parameter
            path: {int(expert): nn.Parameter(row) for expert, row in zip(ids, stack.detach(), strict=True)}
            for path, (stack, ids) in self.stacks.items()
        }

    def _stacks(self) -> Iterator[tuple[str, tuple[nn.Parameter, list[int]]]]:
        """The path of each trained stack, the stack, and the expert of each of its rows."""
        for path, parameter in self.experts.named_parameters():
            if not parameter.requires_grad:
                continue
            owner = self.experts.get_submodule(path.rpartition(".")[0])
            if isinstance(owner, ExpertLoRA):
                yield path, (parameter, owner.ids.tolist())
            elif owner is self.experts and parameter.shape[0] == self.number:
                yield path, (parameter, list(range(self.number)))

    def enter(self) -> None:
        cast("Any", self.experts).selective = self

    def leave(self) -> None:
        del cast("Any", self.experts).selective

    def split_parameters(self) -> Iterator[nn.Parameter]:
        return (stack for stack, _ in self.stacks.values())

    def row_parameters(self) -> Iterator[nn.Parameter]:
        return (row for rows in self.parameters.values() for row in rows.values())

    def parameters_of(self, expert: int) -> Iterator[nn.Parameter]:
        return (rows[expert] for rows in self.parameters.values() if expert in rows)

    def choose(self, chosen: Tensor) -> None:
        self.chosen = chosen
        if self.first_outputs is not None and not self.through_all:
            self.keep_first_outputs_of(chosen)

    def keep_first_outputs_of(self, experts: Tensor) -> None:
        assert self.first_outputs is not None
        self.first_outputs = self.first_outputs.index_select(0, torch.isin(self.expert, experts).nonzero().flatten())

    def outputs(self, rows: Tensor, expert: Tensor) -> Tensor:
        """The outputs of the experts for their rows, before their norm; the outputs of the first matrices are stored."""
        ends = ends_of(expert, self.number)
        self.expert = expert
        self.rng_states = generator_states(rows.device)
        self.first_outputs = projected(self.experts, first_matrix(self.experts), rows, expert, ends)
        return projected(self.experts, "down_proj", activated(self.experts, self.first_outputs), expert, ends)

    def normed(self, out: Tensor) -> Tensor:
        """`outputs` after the norm of the experts, if they have one."""
        return normed(self.experts, out)

    def backward(self, rows: Tensor, expert: Tensor, gradient: Tensor, out: Tensor, reached: Tensor) -> Tensor:
        """Backward from `gradient` through `outputs` into the parameters of chosen experts; the gradient of `rows`.

        out: the outputs for all pairs, of which those at `reached` belong to `rows`.
        """
        assert self.first_outputs is not None
        sorted_rows = self.sorted(expert)
        if len(self.first_outputs) > len(rows):  # gradient checkpointing ran forward again after experts were chosen
            self.keep_first_outputs_of(sorted_rows.present)
        adapters = self.copies(sorted_rows.present)
        if self.experts.has_post_expert_norm:
            gradient = _through(self.normed, out.index_select(0, reached), gradient)
        with torch.enable_grad():
            first = self.first_outputs.requires_grad_()
            inner = activated(self.experts, first)
        self.first_outputs = None
        gradient = self.through_matrix("down_proj", inner.detach(), gradient, sorted_rows, adapters)
        (gradient,) = torch.autograd.grad(inner, first, gradient)
        return self.through_matrix(first_matrix(self.experts), rows, gradient, sorted_rows, adapters)

    def through_matrix(
        self, name: str, inputs: Tensor, gradient: Tensor, rows: "_SortedRows", adapters: Mapping[str, ExpertLoRA]
    ) -> Tensor:
        """Backward through `projected` into the parameters of chosen experts among those of `rows`; the gradient of `inputs`."""
        gradient, present, ends = gradient.contiguous(), rows.present, rows.ends[rows.present]
        self.weight_gradients(name, inputs, gradient, rows)
        weight = getattr(self.experts, name).detach()
        in_stack = ends_in_stack(self.experts, rows.ends, len(weight))
        grad_inputs = grouped(gradient, weight.transpose(1, 2) if self.experts.is_transposed else weight, in_stack)
        if name not in adapters or not len(adapters[name].ids):
            return grad_inputs
        adapter, local = adapters[name], torch.searchsorted(present, rows.expert)
        grad_inputs += _through(partial(adapter.add, torch.zeros_like(gradient), expert=local, ends=ends), inputs, gradient)
        for path, each in adapter.named_parameters():
            if each.grad is not None:
                own = torch.isin(present[adapter.ids], self.reached)
                self.add_gradients(f"lora.{name}.{path}", present[adapter.ids][own], each.grad[own])
        return grad_inputs

    def weight_gradients(self, name: str, inputs: Tensor, gradient: Tensor, rows: "_SortedRows") -> None:
        """Adds the gradients of the trained matrices and biases `name` of the chosen experts among those of `rows`."""
        if self.through_all:
            places = torch.isin(rows.expert, self.reached).nonzero().flatten()
            inputs, gradient, rows = inputs[places], gradient[places], self.sorted(rows.expert[places])
        if name in self.parameters:
            left, right = (inputs, gradient) if self.experts.is_transposed else (gradient, inputs)
            self.add_gradients(name, rows.present, grouped_outer(left, right, rows.ends[rows.present]))
        if f"{name}_bias" in self.parameters:
            sums = gradient.new_zeros(self.number, gradient.shape[1]).index_add_(0, rows.expert, gradient)
            self.add_gradients(f"{name}_bias", rows.present, sums[rows.present])

    def sorted(self, expert: Tensor) -> "_SortedRows":
        return _SortedRows(expert, expert.unique_consecutive(), ends_of(expert, self.number))

    @property
    def reached(self) -> Tensor:
        """The chosen experts."""
        assert self.chosen is not None, CHOOSE
        return self.chosen

    def copies(self, present: Tensor) -> dict[str, ExpertLoRA]:
        """The adapters of the experts `present`, with separate gradients and with the dropout of the forward pass."""
        adapters = dict(self.adapters())
        if not adapters:
            return {}
        reached = torch.isin(self.expert, present)
        copies = {name: _select_experts(adapter, present) for name, adapter in adapters.items()}
        with kept_generators(self.expert.device):
            set_generator_states(self.rng_states, self.expert.device)
            for name in (first_matrix(self.experts), "down_proj"):  # in the order of `outputs`
                if name in adapters and adapters[name].dropout.p:
                    a = adapters[name].a
                    copies[name].dropout = _FixedDropout(
                        adapters[name].dropout(a.new_ones(len(self.expert), a.shape[2]))[reached]
                    )
        return copies

    def adapters(self) -> Iterator[tuple[str, ExpertLoRA]]:
        """The name of each adapted matrix and its adapter."""
        if "lora" in self.experts._modules:
            yield from ((name, cast("ExpertLoRA", each)) for name, each in cast("nn.ModuleDict", self.experts.lora).items())

    def add_gradients(self, path: str, experts: Tensor, gradients: Tensor) -> None:
        """Adds a gradient to the row of each of `experts` in the stack `path`."""
        for expert, gradient in zip(experts.tolist(), gradients, strict=True):
            row = self.parameters[path][expert]
            own = gradient.to(row.dtype)
            row.grad = own if row.grad is None else row.grad + own


class _SortedRows(NamedTuple):
    """The experts of rows that are sorted by them."""

    expert: Tensor  # of each row
    present: Tensor  # each of them once
    ends: Tensor  # of the rows of each expert of the block


def _through(function: Callable[[Tensor], Tensor], inputs: Tensor, gradient: Tensor, into_weights: bool = True) -> Tensor:
    """Backward through `function`, into its parameters if `into_weights`; the gradient of `inputs`."""
    with torch.enable_grad():
        leaf = inputs.detach().requires_grad_()
        out = function(leaf)
    torch.autograd.backward(out, gradient.to(out.dtype), inputs=None if into_weights else [leaf])
    return cast("Tensor", leaf.grad)


class _FixedDropout(nn.Dropout):
    """Dropout with the `factors`, 0 or 1 / (1 - p), of an earlier pass."""

    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, rows: Tensor) -> Tensor:
        return rows * self.factors


def _select_experts(adapter: ExpertLoRA, experts: Tensor) -> ExpertLoRA:
    """A copy of `adapter` for those of `experts` that it adapts, with their indices in `experts` as ids."""
    adapted = torch.isin(adapter.ids, experts)
    ids = torch.searchsorted(experts, adapter.ids[adapted]).tolist()
    part = ExpertLoRA(adapter.a.detach()[adapted], adapter.b.detach()[adapted], adapter.scale, ids, len(experts))
    return part.requires_grad_(adapter.a.requires_grad)


class _ModuleExperts:
    """The experts of a block that are modules (Switch). Both computations of a chosen expert draw the same dropout.

    through_all: gradients flow through all of them, chosen or not.
    """

    def __init__(self, block: Block, through_all: bool) -> None:
        self.experts, self.through_all = cast("nn.ModuleDict", block.experts), through_all
        self.number = block.shape.num_experts
        self.device = next(block.experts.parameters()).device
        self.chosen: Tensor | None = None
        self.anchor = torch.zeros((), requires_grad=True, device=self.device)
        self.rng_states: dict[int, tuple[Tensor, ...]] = {}  # expert → states of torch's generators before it drew

    def enter(self) -> None:
        cast("Any", self.experts).forward = partial(_one_hot_forward, self)

    def leave(self) -> None:
        del cast("Any", self.experts).forward

    def split_parameters(self) -> Iterator[nn.Parameter]:
        return iter(())

    def parameters_of(self, expert: int) -> Iterator[nn.Parameter]:
        return (each for each in self.experts[f"expert_{expert}"].parameters() if each.requires_grad)

    def choose(self, chosen: Tensor) -> None:
        self.chosen = chosen

    def outputs(self, rows: Tensor, expert: Tensor) -> Tensor:
        """The outputs of the experts for their rows."""
        out = torch.empty_like(rows)
        for each in expert.unique().tolist():
            self.rng_states[each] = generator_states(rows.device)
            out[expert == each] = self.experts[f"expert_{each}"](rows[expert == each]).to(out.dtype)
        return out

    def normed(self, out: Tensor) -> Tensor:
        """These experts have no norm."""
        return out

    def backward(self, rows: Tensor, expert: Tensor, gradient: Tensor, *_: Tensor) -> Tensor:
        """Computes the experts again, then backward through them into parameters of chosen ones; the gradient of `rows`."""
        assert self.chosen is not None, CHOOSE
        grad_rows, chosen = torch.zeros_like(rows), set(self.chosen.tolist())
        for each in expert.unique().tolist():
            own = expert == each
            with kept_generators(self.device):
                set_generator_states(self.rng_states[each], self.device)
                module = self.experts[f"expert_{each}"]
                grad_rows[own] = _through(module, rows[own], gradient[own], into_weights=each in chosen)
        return grad_rows


class _Selective(torch.autograd.Function):
    """The outputs of experts, weighted and summed over the pairs (token, expert) of each token; pairs are sorted by expert.

    `pair` is the flat index of each in `weights`: token = pair // top_k.
    """

    @staticmethod
    def forward(
        ctx: Any,
        part: _StackedExperts | _ModuleExperts,
        anchor: Float[Tensor, ""],  # requires a gradient, so that backward is called even if nothing below is trained
        hidden: Float[Tensor, "tokens hidden"],
        weights: Float[Tensor, "tokens top_k"],
        expert: Int[Tensor, " pairs"],
        pair: Int[Tensor, " pairs"],
    ) -> Float[Tensor, "tokens hidden"]:
        tokens, top_k = weights.shape
        token = pair // top_k
        out = part.outputs(hidden.index_select(0, token), expert)
        ctx.part, ctx.precision = part, current_autocast(hidden.device)
        ctx.save_for_backward(hidden, weights, expert, pair, token, out)
        weighted = hidden.new_zeros(tokens * top_k, out.shape[-1], dtype=torch.promote_types(out.dtype, weights.dtype))
        weighted.index_copy_(0, pair, part.normed(out) * weights.reshape(-1)[pair].unsqueeze(1))
        return weighted.view(tokens, top_k, -1).sum(dim=1).to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weights, expert, pair, token, out = ctx.saved_tensors
        assert ctx.part.chosen is not None, CHOOSE
        through = expert.unique_consecutive() if ctx.part.through_all else ctx.part.chosen
        # index_select copies rows several times as fast as an index, and what is changed in place stays in the cache
        grad_pairs = gradients[0].index_select(0, token).to(torch.promote_types(out.dtype, weights.dtype))
        reached = torch.isin(expert, through).nonzero().flatten()
        grad_out = grad_pairs.index_select(0, reached).mul_(weights.reshape(-1)[pair[reached]].unsqueeze(1)).to(out.dtype)

        grad_weights = torch.zeros_like(weights)
        grad_weights.view(-1)[pair] = grad_pairs.mul_(ctx.part.normed(out)).sum(-1).to(weights.dtype)
        del grad_pairs

        token = token[reached]
        with ctx.precision:
            grad_rows = ctx.part.backward(hidden.index_select(0, token), expert[reached], grad_out, out, reached)
        grad_hidden = torch.zeros_like(hidden).index_add_(0, token, grad_rows.to(hidden.dtype))
        return None, None, grad_hidden, grad_weights, None, None


def _selective(part: _StackedExperts | _ModuleExperts, hidden: Tensor, weights: Tensor, expert: Tensor, pair: Tensor) -> Tensor:
    out = _Selective.apply(part, part.anchor, hidden, weights, expert, pair)  # type: ignore[no-untyped-call]  # torch's
    return cast("Tensor", out)


def _stacked_forward(self: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward pass of stacked experts, which transformers calls as one of its implementations."""
    expert, pair = torch.sort(top_k_index.reshape(-1), stable=True)
    return _selective(self.selective, hidden, top_k_weights, expert, pair)


def _one_hot_forward(part: _ModuleExperts, hidden: Tensor, picked: Tensor, weights: Tensor) -> Tensor:
    """The forward pass of Switch's experts; a token beyond an expert's capacity has a row of zeros in `picked`, so no pair."""
    expert, token = picked.reshape(len(hidden), -1).T.nonzero().unbind(1)
    return _selective(part, hidden, weights, expert, token)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _stacked_forward)
