"""Pruning whole models: what changes, what stays, and what a failure leaves behind."""

import copy
import importlib
import logging

import pytest
import torch
import transformers
from torch import nn

from maiht_lightning.block_pruner import PruningError
from maiht_lightning.capture import find_blocks, find_linears, weight_of, write_weight
from maiht_lightning.pruner import prune
from maiht_lightning.solvers import METHODS, prune_layer
from maiht_lightning.sparsity import count_zeros, measured_sparsity

# `maiht_lightning.prune` may hide its module's name.
pruner = importlib.import_module("maiht_lightning.block_pruner")


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


@pytest.mark.parametrize("method", ["maiht", "sparsegpt", "wanda"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_prune_is_the_plain_loop(name, method, windows, request):
    model = request.getfixturevalue(name)
    expected = plainly_pruned(model, windows, method=method, sparsity=0.6)
    prune(model, windows, method=method, sparsity=0.6, progress=False)
    for (path, found), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert (found == 0).eq(wanted == 0).float().mean() > 0.999, path
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4, msg=lambda text, p=path: f"{p}: {text}")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.37), ("row", 0.37), ("2:4", 0.5)])
def test_zeros_are_exact(llama, windows, method, pattern, sparsity):
    report = prune(llama, windows, method=method, pattern=pattern, sparsity=sparsity, progress=False)
    for linear in linears_of(llama):
        zeros = linear.weight == 0
        out, inputs = zeros.shape
        if pattern == "unstructured":
            assert zeros.sum() == int(0.37 * out * inputs)
        elif pattern == "row":
            assert (zeros.sum(1) == int(0.37 * inputs)).all()
        else:
            assert (zeros.view(out, -1, 4).sum(2) == 2).all()
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
    report = prune(llama, windows, progress=False)
    assert all(0 < r.relative_error < 1 for r in report.layers)
    assert all(r.objective for r in report.layers)
    assert report.solve_seconds >= sum(r.seconds for r in report.layers) > 0
    assert report.seconds == report.solve_seconds + report.capture_seconds
    assert report.capture_seconds > 0


def test_only_the_linear_layers_of_the_blocks_change(llama, windows):
    before = state(llama)
    prune(llama, windows, progress=False)
    assert changed(llama, before) == weights_of(llama)


def test_tied_weights_stay_tied(tiny_llama, windows):
    model = tiny_llama(vocab_size=64, tie_word_embeddings=True)
    embedding = model.model.embed_tokens.weight
    before = embedding.clone()
    prune(model, windows, progress=False)
    assert model.lm_head.weight is embedding
    assert torch.equal(embedding, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_mode_dtype_gradients_and_parameters_are_kept(llama, windows, dtype):
    llama.to(dtype).train()
    llama.model.layers[1].mlp.eval()
    llama.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    modes = [module.training for module in llama.modules()]
    parameters = {name: (id(p), p.requires_grad) for name, p in llama.named_parameters()}
    prune(llama, windows, progress=False)
    assert [module.training for module in llama.modules()] == modes
    assert {name: (id(p), p.requires_grad) for name, p in llama.named_parameters()} == parameters
    assert all(p.dtype == dtype and p.device.type == "cpu" for p in llama.parameters())
    for linear in linears_of(llama):
        assert (linear.weight == 0).sum() == linear.weight.numel() // 2
    llama(windows, labels=windows).loss.backward()
    assert llama.model.layers[0].mlp.down_proj.weight.grad.isfinite().all()


def test_dropout_is_off_while_pruning_a_model_in_training(tiny_llama, windows):
    one, two = (tiny_llama(vocab_size=64, attention_dropout=0.5) for _ in range(2))
    prune(one.train(), windows, progress=False)
    prune(two.eval(), windows, progress=False)
    assert changed(one, state(two)) == set()


def test_same_result_twice_and_close_for_any_batch_size(llama, windows):
    results = []
    for batch_size in (1, 1, 2, 5, 9):
        model = copy.deepcopy(llama)
        prune(model, windows, batch_size=batch_size, progress=False)
        results.append(model)
    assert changed(results[1], state(results[0])) == set()
    # Batches only change the order in which a Gram matrix is summed. In float32 that moves a few entries of these
    # small layers across the threshold; what the layers compute stays the same.
    logits = [model(windows, use_cache=False).logits for model in results]
    scale = (logits[0] - llama(windows, use_cache=False).logits).norm()
    for model, found in zip(results[2:], logits[2:], strict=True):
        for one, other in zip(linears_of(model), linears_of(results[0]), strict=True):
            assert ((one.weight == 0) == (other.weight == 0)).float().mean() > 0.99
        assert (found - logits[0]).norm() < 0.2 * scale


def test_autocast_does_not_reuse_dense_weights(llama, windows):
    cached, fresh = copy.deepcopy(llama), copy.deepcopy(llama)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prune(cached, windows, progress=False)
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        prune(fresh, windows, progress=False)
    assert changed(cached, state(fresh)) == set()
    assert cached.dtype == torch.float32


def test_works_in_inference_mode(llama, windows):
    other = copy.deepcopy(llama)
    with torch.inference_mode():
        prune(llama, windows, progress=False)
    prune(other, windows, progress=False)
    assert changed(llama, state(other)) == set()
    llama(windows, labels=windows).loss.backward()


def test_progress_bar_names_layer_and_error(llama, windows, capsys):
    prune(llama, windows)
    shown = capsys.readouterr().err
    assert "21/21" in shown
    prune(llama, windows, progress=False)
    assert capsys.readouterr().err == ""


def test_on_block_is_called_once_a_block_in_order(llama, windows):
    seen = []

    def note(records):
        block = llama.model.layers[records[0].block]
        assert all((linear.weight == 0).any() for linear in find_linears(block).values())
        seen.append([record.name for record in records])

    report = prune(llama, windows, progress=False, on_block=note)
    assert len(seen) == 3
    assert [name for names in seen for name in names] == [record.name for record in report.layers]


# What is refused, before anything changes.


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda w: w.float(), TypeError, "LongTensor.*float32"),
        (lambda w: w.tolist(), TypeError, "LongTensor.*list"),
        (lambda w: w[0], ValueError, r"\(samples, seqlen\).*\(12,\)"),
        (lambda w: w[:0], ValueError, r"\(0, 12\)"),
        (lambda w: w[:, :0], ValueError, r"\(5, 0\)"),
        (lambda w: w + 60, ValueError, "knows 0 to 64|tokenizer"),
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
    before, original = state(llama), pruner.LayerSolver.prune
    calls = []

    def fail(self, weight):
        calls.append(weight)
        if len(calls) == 7 + 2:
            raise FloatingPointError("x")
        return original(self, weight)

    monkeypatch.setattr(pruner.LayerSolver, "prune", fail)
    with pytest.raises(PruningError, match=r"^model\.layers\.1\.self_attn\.k_proj could not be pruned: x"):
        prune(llama, windows, progress=False)
    assert changed(llama, before) == weights_of(llama, 0)


