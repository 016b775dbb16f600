"""Backward that reaches only chosen experts, as HFedMoE's clients do (arXiv 2601.00583, section 4.2).

To mask gradients after backward saves nothing. Here no weight gradient is computed for an expert that is not chosen, nothing
of its inside is kept for backward, and each expert is a parameter of its own to the optimiser, which so holds no state for it.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from fedexperts.errors import BadValue
from fedexperts.moe.anatomy import Block, Experts, blocks
from fedexperts.moe.lora import ExpertLoRA, activated, ends_of, first_matrix, grouped, grouped_outer, normed, projected

IMPLEMENTATION = "fedexperts_selective"  # the name of our experts function in transformers' registry


class SelectiveBackward:
    """While it is on, the experts of `model` compute as ever, and backward reaches only those that were chosen.

    Between forward and backward `choose` names them. What a token gets from an expert that is not chosen is a constant to
    backward: no gradient for the expert's weights, and none through them to the layers below. The router's gradient is that
    of the full backward, since the outputs of all experts are kept for it. What else an expert computed is dropped as soon
    as it is not chosen (Switch's experts keep nothing, and the chosen compute it again).
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._parts = {name: (_Apart if block.is_switch else _Stacked)(block) for name, block in blocks(model).items()}
        self._undo = ExitStack()

    def __enter__(self) -> "SelectiveBackward":
        model = cast("Any", self.model)
        if any(isinstance(part, _Stacked) for part in self._parts.values()):
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
        """What an optimiser is given: all that is trained, each expert of a stack as a parameter that shares its memory."""
        split = {id(parameter) for part in self._parts.values() for parameter in part.split()}
        whole = [each for each in self.model.parameters() if each.requires_grad and id(each) not in split]
        apart = [row for part in self._parts.values() if isinstance(part, _Stacked) for row in part.rows()]
        return [*whole, *apart]

    def choose(self, experts: Experts) -> None:
        """The experts that the next backward reaches, by block; of a block that is absent, none.

        Raises:
            BadValue: a block that the model has not, or ids that it has not or that do not ascend.
        """
        for name, ids in experts.items():
            if name not in self._parts:
                raise BadValue(f"{name} is no MoE block of this model; its blocks are {', '.join(self._parts)}")
            number = self._parts[name].number
            if list(ids) != sorted(set(ids)) or not all(0 <= expert < number for expert in ids):
                raise BadValue(f"{name} was given experts {list(ids)}; give ids from 0 to {number - 1}, ascending, each once")
        for name, part in self._parts.items():
            part.choose(torch.tensor(experts.get(name, ()), dtype=torch.int64))

    def left_out(self) -> Iterator[nn.Parameter]:
        """The trained parameters of all experts that are not chosen: an optimiser may forget them."""
        for part in self._parts.values():
            chosen = set(part.chosen.tolist()) if part.chosen is not None else set()
            for expert in range(part.number):
                if expert not in chosen:
                    yield from part.of(expert)


class _Stacked:
    """The experts of a block whose weights are stacks."""

    def __init__(self, block: Block) -> None:
        self.experts = block.experts
        self.number = block.shape.num_experts
        self.chosen: Tensor | None = None
        self.anchor = torch.zeros((), requires_grad=True)
        self.expert = torch.empty(0, dtype=torch.int64)  # of each pair of the last forward
        self.first: Tensor | None = None  # what the first matrices gave for it; once experts are chosen, for theirs
        self.chance = torch.empty(0)  # the state of torch's generator before the adapters' dropout drew from it
        # Each trained stack by its path below the experts, and its rows as parameters of their own: expert → row.
        self.stacks = dict(self._stacks())
        self.parameters = {
            path: {int(expert): nn.Parameter(row) for expert, row in zip(ids, stack.detach(), strict=True)}
            for path, (stack, ids) in self.stacks.items()
        }

    def _stacks(self) -> Iterator[tuple[str, tuple[nn.Parameter, list[int]]]]:
        """Of those that are trained: the expert that each row belongs to."""
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

    def split(self) -> Iterator[nn.Parameter]:
        return (stack for stack, _ in self.stacks.values())

    def rows(self) -> Iterator[nn.Parameter]:
        return (row for rows in self.parameters.values() for row in rows.values())

    def of(self, expert: int) -> Iterator[nn.Parameter]:
        return (rows[expert] for rows in self.parameters.values() if expert in rows)

    def choose(self, chosen: Tensor) -> None:
        self.chosen = chosen
        if self.first is not None:
            self.first = self.first[torch.isin(self.expert, chosen)]

    def outputs(self, rows: Tensor, expert: Tensor) -> Tensor:
        """What the experts make of their rows; what their first matrices gave stays, for backward."""
        ends = ends_of(expert, self.number)
        self.expert = expert
        self.chance = torch.get_rng_state()
        self.first = projected(self.experts, first_matrix(self.experts), rows, expert, ends)
        return projected(self.experts, "down_proj", activated(self.experts, self.first), expert, ends)

    def finished(self, out: Tensor) -> Tensor:
        return normed(self.experts, out)

    def again(self, rows: Tensor, out: Tensor, expert: Tensor, gradient: Tensor) -> None:
        """Backward through what gave `out`: into `rows` and the parameters of these experts."""
        assert self.first is not None
        met = expert.unique()
        if len(self.first) > len(rows):  # under gradient checkpointing forward came once more after experts were chosen
            self.first = self.first[torch.isin(self.expert, met)]
        adapters = self.copies(met)
        with torch.enable_grad():
            first = self.known(first_matrix(self.experts), rows, expert, self.first, adapters)
            out = normed(self.experts, self.known("down_proj", activated(self.experts, first), expert, out, adapters))
        torch.autograd.backward(out, gradient)
        for name, adapter in adapters.items():
            for path, each in adapter.named_parameters():
                if each.grad is not None:
                    self.add(f"lora.{name}.{path}", met[adapter.ids], each.grad)
        self.first = None

    def copies(self, met: Tensor) -> dict[str, ExpertLoRA]:
        """The adapters of the experts `met`, with gradients of their own and the dropout that they had in forward."""
        adapters, reached = dict(self.adapters()), torch.isin(self.expert, met)
        copies = {name: _rows_of(adapter, met) for name, adapter in adapters.items()}
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.chance)
            for name in (first_matrix(self.experts), "down_proj"):  # in the order of `outputs`
                if name in adapters and adapters[name].dropout.p:
                    a = adapters[name].a
                    copies[name].dropout = _Drawn(adapters[name].dropout(a.new_ones(len(self.expert), a.shape[2]))[reached])
        return copies

    def known(self, name: str, rows: Tensor, expert: Tensor, value: Tensor, adapters: Mapping[str, ExpertLoRA]) -> Tensor:
        """`projected`, whose value is known, with a way back to `rows` and to what is trained of these experts."""
        out = cast("Tensor", _Known.apply(self, name, self.anchor, value, rows, expert))  # type: ignore[no-untyped-call]  # torch's
        if name not in adapters or not len(adapters[name].ids):
            return out
        met, local = expert.unique(return_inverse=True)
        share = adapters[name].add(torch.zeros_like(value), rows, local, ends_of(local, len(met)))
        return out + (share - share.detach())  # its value is in `value` already

    def adapters(self) -> Iterator[tuple[str, ExpertLoRA]]:
        if "lora" in self.experts._modules:
            yield from ((name, cast("ExpertLoRA", each)) for name, each in cast("nn.ModuleDict", self.experts.lora).items())

    def add(self, path: str, experts: Tensor, gradients: Tensor) -> None:
        """A gradient to each of `experts`, for what it has in the stack `path`."""
        for expert, gradient in zip(experts.tolist(), gradients, strict=True):
            row = self.parameters[path][expert]
            row.grad = gradient if row.grad is None else row.grad + gradient


