"""Pruning whole models: what changes, what stays, and what a failure leaves behind."""

import copy
import importlib
import logging
from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn

from helpers.counts import check_zeros
from maiht_lightning.models.blocks import find_blocks, find_linears, weight_of, write_weight
from maiht_lightning.models.sparsity import count_zeros, measured_sparsity
from maiht_lightning.pruning.block_pruner import PruningError
from maiht_lightning.pruning.pruner import prune
from maiht_lightning.solvers import METHODS, MAIHTConfig, prune_layer
from maiht_lightning.solvers.config import PRESETS

# `maiht_lightning.prune` may hide its module's name.
pruner = importlib.import_module("maiht_lightning.pruning.block_pruner")
solving = importlib.import_module("maiht_lightning.pruning.solving")
streams = importlib.import_module("maiht_lightning.pruning.streams")

# As by default, but for the number of steps.
QUICK = replace(PRESETS["balanced"], iterations=6, refine_iterations=3)


@pytest.fixture
def llama(tiny_llama):
    return tiny_llama(vocab_size=64, hidden_size=40, intermediate_size=52, num_hidden_layers=3)


@pytest.fixture
def windows():
    return torch.randint(64, (5, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def gpt2():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokens = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **tokens)
        return transformers.GPT2LMHeadModel(config).eval()


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model, before):
    """Names of the parameters that are not bit-identical."""
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def weights_of(model, block=None):
    """Paths of the prunable weights of one block, or of all."""
    path, blocks = find_blocks(model).path, find_blocks(model).modules
    indices = range(len(blocks)) if block is None else [block]
    return {f"{path}.{i}.{name}.weight" for i in indices for name in find_linears(blocks[i])}


def linears_of(model):
    return [linear for block in find_blocks(model).modules for linear in find_linears(block).values()]


def plainly_pruned(model, windows, **settings):
    """The same in few words: full forward passes, hooks, one layer after the other."""
    model = copy.deepcopy(model)
    for block in find_blocks(model).modules:
        linears, grams = find_linears(block), {}

        def watch(module, args, grams=grams):
            x = args[0].detach().float().reshape(-1, args[0].shape[-1])
            grams[module] = grams.get(module, 0) + x.T @ x

        handles = [linear.register_forward_pre_hook(watch) for linear in linears.values()]
        for tokens in windows:
            model(tokens[None])
        for handle in handles:
            handle.remove()
        for linear in linears.values():
            weight_of(linear).data.copy_(prune_layer(weight_of(linear).data, grams[linear], **settings).weight)
    return model


FEW = MAIHTConfig(mu=0.5, iterations=9, refine_iterations=4, step_scale=0.7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"sparsity": 0.6, "config": "paper"}),
        ("llama", {"sparsity": 0.6, "config": FEW}),
        ("llama", {"method": "aiht", "pattern": "row", "sparsity": 0.3}),
        ("llama", {"method": "iht", "pattern": "2:4"}),
        ("llama", {"method": "sparsegpt", "sparsity": 0.6}),
        ("llama", {"method": "admm", "pattern": "1:4"}),
        ("llama", {"method": "wanda", "pattern": "row", "sparsity": 0.6}),
        ("llama", {"method": "magnitude", "pattern": "2:4"}),
        ("gpt2", {"sparsity": 0.6, "config": "paper"}),
        ("gpt2", {"method": "sparsegpt", "pattern": "2:4"}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_prune_is_the_plain_loop(name, settings, windows, request):
    """So that every setting reaches every layer: with any other the weights would be others."""
    model = request.getfixturevalue(name)
    expected = plainly_pruned(model, windows, **settings)
    prune(model, windows, progress=False, **settings)
    for (path, found), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert (found == 0).eq(wanted == 0).float().mean() > 0.999, path
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4, msg=lambda text, p=path: f"{p}: {text}")


@pytest.mark.slow
def test_without_settings_it_is_mAIHT_at_half_the_weights(llama, windows):
    other = copy.deepcopy(llama)
    prune(llama, windows, progress=False)
    everything = {"sparsity": 0.5, "pattern": "unstructured", "method": "maiht", "config": "balanced", "batch_size": 1}
    prune(other, windows, progress=False, **everything)
    assert changed(llama, state(other)) == set()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.29), ("row", 0.37), ("2:4", 0.5)])
