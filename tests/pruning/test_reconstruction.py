"""Training what is left of a block: what it reports, what it leaves alone, and that it does no harm."""

import copy

import pytest
import torch

from maiht_lightning.capture.block_inputs import record_inputs
from maiht_lightning.models.blocks import find_linears, weight_of
from maiht_lightning.pruning.pruner import prune
from maiht_lightning.pruning.reconstruction import reconstruct, relative_error_per_token, split
from maiht_lightning.solvers import MAIHTConfig
from maiht_lightning.solvers.config import HELD_OUT

CONFIG = MAIHTConfig(reconstruction_epochs=2, reconstruction_rate=0.02)
WINDOWS = torch.randint(0, 64, (2 * HELD_OUT + 2, 12), generator=torch.Generator().manual_seed(0))
HELD = [0, HELD_OUT, 2 * HELD_OUT]


class Case:
    """A block that has lost the smaller half of each weight, its inputs, and what the dense block makes of them."""

    def __init__(self, tiny_llama, dtype=torch.float32, windows=WINDOWS):
        model = tiny_llama(vocab_size=64, hidden_size=32, intermediate_size=48).to(dtype)
        blocks = model.model.layers
        self.inputs = record_inputs(model, tuple(blocks), windows.split(1)).batches
        self.block = blocks[0]
        self.targets = self.outputs()
        with torch.no_grad():
            for linear in find_linears(self.block).values():
                linear.weight[linear.weight.abs() < linear.weight.abs().median()] = 0

    def outputs(self):
        with torch.no_grad():
            return [batch.run(self.block) for batch in self.inputs]

    def error(self, chosen):
        """Mean over all tokens of some windows, by the definition, float64."""
        outputs, ratios = self.outputs(), []
        for i in chosen:
            for token, target in zip(
                outputs[i].flatten(0, 1).double(), self.targets[i].flatten(0, 1).double(), strict=True
            ):
                ratios.append((token - target).square().sum() / target.square().sum())
        return float(torch.stack(ratios).mean())

    def state(self):
        return {name: tensor.clone() for name, tensor in self.block.state_dict().items()}

    def run(self, config=CONFIG, **settings):
        return reconstruct(self.block, self.inputs, self.targets, config, **settings)


@pytest.fixture
def case(tiny_llama):
    return Case(tiny_llama)


