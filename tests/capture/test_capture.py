"""Finding blocks, replaying them and their Gram matrices, against the models' own forward passes."""

import contextlib
import copy
import functools

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.families import FAMILIES, VOCABULARY, make
from maiht_lightning.capture.block_inputs import Batch, BlockInputs, record_inputs
from maiht_lightning.capture.grams import accumulate_grams
from maiht_lightning.models.blocks import evaluation_mode, find_blocks, find_linears, weight_of, write_weight


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param, make(request.param)


@pytest.fixture(scope="module")
def windows():
    return torch.randint(VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def llama():
    return make("llama")


def watched(modules, run):
    """Inputs and outputs of modules during `run()`, by plain forward hooks."""
    seen = [[] for _ in modules]
    handles = [
        module.register_forward_hook(lambda _, args, output, i=i: seen[i].append((args, output)))
        for i, module in enumerate(modules)
    ]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return seen


def check_grams(model, blocks, index, groups, windows):
    """Each Gram matrix equals the float64 one of the inputs seen in the model's own forward."""
    linears = find_linears(blocks.modules[index])
    names = [name for group in groups for name in group.names]
    assert sorted(names) == sorted(linears)
    seen = watched([linears[name] for name in names], lambda: model(windows))
    inputs = {
        name: calls[0][0][0].double().reshape(-1, calls[0][0][0].shape[-1])
        for name, calls in zip(names, seen, strict=True)
    }
    for group in groups:
        for name in group.names:
            expected = inputs[name].T @ inputs[name]
            assert group.gram.dtype == torch.float64
            torch.testing.assert_close(
                group.gram.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.diagonal().max())
            )


def test_blocks_are_found(family):
    name, model = family
    blocks = find_blocks(model)
    assert blocks.path == (FAMILIES[name][2] or "model.layers")
    assert list(blocks.modules) == list(model.get_submodule(blocks.path))
    assert len(blocks.modules) == 3
    head = model.get_output_embeddings()
    assert all(linear is not head for block in blocks.modules for linear in find_linears(block).values())


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_replay_gives_the_models_own_hidden_states(family, windows, batch_size):
    """Every block's output, batch by batch; the last batch is smaller."""
    _, model = family
    blocks = find_blocks(model).modules
    batches = record_inputs(model, blocks, windows.split(batch_size))
    assert [len(batch.hidden) for batch in batches] == [len(w) for w in windows.split(batch_size)]
    for tokens, batch in zip(windows.split(batch_size), batches, strict=True):
        seen = watched(blocks, lambda tokens=tokens: model(tokens))
        assert torch.equal(batch.hidden, seen[0][0][0][0])
        for index, block in enumerate(blocks):
            batch.advance(block)
            output = seen[index][0][1]  # Falcon's blocks return a tuple
            assert torch.equal(batch.hidden, output[0] if isinstance(output, tuple) else output)


def test_gram_matrices_are_those_of_the_dense_and_then_of_the_pruned_model(family, windows):
    model = copy.deepcopy(family[1])
    blocks = find_blocks(model)
    batches = record_inputs(model, blocks.modules, windows.split(2))
    check_grams(model, blocks, 0, accumulate_grams(blocks.modules[0], batches), windows)
    before = batches.batches[0].hidden.clone()
    accumulate_grams(blocks.modules[0], batches)
    assert torch.equal(batches.batches[0].hidden, before)
    for linear in find_linears(blocks.modules[0]).values():
        weight = weight_of(linear)
        write_weight(linear, weight * (weight.abs() > weight.abs().median()))
    batches.pass_through(blocks.modules[0])
    check_grams(model, blocks, 1, accumulate_grams(blocks.modules[1], batches), windows)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]),
        ("opt", [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]]),
        ("gpt2", [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]]),
        ("falcon", [["query_key_value", "dense_h_to_4h"], ["dense"], ["dense_4h_to_h"]]),
    ],
)
def test_layers_with_the_same_input_share_a_gram_matrix(name, expected, windows):
    model = make(name)
    blocks = find_blocks(model).modules
    groups = accumulate_grams(blocks[0], record_inputs(model, blocks, windows.split(2)))
    assert [[path.rsplit(".")[-1] for path in group.names] for group in groups] == expected


