"""Inputs of one group of layers after another, in a pruned model beside the dense one, against whole forward passes."""

import copy

import pytest
import torch

from helpers.families import VOCABULARY, make
from maiht_lightning.capture import sublayers
from maiht_lightning.capture.block_inputs import record_inputs
from maiht_lightning.capture.grams import add_gram, slice_rows
from maiht_lightning.capture.hidden_states import HiddenStateStore
from maiht_lightning.capture.sublayers import DenseStream, accumulate_group, add_product, find_groups
from maiht_lightning.models.blocks import find_blocks, find_linears, weight_of

# Of different shapes, as the last batch may be.
BATCHES = [
    torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(i))
    for i, shape in enumerate([(2, 12), (1, 9), (3, 12)])
]
GROUPS = {
    "llama": [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ],
    "gpt2": [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]],
    "opt": [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.out_proj"],
        ["fc1"],
        ["fc2"],
    ],
}


def halve(block, names=None):
    """Set the smaller half of each weight to zero."""
    for name, linear in find_linears(block).items():
        if names is None or name in names:
            weight = weight_of(linear).data
            weight[weight.abs() < weight.abs().median()] = 0


def seen_by(model, layer):
    """The inputs (tokens, in) of a layer over all batches, float64, by a hook in the whole model's forward passes."""
    seen = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2).double()))
    with torch.no_grad():
        for tokens in BATCHES:
            model(input_ids=tokens)
    handle.remove()
    return torch.cat(seen)


@pytest.fixture
def streams():
    """A function that gives a pruned model and the dense one, with the inputs of their second blocks."""

    def make_both(family):
        dense = make(family)
        pruned = copy.deepcopy(dense)
        halve(find_blocks(pruned).modules[0])
        inputs = record_inputs(pruned, find_blocks(pruned).modules, BATCHES)
        beside = inputs.twin(HiddenStateStore("device", torch.device("cpu")))
        inputs.pass_through(find_blocks(pruned).modules[0])
        beside.pass_through(find_blocks(dense).modules[0])
        return pruned, inputs, DenseStream(beside, find_blocks(dense).modules[1]), dense

    return make_both


@pytest.mark.parametrize("family", GROUPS)
def test_each_group_sees_the_pruned_layers_before_it(streams, family):
    pruned, inputs, stream, dense = streams(family)
    block = find_blocks(pruned).modules[1]
    groups, _ = find_groups(block, inputs)
    assert groups == GROUPS[family]
    for names in groups:
        group = accumulate_group(block, inputs, names, dense=stream)
        ours = seen_by(pruned, find_linears(block)[names[0]])
        theirs = seen_by(dense, find_linears(stream.block)[names[0]])
        assert group.names == names
        assert (ours - theirs).norm() > 1e-3 * theirs.norm()
        gram, drift = ours.T @ ours, ours.T @ (theirs - ours)
        torch.testing.assert_close(group.gram, gram, rtol=1e-4, atol=1e-5 * float(gram.abs().max()))
        torch.testing.assert_close(group.drift, drift, rtol=1e-4, atol=1e-5 * float(drift.abs().max()))
        assert torch.equal(group.gram, group.gram.T)
        assert group.gram.dtype == group.drift.dtype == torch.float64
        halve(block, names)


@pytest.mark.parametrize(("at_once", "products"), [(1, 3), (30, 2), (10**9, 1)])
def test_batches_are_multiplied_together(streams, monkeypatch, at_once, products):
    """As many as have enough tokens, and all of them in the end, with the same sums."""
    pruned, inputs, stream, dense = streams("llama")
    block, names = find_blocks(pruned).modules[1], ["mlp.gate_proj", "mlp.up_proj"]
    seen = []

    def watch(gram, tokens, buffer):
        seen.append(len(tokens))
        add_gram(gram, tokens, buffer)

    monkeypatch.setattr(sublayers, "add_gram", watch)
    group = accumulate_group(block, inputs, names, dense=stream, at_once=at_once)
    ours, theirs = seen_by(pruned, block.mlp.gate_proj), seen_by(dense, stream.block.mlp.gate_proj)
    assert sum(seen) == len(ours)
    assert len(seen) == products
    gram, drift = ours.T @ ours, ours.T @ (theirs - ours)
    torch.testing.assert_close(group.gram, gram, rtol=1e-4, atol=1e-5 * float(gram.abs().max()))
    torch.testing.assert_close(group.drift, drift, rtol=1e-4, atol=1e-5 * float(drift.abs().max()))


