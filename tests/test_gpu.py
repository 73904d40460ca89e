"""What is said of GPUs: the same results as on a CPU, twice the same, wherever model and hidden states are.

`MAIHT_TEST_DEVICE=cpu python -m pytest -m gpu` rehearses these tests where there is no GPU. None bounds seconds.
"""

import copy
import socket
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM

from helpers import device
from helpers.byte_model import byte_tokenizer, llama_config, save_folder
from helpers.problems import make_problem
from helpers.small_task import write_boolq
from maiht_lightning import MAIHTConfig, prune, prune_layer
from maiht_lightning.capture.block_inputs import record_inputs
from maiht_lightning.capture.grams import accumulate_grams
from maiht_lightning.capture.hidden_states import HiddenStateStore
from maiht_lightning.capture.sublayers import DenseStream, accumulate_group, find_groups
from maiht_lightning.evaluation.lm_eval_tasks import load_tasks
from maiht_lightning.evaluation.perplexity import perplexity
from maiht_lightning.evaluation.zero_shot import zero_shot
from maiht_lightning.models.blocks import evaluation_mode, find_blocks, find_linears, weight_of
from maiht_lightning.models.loading import load_model
from maiht_lightning.solvers import resolve_config
from maiht_lightning.solvers.fusing import failures, run_by, unfused
from maiht_lightning.solvers.inverse import shifted_inverse
from maiht_lightning.solvers.problem import scale_gram
from maiht_lightning.solvers.slices import copy_beside, page_locked

pytestmark = pytest.mark.gpu
# Once for all of them.
if not device.THERE:
    pytest.skip(device.MISSING, allow_module_level=True)


@pytest.fixture
def gpu():
    """The device of these tests."""
    return device.DEVICE


CONFIG = MAIHTConfig(iterations=20, refine_iterations=10)
WINDOWS = torch.randint(0, 256, (6, 64), generator=torch.Generator().manual_seed(1))
SIZES = {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2}


def llama(dtype=torch.float32):
    """A LLaMA of bytes whose perplexity depends on its blocks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(llama_config(**SIZES)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
        rotary = copy.deepcopy(model.model.rotary_emb)
        model.to(dtype).model.rotary_emb = rotary
    return model


def pruned(model, **settings):
    """The report of a pruning, and the layers' weights in host memory."""
    settings = {"config": CONFIG, "batch_size": 2, "progress": False, **settings}
    report = prune(model, WINDOWS, **settings)
    return report, {path: weight_of(linear).detach().cpu() for path, linear in find_blocks(model).linears()}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert torch.equal(found[name], weight), name


