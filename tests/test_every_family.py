"""What must hold for every family of models."""

import pytest
import torch

import fedexperts.moe.disk
from fedexperts.moe import rows, shrink
from fedexperts.moe.anatomy import anatomy, blocks
from fedexperts.moe.tuning import Tuning, prepare
from fedexperts.testing import FAMILIES, tiny_batch, tiny_experts, tiny_model

every_family = pytest.mark.parametrize("family", FAMILIES)


def test_there_are_twelve_families():
    assert len(set(FAMILIES)) == 12
    assert len({type(tiny_model(family)) for family in FAMILIES}) == 12


@every_family
def test_a_tiny_model_is_the_same_each_time_and_leaves_the_random_generator_alone(family):
    before = torch.get_rng_state()
    one, other, third = tiny_model(family), tiny_model(family), tiny_model(family, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    batch = tiny_batch(family)
    assert torch.equal(one(**batch).logits, other(**batch).logits)
    assert not torch.equal(one(**batch).logits, third(**batch).logits)


@every_family
def test_with_all_experts_kept_the_logits_are_the_full_model_s_bit_for_bit(family):
    model, batch = tiny_model(family), tiny_batch(family)
    whole = shrink.shrink(model, anatomy(model).all_experts)
    assert torch.equal(whole(**batch).logits, model(**batch).logits)


@every_family
@pytest.mark.parametrize("seed", range(3))
def test_a_subset_equals_the_full_model_with_the_rest_at_minus_infinity(family, seed, masked):
    model, batch = tiny_model(family), tiny_batch(family)
    experts = tiny_experts(model, seed=seed)
    assert len({len(kept) for kept in experts.values()}) == len(experts), "another number in each layer"
    small = shrink.shrink(model, experts)
    with masked(model, experts) as calls:
        expected = model(**batch).logits
    assert len(calls) == len(blocks(model)), "each router was masked once"
    assert (small(**batch).logits - expected).abs().max() <= 1e-6
    assert (small(**batch).logits - model(**batch).logits).abs().max() > 1e-4, "what was cut matters"


@every_family
def test_a_subset_has_the_gradients_of_the_full_model_with_the_rest_at_minus_infinity(family, masked):
    model, batch = tiny_model(family), tiny_batch(family)
    experts = tiny_experts(model)
    with masked(model, experts):
        model(**batch).loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()  # sets them to None; a shrunk model shares these parameters

    small = shrink.shrink(model, experts)
    small(**batch).loss.backward()
    axes = {f"{name}.{path}": (name, axis) for name, b in blocks(small).items() for path, axis in b.expert_axes().items()}
    seen = 0
    for name, parameter in small.named_parameters():
        if parameter.grad is None or ".expert_" in name:  # Switch's change their names: the next test sees them
            continue
        assert parameter.grad.isfinite().all()
        whole = expected[name]
        if name in axes:
            block, axis = axes[name]
            whole = whole.index_select(axis, torch.tensor(experts[block]))
        assert torch.allclose(parameter.grad, whole, atol=1e-5), name
        seen += name in axes
    assert seen >= len(experts)


@every_family
def test_forward_and_backward_reach_every_kept_expert_with_finite_gradients(family):
    model = tiny_model(family)
    small = shrink.shrink(model, tiny_experts(model)).train()
    loss = small(**tiny_batch(family, batch_size=8)).loss
    loss.backward()
    assert loss.isfinite()
    layout = rows.layout(small)
    trained = [name for name, parameter in small.named_parameters() if parameter.grad is not None]
    assert all(small.get_parameter(name).grad.isfinite().all() for name in trained)
    assert {block for name, block in layout.items() if block and name in trained} <= set(blocks(small))
    for name, block in blocks(small).items():
        grads = [parameter.grad for parameter in block.experts.parameters() if parameter.grad is not None]
        assert grads, name
        assert any(grad.any() for grad in grads), name


@every_family
def test_a_shrunk_model_is_saved_and_loaded_exactly(family, tmp_path):
    model, batch = tiny_model(family), tiny_batch(family)
    small = shrink.shrink(model, tiny_experts(model))
    shrink.save(small, tmp_path)
    again = shrink.load(tmp_path)
    assert type(again) is type(small)
    assert shrink.kept_experts(again) == shrink.kept_experts(small) == tiny_experts(model)
    assert same_tensors(again, small)
    assert torch.equal(again(**batch).logits, small(**batch).logits)


@every_family
@pytest.mark.parametrize("stacked", [False, True], ids=["as transformers saves", "stacked"])
@pytest.mark.parametrize("shard", ["1GB", "40KB"], ids=["one file", "several files"])
def test_only_the_kept_experts_are_read_from_disk(family, stacked, shard, tmp_path, monkeypatch):
    model = tiny_model(family)
    model.save_pretrained(tmp_path, save_original_format=not stacked, max_shard_size=shard)
    experts = tiny_experts(model)
    small = shrink.shrink(model, experts)
    reader = CountingReader(fedexperts.moe.disk.safe_open)
    monkeypatch.setattr(fedexperts.moe.disk, "safe_open", reader)

    part = shrink.load_part(tmp_path, experts)
    assert same_tensors(part, small)
    assert reader.bytes_read == nbytes(small) < nbytes(model)
    assert (reader.files > 1) == (shard == "40KB")


@every_family
def test_rows_written_are_rows_read(family):
    model, other = tiny_model(family), tiny_model(family, seed=1)
    rows.write(other, rows.read(model))
    read = rows.read(other)
    assert all(torch.equal(tensor, read[name]) for name, tensor in rows.read(model).items())
    assert same_parameters(other, model)


@every_family
def test_writing_one_expert_changes_exactly_one_expert(family):
    model = tiny_model(family)
    before, layout = rows.read(model), rows.layout(model)
    block, expert = list(blocks(model))[-1], 5
    tensors, ids = rows.cut(before, layout, {block: (expert,)})
    names = [name for name, owner in layout.items() if owner == block]
    rows.write(model, {name: tensors[name] + 1 for name in names}, {name: ids[name] for name in names})

    after = rows.read(model)
    assert len(names) >= 3
    for name, tensor in after.items():
        changed = [row for row in range(len(tensor)) if not torch.equal(tensor[row], before[name][row])]
        assert changed == ([expert] if layout[name] == block else []), name
        if layout[name] == block:
            assert torch.equal(tensor[expert], before[name][expert] + 1)


@every_family
def test_the_written_expert_is_the_one_the_router_picks(family):
    """Zeroing one expert's rows changes the output of the tokens sent to it, and of no other."""
    model = tiny_model(family)
    name, block = list(blocks(model).items())[-1]
    expert, hidden = 5, torch.randn(1, 40, 32, generator=torch.Generator().manual_seed(0))
    before, picked = run_block(block, hidden)
    tensors = {n: torch.zeros(1, *t.shape[1:]) for n, t in rows.read(model).items() if n.startswith(f"{name}.experts.")}
    rows.write(model, tensors, {n: torch.tensor([expert]) for n in tensors})
    after, _ = run_block(block, hidden)
    assert ((before != after).any(-1) == picked[:, expert]).all()
    assert 0 < picked[:, expert].sum() < 40


@torch.no_grad()
def run_block(block, hidden):
    """The block's output [tokens, width] and which expert each token was sent to [tokens, experts]."""
    seen = []
    handle = block.router.register_forward_hook(lambda module, args, output: seen.append(output))
    output = block.module(hidden)
    handle.remove()
    ids = next(part for part in seen[0] if part.dtype == torch.int64)
    picked = ids[0] if block.is_switch else torch.zeros(40, 8).scatter(1, ids, 1)
    return (output if isinstance(output, torch.Tensor) else output[0])[0], picked.bool()


def test_embeddings_that_are_tied_stay_tied_through_all_that_is_done_to_a_model(tmp_path):
    model, batch = tiny_model("olmoe", tie_word_embeddings=True), tiny_batch("olmoe")
    experts = tiny_experts(model)
    small = shrink.shrink(model, experts)
    shrink.save(small, tmp_path / "small")
    shrink.save(model, tmp_path / "whole")
    again, part = shrink.load(tmp_path / "small"), shrink.load_part(tmp_path / "whole", experts)
    tuned = [prepare(shrink.shrink(model, experts), Tuning(train, rank=4), seed="0").eval() for train in ("full", "lora")]
    for each in (small, again, part, *tuned):
        assert each.lm_head.weight is each.model.embed_tokens.weight
        assert torch.equal(each(**batch).logits, small(**batch).logits)
        assert not any("lm_head" in name for name in rows.read(each))


class CountingReader:
    """safetensors' safe_open, counting what is really taken out of the files."""

    def __init__(self, safe_open):
        self.safe_open, self.bytes_read, self.files = safe_open, 0, 0

    def __call__(self, *args, **options):
        self.files += 1
        return CountingFile(self, self.safe_open(*args, **options))


class CountingFile:
    def __init__(self, reader, file):
        self.reader, self.file = reader, file

    def keys(self):
        return self.file.keys()

    def get_slice(self, key):
        return CountingSlice(self.reader, self.file.get_slice(key))


class CountingSlice:
    def __init__(self, reader, disk):
        self.reader, self.disk, self.get_shape = reader, disk, disk.get_shape

    def __getitem__(self, index):
        tensor = self.disk[index]
        self.reader.bytes_read += tensor.nbytes
        return tensor


def nbytes(model):
    """Of all that a checkpoint holds, a tied parameter once."""
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    return sum(tensor.nbytes for tensor in tensors.values())


def same_tensors(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def same_parameters(one, other):
    pairs = zip(one.named_parameters(), other.named_parameters(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs if x.requires_grad)
