"""FLoRA, the stacking of Wang et al."""

from dataclasses import replace

import pytest
import torch

from fedexperts.experiment import checkpoint
from fedexperts.experiment.client_task import apply_update
from fedexperts.federation import jobs_for
from fedexperts.methods.base import entries
from fedexperts.methods.flora import FLoRA, base_change, product_flops
from fedexperts.moe import factors, rows
from fedexperts.moe.anatomy import Anatomy, BlockShape
from fedexperts.moe.footprint import Footprint
from fedexperts.moe.shrink import shrink
from fedexperts.moe.tuning import Tuning, prepare
from fedexperts.testing import flop_counter, tiny_batch, tiny_context, tiny_model, tiny_server
from fedexperts.types import Client, Patch, Server, Training, Update, size

A, B = "q.lora_A.default.weight", "q.lora_B.default.weight"
CLIENTS = [Client("a", 8), Client("b", 12), Client("c", 4)]
LORA = Training(train="lora", rank=8, batch_size=4, local_steps=2, lr=0.01)
RANKS = (8, 4, 4)
every_family = pytest.mark.parametrize("family", ["olmoe", "switch_transformers"])


def row(matrix):
    """One row, row-first."""
    return torch.tensor([matrix])


def bare(sides=2, clients="ab"):
    """A server of one adapted matrix and a router."""
    weights = {A: torch.ones(1, 2, sides), B: torch.zeros(1, sides, 2), "gate": row([0.0])}
    known = {name: Client(name, 1) for name in clients}
    return Server(weights, dict.fromkeys(weights), Anatomy({"0": BlockShape(4, 1)}), Footprint(0, {"0": 1}, 0), known, round=1)


def sent(client, a, b, examples, gate=0.0):
    return Update(client, 1, "train", Patch({"gate": row([gate])}), examples, {f"stack/{A}": row(a), f"stack/{B}": row(b)})


ONE = sent("a", [[1.0, 0.0]], [[4.0], [0.0]], 1, 4.0)  # BA = [[4, 0], [0, 0]], rank 1
OTHER = sent("b", [[0.0, 2.0], [1.0, 1.0]], [[0.0, 4.0], [4.0, 0.0]], 3, 8.0)  # [[4, 4], [0, 8]], rank 2


def test_a_merge_by_hand():
    merged = FLoRA().merge(bare(), iter([ONE, OTHER]))
    assert merged.method_state[f"change/{A}"].tolist() == [[[4.0, 3.0], [0.0, 6.0]]]  # a quarter of the one, three of the other
    assert merged.weights["gate"].tolist() == [[7.0]]
    again = FLoRA().merge(replace(merged, round=2), iter([ONE]))
    assert again.method_state[f"change/{A}"].tolist() == [[[8.0, 3.0], [0.0, 6.0]]]


def test_the_order_of_updates_does_not_matter_and_one_client_is_taken_at_its_word():
    one, other = (FLoRA().merge(bare(), iter(order)).method_state[f"change/{A}"] for order in ([ONE, OTHER], [OTHER, ONE]))
    torch.testing.assert_close(one, other)
    alone = FLoRA().merge(bare(), iter([OTHER]))
    assert alone.method_state[f"change/{A}"].tolist() == [[[4.0, 4.0], [0.0, 8.0]]]


def test_a_client_is_sent_the_stacks_of_the_rounds_it_missed():
    """Matrices of 40 x 40, so that a sum is 6400 bytes, and a stack of rank 2 is 640."""
    server, wide = bare(40), [[1.0] * 40, [2.0] * 40]
    updates = [sent(name, wide, [[1.0, 0.0]] * 40, 1) for name in "ab"]
    server = FLoRA().merge(replace(server, round=1), iter([replace(updates[0], round=1)]))
    server = FLoRA().merge(replace(server, round=2), iter([replace(updates[1], round=2)]))

    def sent_to(name, round):
        return FLoRA().assign(replace(server, round=round), Client(name, 1)).extra

    assert {name: int(has) for name, has in entries("has", server.method_state).items()} == {"a": 0, "b": 1}
    assert sent_to("a", 3)[f"stack/{A}"].shape == (1, 4, 40)  # it trained before either was there
    assert sent_to("b", 3)[f"stack/{A}"].shape == (1, 2, 40)  # in the second round it was sent the first
    assert sent_to("never", 3)[f"stack/{A}"].shape == (1, 4, 40)
    assert sent_to("a", 3)["rank"] == 2


