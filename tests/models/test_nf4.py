"""Models with frozen weights in 4 bits: what is packed, what it computes, and that all else works as with plain weights."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

from fedexperts.config import RunConfig
from fedexperts.errors import BadValue
from fedexperts.experiment.client_task import bits
from fedexperts.federation import jobs_for, steps
from fedexperts.io.toml import checked
from fedexperts.methods import METHODS
from fedexperts.models import load as load_module
from fedexperts.models import nf4
from fedexperts.models.load import load
from fedexperts.models.tokenizer import make_tokenizer
from fedexperts.moe import graft, lora, rows
from fedexperts.moe.anatomy import anatomy, blocks
from fedexperts.moe.flops import FlopsEstimate, Size
from fedexperts.moe.footprint import footprint, on_meta
from fedexperts.moe.kernel import fits
from fedexperts.moe.memory import MemoryMeter
from fedexperts.moe.packed import Packed, as_parameter, plain, stored
from fedexperts.moe.shrink import shrink
from fedexperts.moe.tuning import Tuning, prepare
from fedexperts.testing import FAMILIES, tiny_batch, tiny_context, tiny_experts, tiny_model, tiny_server
from fedexperts.types import Client, Training

functional = pytest.importorskip("bitsandbytes.functional")
ALL_LORA = Tuning(train="lora", rank=8)


def with_dtype(model, dtype):
    """`model` with parameters in `dtype`; its buffers, such as frequencies, stay as they are, as when a model is loaded."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def packed_model(family, dtype=torch.bfloat16, **options):
    """A tiny model whose frozen weights are packed as `load` packs them."""
    model = with_dtype(tiny_model(family, **options), dtype)
    for path, number in nf4.packed_weights(model).items():
        parent, _, name = path.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, name, as_parameter(nf4.pack(getattr(owner, name), number)))
    return model.requires_grad_(False)


def unpacked(model):
    """The same model with the values of its packed weights as plain weights."""
    memo = {id(each): nn.Parameter(plain(each.detach()).clone(), requires_grad=False) for each in model.parameters()}
    return copy.deepcopy(model, memo)


def logits(model, family):
    with torch.no_grad():
        return model(**tiny_batch(family)).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 16, 64), (3, 7, 9), (2, 1, 2)])