def interrupted(monkeypatch, error, groups):
    """Let the solver raise in place of its `groups`-th Gram matrix."""
    calls = []

    def solve(gram, **settings):
        calls.append(len(gram))
        if len(calls) == groups:
            raise error
        return original(gram, **settings)

    original = pruner.LayerSolver
    monkeypatch.setattr(pruner, "LayerSolver", solve)


@pytest.mark.parametrize("error", [ValueError("x"), FloatingPointError("x"), torch.linalg.LinAlgError("x")])
def test_a_failing_solver_names_the_layer_and_leaves_its_block(llama, windows, monkeypatch, error):
    before, llama = state(llama), llama.train()
    interrupted(monkeypatch, error, groups=4 + 3)  # gate and up of block 1
    with pytest.raises(PruningError, match=r"model\.layers\.1\.mlp\.gate_proj, model\.layers\.1\.mlp\.up_proj.*: x"):
        prune(llama, windows, progress=False)
    assert changed(llama, before) == weights_of(llama, 0)
    assert all(module.training for module in llama.modules())


def test_out_of_memory_while_capturing_names_the_block(llama, windows, monkeypatch):
    before = state(llama)

    def fail(*_, **__):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(pruner, "accumulate_grams", fail)
    with pytest.raises(PruningError, match=r"model\.layers\.0 could not be captured: no memory left"):
        prune(llama, windows, progress=False)
    assert changed(llama, before) == set()


def test_an_interrupt_while_solving_leaves_whole_blocks(llama, windows, monkeypatch):
    before = state(llama)
    interrupted(monkeypatch, KeyboardInterrupt(), groups=4 + 2)
    with pytest.raises(KeyboardInterrupt):
        prune(llama, windows, progress=False)
    assert changed(llama, before) == weights_of(llama, 0)


@pytest.mark.parametrize("writes", [1, 4, 7, 10])
def test_an_interrupt_while_writing_leaves_whole_blocks(llama, windows, monkeypatch, writes):
    """Ctrl-C between two layers of a block: the block is completed first."""
    before, expected = state(llama), copy.deepcopy(llama)
    prune(expected, windows, progress=False)
    count, original = [], write_weight

    def write(linear, weight):
        original(linear, weight)
        count.append(linear)
        if len(count) == writes:
            raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("maiht_lightning.pruner"), "write_weight", write)
    with pytest.raises(KeyboardInterrupt):
        prune(llama, windows, progress=False)
    done = weights_of(llama, 0) | (weights_of(llama, 1) if writes > 7 else set())
    assert changed(llama, before) == done
    assert not changed(llama, state(expected)) & done


def test_an_error_in_on_block_leaves_whole_blocks(llama, windows):
    before = state(llama)

    def fail(records):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        prune(llama, windows, progress=False, on_block=fail)
    assert changed(llama, before) == weights_of(llama, 0)


def test_no_warnings_without_a_journal(llama, windows, caplog):
    with caplog.at_level(logging.WARNING):
        prune(llama, windows, progress=False)
    assert not caplog.records
