"""How zeros are shared out to layers: totals, limits, what each allocation looks at, and whole prunings with it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.own_module import NoTokenizer, OwnModule, Windows, trainer
from maiht_lightning import FrozenSparsity, MAIHTPruning
from maiht_lightning.capture.block_inputs import record_inputs
from maiht_lightning.capture.norms import pass_and_measure
from maiht_lightning.evaluation.evaluation import Evaluation
from maiht_lightning.models.blocks import find_blocks, find_linears, weight_of
from maiht_lightning.models.sparsity import count_zeros
from maiht_lightning.pruning.allocation import LayerSize, at_equal_score, distribute, outlier_shares, score_histograms
from maiht_lightning.pruning.pruner import prune
from maiht_lightning.solvers import MAIHTConfig, PruningSpec, parse_pattern

WINDOWS = torch.randint(64, (6, 12), generator=torch.Generator().manual_seed(0))
PLAIN = MAIHTConfig(iterations=6, refine_iterations=3)
ALLOCATIONS = ["depth", "owl", "error"]


@pytest.fixture
def make(tiny_llama):
    """Makes the same small model each time, with outliers in some blocks more than in others."""

    def new(**more):
        model = tiny_llama(
            vocab_size=64, **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, **more}
        )
        with torch.no_grad():
            for index, block in enumerate(find_blocks(model).modules):
                block.mlp.up_proj.weight[: 4 * index, :3] *= 30
        return model

    return new


def norms_of(model, block=0):
    inputs = record_inputs(model, find_blocks(model).modules, list(WINDOWS.split(2)))
    for module in find_blocks(model).modules[:block]:
        inputs.pass_through(module)
    inputs.settle()
    return pass_and_measure(find_blocks(model).modules[block], inputs), inputs


# ---- What is measured


def test_norms_are_those_of_inputs_and_outputs(make):
    model, seen = make(attention_bias=True), {}
    with torch.no_grad():
        for linear in find_linears(find_blocks(model).modules[1]).values():
            if linear.bias is not None:
                linear.bias.normal_()
    linears = find_linears(find_blocks(model).modules[1])
    found, inputs = norms_of(model, 1)
    for name, linear in linears.items():
        linear.register_forward_hook(lambda _, args, out, name=name: seen.setdefault(name, []).append(args[0]))
    with torch.no_grad():
        model(input_ids=WINDOWS)
    for name, linear in linears.items():
        tokens = torch.cat(seen[name]).flatten(0, -2).double()
        torch.testing.assert_close(found[name].inputs, tokens.square().sum(0), rtol=1e-5, atol=0)
        outputs = (tokens @ weight_of(linear).double().T).square().sum()
        torch.testing.assert_close(found[name].outputs, outputs, rtol=1e-5, atol=0)
    assert {batch.index for batch in inputs.batches} == {2}


def test_outliers_are_counted_in_a_block_as_a_whole(make):
    model = make()
    norms, _ = norms_of(model, 2)
    linears = find_linears(find_blocks(model).modules[2])
    scores = torch.cat(
        [
            abs(float(weight.detach())) * torch.sqrt(norms[name].inputs[column])[None]
            for name, linear in linears.items()
            for row in weight_of(linear)
            for column, weight in enumerate(row)
        ]
    )
    expected = float((scores > 5 * scores.mean()).double().mean())
    assert expected > 0
    assert outlier_shares(find_blocks(model).modules[2], norms) == pytest.approx([expected] * 7)


@pytest.mark.parametrize("wanted", [0.3, 0.6, 0.85])
def test_equal_scores_are_those_of_one_sorted_list(make, wanted):
    """Without limits, the zeros are where the smallest of all scores are, sorted together."""
    model = make()
    norms, _ = norms_of(model, 1)
    block = find_blocks(model).modules[1]
    sizes = [LayerSize(name, 1, 1, weight_of(each).numel()) for name, each in find_linears(block).items()]
    shares = at_equal_score(score_histograms(block, norms), sizes, wanted, 0.0, 1.0)
    scores = {
        name: weight_of(each).double().square() * norms[name].inputs / norms[name].outputs
        for name, each in find_linears(block).items()
    }
    limit = torch.cat([score.flatten() for score in scores.values()]).sort().values
    limit = limit[int(wanted * len(limit))]
    for share, score in zip(shares, scores.values(), strict=True):
        assert share == pytest.approx(float((score < limit).double().mean()), abs=0.01)
    assert max(shares) - min(shares) > 0.05


def test_equal_scores_stay_within_limits_and_keep_the_total(make):
    model = make()
    norms, _ = norms_of(model, 3)
    block = find_blocks(model).modules[3]
    sizes = [LayerSize(name, 3, 1, weight_of(each).numel()) for name, each in find_linears(block).items()]
    shares = at_equal_score(score_histograms(block, norms), sizes, 0.6, 0.55, 0.65)
    assert min(shares) >= 0.55
    assert max(shares) <= 0.65
    total = sum(share * size.size for share, size in zip(shares, sizes, strict=True))
    assert total / sum(size.size for size in sizes) == pytest.approx(0.6, abs=0.005)


# ---- Whole numbers


@given(
    sizes=st.lists(st.integers(20, 5000), min_size=1, max_size=12),
    shares=st.lists(st.floats(0, 1), min_size=12, max_size=12),
    wanted=st.floats(0.05, 0.95),
    spread=st.floats(0.01, 0.3),
)
def test_the_total_is_that_of_a_uniform_allocation(sizes, shares, wanted, spread):
    layers = [LayerSize(str(i), i, 1, size) for i, size in enumerate(sizes)]
    low, high = max(0.0, wanted - spread), min((1 + wanted) / 2, wanted + spread)
    pattern = parse_pattern("unstructured", wanted)
    found = distribute(layers, shares[: len(sizes)], pattern, low, high)
    assert sum(found.values()) == sum(size - pattern.kept((1, size)) for size in sizes)
    for layer in layers:
        assert int(low * layer.size) - 1 <= found[layer.path] <= high * layer.size + 1
        # What the solver is told comes to the same number.
        told = pattern.with_zeros(found[layer.path], layer.size)
        assert layer.size - told.kept((1, layer.size)) == found[layer.path]


@given(
    rows=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    shares=st.lists(st.floats(0, 1), min_size=8, max_size=8),
    wanted=st.floats(0.1, 0.9),
)
def test_rows_get_whole_numbers_each(rows, shares, wanted):
    layers = [LayerSize(str(i), i, units, 64) for i, units in enumerate(rows)]
    pattern = parse_pattern("row", wanted)
    found = distribute(layers, shares[: len(rows)], pattern, wanted - 0.1, wanted + 0.1)
    total = sum(units * found[str(i)] for i, units in enumerate(rows))
    uniform = sum(units * (64 - pattern.kept((units, 64))) for units in rows)
    assert uniform <= total < uniform + max(rows)


def test_zeros_that_are_there_stay_in_the_total():
    layers = [LayerSize("a", 0, 1, 100, least=70), LayerSize("b", 1, 1, 100, least=0)]
    pattern = parse_pattern("unstructured", 0.5)
    assert distribute(layers, [0.5, 0.5], pattern, 0.3, 0.7) == {"a": 70, "b": 30}


# ---- Whole models


@pytest.mark.parametrize("pattern", ["unstructured", "row"])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_layers_differ_and_the_total_does_not(make, allocation, pattern):
    model, uniform = make(), make()
    config = replace(PLAIN, allocation=allocation)
    report = prune(model, WINDOWS, sparsity=0.6, pattern=pattern, config=config, progress=False)
    expected = prune(uniform, WINDOWS, sparsity=0.6, pattern=pattern, config=PLAIN, progress=False)
    total, wanted = (sum(record.zeros for record in each.layers) for each in (report, expected))
    assert wanted <= total <= wanted + (0 if pattern == "unstructured" else 48)
    assert sum(count.zeros for count in count_zeros(model)) == total
    by_layer = [record.sparsity for record in report.layers]
    # A row of 32 has zeros in steps of 1 / 32, a layer of 512 in steps of 1 / 512.
    step = 1 / 512 if pattern == "unstructured" else 1 / 32
    assert 0.525 - step <= min(by_layer) < 0.58 < 0.62 < max(by_layer) <= 0.675 + step
    by_block = [sum(by_layer[7 * i : 7 * i + 7]) for i in range(4)]
    if allocation == "depth":
        assert by_block == sorted(by_block)
        assert by_block[0] / 7 == pytest.approx(0.525, abs=0.01 + step)
    if allocation == "owl":
        outliers = [
            outlier_shares(find_blocks(dense).modules[index], norms_of(dense, index)[0])[0]
            for dense in [make()]
            for index in range(4)
        ]
        assert len(set(outliers)) == 4
        assert sorted(range(4), key=lambda i: by_block[i]) == sorted(range(4), key=lambda i: -outliers[i])


def test_the_spread_limits_it(make):
    model = make()
    config = replace(PLAIN, allocation="error", allocation_spread=0.05)
    report = prune(model, WINDOWS, sparsity=0.6, config=config, progress=False)
    assert max(abs(record.sparsity - 0.6) for record in report.layers) <= 0.031


def test_batches_and_storage_change_nothing(make):
    config = replace(PLAIN, allocation="error")
    zeros = [
        [r.zeros for r in prune(make(), WINDOWS, sparsity=0.7, config=config, progress=False, **settings).layers]
        for settings in ({}, {"batch_size": 3}, {"hidden_states": "disk"})
    ]
    assert zeros[0] == zeros[1] == zeros[2]


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_a_pruning_that_is_cut_off_resumes_with_the_same_zeros(make, tmp_path, allocation):
    """Also with the partly pruned model, in which other zeros would be found best."""
    config, whole, model = replace(PLAIN, allocation=allocation), make(), make()
    prune(whole, WINDOWS, sparsity=0.6, config=config, progress=False)

    def stop(records):
        if records[0].block == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(
            model,
            WINDOWS,
            sparsity=0.6,
            config=config,
            journal_dir=tmp_path / "journal",
            on_block=stop,
            progress=False,
        )
    report = prune(model, WINDOWS, sparsity=0.6, config=config, journal_dir=tmp_path / "journal", progress=False)
    assert report.resumed == 2
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_zeros_grow_in_steps(make, allocation):
    model = make()
    config = replace(PLAIN, allocation=allocation)
    prune(model, WINDOWS, sparsity=0.4, config=config, progress=False)
    zeros = {path: weight_of(linear) == 0 for path, linear in find_blocks(model).linears()}
    report = prune(model, WINDOWS, sparsity=0.6, config=replace(config, keep_zeros=True), progress=False)
    assert all(not weight_of(linear)[zeros[path]].any() for path, linear in find_blocks(model).linears())
    uniform = prune(make(), WINDOWS, sparsity=0.6, config=PLAIN, progress=False)
    assert sum(r.zeros for r in report.layers) == sum(r.zeros for r in uniform.layers)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_a_layer_with_more_zeros_keeps_them_and_others_get_fewer(make, allocation):
    model = make()
    weight = find_blocks(model).modules[1].mlp.down_proj.weight
    with torch.no_grad():
        weight[:, : 9 * weight.shape[1] // 10] = 0
    before = int((weight == 0).sum())
    config = replace(PLAIN, allocation=allocation, keep_zeros=True)
    report = prune(model, WINDOWS, sparsity=0.6, config=config, progress=False)
    uniform = prune(make(), WINDOWS, sparsity=0.6, config=PLAIN, progress=False)
    assert sum(r.zeros for r in report.layers) == sum(r.zeros for r in uniform.layers)
    assert next(r.zeros for r in report.layers if r.name.endswith("1.mlp.down_proj")) == before


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_a_pattern_that_fixes_every_layer_has_no_allocation(make, allocation):
    config = replace(PLAIN, allocation=allocation)
    assert PruningSpec.parse(pattern="2:4", config=config) == PruningSpec.parse(pattern="2:4", config=PLAIN)
    report = prune(make(), WINDOWS, pattern="2:4", config=config, progress=False)
    assert {record.sparsity for record in report.layers} == {0.5}


@pytest.mark.parametrize("change", [{"allocation": "fair"}, {"allocation_spread": 0.0}, {"allocation_spread": 1}])
def test_settings_are_checked(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        MAIHTConfig(**change)


def module(model):
    found = OwnModule(model)
    found.tokenizer = NoTokenizer()
    return found


@pytest.mark.slow
def test_a_model_that_has_its_zeros_is_trained_on_and_not_pruned(make, tmp_path):
    """Its layers have not the common sparsity each, but in total."""
    model, config = make(), replace(PLAIN, allocation="depth")
    settings = {"sparsity": 0.6, "config": config, "calibration": Windows(), "evaluation": Evaluation(perplexity=[])}
    first = MAIHTPruning(output_dir=tmp_path / "one", **settings)
    trainer(first).fit(module(model))
    zeros = {path: weight_of(linear) == 0 for path, linear in find_blocks(model).linears()}
    again = MAIHTPruning(output_dir=tmp_path / "two", **settings)
    trainer(again, FrozenSparsity()).fit(module(model))
    assert again.report is None
    for path, linear in find_blocks(model).linears():
        assert torch.equal(weight_of(linear) == 0, zeros[path])


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_next_to_no_spread_is_uniform(make, allocation):
    """So the windows that are measured are not those that are pruned with, which are where they were."""
    one, other = make(), make()
    config = MAIHTConfig(allocation=allocation, allocation_spread=1e-9)
    settings = {"sparsity": 0.6, "method": "wanda", "progress": False, "pattern": "row"}
    prune(one, WINDOWS, config=config, **settings)
    prune(other, WINDOWS, **settings)
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))