def test_each_expert_is_packed_as_bitsandbytes_packs_it_alone(shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[0, 0, :] = 0
    packed = nf4.pack(weight, 1)
    assert (packed.shape, packed.dtype, packed.ndim) == (weight.shape, dtype, 3)
    for expert in range(len(weight)):
        padded = nn.functional.pad(weight[expert].reshape(-1), (0, -weight[expert].numel() % 64))
        values, state = functional.quantize_4bit(padded, blocksize=64, quant_type="nf4")
        assert torch.equal(values.view(-1), packed.codes[expert])
        assert torch.equal(state.absmax, packed.scales[expert])
        codes = torch.stack([values >> 4, values & 15], dim=-1).view(-1, 64).long()
        by_hand = (functional.get_4bit_type("nf4", device="cpu")[codes] * state.absmax[:, None]).to(dtype).view(-1)
        assert torch.equal(by_hand[: weight[expert].numel()].view(shape[1:]), packed.unpacked()[expert])


def test_codes_are_those_of_bitsandbytes_for_every_share():
    shares = torch.cat([torch.linspace(-1, 1, 2**16), torch.tensor([0.0, -1.0, 1.0])])
    codes = functional.get_4bit_type("nf4", device="cpu")
    assert torch.equal(nf4.nearest_codes(shares).long(), torch.bucketize(shares, (codes[1:] + codes[:-1]) / 2))


def test_a_packed_weight_takes_9_bits_for_2_values():
    packed = nf4.pack(torch.ones(4, 64, 64, dtype=torch.bfloat16), 1)
    assert packed.nbytes == 4 * 64 * 64 * 9 // 16 == sum(each.nbytes for each in stored(packed))
    assert packed.numel() == 4 * 64 * 64


def test_rows_are_taken_copied_moved_and_sent_to_other_processes_without_unpacking():
    weight = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
    packed, values = nf4.pack(weight, 1), nf4.pack(weight, 1).unpacked()
    ids = torch.tensor([0, 3])
    cases = {
        packed.detach()[[0, 3]]: values[[0, 3]],
        packed.index_select(0, ids): values[ids],
        packed[2]: values[2],
        packed[torch.tensor(2)]: values[2],
        packed[1:3]: values[1:3],
        packed.transpose(1, 2): values.transpose(1, 2),
        packed.transpose(-1, -2)[1].t(): values[1],
        packed.to(torch.bfloat16): values.to(torch.bfloat16),
        packed.unbind()[2]: values[2],
        copy.deepcopy(as_parameter(packed)): values,
        pickle.loads(pickle.dumps(as_parameter(packed))): values,  # noqa: S301
    }
    for result, expected in cases.items():
        assert isinstance(result, Packed) and result.shape == expected.shape
        assert torch.equal(result.unpacked(), expected) and torch.equal(result, expected)
    assert isinstance(copy.deepcopy(as_parameter(packed)), nn.Parameter)
    assert torch.equal(packed + 1, values + 1) and not isinstance(packed + 1, Packed)
    assert not isinstance(packed.transpose(0, 1), Packed)
    assert packed.to("meta").is_meta and "Packed([4, 6, 8]" in repr(packed)
    shared = nn.Linear(8, 6)
    shared.weight = as_parameter(nf4.pack(weight[0], 0))
    assert shared.share_memory().weight.is_shared() and isinstance(shared.weight, Packed)
    with pytest.raises(TypeError, match="frozen"):
        packed.add_(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_computes_with_the_values_that_its_packed_weights_stand_for(family, dtype):
    model = packed_model(family, dtype)
    assert torch.equal(logits(model, family), logits(unpacked(model), family))
    experts = tiny_experts(model)
    ours, theirs = (prepare(each, ALL_LORA, "seed") for each in (shrink(model, experts), unpacked(shrink(model, experts))))
    for each in (ours, theirs):
        for b in (module.b for module in each.modules() if isinstance(module, lora.ExpertLoRA)):
            b.data.fill_(0.01)
        each(**tiny_batch(family)).loss.backward()
    grads = [{name: each.grad for name, each in model.named_parameters() if each.grad is not None} for model in (ours, theirs)]
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 5
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
    assert any(isinstance(each, Packed) for each in ours.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_and_linear_layers_are_packed_but_no_router_embedding_head_or_norm(family):
    model = packed_model(family)
    packed = {name for name, each in model.named_parameters() if isinstance(each, Packed)}
    experts = {name for name, each in model.named_parameters() if ".experts." in name and each.ndim >= 2 and "bias" not in name}
    assert experts <= packed
    kept = (
        "norm",
        "embed",
        "lm_head",
        "router",
        "classifier",
        "shared.weight",
        "mlp.gate.",
        "relative_attention_bias",
        "_gate.weight",
    )
    assert not [name for name in packed if any(part in name for part in kept)]
    held = sum(each.nbytes for each in model.parameters())
    assert held < 0.65 * sum(each.nbytes for each in unpacked(model).parameters())


def test_what_counts_and_adapts_weights_reads_their_shapes_without_unpacking(monkeypatch):
    model = packed_model("olmoe")
    whole = unpacked(model)
    monkeypatch.setattr(nf4.NF4, "unpack", None)
    block = next(iter(blocks(model).values()))
    assert lora.matrices(block.experts) == ["gate_up_proj", "down_proj"] and fits(block.experts.down_proj)
    assert anatomy(model) == anatomy(whole)
    assert FlopsEstimate(model).forward(Size(2, 12, 11)) == FlopsEstimate(whole).forward(Size(2, 12, 11))
    assert bits(model) == bits(copy.deepcopy(model)) != bits(packed_model("olmoe", seed=1))
    small = shrink(model, tiny_experts(model))
    prepare(small, ALL_LORA, "seed")
    assert {type(each.gate_up_proj) for each in (block.experts for block in blocks(small).values())} == {Packed}
    assert all(each.is_meta for each in on_meta(model).parameters())


LARGER = {"hidden_size": 64, "intermediate_size": 64, "num_experts": 16}


def test_the_footprint_counts_the_bytes_of_packed_weights_and_no_stack_that_is_unpacked():
    model = packed_model("olmoe", **LARGER)
    whole = unpacked(model)
    ours, theirs = (footprint(each, ALL_LORA, (2, 12)) for each in (model, whole))
    assert ours.frozen_bytes == sum(each.nbytes for each in model.parameters()) < 0.5 * theirs.frozen_bytes
    block = next(iter(ours.expert_bytes))
    saved = sum(plain(each).nbytes - each.nbytes for each in blocks(model)[block].experts.parameters()) // 16
    assert theirs.expert_bytes[block] - ours.expert_bytes[block] == saved
    linear = model.model.layers[0].self_attn.q_proj.weight
    assert ours.activation_bytes <= theirs.activation_bytes + 2 * plain(linear).nbytes


def test_measured_memory_is_that_of_packed_weights_and_of_one_matrix_that_is_unpacked():
    model = packed_model("olmoe", **LARGER)
    held = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
    with MemoryMeter(model) as meter:
        assert meter.bytes == held
        logits(model, "olmoe")
    assert meter.peak_bytes - held < blocks(model)["model.layers.0.mlp"].experts.down_proj.numel() * 2
    small = shrink(model, tiny_experts(model), share_stacks=True)
    own = shrink(model, tiny_experts(model))
    with MemoryMeter(small) as shared, MemoryMeter(own) as copied:
        assert shared.bytes - copied.bytes == sum(each.stack_ids.nbytes for each in (b.experts for b in blocks(small).values()))
    assert torch.equal(logits(small, "olmoe"), logits(own, "olmoe"))


def test_evaluation_in_inference_mode_computes_the_same_bits_and_unpacks_no_whole_stack(monkeypatch):
    model = prepare(packed_model("olmoe", **LARGER), ALL_LORA, "seed")
    expected = logits(model, "olmoe")
    ranks = []
    unpack = nf4.NF4.unpack
    monkeypatch.setattr(nf4.NF4, "unpack", lambda *args: [ranks.append(len(args[3])), unpack(*args)][1])
    with torch.inference_mode():
        assert torch.equal(logits(model, "olmoe"), expected)
    assert set(ranks) == {2}


def test_autograd_keeps_no_copy_of_the_values_of_packed_weights():
    options = {**LARGER, "num_hidden_layers": 8}
    kept = []
    for model in (packed_model("olmoe", **options), unpacked(packed_model("olmoe", **options))):
        prepare(model, ALL_LORA, "seed")
        with MemoryMeter(model) as meter:
            before = meter.bytes
            loss = model(**tiny_batch("olmoe")).loss
            kept.append(meter.bytes - before)
            loss.backward()
    assert kept[0] == kept[1]


@pytest.mark.parametrize("train", ["lora", "full"])
def test_personal_experts_are_copied_as_they_are_stored_or_trained_in_float32(train):
    model = packed_model("olmoe")
    tuning = Tuning(train=train, parts=("router",), rank=8)
    small = prepare(shrink(model, {}), tuning, "seed")
    graft.attach(small, dict.fromkeys(blocks(model), (1, 3)), tuning, "seed")
    name, block = next(iter(blocks(model).items()))
    personal = small.get_submodule(f"{name}.grafted.copies").down_proj
    assert torch.equal(plain(personal), plain(block.experts.down_proj)[[1, 3]].to(personal.dtype))
    assert isinstance(personal, Packed) == (train == "lora")
    assert personal.dtype == (torch.bfloat16 if train == "lora" else torch.float32) and personal.requires_grad == (
        train == "full"
    )
    small(**tiny_batch("olmoe")).loss.backward()


def test_a_selection_unpacks_the_experts_once_for_many_examples():
    def sizes(model):
        context = tiny_context(model, Client("a", 40, "x"), Training(batch_size=4))
        return [len(batch["labels"]) for batch in METHODS["flex"]().calibration(replace(context, encoder=encoder))]

    model = packed_model("olmoe")
    encoder = copy.copy(tiny_context(model, Client("a", 40, "x"), Training()).encoder)
    encoder.max_tokens = 64
    assert sizes(model) == [16, 16, 8] and sizes(unpacked(model)) == [4] * 10
    encoder.max_tokens = 512
    assert sizes(model) == [4] * 10


@pytest.mark.parametrize(
    ("name", "family"),
    [
        *((name, "olmoe") for name in ("fedmoe", "hfedmoe", "flex", "flora", "fedit", "random_expert")),
        ("flex", "switch_transformers"),
    ],
)
def test_methods_do_on_packed_weights_what_they_do_on_their_values(name, family):
    parts = ("attention",) if name == "flex" else None
    training = Training(batch_size=4, local_steps=2, train="lora", rank=8, parts=parts)
    model = packed_model(family, torch.float32)
    sent = []
    for each in (model, unpacked(model)):
        before, method = bits(each), METHODS[name](**({"calibration_stride": 1} if name == "flex" else {}))  # batches differ
        server = tiny_server(each, [], training)
        clients = [Client(client, 8, "x") for client in "ab"]
        server = replace(server, clients={client.name: client for client in clients})
        contexts = {client.name: tiny_context(each, client, training) for client in clients}
        for round_, task in steps(method, 1):
            asked = replace(server, round=round_, task=task)
            server = method.merge(
                asked, iter([method.train(job, contexts[job.client]) for job in jobs_for(asked, method, clients)])
            )
        scored = method.build_model(next(jobs_for(replace(server, task="evaluate"), method, clients[:1])), contexts["a"])
        sent.append((server.weights, rows.read(scored), logits(scored, family)))
        assert bits(each) == before
    (ours, own, computed), (theirs, other, expected) = sent
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert all(torch.equal(own[key], other[key]) for key in own)
    assert torch.equal(computed, expected)


def saved(folder, family, dtype=torch.bfloat16, **options):
    tokenizer = make_tokenizer(128)
    tiny_model(family, vocab_size=len(tokenizer), **options).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "switch_transformers"])
def test_a_folder_is_loaded_in_4_bits_stack_by_stack(family, tmp_path, monkeypatch):
    folder = saved(tmp_path / "base", family)
    held, whole = [], []
    pack = nf4.pack

    def watched(weight, number):
        whole.append(sum(1 for each in held if each() is not None))
        return pack(weight, number)

    monkeypatch.setattr(nf4, "pack", watched)
    base, full = load(folder, quantize="nf4"), load(folder)
    packed = {name for name, each in base.model.named_parameters() if isinstance(each, Packed)}
    assert packed == nf4.packed_weights(full.model).keys() and len(whole) == len(packed)
    assert base.identity == full.identity and type(base.model) is type(full.model)
    values = dict(full.model.named_parameters())
    for name, each in base.model.named_parameters():
        expected = nf4.pack(values[name], nf4.packed_weights(full.model)[name]).unpacked() if name in packed else values[name]
        assert torch.equal(plain(each), expected)
    assert base.model.config._experts_implementation == full.model.config._experts_implementation


def test_without_bitsandbytes_the_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(nf4, "find_spec", lambda _: None)
    nf4.require_bitsandbytes.cache_clear()
    with pytest.raises(BadValue, match=r'pip install "fedexperts\[quant\]"'):
        load("tiny", quantize="nf4")
    assert load_module.load("tiny").stored_as is None


@pytest.mark.parametrize("parts", [None, ["attention"], ["router", "experts"], ["dense"]])
def test_training_whole_what_would_be_packed_is_refused(parts):
    training = {"train": "full", **({"parts": parts} if parts else {})}
    tree = {"model": {"quantize": "nf4"}, "training": training, "data": {"sources": ["sum"]}}
    with pytest.raises(BadValue, match=r'set training.train = "lora"'):
        checked(RunConfig, tree)
    assert checked(RunConfig, {**tree, "training": {"train": "lora"}}).model.quantize == "nf4"
    assert (
        checked(RunConfig, {**tree, "training": {"train": "full", "parts": ["router"]}}).resolved()["model"]["quantize"] == "nf4"
    )