def test_zeros_are_exact(llama, windows, method, pattern, sparsity):
    # Published methods, and mAIHT without an allocation, have so many in every layer.
    config = "fast" if method == "maiht" else None
    report = prune(llama, windows, method=method, pattern=pattern, sparsity=sparsity, config=config, progress=False)
    for linear in linears_of(llama):
        check_zeros(linear.weight == 0, pattern, sparsity)
    counts = count_zeros(llama)
    assert [(r.name, r.zeros, r.shape[0] * r.shape[1]) for r in report.layers] == [
        (c.name, c.zeros, c.size) for c in counts
    ]
    total = sum(int((linear.weight == 0).sum()) for linear in linears_of(llama))
    size = sum(linear.weight.numel() for linear in linears_of(llama))
    assert report.sparsity == measured_sparsity(counts) == total / size
    assert len(counts) == 21
    assert [r.block for r in report.layers] == [i for i in range(3) for _ in range(7)]


def test_report_tells_errors_and_times(llama, windows):
    report = prune(llama, windows, config=QUICK, progress=False)
    assert all(0 < r.relative_error < 1 for r in report.layers)
    assert all(r.objective for r in report.layers)
    assert report.solve_seconds >= sum(r.seconds for r in report.layers) > 0
    parts = report.capture_seconds, report.solve_seconds, report.reconstruction_seconds
    assert report.seconds == pytest.approx(sum(parts), rel=1e-9)
    assert min(parts) > 0
    assert report.capture_seconds > 0


@pytest.mark.slow
def test_only_the_linear_layers_of_the_blocks_change(llama, windows):
    before = state(llama)
    prune(llama, windows, config=QUICK, progress=False)
    assert changed(llama, before) == weights_of(llama)


@pytest.mark.slow
def test_tied_weights_stay_tied(tiny_llama, windows):
    model = tiny_llama(vocab_size=64, tie_word_embeddings=True)
    embedding = model.model.embed_tokens.weight
    before = embedding.clone()
    prune(model, windows, config=QUICK, progress=False)
    assert model.lm_head.weight is embedding
    assert torch.equal(embedding, before)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_mode_dtype_gradients_and_parameters_are_kept(llama, windows, dtype):
    llama.to(dtype).train()
    llama.model.layers[1].mlp.eval()
    llama.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    modes = [module.training for module in llama.modules()]
    parameters = {name: (id(p), p.requires_grad) for name, p in llama.named_parameters()}
    prune(llama, windows, config=QUICK, progress=False)
    assert [module.training for module in llama.modules()] == modes
    assert {name: (id(p), p.requires_grad) for name, p in llama.named_parameters()} == parameters
    assert all(p.dtype == dtype and p.device.type == "cpu" for p in llama.parameters())
    assert measured_sparsity(count_zeros(llama)) == 0.5
    llama(windows, labels=windows).loss.backward()
    assert llama.model.layers[0].mlp.down_proj.weight.grad.isfinite().all()


@pytest.mark.slow
def test_dropout_is_off_while_pruning_a_model_in_training(tiny_llama, windows):
    one, two = (tiny_llama(vocab_size=64, attention_dropout=0.5) for _ in range(2))
    prune(one.train(), windows, config=QUICK, progress=False)
    prune(two.eval(), windows, config=QUICK, progress=False)
    assert changed(one, state(two)) == set()