def test_blocks_run_once_during_recording(llama, windows):
    """Only to learn what form their output has; everything else is the identity."""
    blocks = find_blocks(llama).modules
    linears = [linear for block in blocks for linear in find_linears(block).values()]
    seen = watched(linears, lambda: record_inputs(llama, blocks, windows.split(1)))
    assert sorted(map(len, seen)) == [0] * 14 + [1] * 7


def test_equal_arguments_are_stored_once(windows):
    model = make("gemma3")
    batches = record_inputs(model, find_blocks(model).modules, windows.split(2))
    tensors = [
        {id(t) for positional, keywords in batch.arguments for t in tensors_in((positional, keywords))}
        for batch in batches
    ]
    assert tensors[0]
    assert tensors[1] <= tensors[0]
    # The last batch is smaller: what depends on the number of windows is its own.
    assert [len(b.hidden) for b in batches] == [2, 2, 1]


def test_different_arguments_stay_apart(windows):
    class Shifting(nn.Module):
        """Hands a block what depends on the tokens."""

        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(VOCABULARY, 8)
            self.blocks = nn.ModuleList(OldStyle() for _ in range(2))

        def forward(self, input_ids, use_cache):
            hidden = self.embed(input_ids)
            for block in self.blocks:
                hidden = block(hidden, shift=input_ids.float().mean((0, 1)))[0]
            return hidden

    class OldStyle(nn.Module):
        """Returns a tuple, as blocks of older models do."""

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, hidden_states, shift):
            return (hidden_states + self.linear(hidden_states) * shift, None)

    model = Shifting()
    batches = record_inputs(model, tuple(model.blocks), windows.split(2))
    for block in model.blocks:
        batches.pass_through(block)
    for batch, tokens in zip(batches, windows.split(2), strict=True):
        assert torch.equal(batch.hidden, model(tokens, use_cache=False))


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


def test_forwards_are_back_after_recording(llama, windows, monkeypatch):
    blocks = find_blocks(llama).modules
    given = functools.partial(blocks[1].forward)
    blocks[1].forward = given
    expected = llama(windows).logits
    record_inputs(llama, blocks, windows.split(1))
    assert "forward" not in blocks[0].__dict__
    assert blocks[1].forward is given
    assert torch.equal(llama(windows).logits, expected)

    def fail(*args, **keywords):
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(llama.model.norm, "forward", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            record_inputs(llama, blocks, windows.split(1))
    assert blocks[1].forward is given
    assert torch.equal(llama(windows).logits, expected)


def test_no_hooks_remain_after_a_failed_capture(llama, windows):
    blocks = find_blocks(llama).modules
    batches = record_inputs(llama, blocks, windows.split(1))
    batches.batches[1].hidden.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"inputs of .*q_proj.* are not finite"):
        accumulate_grams(blocks[0], batches)
    assert not any(linear._forward_pre_hooks for linear in find_linears(blocks[0]).values())


def test_gram_matrices_stay_float64(llama, windows):
    """Under autocast, for half-precision models, and whatever torch's default dtype is."""
    blocks = find_blocks(llama)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        batches = record_inputs(llama, blocks.modules, windows.split(2))
        for group in accumulate_grams(blocks.modules[0], batches):
            assert group.gram.dtype == torch.float64
        seen = watched([find_linears(blocks.modules[0])["self_attn.q_proj"]], lambda: llama(windows))
    inputs = seen[0][0][0][0].double().flatten(0, 1)
    gram = accumulate_grams(blocks.modules[0], batches)[0].gram.double()
    torch.testing.assert_close(gram, inputs.T @ inputs, rtol=1e-5, atol=1e-3)

    half = copy.deepcopy(llama).bfloat16()
    torch.set_default_dtype(torch.bfloat16)
    try:
        batches = record_inputs(half, find_blocks(half).modules, windows.split(2))
        groups = accumulate_grams(find_blocks(half).modules[0], batches)
    finally:
        torch.set_default_dtype(torch.float32)
    check_grams(half, find_blocks(half), 0, groups, windows)


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="needs PyTorch 2.9")
def test_gram_matrices_are_exact_whatever_the_training_allows(llama, windows):
    blocks, seen = find_blocks(llama).modules, []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.mm.out:
                seen.append(torch.backends.cuda.matmul.fp32_precision)
            return function(*args, **(kwargs or {}))

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        batches = record_inputs(llama, blocks, windows.split(2))
        with Watch():
            groups = accumulate_grams(blocks[0], batches)
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["ieee"] * len(groups) * len(batches.batches)


