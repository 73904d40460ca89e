"""Padded and packed batches give the Gram matrices of a plain loop over their sequences, one by one, in float64."""

import copy
from dataclasses import replace

import pytest
import torch

from helpers.families import VOCABULARY, make
from maiht_lightning import prune
from maiht_lightning.capture.block_inputs import record_inputs
from maiht_lightning.capture.grams import accumulate_grams
from maiht_lightning.capture.sublayers import DenseStream, accumulate_group
from maiht_lightning.data.batches import Windows
from maiht_lightning.evaluation.perplexity import perplexity
from maiht_lightning.models.blocks import find_blocks, find_linears, weight_of
from maiht_lightning.models.offload import copy_of
from maiht_lightning.pruning.reconstruction import reconstruct
from maiht_lightning.solvers import MAIHTConfig

PAD = 2  # the families' end of text
FEW = MAIHTConfig(iterations=4, refine_iterations=2)
BEYOND_THE_LAYER = {"sublayers": True, "dense_targets": 0.5, "reconstruction_epochs": 1}
FAMILIES = ["llama", "gpt2", "opt", "qwen2", "falcon_alibi"]


def sequences():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in (9, 4, 13, 4, 6, 13, 2)]


def padded(left, pad=PAD):
    """Two batches, as a collator would make them."""
    batches = []
    for rows in (sequences()[:3], sequences()[3:]):
        longest = max(map(len, rows))
        ids, mask = torch.full((len(rows), longest), pad), torch.zeros(len(rows), longest, dtype=torch.long)
        for row, tokens in enumerate(rows):
            place = slice(longest - len(tokens), None) if left else slice(len(tokens))
            ids[row, place], mask[row, place] = tokens, 1
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def packed():
    rows = sequences()
    places = [torch.arange(len(tokens)) for tokens in rows]
    return [
        {"input_ids": torch.cat(rows[part])[None], "position_ids": torch.cat(places[part])[None]}
        for part in (slice(3), slice(3, None))
    ]


SOURCES = {"right": lambda: padded(False), "left": lambda: padded(True), "packed": packed}


@torch.no_grad()
def plain_grams(model):
    """XᵀX of every linear layer's inputs X (tokens, in), a sequence alone in each pass, in float64."""
    model, grams, handles = copy.deepcopy(model).double(), {}, []
    for path, linear in find_blocks(model).linears():

        def add(_, given, path=path):
            inputs = given[0].reshape(-1, given[0].shape[-1])
            grams[path] = grams.get(path, 0) + inputs.T @ inputs

        handles.append(linear.register_forward_pre_hook(add))
    for tokens in sequences():
        model(input_ids=tokens[None], use_cache=False)
    return grams


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("family", FAMILIES)
def test_gram_matrices_are_those_of_single_sequences(family, source, batch_size):
    model = make(family)
    blocks, expected = find_blocks(model), plain_grams(model)
    inputs = record_inputs(model, blocks.modules, Windows.parse(SOURCES[source]()).batches(batch_size))
    seen = set()
    for index, block in enumerate(blocks.modules):
        groups = accumulate_grams(block, inputs)
        alone = [accumulate_group(block, inputs, group.names).gram for group in groups]
        for group, gram in zip(groups, alone, strict=True):
            for name in group.names:
                path = f"{blocks.path}.{index}.{name}"
                scale = expected[path].abs().max()
                assert (group.gram - expected[path]).abs().max() < 1e-5 * scale
                assert (gram - expected[path]).abs().max() < 1e-5 * scale
                seen.add(path)
        inputs.pass_through(block)
    assert seen == set(expected)