def zeros_of(state):
    return {name: tensor == 0 for name, tensor in state.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_held_out_error_falls_and_is_the_one_reported(tiny_llama, dtype):
    case = Case(tiny_llama, dtype)
    before, expected = case.state(), case.error(HELD)
    start, end = case.run()
    assert start == pytest.approx(expected, rel=1e-5)
    assert end == pytest.approx(case.error(HELD), rel=1e-5)
    assert end < 0.9 * start
    after = case.state()
    for name, zeros in zeros_of(before).items():
        assert after[name].dtype == dtype
        if name.endswith("_proj.weight"):
            assert not after[name][zeros].any()
            assert not torch.equal(after[name], before[name])
        else:
            assert torch.equal(after[name], before[name]), name


@pytest.mark.parametrize("rate", [1e-12, 0.999])
def test_nothing_changes_where_the_error_does_not_fall(case, rate):
    before = case.state()
    start, end = case.run(MAIHTConfig(reconstruction_epochs=1, reconstruction_rate=rate))
    assert end == start == pytest.approx(case.error(HELD), rel=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in case.state().items())


def test_the_best_epoch_is_kept(tiny_llama):
    """Windows that are held out are unlike those trained on: the error on them rises again in the end."""
    case, watched = Case(tiny_llama), []
    for i in range(len(case.targets)):
        if i not in HELD:
            # All but the held-out windows ask for something else.
            case.targets[i] = -case.targets[i]
    before = case.state()
    start, end = case.run(MAIHTConfig(reconstruction_epochs=3, reconstruction_rate=0.05))
    watched.append((start, end))
    assert end == start
    assert all(torch.equal(tensor, before[name]) for name, tensor in case.state().items())


def test_nothing_but_the_weights_is_touched(case):
    """Gradients of other parameters would go into the training's next step."""
    for number, parameter in enumerate(case.block.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    wanted = [parameter.requires_grad for parameter in case.block.parameters()]
    parameters = list(case.block.parameters())
    hidden = [batch.hidden.clone() for batch in case.inputs]
    random = torch.get_rng_state()
    with torch.no_grad():
        start, end = case.run()
        assert not torch.is_grad_enabled()
    assert end < start
    assert [parameter.requires_grad for parameter in case.block.parameters()] == wanted
    assert all(one is other for one, other in zip(case.block.parameters(), parameters, strict=True))
    assert all(parameter.grad is None for parameter in parameters)
    assert all(parameter.is_leaf for parameter in parameters)
    for batch, before in zip(case.inputs, hidden, strict=True):
        assert torch.equal(batch.hidden, before)
        assert batch.index == 0
    assert torch.equal(torch.get_rng_state(), random)


def test_the_same_twice_and_another_with_another_order(tiny_llama):
    found = []
    for seed in (1, 1, 2):
        case = Case(tiny_llama)
        case.run(seed=seed)
        found.append(case.state())
    one, same, other = found
    assert all(torch.equal(tensor, same[name]) for name, tensor in one.items())
    assert not torch.equal(one["mlp.up_proj.weight"], other["mlp.up_proj.weight"])


def test_windows_are_split_and_few_are_used_for_both():
    pairs = list(range(2 * HELD_OUT + 2))
    training, held_out = split(pairs)
    assert held_out == HELD
    assert training == [i for i in pairs if i not in HELD]
    assert split(pairs[:4]) == ([1, 2, 3], [0])


def test_three_windows_are_trained_on_and_measured(tiny_llama):
    case = Case(tiny_llama, windows=WINDOWS[:3])
    start, end = case.run()
    assert start > end == pytest.approx(case.error(range(3)), rel=1e-5)


def test_each_token_counts_as_much(case):
    """One of a thousandfold size does not outweigh the others; one that is 0 does not divide by it."""
    output, target = torch.ones(1, 3, 4), torch.tensor([1e3, 2.0, 1.0])[None, :, None].expand(1, 3, 4)
    found = relative_error_per_token(output, target)
    torch.testing.assert_close(found, torch.tensor([[0.999**2, 0.25, 0.0]]))
    assert relative_error_per_token(output, 0 * target).isfinite().all()
    assert relative_error_per_token(output.bfloat16(), target.bfloat16()).dtype == torch.float32


def test_a_block_without_any_weights_left_stays(case):
    with torch.no_grad():
        for linear in find_linears(case.block).values():
            linear.weight.zero_()
    start, end = case.run()
    assert start == end
    assert not any(linear.weight.any() for linear in find_linears(case.block).values())


def test_a_pruning_reports_the_blocks_errors(tiny_llama):
    """Each block is to return what the dense model has there, also where the layers before it are pruned."""
    model = tiny_llama(vocab_size=64, hidden_size=32, intermediate_size=48)
    dense, plain = copy.deepcopy(model), copy.deepcopy(model)
    config = MAIHTConfig(reconstruction_epochs=2, reconstruction_rate=0.02)
    report = prune(model, WINDOWS, method="magnitude", config=config, progress=False)
    prune(plain, WINDOWS, method="magnitude", progress=False)
    assert report.reconstruction_seconds > 0
    assert report.seconds == report.capture_seconds + report.solve_seconds + report.reconstruction_seconds
    outputs = {}
    for name, one in (("dense", dense), ("pruned", model)):
        seen = []
        handles = [
            block.register_forward_hook(lambda *a, seen=seen: seen.append(a[2][0] if isinstance(a[2], tuple) else a[2]))
            for block in one.model.layers
        ]
        with torch.no_grad():
            one(input_ids=WINDOWS[HELD])
        for handle in handles:
            handle.remove()
        outputs[name] = seen
    for block, (output, target) in enumerate(zip(outputs["pruned"], outputs["dense"], strict=True)):
        errors = {record.block_error for record in report.layers if record.block == block}
        ((before, after),) = errors
        assert after < before
        assert after == pytest.approx(float(relative_error_per_token(output, target).mean()), rel=1e-3)
    for record in report.layers:
        weight = model.get_submodule(record.name).weight
        assert record.zeros == int((weight == 0).sum()) == weight.numel() // 2
    # Magnitudes do not depend on inputs: the supports are those without reconstruction, and the weights are not.
    for (name, found), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(found == 0, other == 0), name
        assert torch.equal(found, other) != name.endswith("_proj.weight"), name


def test_conv1d_is_trained_as_linear_layers_are():
    """GPT-2 keeps its weights transposed."""
    import transformers

    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config).eval()
    report = prune(model, WINDOWS, config="best", progress=False)
    assert all(record.block_error[1] < record.block_error[0] for record in report.layers)
    for record in report.layers:
        weight = weight_of(model.get_submodule(record.name))
        assert tuple(weight.shape) == record.shape
        assert record.zeros == int((weight == 0).sum())
    assert report.sparsity == 0.5


def test_a_layer_that_only_chooses_stays(case):
    """Its output has no gradient, as that of a router that picks the best of some."""

    class Chosen(torch.nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block, self.router = block, torch.nn.Linear(32, 2, bias=False)

        def forward(self, hidden, *args, **kwargs):
            sign = 1 - 2 * self.router(hidden).argmax(-1, keepdim=True)
            output = self.block(hidden, *args, **kwargs)
            return sign * (output[0] if isinstance(output, tuple) else output)

    case.block = Chosen(case.block)
    case.targets = [target + 0.5 * torch.tanh(target) for target in case.outputs()]
    before = case.state()
    start, end = case.run()
    assert end < start
    after = case.state()
    assert torch.equal(after["router.weight"], before["router.weight"])
    assert not torch.equal(after["block.mlp.up_proj.weight"], before["block.mlp.up_proj.weight"])