@pytest.mark.slow
def test_same_result_twice_and_for_any_order_or_batches_of_windows(llama, windows):
    """Each batch's part of a Gram matrix is rounded to float32, the sum of the parts is not."""
    results = []
    for tokens, batch_size in ((windows, 1), (windows, 1), (windows.flip(0), 1), (windows, 2), (windows, 9)):
        model = copy.deepcopy(llama)
        prune(model, tokens, batch_size=batch_size, config="paper", progress=False)
        results.append(model)
    same_again, reordered, *other_batches = results[1:]
    assert changed(same_again, state(results[0])) == set()
    assert changed(reordered, state(results[0])) == set()
    for model in other_batches:
        for one, other in zip(linears_of(model), linears_of(results[0]), strict=True):
            assert torch.equal(one.weight == 0, other.weight == 0)
            torch.testing.assert_close(one.weight, other.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_batches_are_as_large_as_asked_for(llama, windows, batch_size):
    """A block runs twice on each: while it is dense, for its Gram matrices, and pruned, for the next block's inputs."""
    seen = []
    llama.model.layers[1].mlp.up_proj.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    prune(llama, windows, batch_size=batch_size, method="magnitude", progress=False)
    assert sorted(seen) == sorted(2 * [len(tokens) for tokens in windows.split(batch_size)])


@pytest.mark.parametrize("sublayers", [False, True])
@pytest.mark.parametrize(("precision", "tf32"), [("float32", False), ("float64", False), ("tf32", True)])
def test_gram_matrices_are_in_tf32_where_the_solver_may_be(llama, windows, precision, tf32, sublayers, monkeypatch):
    part = "accumulate_group" if sublayers else "accumulate_grams"
    seen, original = [], getattr(streams, part)

    def note(*arguments, tf32, **settings):
        seen.append(tf32)
        return original(*arguments, tf32=tf32, **settings)

    monkeypatch.setattr(streams, part, note)
    config = MAIHTConfig(precision=precision, sublayers=sublayers)
    prune(llama, windows, method="magnitude", config=config, progress=False)
    assert seen == [tf32] * (3 * 4 if sublayers else 3)


@pytest.mark.slow
def test_autocast_does_not_reuse_dense_weights(llama, windows):
    cached, fresh = copy.deepcopy(llama), copy.deepcopy(llama)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prune(cached, windows, config=QUICK, progress=False)
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        prune(fresh, windows, config=QUICK, progress=False)
    assert changed(cached, state(fresh)) == set()
    assert cached.dtype == torch.float32


@pytest.mark.slow
def test_works_in_inference_mode(llama, windows):
    other = copy.deepcopy(llama)
    with torch.inference_mode():
        prune(llama, windows, config=QUICK, progress=False)
    prune(other, windows, config=QUICK, progress=False)
    assert changed(llama, state(other)) == set()
    llama(windows, labels=windows).loss.backward()


def test_progress_bar_names_block_layer_and_error(llama, windows, capsys):
    records = prune(llama, windows, method="wanda").layers
    shown = capsys.readouterr().err
    assert "Pruning: 100%" in shown
    assert "21/21" in shown
    for record in records:
        name = record.name.removeprefix(f"model.layers.{record.block}.")
        assert f"block {record.block + 1}/3, {name}, error {record.relative_error:.4f}" in shown
    for block in (1, 2, 3):
        assert f"block {block}/3, Gram matrices" in shown
    prune(llama, windows, method="wanda", progress=False)
    assert capsys.readouterr().err == ""


def test_on_block_is_called_once_a_block_in_order(llama, windows):
    seen = []

    def note(records):
        block = llama.model.layers[records[0].block]
        assert all((linear.weight == 0).any() for linear in find_linears(block).values())
        seen.append([record.name for record in records])

    report = prune(llama, windows, method="wanda", progress=False, on_block=note)
    assert seen == [[r.name for r in report.layers if r.block == block] for block in range(3)]
    assert [len(names) for names in seen] == [7, 7, 7]


# What is refused, before anything changes.


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda w: w.float(), TypeError, "LongTensor.*float32"),
        (lambda w: w.tolist(), TypeError, "LongTensor.*list"),
        (lambda w: w[0], ValueError, r"\(samples, seqlen\).*\(12,\)"),
        (lambda w: w[:0], ValueError, r"\(0, 12\)"),
        (lambda w: w[:, :0], ValueError, r"\(5, 0\)"),
        (lambda w: w + 60, ValueError, "knows 0 to 63: .*tokenizer"),
        (lambda w: w - 64, ValueError, "tokenizer"),
    ],
)
def test_bad_windows_are_refused(llama, windows, make, error, match, tmp_path):
    before = state(llama)
    with pytest.raises(error, match=match):
        prune(llama, make(windows), progress=False, journal_dir=tmp_path / "journal")
    assert changed(llama, before) == set()
    assert not (tmp_path / "journal").exists()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"sparsity": 1.0}, "sparsity"),
        ({"sparsity": 50}, "sparsity"),
        ({"pattern": "4:2"}, "pattern"),
        ({"pattern": "3:7"}, r"divisible by 7.*model\.layers\.0\.self_attn\.q_proj"),
        ({"pattern": "2:4", "sparsity": 0.7}, "0.5"),
        ({"method": "obs"}, "method.*maiht"),
        ({"config": "quick"}, "preset.*paper"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_settings_are_refused(llama, windows, settings, match, tmp_path):
    before = state(llama)
    with pytest.raises(ValueError, match=match):
        prune(llama, windows, progress=False, journal_dir=tmp_path / "journal", **settings)
    assert changed(llama, before) == set()
    assert not (tmp_path / "journal").exists()


def test_mixture_of_experts_is_refused(windows):
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    model = transformers.MixtralForCausalLM(config).eval()
    before = state(model)
    with pytest.raises(ValueError, match="mixture-of-experts"):
        prune(model, windows, progress=False)
    assert changed(model, before) == set()


class Experts(nn.Module):
    """A block that sends each token to one of its linear layers, or, where `routed` is False, through all of them."""

    def __init__(self, routed):
        super().__init__()
        self.mix, self.experts, self.routed = nn.Linear(8, 8), nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), routed

    def forward(self, hidden, **_):
        mixed, out = self.mix(hidden), hidden.clone()
        for number, expert in enumerate(self.experts):
            if self.routed:
                chosen = mixed[..., :3].argmax(-1) == number
                out[chosen] += expert(hidden[chosen])
            else:
                out = out + expert(hidden)
        return out