@pytest.mark.parametrize("precision", ["float32", "tf32", "fp16x3", "mixed"])
def test_the_same_result_twice(gpu, precision):
    config = MAIHTConfig(iterations=20, refine_iterations=10, precision=precision)
    model = llama(torch.bfloat16).to(gpu)
    first, weights = pruned(copy.deepcopy(model), config=config)
    second, again = pruned(model, config=config)
    assert_same(again, weights)
    assert [r.relative_error for r in first.layers] == [r.relative_error for r in second.layers]
    assert all(record.zeros == record.shape[0] * record.shape[1] // 2 for record in first.layers)


@pytest.mark.parametrize("preset", ["paper", "fast"])
def test_precisions_on_a_gpu(gpu, preset):
    """Against float32 on the same GPU, whose tensor cores add up in their own way."""
    weight, gram = (tensor.float().to(gpu) for tensor in make_problem(7, 384, 512, spread=1.5))
    found = {
        name: prune_layer(weight, gram, config=replace(resolve_config(preset), precision=name))
        for name in ("float32", "fp16x3", "mixed")
    }
    auto = prune_layer(weight, gram, config=preset)
    base = found["float32"].relative_error
    assert found["fp16x3"].relative_error == pytest.approx(base, rel=1e-4 if preset == "paper" else 3e-3)
    assert found["mixed"].relative_error == pytest.approx(base, rel=3e-3)
    assert torch.equal(auto.weight, found["mixed" if gpu.type == "cuda" else "float32"].weight)


@pytest.mark.parametrize("method", ["maiht", "preconditioned", "aiht", "iht"])
@pytest.mark.parametrize("pattern", ["unstructured", "row", "2:4"])
@pytest.mark.parametrize("precision", ["float32", "fp16x3", "auto"])
def test_fused_passes_give_the_same_weights(gpu, method, pattern, precision):
    """Kernels beside the operations that they stand for; wide rows, too, and zeros that stay."""
    config = replace(resolve_config("balanced" if method == "preconditioned" else "paper"), precision=precision)
    method = "maiht" if method == "preconditioned" else method
    for shape in ((200, 64), (384, 1100)):
        weight, gram = (tensor.float().to(gpu) for tensor in make_problem(7, *shape, spread=1.5))
        weight[3, :20] = 0
        settings = {"config": replace(config, keep_zeros=shape[1] == 64), "method": method, "pattern": pattern}
        found = prune_layer(weight, gram, **settings)
        with run_by(unfused):
            plain = prune_layer(weight, gram, **settings)
        assert not failures
        assert found.mask.sum() == plain.mask.sum()
        assert found.relative_error == pytest.approx(plain.relative_error, rel=3e-3)


@pytest.mark.parametrize("setting", ["paper", "balanced", "best"])
def test_as_on_a_cpu(gpu, setting):
    """In `auto`: with another order of sums and other precisions, near-ties may end otherwise, the quality not."""
    there, here = llama().to(gpu), llama()
    (report, _), (expected, _) = pruned(there, config=setting), pruned(here, config=setting)
    assert report.sparsity == expected.sparsity
    for one, other in zip(report.layers, expected.layers, strict=True):
        assert one.relative_error == pytest.approx(other.relative_error, rel=0.05), one.name
    measured = {"progress": False, "batch_size": 2}
    assert perplexity(there, WINDOWS, **measured) == pytest.approx(perplexity(here, WINDOWS, **measured), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_grams_are_those_of_what_the_layers_multiply(gpu, dtype, autocast):
    """Also where the process lets float32 products be rounded: TF32 would be wrong by some 1e-4."""
    model = llama(dtype).to(gpu)
    before, block = torch.get_float32_matmul_precision(), find_blocks(model).modules[0]
    seen, tokens = {}, WINDOWS.to(gpu)

    def note(name):
        def hook(module, args):
            inputs = args[0].to(torch.bfloat16) if autocast else args[0]
            seen.setdefault(name, []).append(inputs.detach().cpu().double().flatten(0, -2))

        return hook

    torch.set_float32_matmul_precision("medium")
    try:
        with torch.no_grad(), evaluation_mode(model), torch.autocast(gpu.type, torch.bfloat16, enabled=autocast):
            inputs = record_inputs(model, find_blocks(model).modules, list(tokens.split(2)))
            groups = accumulate_grams(block, inputs)
            for name, linear in find_linears(block).items():
                linear.register_forward_pre_hook(note(name))
            for batch in inputs:
                batch.run(block)
    finally:
        torch.set_float32_matmul_precision(before)
    assert sorted(name for group in groups for name in group.names) == sorted(seen)
    for group in groups:
        features = torch.cat(seen[group.names[0]])
        wanted = features.T @ features
        scale = wanted.diagonal().sqrt()
        difference = (group.gram.cpu() - wanted) / scale / scale[:, None]
        assert difference.abs().max() < 2e-5, group.names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_dense_model_has_elsewhere_is_exact(gpu, dtype):
    """Xᵀ(X_d − X) is a difference of products: its error is small beside what layers see, also from half precision."""
    dense = llama(dtype).to(gpu)
    sparse = copy.deepcopy(dense)
    first, block = find_blocks(sparse).modules[:2]
    with torch.no_grad():
        for linear in find_linears(first).values():
            weight = weight_of(linear)
            weight[weight.abs() < weight.abs().median()] = 0
        ours = record_inputs(sparse, find_blocks(sparse).modules, list(WINDOWS.to(gpu).split(2)))
        theirs = ours.twin(HiddenStateStore("device", gpu))
        ours.pass_through(first)
        theirs.pass_through(find_blocks(dense).modules[0])
        names = find_groups(block, ours)[0][0]
        found = accumulate_group(block, ours, names, dense=DenseStream(theirs, find_blocks(dense).modules[1]))
        seen = []
        for model in (sparse, dense):
            layer = find_linears(find_blocks(model).modules[1])[names[0]]
            layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].cpu().double().flatten(0, -2)))
            for tokens in WINDOWS.to(gpu).split(2):
                model(input_ids=tokens)
    inputs, others = torch.cat(seen[:3]), torch.cat(seen[3:])
    wanted = inputs.T @ (others - inputs)
    scale = inputs.norm(dim=0)
    assert (wanted / scale / scale[:, None]).abs().max() > 1e-3
    assert ((found.drift.cpu() - wanted) / scale / scale[:, None]).abs().max() < 4e-5


@pytest.mark.parametrize("form", ["plain", "fp16x3"])
def test_inverses_by_products_and_by_factorisations(gpu, form):
    _, gram = make_problem(0, 1, 2400, tokens=4000)
    correlation = scale_gram(gram.float()).correlation
    wanted = torch.linalg.inv(correlation.double() + 0.1 * torch.eye(2400))
    found = shifted_inverse(correlation.to(gpu), 0.1, form, who="", tried="", advice="").cpu()
    assert (found.double() - wanted).norm() < 2e-5 * wanted.norm()