@torch.no_grad()
@pytest.mark.parametrize("source", SOURCES)
def test_what_was_lost_so_far_is_that_of_single_sequences(source):
    """Xᵀ(X_d − X), where X (tokens, in) are the inputs behind a damaged block, X_d those behind the dense one."""
    model = make("llama")
    damaged = copy.deepcopy(model)
    weight_of(find_linears(find_blocks(damaged).modules[0])["mlp.up_proj"])[:, ::2] = 0
    seen = {}
    for name, each in (("dense", model), ("damaged", damaged)):
        exact = copy.deepcopy(each).double()
        inputs = seen[name] = []
        linear = find_linears(find_blocks(exact).modules[1])["mlp.down_proj"]
        linear.register_forward_pre_hook(lambda _, given, inputs=inputs: inputs.append(given[0][0]))
        for tokens in sequences():
            exact(input_ids=tokens[None], use_cache=False)
    x_d, x = torch.cat(seen["dense"]), torch.cat(seen["damaged"])
    blocks, dense = find_blocks(damaged).modules, find_blocks(model).modules
    inputs = record_inputs(damaged, blocks, Windows.parse(SOURCES[source]()).batches(2))
    other = record_inputs(model, dense, Windows.parse(SOURCES[source]()).batches(2))
    inputs.pass_through(blocks[0])
    other.pass_through(dense[0])
    stream = DenseStream(other, copy_of(dense[1]))
    found = accumulate_group(blocks[1], inputs, ["mlp.down_proj"], dense=stream)
    expected = x.T @ (x_d - x)
    assert expected.abs().max() > 1e-3 * (x.T @ x).abs().max()
    assert (found.drift - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "hidden_states"), [(FEW, "device"), (replace(FEW, **BEYOND_THE_LAYER), "disk")], ids=["layers", "blocks"]
)
def test_a_model_is_pruned_the_same_whatever_stands_in_the_padding(config, hidden_states, tmp_path):
    """Reconstruction and targets between two models included; masks are part of what a journal is compared by."""
    settings = {"config": config, "batch_size": 2, "hidden_states": hidden_states, "progress": False}
    weights = []
    for name, source in (("one", padded(False)), ("two", padded(False, pad=40)), ("three", padded(True))):
        model = make("llama")
        report = prune(model, source, journal_dir=tmp_path / name, **settings)
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert all(torch.equal(weights[0][key], weights[2][key]) for key in weights[0])
    again = make("llama")
    assert prune(again, packed(), journal_dir=tmp_path / "one", **settings).resumed == len(find_blocks(again).modules)
    masked = [{**batch, "attention_mask": batch["attention_mask"].clone()} for batch in padded(False)]
    masked[0]["attention_mask"][1, 3] = 0
    assert prune(make("llama"), masked, journal_dir=tmp_path / "one", **settings).resumed == 0
    assert (tmp_path / "one.1").is_dir()
    assert 0 < report.sparsity < 1


def test_padding_without_a_mask_is_refused():
    with pytest.raises(ValueError, match=r"windows must be whole.* give batches with attention_mask"):
        prune(make("llama"), [batch["input_ids"] for batch in padded(False)], method="magnitude", progress=False)


def test_held_out_errors_are_means_over_tokens():
    """Of batches of different lengths, each token counts the same."""
    model = make("llama")
    blocks = find_blocks(model).modules
    batches = record_inputs(model, blocks, Windows.parse(padded(False)).batches(1)).batches[:3]
    targets = [
        batch.hidden + torch.rand(batch.hidden.shape, generator=torch.Generator().manual_seed(1)) for batch in batches
    ]
    with torch.no_grad():
        errors = [
            ((batch.run(blocks[0]) - target).square().sum(-1) / target.square().sum(-1)).flatten()
            for batch, target in zip(batches, targets, strict=True)
        ]
    before, _ = reconstruct(blocks[0], batches, targets, MAIHTConfig(reconstruction_epochs=1, reconstruction_rate=1e-9))
    assert len({len(error) for error in errors}) > 1
    assert before == pytest.approx(torch.cat(errors).mean().item(), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("source", SOURCES)
def test_perplexity_is_that_of_single_sequences(source, batch_size):
    model = make("gpt2")
    exact, losses = copy.deepcopy(model).double(), []
    for tokens in sequences():
        scores = exact(input_ids=tokens[None]).logits[0].log_softmax(-1)
        losses += [-scores[place, tokens[place + 1]] for place in range(len(tokens) - 1)]
    expected = torch.stack(losses).mean().exp().item()
    found = perplexity(model, SOURCES[source](), batch_size=batch_size, progress=False)
    assert found == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match=r"at least one window of two tokens, but found \(1, 1\)"):
        perplexity(model, [torch.tensor([[5]])])