def test_a_client_is_sent_the_sum_if_the_missed_stacks_take_more_bytes():
    server, wide = bare(40, "ab"), [[1.0] * 40, [2.0] * 40]
    for round in range(1, 15):
        update = replace(sent("a", wide, [[1.0, 0.0]] * 40, 1), round=round)
        server = FLoRA().merge(replace(server, round=round), iter([update]))
        stack_bytes = sum(size(entries(f"stack/{each}", server.method_state)) for each in range(1, 15))
        assert stack_bytes == 640 * min(round, 10) <= size(entries("change", server.method_state))
    assert int(server.method_state["forgotten"]) == 4
    often, never = (FLoRA().assign(replace(server, round=15), Client(name, 1)).extra for name in "ab")
    assert often.keys() == {"rank", f"stack/{A}", f"stack/{B}"} and often[f"stack/{A}"].shape == (1, 2, 40)
    assert never.keys() == {"rank", f"change/{A}"}
    assert torch.equal(never[f"change/{A}"], torch.full((1, 40, 40), 14.0))
    assert size(often) < size(never) == 6400 + 8


class Played:
    """Rounds in which only some take part."""

    def __init__(self, family, takes_part):
        self.model = tiny_model(family)
        self.server = tiny_server(self.model, CLIENTS, LORA)
        self.contexts = {client.name: tiny_context(self.model, client, LORA) for client in CLIENTS}
        self.jobs, self.updates = [], []
        for number, names in enumerate(takes_part, 1):
            server = replace(self.server, round=number, task="train")
            jobs = list(jobs_for(server, FLoRA(RANKS), [client for client in CLIENTS if client.name in names]))
            updates = [FLoRA(RANKS).train(job, self.contexts[job.client]) for job in jobs]
            self.server = FLoRA(RANKS).merge(server, iter(updates))
            self.jobs.append(jobs)
            self.updates.append(updates)

    def logits(self, family):
        """Of the models that the clients would be scored with."""
        jobs = jobs_for(replace(self.server, task="evaluate"), FLoRA(RANKS), CLIENTS)
        with torch.no_grad():
            return [FLoRA().build_model(job, self.contexts[job.client])(**tiny_batch(family)).logits for job in jobs]


@every_family
def test_after_a_round_all_have_the_base_and_the_weighted_products_of_different_ranks(family):
    """As if the stack, of rank 8 + 4 + 4, were an adapter itself."""
    played = Played(family, ["abc"])
    sizes = [[factors.rank_of(entries("stack", update.extra)) for update in updates] for updates in played.updates]
    assert sizes == [[8, 4, 4]]
    stack = factors.stacked([(float(update.examples), entries("stack", update.extra)) for update in played.updates[0]])
    tuning = Tuning("lora", rank=16, alpha=LORA.tuning.alpha * 2)  # the scale of rank 8
    reference = prepare(shrink(played.model, {}), tuning, "any")
    rows.write(reference, {**played.server.weights, **stack})
    with torch.no_grad():
        expected, base = (model(**tiny_batch(family)).logits for model in (reference, played.model))
    assert not torch.allclose(expected, base, atol=1e-3)
    for logits in played.logits(family):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@every_family
def test_the_product_of_the_stacks_that_a_client_is_sent_counts(family):
    played = Played(family, ["b"])  # of rank 4, so that its stack takes fewer bytes than the product
    job = next(iter(jobs_for(replace(played.server, round=2, task="train"), FLoRA(RANKS), CLIENTS)))
    assert product_flops(job.extra) > 0
    with flop_counter() as counter:
        update = FLoRA(RANKS).train(job, played.contexts[job.client])
    assert update.cost.flops_estimated == pytest.approx(counter.get_total_flops(), rel=0.001)