@pytest.mark.parametrize("memory_budget", [None, 200_000])
@pytest.mark.parametrize("precision", ["float32", "mixed"])
def test_layers_in_slices(gpu, precision, memory_budget):
    """Against the same layer on the CPU in float64: a budget brings its rows to the GPU one slice after another."""
    generator = torch.Generator().manual_seed(3)
    weight, features = torch.randn(192, 160, generator=generator), torch.randn(800, 160, generator=generator)
    gram = features.T @ (features * torch.linspace(0.1, 2, 160))
    gram = gram + gram.T
    wanted = prune_layer(weight.double(), gram.double(), config=MAIHTConfig(precision="float64"))
    config = MAIHTConfig(precision=precision, memory_budget=memory_budget)
    found = prune_layer(weight.to(gpu), gram.to(gpu), config=config)
    assert found.weight.device.type == gpu.type
    assert found.relative_error == pytest.approx(wanted.relative_error, rel=5e-3)
    assert (found.mask.cpu() != wanted.mask).float().mean() < 0.02


def test_what_waits_in_host_memory_is_page_locked(gpu):
    matrix = page_locked(torch.ones(3, 4), gpu)
    assert matrix.is_pinned() == copy_beside(matrix).is_pinned() == (gpu.type == "cuda")


@pytest.mark.parametrize("hidden_states", ["device", "host", "disk"])
def test_where_hidden_states_wait_does_not_matter(gpu, tmp_path, hidden_states):
    _, wanted = pruned(llama(torch.bfloat16).to(gpu))
    _, found = pruned(
        llama(torch.bfloat16).to(gpu), hidden_states=hidden_states, journal_dir=tmp_path / "run" / "journal"
    )
    assert_same(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_block_sees_is_kept_or_computed_again(gpu, monkeypatch, dtype):
    config, model = replace(resolve_config("balanced"), iterations=6, refine_iterations=3), llama(dtype).to(gpu)
    _, kept = pruned(copy.deepcopy(model), config=config, hidden_states="device")
    monkeypatch.setattr("maiht_lightning.pruning.pruner.has_room", lambda *_, **__: False)
    _, anew = pruned(model, config=config, hidden_states="device")
    assert_same(anew, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_elsewhere_are_pruned_and_measured_as_those_on_the_gpu(gpu, tmp_path, monkeypatch, dtype):
    """In host memory (`offload: cpu`) and on disk (`offload: disk`): weights, perplexity and a task's accuracy."""
    monkeypatch.setenv("MAIHT_DATA_DIR", str(tmp_path / "data"))
    write_boolq(tmp_path / "data")
    folder = save_folder(tmp_path / "dense", llama_config(**SIZES, max_position_embeddings=256), dtype=dtype)
    tasks, tokenizer = load_tasks(["boolq"]), byte_tokenizer()

    def results(model, **settings):
        _, weights = pruned(model, device=gpu, **settings)
        figures = zero_shot(model, tokenizer, tasks, device=gpu, batch_size=2, progress=False)
        return weights, figures, perplexity(model, WINDOWS, device=gpu, progress=False)

    wanted, figures, wanted_perplexity = results(load_model(str(folder), dtype).to(gpu))
    host = load_model(str(folder), dtype)
    places = {name: (parameter, parameter.device) for name, parameter in host.named_parameters()}
    found = results(host)
    # An optimizer may hold these very objects.
    assert all(places[name] == (parameter, parameter.device) for name, parameter in host.named_parameters())
    assert_same(found[0], wanted)
    assert (found[1], found[2]) == (figures, pytest.approx(wanted_perplexity, rel=1e-5))
    disk = load_model(str(folder), dtype, blocks_on_disk=True)
    report = prune(disk, WINDOWS, config=CONFIG, batch_size=2, progress=False, device=gpu, journal_dir=tmp_path / "j")
    assert report.sparsity == 0.5
    assert zero_shot(disk, tokenizer, tasks, device=gpu, batch_size=2, progress=False) == figures
    measured = perplexity(disk, WINDOWS, device=gpu, progress=False)
    assert measured == pytest.approx(wanted_perplexity, rel=1e-5)


def _prune_as_rank(rank, port, kind, folder):
    """What each of two processes does."""
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    address = f"tcp://localhost:{port}"
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", init_method=address, rank=rank, world_size=2)
    try:
        report, weights = pruned(llama(torch.bfloat16).to(device), process_group=dist.group.WORLD)
        torch.save((weights, [r.relative_error for r in report.layers]), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_gpus_as_one(gpu, tmp_path):
    if gpu.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    report, wanted = pruned(llama(torch.bfloat16).to(gpu))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_prune_as_rank, (port, gpu.type, tmp_path), nprocs=2)
    for rank in range(2):
        weights, errors = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert_same(weights, wanted)
        assert errors == [record.relative_error for record in report.layers]
