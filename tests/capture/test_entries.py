"""Modules that begin at the input of their last layer, against whole forward passes."""

import copy

import pytest
import torch
from torch import nn

from helpers.families import FAMILIES, VOCABULARY, make
from maiht_lightning.capture.block_inputs import record_inputs
from maiht_lightning.capture.entries import Entry, entered, finding_entries
from maiht_lightning.capture.hidden_states import HiddenStateStore
from maiht_lightning.capture.sublayers import DenseStream, accumulate_group, find_groups
from maiht_lightning.models.blocks import find_blocks, find_linears, weight_of

BATCHES = [
    torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(i))
    for i, shape in enumerate([(2, 12), (1, 9), (3, 12)])
]
# The layers at whose inputs modules begin. OPT's MLP is no module of its own, and gemma's norms come after its modules.
# Falcon's blocks, where attention and MLP see the same input, have both as modules.
BEGIN_AT = {
    "llama": ["self_attn.o_proj", "mlp.down_proj"],
    "mistral": ["self_attn.o_proj", "mlp.down_proj"],
    "qwen2": ["self_attn.o_proj", "mlp.down_proj"],
    "qwen3": ["self_attn.o_proj", "mlp.down_proj"],
    "gemma3": ["self_attn.o_proj", "mlp.down_proj"],
    "opt": ["self_attn.out_proj"],
    "gpt2": ["attn.c_proj", "mlp.c_proj"],
    "falcon": ["self_attention.dense", "mlp.dense_4h_to_h"],
    "falcon_alibi": ["self_attention.dense", "mlp.dense_4h_to_h"],
}


def inputs_of(model):
    return record_inputs(model, find_blocks(model).modules, BATCHES)


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_that_return_what_their_last_layer_does(family):
    model = make(family)
    block = find_blocks(model).modules[0]
    _, entries = find_groups(block, inputs_of(model))
    assert [entry.layer for entry in entries] == BEGIN_AT[family]
    assert all(entry.layer.startswith(f"{entry.module}.") for entry in entries)
    assert not any(module._forward_hooks for module in block.modules())


class Around(nn.Module):
    """A module around a layer, which does with the layer's output what it is told."""

    def __init__(self, does):
        super().__init__()
        self.first, self.layer, self.does = nn.Linear(6, 6), nn.Linear(6, 6), does

    def forward(self, x):
        return self.does(self, self.layer(self.first(x)), x)


class Block(nn.Module):
    def __init__(self, does):
        super().__init__()
        self.inner = Around(does)

    def forward(self, x):
        output = self.inner(x)
        return x + (output[0] if isinstance(output, tuple) else output)


@pytest.mark.parametrize(
    ("does", "begins"),
    [
        (lambda module, y, x: y, True),
        (lambda module, y, x: (y, None), True),
        (lambda module, y, x: nn.functional.dropout(y, training=False), True),
        (lambda module, y, x: y + 0, False),
        (lambda module, y, x: y.mul_(2), False),
        (lambda module, y, x: y[:1], False),
        (lambda module, y, x: y.T, False),
        (lambda module, y, x: (y, x), False),
        (lambda module, y, x: [y, module.first(x)][0], False),
    ],
    ids=[
        "alone",
        "in a tuple",
        "no dropout",
        "a sum",
        "changed in place",
        "a part",
        "turned",
        "a tensor beside",
        "not the last",
    ],
)
def test_only_an_output_that_is_returned_as_it_is_counts(does, begins):
    block, x = Block(does), torch.randn(6, 6)
    with torch.no_grad(), finding_entries(block) as entries:
        expected = block(x)
    assert [(entry.module, entry.layer) for entry in entries] == ([("inner", "inner.layer")] if begins else [])
    seen = []
    block.inner.layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        block(x)
        block.inner.first.register_forward_hook(lambda *_: pytest.fail("it runs"))
        if begins:
            with entered(block, [(entries[0], seen[0])]):
                assert torch.equal(block(x), expected)


def test_the_outermost_module_begins():
    block = nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))), nn.ReLU())
    with torch.no_grad(), finding_entries(block) as entries:
        block(torch.randn(2, 4))
    assert entries == [Entry("0", "0.0.1", None)]


def test_in_inference_mode_none_is_found():
    """Whether a tensor was changed in place, PyTorch does not tell there."""
    block = Block(lambda module, y, x: y.mul_(2))
    with torch.inference_mode(), finding_entries(block) as entries:
        block(torch.randn(3, 6))
    assert entries == []


def test_forwards_of_modules_are_back_after_an_error():
    block = Block(lambda module, y, x: y)
    own = block.inner.forward = block.inner.forward
    with pytest.raises(RuntimeError), entered(block, [(Entry("inner", "inner.layer", None), torch.randn(3, 5))]):
        block(torch.randn(3, 6))
    assert block.inner.forward is own


def captured(family, keeps):
    """Gram matrices, drifts and hidden states of a block that is pruned group by group, and how often layers run."""
    dense = make(family)
    pruned = copy.deepcopy(dense)
    block, theirs = find_blocks(pruned).modules[0], find_blocks(dense).modules[0]
    inputs = inputs_of(pruned)
    stream = DenseStream(inputs.twin(HiddenStateStore("device", torch.device("cpu"))), theirs)
    groups, entries = find_groups(block, inputs)
    runs = dict.fromkeys(find_linears(block), 0)

    def count(name):
        runs[name] += 1

    for one in (block, theirs):
        for name, linear in find_linears(one).items():
            linear.register_forward_hook(lambda *_, name=name: count(name))
    found = []
    for names in groups:
        entry = next((entry for entry in entries if keeps and entry.layer in names), None)
        stream.entry = entry
        group = accumulate_group(block, inputs, names, dense=stream, entry=entry)
        found += [group.gram, group.drift]
        for name in names:
            weight_of(find_linears(block)[name]).data[::2] = 0
    for way, passed in ((inputs, block), (stream.inputs, theirs)):
        way.pass_through(passed)
        way.settle()
        found += [batch.hidden for batch in way.batches]
        assert all(batch.known == [] for batch in way.batches)
    return found, {name: count // (2 * len(BATCHES)) for name, count in runs.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept_of_a_block_changes_nothing(family):
    kept, fewer = captured(family, keeps=True)
    anew, more = captured(family, keeps=False)
    assert all(torch.equal(one, other) for one, other in zip(kept, anew, strict=True))
    assert sum(fewer.values()) < sum(more.values())


def test_what_leads_to_a_known_input_runs_once():
    _, runs = captured("llama", keeps=True)
    assert runs == {
        **dict.fromkeys(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], 1),
        # For the inputs of gate and up, for that of down, and for the next block.
        "self_attn.o_proj": 3,
        **dict.fromkeys(["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"], 1),
    }