def test_a_written_weight_counts_under_autocast(llama):
    linear = find_linears(llama.model.layers[0])["self_attn.q_proj"]
    x = torch.ones(1, 32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x).any()
        write_weight(linear, torch.zeros_like(linear.weight))
        assert not linear(x).any()


def test_conv1d_is_read_and_written_as_out_in():
    linear = make("gpt2").transformer.h[0].attn.c_attn
    assert weight_of(linear).shape == (96, 32)
    weight = torch.randn(96, 32)
    write_weight(linear, weight)
    assert torch.equal(linear.weight, weight.T)
    x = torch.randn(4, 32)
    torch.testing.assert_close(linear(x), x @ weight.T + linear.bias)


class Scripted(nn.Module):
    """A block whose layers run on so many tokens, pass by pass, as `plan` says; others than named do not run."""

    def __init__(self, *plan):
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(4, 4) for _ in range(3))
        self.plan = list(plan)

    def forward(self, hidden):
        for name, tokens in self.plan.pop(0):
            # Each layer has an input of its own.
            getattr(self, name)(hidden.flatten(0, -2)[:tokens] + 0)
        return hidden


ALL = [("one", 6), ("two", 6), ("three", 6)]


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ([ALL[:2]], "three did not run"),
        ([[]], "one, two, three did not run"),
        ([[*ALL, ("one", 6)]], "one runs more than once"),
        ([ALL, [("one", 6), ("one", 6)]], "one runs more than once"),
        (
            [[("one", 6), ("two", 5), ("three", 6)]],
            "each of the 6 tokens of a pass, but two ran on 5: mixtures of experts",
        ),
        ([[("one", 6), ("two", 0), ("three", 6)]], "two ran on 0"),
        ([ALL, [("one", 6), ("two", 4), ("three", 6)]], "two ran on 4"),
        # Not in the first pass alone.
        ([ALL[1:], ALL], "one did not run"),
        ([ALL, ALL[1:]], "one did not run"),
        ([ALL, ALL, ALL[:2]], "three did not run"),
        ([ALL, ALL[2:]], "one, two did not run"),
    ],
)
def test_layers_that_do_not_run_once_on_every_token_are_refused(passes, message):
    block = Scripted(*passes)
    batches = BlockInputs([Batch(torch.ones(2, 3, 4), [((), {})], torch.device("cpu")) for _ in passes])
    with pytest.raises(ValueError, match=message):
        accumulate_grams(block, batches)


def test_layers_that_run_on_every_token_are_not():
    """In any order, and on more tokens than there are, as layers of a head apart do."""
    block = Scripted(ALL, [("two", 6), ("one", 6), ("three", 6)], ALL)
    batches = BlockInputs([Batch(torch.ones(2, 3, 4), [((), {})], torch.device("cpu")) for _ in range(3)])
    assert [group.gram[0, 0] for group in accumulate_grams(block, batches)] == [18, 18, 18]

    class Pair(nn.Module):
        """The last input is that of two layers: a pass ends at the first of them."""

        def __init__(self):
            super().__init__()
            self.first, self.left, self.right = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, hidden):
            hidden = hidden + self.first(hidden)
            return self.left(hidden) + self.right(hidden)

    assert [group.names for group in accumulate_grams(Pair(), batches)] == [["first"], ["left", "right"]]

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(2, 2)

        def forward(self, hidden):
            return self.head(hidden.unflatten(-1, (2, 2))).flatten(-2)

    (group,) = accumulate_grams(Heads(), batches)
    assert group.gram[0, 0] == 36


def test_skipped_blocks_are_refused(llama, windows):
    blocks = find_blocks(llama).modules
    llama.model.layers = llama.model.layers[:2]
    llama.config.num_hidden_layers = 2
    with pytest.raises(ValueError, match="ran 2 of its 3 decoder blocks"):
        record_inputs(llama, blocks, windows.split(1))


def test_evaluation_mode_puts_every_mode_back(llama):
    llama.train()
    llama.model.layers[1].mlp.eval()
    modes = [module.training for module in llama.modules()]
    with contextlib.suppress(KeyError), evaluation_mode(llama):
        assert not any(module.training for module in llama.modules())
        raise KeyError
    assert [module.training for module in llama.modules()] == modes