class ModelOfExperts(nn.Module):
    def __init__(self, *routed):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(64, 8), nn.ModuleList(Experts(each) for each in routed)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, use_cache):
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


def test_experts_in_a_list_are_refused_before_anything_is_pruned(windows):
    torch.manual_seed(0)
    dense, routed = ModelOfExperts(False, False), ModelOfExperts(True, True)
    prune(dense, windows, config=QUICK, progress=False)
    assert sum(int((linear.weight == 0).sum()) for linear in linears_of(dense)) == 32 * len(list(linears_of(dense)))
    before = state(routed)
    with pytest.raises(PruningError, match=r"blocks\.0 could not .* but experts\.0 ran on .* mixtures of experts"):
        prune(routed, windows, progress=False)
    assert changed(routed, before) == set()
    assert not any(linear._forward_pre_hooks for linear in linears_of(routed))


def test_models_without_blocks_are_refused(windows):
    with pytest.raises(ValueError, match="no decoder blocks"):
        prune(nn.Sequential(nn.Linear(4, 4)), windows, progress=False)
    with pytest.raises(ValueError, match="no decoder blocks"):
        prune(nn.Sequential(nn.ModuleList([nn.LayerNorm(4)])), windows, progress=False)


def test_quantised_weights_are_refused(llama, windows):
    layer = llama.model.layers[2].mlp.down_proj
    layer.weight = nn.Parameter(torch.ones_like(layer.weight, dtype=torch.int8), requires_grad=False)
    before = state(llama)
    with pytest.raises(TypeError, match=r"model\.layers\.2\.mlp\.down_proj.*int8"):
        prune(llama, windows, progress=False)
    assert changed(llama, before) == set()


# What a failure leaves behind.


@pytest.mark.parametrize("layer", ["mlp.down_proj", "self_attn.k_proj", "self_attn.v_proj"])
def test_a_layer_with_nan_is_named_before_anything_is_done(llama, windows, layer):
    llama.model.layers[1].get_submodule(layer).weight.data[0, 0] = float("nan")
    before = {name: tensor.nan_to_num(7) for name, tensor in state(llama).items()}
    with pytest.raises(ValueError, match=rf"model\.layers\.1\.{layer} has weights that are NaN"):
        prune(llama, windows, progress=False)
    now = {name: tensor.nan_to_num(7) for name, tensor in state(llama).items()}
    assert all(torch.equal(now[n], before[n]) for n in now)