@every_family
def test_clients_that_took_part_in_different_rounds_have_the_same_model(family):
    played = Played(family, ["ab", "ac", "a", "bc"])
    assert {name: int(has) for name, has in entries("has", played.server.method_state).items()} == {"a": 2, "b": 3, "c": 3}
    one, *others = played.logits(family)
    assert len(others) == 2
    for other in others:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_every_round_starts_with_new_adapters_which_are_not_sent_to_clients():
    played = Played("olmoe", ["ab", "ab"])
    fresh = [rows.read(FLoRA().build_model(job, played.contexts[job.client])) for jobs in played.jobs for job in jobs]
    pairs = factors.pairs(fresh[0])
    assert not any(each[b].any() for each in fresh for b in pairs.values())
    assert all(len({each[a][0, 0, 0].item() for each in fresh}) == 4 for a in pairs)
    trained = {*pairs, *pairs.values()}
    assert not any(trained & job.patch.tensors.keys() for jobs in played.jobs for job in jobs)


@every_family
def test_a_client_scored_before_the_merge_has_its_base_and_its_own_adapters_on_it(family):
    played = Played(family, ["ab", "a"])
    (job,), (update,) = played.jobs[1], played.updates[1]
    context = played.contexts["a"]
    updated = FLoRA().build_model(replace(job, extra={"rank": job.extra["rank"]}), context)  # all that came before the round
    rows.write(updated, entries("stack", update.extra))
    rows.write(updated, update.patch.tensors)
    scored = FLoRA().build_model(apply_update(job, update), context)
    with torch.no_grad():
        logits, expected = (model(**tiny_batch(family)).logits for model in (scored, updated))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_clients_send_their_factors_and_receive_the_last_rounds_stack():
    """Of rank 8 and 4 up, of rank 12 to each down: in a round without a stack, the routers and the rank alone."""
    played = Played("olmoe", ["ab", "ab"])
    per_rank = sum(tensor.nbytes for name, tensor in played.server.weights.items() if "lora" in name) // 8
    routers = sum(tensor.nbytes for name, tensor in played.server.weights.items() if "lora" not in name)
    ids = 8 * 8 * 3
    down = [[job.nbytes for job in jobs] for jobs in played.jobs]
    assert down == [[routers + ids + 8] * 2, [routers + ids + 8 + 12 * per_rank] * 2]
    up = [[replace(update, metrics={}).nbytes - 2 for update in updates] for updates in played.updates]
    assert up == [[routers + ids + 8 * per_rank, routers + ids + 4 * per_rank]] * 2


def test_a_server_from_a_checkpoint_sends_and_merges_what_the_undisturbed_one_does(tmp_path):
    played = Played("olmoe", ["ab", "ac"])
    checkpoint.save(tmp_path, played.server)
    again = checkpoint.load(tmp_path, tiny_server(played.model, CLIENTS, LORA))
    for server in (again, played.server):
        current = replace(server, round=3, task="train")
        jobs = list(jobs_for(current, FLoRA(RANKS), CLIENTS))
        client_states = {name: dict(context.client_state) for name, context in played.contexts.items()}
        contexts = {name: replace(context, client_state=client_states[name]) for name, context in played.contexts.items()}
        merged = FLoRA(RANKS).merge(current, (FLoRA(RANKS).train(job, contexts[job.client]) for job in jobs))
        if server is again:
            first = merged
    assert first.method_state.keys() == merged.method_state.keys() and len(merged.method_state) > 20
    assert all(torch.equal(first.method_state[name], merged.method_state[name]) for name in merged.method_state)


def test_a_base_change_is_the_stored_or_received_sum_plus_the_products_received_since():
    stack = {f"stack/{A}": row([[1.0, 2.0]]), f"stack/{B}": row([[1.0], [3.0]])}  # [[1, 2], [3, 6]]
    client_state = {f"change/{A}": row([[10.0, 0.0], [0.0, 0.0]]), "another": row([1.0])}
    job_extra = {f"change/{A}": row([[0.0, 0.0], [0.0, 20.0]]), "rank": torch.tensor(1)}

    def change(extra, client_state):
        return {name: each.tolist() for name, each in base_change(extra, client_state).items()}

    assert change({}, {}) == change({"rank": torch.tensor(1)}, {"another": row([1.0])}) == {}
    assert change(stack, {}) == {f"change/{A}": [[[1.0, 2.0], [3.0, 6.0]]]}
    assert change(stack, client_state) == {f"change/{A}": [[[11.0, 2.0], [3.0, 6.0]]]}
    assert change(job_extra, client_state) == {f"change/{A}": [[[0.0, 0.0], [0.0, 20.0]]]}