class _Known(torch.autograd.Function):
    """`projected` without adapters, whose value is known and not computed.

    Gradients of the weights are computed for the experts met alone, and left with their own parameters.
    """

    @staticmethod
    def forward(ctx: Any, part: _Stacked, name: str, anchor: Tensor, value: Tensor, rows: Tensor, expert: Tensor) -> Tensor:
        ctx.part, ctx.name = part, name
        ctx.save_for_backward(rows, expert)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (rows, expert), arriving = ctx.saved_tensors, gradients[0].contiguous()
        part, name = ctx.part, ctx.name
        met, local = expert.unique(return_inverse=True)
        if name in part.parameters:
            left, right = (rows, arriving) if part.experts.is_transposed else (arriving, rows)
            part.add(name, met, grouped_outer(left, right, ends_of(local, len(met))))
        if f"{name}_bias" in part.parameters:
            part.add(f"{name}_bias", met, arriving.new_zeros(len(met), arriving.shape[1]).index_add_(0, local, arriving))
        weight = getattr(part.experts, name)
        back = weight.transpose(1, 2) if part.experts.is_transposed else weight
        for_rows = grouped(arriving, back, ends_of(expert, part.number)) if ctx.needs_input_grad[4] else None
        return None, None, None, None, for_rows, None


class _Drawn(nn.Dropout):
    """Dropout that was drawn before: `factors` of 0 or 1 / (1 - p)."""

    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, rows: Tensor) -> Tensor:
        return rows * self.factors


def _rows_of(adapter: ExpertLoRA, chosen: Tensor) -> ExpertLoRA:
    """The adapter of those of `chosen` that have one, numbered by their places there: copies with gradients of their own."""
    kept = torch.isin(adapter.ids, chosen)
    ids = torch.searchsorted(chosen, adapter.ids[kept]).tolist()
    rows = ExpertLoRA(adapter.a.detach()[kept], adapter.b.detach()[kept], adapter.scale, ids, len(chosen))
    return rows.requires_grad_(adapter.a.requires_grad)