def test_inputs_stay_inputs_of_the_block(streams):
    """Until it is passed; then they are the whole models' hidden states."""
    pruned, inputs, stream, dense = streams("llama")
    block, blocks = find_blocks(pruned).modules[1], find_blocks(dense).modules
    for names in find_groups(block, inputs)[0]:
        accumulate_group(block, inputs, names, dense=stream)
        halve(block, names)
    inputs.pass_through(block)
    stream.inputs.pass_through(stream.block)
    inputs.settle()
    stream.inputs.settle()
    for model, found in ((pruned, inputs), (dense, stream.inputs)):
        seen = []
        last = find_blocks(model).modules[2]
        handle = last.register_forward_pre_hook(
            lambda _, args, kwargs, seen=seen: seen.append((*args, *kwargs.values())[0]), with_kwargs=True
        )
        with torch.no_grad():
            for tokens in BATCHES:
                model(input_ids=tokens)
        handle.remove()
        for batch, expected in zip(found.batches, seen, strict=True):
            torch.testing.assert_close(batch.hidden, expected)
            assert batch.index == 2
    assert len(blocks) == 3


def test_without_a_dense_stream_there_is_no_drift(streams):
    pruned, inputs, _, _ = streams("llama")
    block = find_blocks(pruned).modules[1]
    group = accumulate_group(block, inputs, ["mlp.gate_proj", "mlp.up_proj"])
    ours = seen_by(pruned, block.mlp.gate_proj)
    assert group.drift is None
    torch.testing.assert_close(group.gram, ours.T @ ours, rtol=1e-4, atol=1e-3)


def test_what_comes_after_the_group_does_not_run(streams):
    pruned, inputs, stream, _ = streams("llama")
    block = find_blocks(pruned).modules[1]
    for one in (block, stream.block):
        for module in (one.self_attn.o_proj, one.mlp.gate_proj):
            module.register_forward_hook(lambda *_: pytest.fail("it runs"))
    accumulate_group(block, inputs, ["self_attn.o_proj"], dense=stream)
    assert not any(linear._forward_pre_hooks for one in (block, stream.block) for linear in find_linears(one).values())


@pytest.mark.parametrize("which", ["pruned", "dense"])
def test_inputs_that_are_not_finite_are_an_error(streams, which):
    pruned, inputs, stream, dense = streams("llama")
    with torch.no_grad():
        find_blocks(pruned if which == "pruned" else dense).modules[0].mlp.down_proj.weight[0, 0] = torch.inf
    block = find_blocks(pruned).modules[1]
    with pytest.raises(ValueError, match=r"the inputs of self_attn\.o_proj are not finite: the model overflows"):
        accumulate_group(block, inputs, ["self_attn.o_proj"], dense=stream)
    assert not block.self_attn.o_proj._forward_pre_hooks


@pytest.mark.parametrize("size", [200, 600])
def test_slices_make_the_whole_product(size):
    """Products of integers are exact."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-4, 5, (30, size), generator=generator).float() for _ in range(2))
    total = torch.ones(size, size, dtype=torch.float64)
    rows = slice_rows(size, total.device)
    assert (rows < size) == (size == 600)
    add_product(total, left, right, torch.empty(rows * size))
    assert torch.equal(total, 1 + left.double().T @ right.double())


def test_a_twin_goes_its_own_way():
    """On disk, too, where hidden states are overwritten in place."""
    model = make("llama")
    blocks = find_blocks(model).modules
    with HiddenStateStore("disk", torch.device("cpu")) as store:
        inputs = record_inputs(model, blocks, BATCHES, store=store)
        twin = inputs.twin(store)
        before = [batch.hidden.clone() for batch in twin.batches]
        inputs.pass_through(blocks[0])
        inputs.settle()
        for batch, other, hidden in zip(inputs.batches, twin.batches, before, strict=True):
            assert torch.equal(other.hidden, hidden)
            assert not torch.equal(batch.hidden, hidden)
            assert (batch.index, other.index) == (1, 0)
