"""Gram matrices in slices of rows, and of a block whose inputs are still those of the block before it."""

import copy

import pytest
import torch

from helpers.families import VOCABULARY, make
from maiht_lightning.capture.block_inputs import record_inputs
from maiht_lightning.capture.grams import accumulate_grams, add_gram, mirror_, slice_rows
from maiht_lightning.models.blocks import find_blocks


@pytest.mark.parametrize("size", [200, 256, 600])
def test_slices_make_the_whole_symmetric_matrix(size):
    generator = torch.Generator().manual_seed(0)
    batches = torch.randint(-4, 5, (2, 30, size), generator=generator).float()  # products of integers are exact
    gram = torch.zeros(size, size, dtype=torch.float64)
    rows = slice_rows(size, gram.device)
    assert (rows < size) == (size == 600)
    for tokens in batches:
        add_gram(gram, tokens, torch.empty(rows * size))
    whole = batches.double().flatten(0, 1)
    assert torch.equal(mirror_(gram), whole.T @ whole)


def test_on_the_way_through_the_block_before_batches_get_its_arguments():
    """Gemma's blocks differ in their attention masks and rotary embeddings."""
    model = make("gemma3")
    blocks = find_blocks(model).modules
    windows = torch.randint(0, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))
    inputs = record_inputs(model, blocks, windows.split(2))
    other = copy.deepcopy(inputs)
    other.pass_through(blocks[0])
    for _ in other:  # all batches before the next block is looked at
        pass
    expected = accumulate_grams(blocks[1], other)
    inputs.pass_through(blocks[0])
    found = accumulate_grams(blocks[1], inputs)
    assert [group.names for group in found] == [group.names for group in expected]
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one.gram, two.gram)
    seen = []
    handle = blocks[1].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((*args, *kwargs.values())[0]), with_kwargs=True
    )
    with torch.no_grad():
        for tokens in windows.split(2):
            model(tokens)
    handle.remove()
    assert all(torch.equal(batch.hidden, own) for batch, own in zip(inputs.batches, seen, strict=True))