class _Apart:
    """The experts of a block that are modules of their own: Switch. Its experts draw dropout, the same in both computations."""

    def __init__(self, block: Block) -> None:
        self.experts = cast("nn.ModuleDict", block.experts)
        self.number = block.shape.num_experts
        self.chosen: Tensor | None = None
        self.anchor = torch.zeros((), requires_grad=True)
        self.chance: dict[int, Tensor] = {}  # its state before each expert drew from it

    def enter(self) -> None:
        cast("Any", self.experts).forward = partial(_one_hot_forward, self)

    def leave(self) -> None:
        del cast("Any", self.experts).forward

    def split(self) -> Iterator[nn.Parameter]:
        return iter(())

    def of(self, expert: int) -> Iterator[nn.Parameter]:
        return (each for each in self.experts[f"expert_{expert}"].parameters() if each.requires_grad)

    def choose(self, chosen: Tensor) -> None:
        self.chosen = chosen

    def outputs(self, rows: Tensor, expert: Tensor) -> Tensor:
        """What each expert makes of its rows."""
        out = torch.empty_like(rows)
        for each in expert.unique().tolist():
            self.chance[each] = torch.get_rng_state()
            out[expert == each] = self.experts[f"expert_{each}"](rows[expert == each])
        return out

    def finished(self, out: Tensor) -> Tensor:
        return out

    def again(self, rows: Tensor, _: Tensor, expert: Tensor, gradient: Tensor) -> None:
        """The same once more, and backward through it: into `rows` and the parameters of these experts."""
        for each in expert.unique().tolist():
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                torch.set_rng_state(self.chance[each])
                out = self.experts[f"expert_{each}"](rows[expert == each])
            if out.requires_grad:
                torch.autograd.backward(out, gradient[expert == each])


class _Selective(torch.autograd.Function):
    """Experts, weighted and summed over each token's pairs (token, expert); the pairs are sorted by expert.

    `pair` is the place of each in `weights`: token = pair // top_k.
    """

    @staticmethod
    def forward(
        ctx: Any,
        part: _Stacked | _Apart,
        anchor: Float[Tensor, ""],  # requires a gradient, so that backward comes here even if nothing below is trained
        hidden: Float[Tensor, "tokens hidden"],
        weights: Float[Tensor, "tokens top_k"],
        expert: Int[Tensor, " pairs"],
        pair: Int[Tensor, " pairs"],
    ) -> Float[Tensor, "tokens hidden"]:
        tokens, top_k = weights.shape
        out = part.outputs(hidden[pair // top_k], expert)
        ctx.part = part
        ctx.save_for_backward(hidden, weights, expert, pair, out)
        weighted = hidden.new_zeros(tokens * top_k, out.shape[-1], dtype=torch.promote_types(out.dtype, weights.dtype))
        weighted[pair] = part.finished(out) * weights.reshape(-1)[pair].unsqueeze(1)
        return weighted.view(tokens, top_k, -1).sum(dim=1).to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weights, expert, pair, out = ctx.saved_tensors
        chosen = ctx.part.chosen
        assert chosen is not None, "choose experts between forward and backward"
        token = pair // weights.shape[1]
        arriving = gradients[0]

        for_weights = torch.zeros_like(weights)
        for_weights.view(-1)[pair] = (arriving[token] * ctx.part.finished(out)).sum(-1).to(weights.dtype)

        reached = torch.isin(expert, chosen).nonzero().flatten()
        rows = hidden[token[reached]].requires_grad_(ctx.needs_input_grad[2])
        share = arriving[token[reached]] * weights.reshape(-1)[pair[reached]].unsqueeze(1)
        ctx.part.again(rows, out[reached], expert[reached], share.to(out.dtype))
        for_hidden = torch.zeros_like(hidden)
        if rows.grad is not None:
            for_hidden.index_add_(0, token[reached], rows.grad)
        return None, None, for_hidden, for_weights, None, None


def _selective(part: _Stacked | _Apart, hidden: Tensor, weights: Tensor, expert: Tensor, pair: Tensor) -> Tensor:
    out = _Selective.apply(part, part.anchor, hidden, weights, expert, pair)  # type: ignore[no-untyped-call]  # torch's
    return cast("Tensor", out)


def _stacked_forward(self: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Stacked experts: what transformers calls in place of its own implementation."""
    expert, pair = torch.sort(top_k_index.reshape(-1), stable=True)
    return _selective(self.selective, hidden, top_k_weights, expert, pair)


def _one_hot_forward(part: _Apart, hidden: Tensor, picked: Tensor, weights: Tensor) -> Tensor:
    """Switch's experts; a token beyond an expert's capacity has a row of zeros and so no pair."""
    expert, token = picked.reshape(len(hidden), -1).T.nonzero().unbind(1)
    return _selective(part, hidden, weights, expert, token)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _stacked_forward)