def test_a_layer_that_fails_is_named_alone(llama, windows, monkeypatch):
    before, original = state(llama), solving.LayerSolver.prune
    calls = []

    def fail(self, weight, pattern):
        calls.append(weight)
        if len(calls) == 7 + 2:
            raise FloatingPointError("x")
        return original(self, weight, pattern)

    monkeypatch.setattr(solving.LayerSolver, "prune", fail)
    with pytest.raises(PruningError, match=r"^model\.layers\.1\.self_attn\.k_proj could not be pruned: x"):
        prune(llama, windows, config=QUICK, progress=False)
    assert changed(llama, before) == weights_of(llama, 0)


def interrupted(monkeypatch, error, groups):
    """Let the solver raise in place of its `groups`-th Gram matrix."""
    calls = []

    def solve(gram, spec, drift=None):
        calls.append(len(gram))
        if len(calls) == groups:
            raise error
        return original(gram, spec, drift)

    original = solving.LayerSolver
    monkeypatch.setattr(solving, "LayerSolver", solve)


@pytest.mark.parametrize("error", [ValueError("x"), FloatingPointError("x"), torch.linalg.LinAlgError("x")])
def test_a_failing_solver_names_the_layer_and_leaves_its_block(llama, windows, monkeypatch, error):
    before, llama = state(llama), llama.train()
    interrupted(monkeypatch, error, groups=4 + 3)  # gate and up of block 1
    with pytest.raises(PruningError, match=r"model\.layers\.1\.mlp\.gate_proj, model\.layers\.1\.mlp\.up_proj.*: x"):
        prune(llama, windows, config=QUICK, progress=False)
    assert changed(llama, before) == weights_of(llama, 0)
    assert all(module.training for module in llama.modules())


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ("paper", "accumulate_grams"),
        ("balanced", "find_groups"),
        ("balanced", "accumulate_group"),
        ("best", "reconstruct"),
    ],
)
def test_out_of_memory_names_the_block(llama, windows, monkeypatch, config, part):
    before = state(llama)

    def fail(*_, **__):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(pruner if part == "reconstruct" else streams, part, fail)
    with pytest.raises(PruningError, match=r"model\.layers\.0 could not be \w+: no memory left"):
        prune(llama, windows, config=config, progress=False)
    assert changed(llama, before) == set()


def test_an_interrupt_while_solving_leaves_whole_blocks(llama, windows, monkeypatch):
    before = state(llama)
    interrupted(monkeypatch, KeyboardInterrupt(), groups=4 + 2)
    with pytest.raises(KeyboardInterrupt):
        prune(llama, windows, config=QUICK, progress=False)
    assert changed(llama, before) == weights_of(llama, 0)


@pytest.mark.slow
@pytest.mark.parametrize("writes", [1, 4, 7, 10])
def test_an_interrupt_while_writing_leaves_whole_blocks(llama, windows, monkeypatch, writes):
    """Ctrl-C between two layers of a block: the block is completed first."""
    before, expected = state(llama), copy.deepcopy(llama)
    prune(expected, windows, config="paper", progress=False)
    count, original = [], write_weight

    def write(linear, weight):
        original(linear, weight)
        count.append(linear)
        if len(count) == writes:
            raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("maiht_lightning.pruning.block_pruner"), "write_weight", write)
    with pytest.raises(KeyboardInterrupt):
        prune(llama, windows, config="paper", progress=False)
    done = weights_of(llama, 0) | (weights_of(llama, 1) if writes > 7 else set())
    assert changed(llama, before) == done
    assert not changed(llama, state(expected)) & done


def test_an_error_in_on_block_leaves_whole_blocks(llama, windows):
    before = state(llama)

    def fail(records):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        prune(llama, windows, config=QUICK, progress=False, on_block=fail)
    assert changed(llama, before) == weights_of(llama, 0)


def test_no_warnings_without_a_journal(llama, windows, caplog):
    with caplog.at_level(logging.WARNING):
        prune(llama, windows, config=QUICK, progress=False)
    assert not caplog.records
