"""Gram matrices in slices of rows, and of a block whose inputs are still those of the block before it."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.families import VOCABULARY, make
from maiht_lightning.capture.block_inputs import record_inputs
from maiht_lightning.capture.grams import accumulate_grams, add_gram, as_factor, mirror_, multiply, slice_rows
from maiht_lightning.capture.sublayers import accumulate_group
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


class Products(TorchDispatchMode):
    """Notes products with their arguments, and what is turned to float32."""

    def __init__(self):
        super().__init__()
        self.products, self.turned = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith("aten.mm."):
            self.products.append((args[0].dtype, (kwargs or {}).get("out_dtype", args[2] if len(args) > 2 else None)))
        self.turned += func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.float32
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_on_a_gpu_half_precision_is_multiplied_as_it_is(dtype, device):
    """With tensors that pretend to be on one: shapes, dtypes and arguments are checked, nothing is computed."""
    with FakeTensorMode(), Products() as seen:
        tokens = as_factor(torch.empty(30, 64, dtype=dtype, device=device))
        out = torch.empty(64, 64, device=device)
        assert multiply(tokens.T, tokens, out) is out
    direct = device == "cuda" and dtype != torch.float32
    assert [given for given, _ in seen.products] == [dtype if direct else torch.float32]
    assert [made for _, made in seen.products] == [torch.float32 if direct else None]
    assert seen.turned == (not direct and dtype != torch.float32)


@pytest.mark.parametrize(
    ("capability", "dtypes"),
    [((6, 1), []), ((7, 5), [torch.float16]), ((8, 0), [torch.float16, torch.bfloat16])],
)
def test_older_gpus_get_what_they_can_multiply(monkeypatch, capability, dtypes):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with FakeTensorMode():
        given = [torch.empty(3, 4, dtype=dtype, device="cuda") for dtype in (torch.float16, torch.bfloat16)]
        assert [factor.dtype for each in given if (factor := as_factor(each)).dtype != torch.float32] == dtypes


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


@pytest.mark.parametrize("staged", [False, True])
def test_under_autocast_inputs_count_as_they_are_multiplied(staged):
    """Norms return float32 there; the projections' products round it to bfloat16."""
    model = make("llama")
    blocks = find_blocks(model).modules
    windows = torch.randint(0, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))
    seen = []
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        inputs = record_inputs(model, blocks, windows.split(2))
        if staged:
            names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
            group = accumulate_group(blocks[0], inputs, names)
        else:
            group = accumulate_grams(blocks[0], inputs)[0]
        handle = blocks[0].self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for tokens in windows.split(2):
            model(tokens)
    handle.remove()
    assert {each.dtype for each in seen} == {torch.float32}
    rounded = torch.cat([each.bfloat16().double().flatten(0, 1) for each in seen])
    torch.testing.assert_close(group.gram, rounded.T @ rounded, rtol=1e-5, atol=1e-5 * float(group.gram.max()))
    exact = torch.cat([each.double().flatten(0, 1) for each in seen])
    assert (group.gram - exact.T @ exact).abs().max() > 1e-4 * group.gram.max()
