"""Models that lie elsewhere than they are computed, and hidden states that do."""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from transformers import LlamaForCausalLM

from helpers.warm import python
from maiht_lightning.capture.hidden_states import HiddenStateStore, choose_storage, pinned_bytes
from maiht_lightning.cli import main
from maiht_lightning.evaluation.perplexity import perplexity
from maiht_lightning.models import offload as offload_module
from maiht_lightning.models.blocks import find_blocks
from maiht_lightning.models.loading import load_model
from maiht_lightning.models.offload import BlockLoader, offloaded_forward
from maiht_lightning.models.saving import save_model
from maiht_lightning.models.sparsity import count_zeros, measured_sparsity
from maiht_lightning.pruning.pruner import prune

WINDOWS = torch.randint(0, 64, (6, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(tiny_llama, tmp_path):
    """A small model in a folder."""
    tiny_llama(vocab_size=64, num_hidden_layers=3).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def weights_of(folder):
    return LlamaForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.slow
@pytest.mark.parametrize(("method", "pattern"), [("maiht", "unstructured"), ("sparsegpt", "2:4")])
def test_blocks_on_disk_are_pruned_as_in_memory(folder, tmp_path, method, pattern):
    settings = {"method": method, "pattern": pattern, "progress": False}
    expected, model = LlamaForCausalLM.from_pretrained(folder), load_model(str(folder), blocks_on_disk=True)
    records = prune(expected, WINDOWS, **settings).layers
    report = prune(model, WINDOWS, journal_dir=tmp_path / "journal", **settings)
    assert [(r.name, r.zeros, r.objective) for r in report.layers] == [(r.name, r.zeros, r.objective) for r in records]
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    assert measured_sparsity(count_zeros(model)) == report.sparsity
    save_model(model, tmp_path / "pruned")
    saved = weights_of(tmp_path / "pruned")
    assert all(torch.equal(saved[name], weight) for name, weight in expected.state_dict().items())
    # The model runs on as it is, with what was pruned.
    with torch.no_grad():
        assert torch.equal(model(input_ids=WINDOWS).logits, expected(input_ids=WINDOWS).logits)


def test_perplexity_of_blocks_on_disk(folder):
    model, expected = load_model(str(folder), blocks_on_disk=True), LlamaForCausalLM.from_pretrained(folder)
    found = perplexity(model, WINDOWS, batch_size=4, progress=False)
    assert found == pytest.approx(perplexity(expected, WINDOWS, progress=False), rel=1e-6)


@pytest.mark.slow
def test_pruning_from_disk_goes_on_after_a_crash(folder, tmp_path):
    """Once with the model as it was, once with the one whose first blocks point to the journal."""
    journal = tmp_path / "journal"
    expected = load_model(str(folder), blocks_on_disk=True)
    prune(expected, WINDOWS, journal_dir=tmp_path / "another", config="paper", progress=False)

    def stop(records):
        if records[0].block == 1:
            raise KeyboardInterrupt

    model = load_model(str(folder), blocks_on_disk=True)
    with pytest.raises(KeyboardInterrupt):
        prune(model, WINDOWS, journal_dir=journal, config="paper", progress=False, on_block=stop)
    solved = []
    for again in (load_model(str(folder), blocks_on_disk=True), model):
        report = prune(again, WINDOWS, journal_dir=journal, config="paper", progress=False, on_block=solved.append)
        assert len(report.layers) == 21
        save_model(again, tmp_path / "again")
        save_model(expected, tmp_path / "expected")
        one, other = weights_of(tmp_path / "again"), weights_of(tmp_path / "expected")
        assert all(torch.equal(weight, other[name]) for name, weight in one.items())


def test_pruned_weights_of_a_model_on_disk_need_a_place(folder):
    with pytest.raises(ValueError, match="give journal_dir"):
        prune(load_model(str(folder), blocks_on_disk=True), WINDOWS, progress=False)


def test_files_whose_blocks_cannot_stay_there_are_refused(folder):
    with pytest.raises(ValueError, match="safetensors"):
        load_model(str(folder / "config.json"), blocks_on_disk=True)


def test_a_model_without_values_is_refused(tiny_llama, tmp_path):
    with torch.device("meta"):
        model = tiny_llama(vocab_size=64)
    model.lm_head.to_empty(device="cpu")
    with pytest.raises(ValueError, match="has no values: load the model with from_pretrained"):
        prune(model, WINDOWS, journal_dir=tmp_path, progress=False)


# ---- Models in host memory, computed on another device. There is one device here; where values do not matter, the
# other one is PyTorch's `meta` device, which has none, and else "cpu:0", which is the CPU under another name.

META = torch.device("meta")


@pytest.fixture
def another_cpu(monkeypatch):
    """Devices are the same only if they are called the same: "cpu:0" is another one than "cpu"."""
    monkeypatch.setattr("maiht_lightning.models.offload._same", lambda one, other: one == other)
    return torch.device("cpu:0")


@pytest.fixture
def reads(monkeypatch):
    """Notes (module, name of a tensor in it, thread) for each tensor that is read from its home."""
    offload, seen = importlib.import_module("maiht_lightning.models.offload"), []
    original = offload.full_tensor

    def note(module, name):
        seen.append((module, name, threading.current_thread().name))
        return original(module, name)

    monkeypatch.setattr(offload, "full_tensor", note)
    return seen


@pytest.mark.parametrize("hidden_states", ["auto", "device", "host", "disk"])
@pytest.mark.parametrize(("method", "pattern"), [("wanda", "unstructured"), ("sparsegpt", "2:4")])
def test_a_model_elsewhere_is_pruned_as_one_at_hand(tiny_llama, another_cpu, reads, method, pattern, hidden_states):
    settings = {"method": method, "pattern": pattern, "progress": False, "hidden_states": hidden_states}
    expected, model = (tiny_llama(vocab_size=64, num_hidden_layers=3) for _ in range(2))
    records = prune(expected, WINDOWS, **settings).layers
    parameters = dict(model.named_parameters())
    # It stays at home: only copies run.
    for block in model.model.layers:
        block.mlp.up_proj.register_forward_pre_hook(lambda *_: pytest.fail("the model itself runs"))
    reads.clear()
    report = prune(model, WINDOWS, device=another_cpu, **settings)
    assert reads
    assert [(r.name, r.zeros, r.relative_error) for r in report.layers] == [
        (r.name, r.zeros, r.relative_error) for r in records
    ]
    assert dict(model.named_parameters()).keys() == parameters.keys()
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        assert torch.equal(parameter, expected.get_parameter(name))


def test_each_block_is_read_once_and_ahead(tiny_llama, another_cpu, reads):
    """The first one by the process itself, the others by a thread while the one before is at work."""
    model = tiny_llama(vocab_size=64, num_hidden_layers=3)
    home = {module: name for name, module in model.named_modules()}
    prune(model, WINDOWS, device=another_cpu, method="wanda", progress=False)
    main_thread = threading.current_thread().name
    for number, block in enumerate(model.model.layers):
        names = {f"{home[block]}.{name}" for name, _ in [*block.named_parameters(), *block.named_buffers()]}
        found = [(f"{home[m]}.{name}", t) for m, name, t in reads if home[m].startswith(f"{home[block]}.")]
        assert sorted(name for name, _ in found) == sorted(names)
        assert all((thread == main_thread) == (number == 0) for _, thread in found)


def test_a_block_is_copied_to_where_it_is_computed(tiny_llama):
    model = tiny_llama(vocab_size=64, num_hidden_layers=2)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loader = BlockLoader(find_blocks(model), META)
    with loader:
        assert loader.copies
        loader.prefetch(1)
        for index, block in enumerate(model.model.layers):
            copy = loader.fetch(index)
            assert type(copy) is type(block)
            assert all(p.is_meta for p in copy.parameters())
            assert {n: (p.shape, p.dtype) for n, p in copy.named_parameters()} == {
                n: (p.shape, p.dtype) for n, p in block.named_parameters()
            }
            # Only pruned weights find their way home.
            weight = torch.full_like(block.mlp.up_proj.weight, index + 1.0)
            loader.write_back(index, {"mlp.up_proj": weight}, None)
            state[f"model.layers.{index}.mlp.up_proj.weight"] = weight
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_model_at_hand_is_not_copied(tiny_llama):
    model = tiny_llama(vocab_size=64)
    for device in ("cpu", "cpu:0"):
        loader = BlockLoader(find_blocks(model), torch.device(device))
        with loader:
            loader.prefetch(0)
            assert not loader.copies
            assert [loader.fetch(i) for i in range(2)] == list(model.model.layers)


def test_accelerate_computes_a_whole_model_on_another_device():
    """One without a forward that looks at values, which the meta device does not have."""
    model = torch.nn.Sequential(torch.nn.Embedding(64, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 64))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    devices = []
    model[2].register_forward_pre_hook(lambda module, args: devices.append(args[0].device))
    with offloaded_forward(model, META):
        # Nothing is where it was, and what one layer computes is on the other device for the next one.
        assert all(parameter.is_meta for parameter in model.parameters())
        # The result goes back to where the input is, which it cannot without values.
        with pytest.raises(NotImplementedError, match="no data"):
            model(WINDOWS)
    assert devices == [META]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model(WINDOWS).device == WINDOWS.device


def test_accelerate_brings_the_values_and_takes_them_back(tiny_llama, monkeypatch):
    # A `cpu` that is not the one where the model is, so that the values are there and can be compared.
    monkeypatch.setattr("maiht_lightning.models.offload._same", lambda one, other: False)
    model = tiny_llama(vocab_size=64)
    expected = model(input_ids=WINDOWS, use_cache=False).logits
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for error in (None, KeyboardInterrupt):
        with contextlib.suppress(KeyboardInterrupt), offloaded_forward(model, torch.device("cpu")):
            assert all(parameter.is_meta for parameter in model.parameters())
            assert torch.equal(model(input_ids=WINDOWS, use_cache=False).logits, expected)
            if error is not None:
                raise error
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert not any(hasattr(module, "_hf_hook") for module in model.modules())
    assert torch.equal(model(input_ids=WINDOWS, use_cache=False).logits, expected)


@pytest.mark.parametrize("has_room", [True, False])
def test_a_forward_elsewhere_leaves_the_same_parameters(tiny_llama, monkeypatch, has_room):
    """An optimizer and masks hold these objects, and a tied head is that of the embedding."""
    monkeypatch.setattr("maiht_lightning.models.offload._same", lambda one, other: False)
    monkeypatch.setattr("maiht_lightning.models.offload._has_room", lambda device, model: has_room)
    model = tiny_llama(vocab_size=64, tie_word_embeddings=True)
    expected = model(input_ids=WINDOWS, use_cache=False).logits
    before = {name: (tensor, tensor.data_ptr()) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    for error in (None, KeyboardInterrupt):
        with contextlib.suppress(KeyboardInterrupt), offloaded_forward(model, torch.device("cpu")):
            assert all(parameter.is_meta for parameter in model.parameters()) != has_room
            assert any(hasattr(module, "_hf_hook") for module in model.modules()) != has_room
            assert torch.equal(model(input_ids=WINDOWS, use_cache=False).logits, expected)
            if error is not None:
                raise error
        after = dict([*model.named_parameters(), *model.named_buffers()])
        assert after.keys() == before.keys()
        assert all(after[name] is tensor and tensor.data_ptr() == place for name, (tensor, place) in before.items())
        assert model.lm_head.weight is model.model.embed_tokens.weight
    model(input_ids=WINDOWS, labels=WINDOWS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_room_is_for_the_model_and_half_as_much_again(monkeypatch):
    model = torch.nn.Linear(10, 10, bias=False)
    for free, room in ((599, False), (600, True)):
        monkeypatch.setattr("maiht_lightning.models.offload.free_memory", lambda device, free=free: free)
        assert offload_module._has_room(torch.device("cuda"), model) == room
    assert not offload_module._has_room(torch.device("cpu"), model)


def test_accelerate_leaves_alone_what_is_there_or_has_hooks(tiny_llama, folder):
    at_hand, on_disk = tiny_llama(vocab_size=64), load_model(str(folder), blocks_on_disk=True)
    for model, device in ((at_hand, None), (at_hand, torch.device("cpu")), (on_disk, META)):
        hooks = [getattr(module, "_hf_hook", None) for module in model.modules()]
        devices = [parameter.device for parameter in model.parameters()]
        with offloaded_forward(model, device):
            assert [getattr(module, "_hf_hook", None) for module in model.modules()] == hooks
            assert [parameter.device for parameter in model.parameters()] == devices


# ---- Hidden states


def test_hidden_states_wait_for_a_gpu_in_pinned_memory(monkeypatch):
    """Without a GPU nothing can be pinned: what is asked for is looked at."""
    hidden, asked, empty = torch.randn(2, 3, 4), [], torch.empty

    def note(*shape, pin_memory=False, **settings):
        asked.append(pin_memory)
        return empty(*shape, **settings)

    monkeypatch.setattr(torch, "empty", note)
    with HiddenStateStore("host", torch.device("cuda")) as store:
        assert torch.equal(store.put(hidden), hidden)
    with HiddenStateStore("host", META) as store:
        assert store.put(hidden).device == hidden.device
    with HiddenStateStore("device", META) as store:
        assert store.put(hidden).is_meta
    assert asked == [True, False]


@pytest.mark.parametrize("storage", ["device", "host", "disk"])
def test_hidden_states_are_where_they_were_asked_for(tiny_llama, storage, tmp_path):
    files = []

    def look(records):
        files.append([path.stat().st_size for path in tmp_path.glob("run/hidden_states_*/batch_*.bin")])

    model = tiny_llama(vocab_size=64)
    settings = {"method": "magnitude", "batch_size": 4, "on_block": look, "progress": False}
    prune(model, WINDOWS, hidden_states=storage, journal_dir=tmp_path / "run" / "journal", **settings)
    # 4 and 2 windows of 32 tokens, 64 numbers of 4 bytes each.
    expected = [32768, 16384] if storage == "disk" else []
    assert [sorted(sizes, reverse=True) for sizes in files] == [expected, expected]


def test_by_itself_hidden_states_go_where_there_is_room(tiny_llama, monkeypatch, tmp_path):
    asked, files = [], []

    def choose(size, device, working, pinned):
        asked.append((size, device, working, pinned))
        return "disk"

    monkeypatch.setattr("maiht_lightning.pruning.pruner.choose_storage", choose)
    model = tiny_llama(vocab_size=64)
    settings = {"method": "magnitude", "journal_dir": tmp_path / "journal", "progress": False}
    prune(model, WINDOWS, on_block=lambda _: files.extend(tmp_path.glob("hidden_states_*/*")), **settings)
    assert len(files) == 2 * len(WINDOWS)
    ((size, device, working, pinned),) = asked
    # A window's 8 KiB are a power of two.
    assert (size, device, pinned) == (6 * 32 * 64 * 4, torch.device("cpu"), size)
    # Beside them: float64 Gram matrices of the widths 64 and 128, with copies; 11 matrices of the largest layer and
    # three of a Gram matrix's size in float32; and three blocks, of which the layers are nearly all.
    layers = 64 * (64 + 32 + 32 + 64 + 3 * 128)
    solver = 4 * (11 * 64 * 128 + 3 * 128**2)
    # A window of 32 tokens has the layers' outputs and the widest input.
    batch = 32 * 4 * ((64 + 32 + 32 + 64 + 128 + 128 + 64) + 128)
    assert working == 2 * 8 * (64**2 + 128**2) + solver + 3 * 4 * (layers + 2 * 64) + batch


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["device", "host", "disk"])
def test_where_hidden_states_are_stored_changes_nothing(tiny_llama, storage, tmp_path):
    expected, model = tiny_llama(vocab_size=64), tiny_llama(vocab_size=64)
    prune(expected, WINDOWS, progress=False, hidden_states="auto")
    prune(model, WINDOWS, progress=False, hidden_states=storage, journal_dir=tmp_path / "run" / "journal")
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), model.parameters(), strict=True))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["journal"]


def test_hidden_states_go_where_there_is_room(monkeypatch):
    free, cuda = 100, torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 200))
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    monkeypatch.setattr("maiht_lightning.capture.hidden_states.available_host_memory", lambda: 1000)
    assert choose_storage(50, cuda, working=40) == "device"
    assert choose_storage(51, cuda, working=40) == "host"
    assert choose_storage(501, cuda) == "disk"
    # Pinned memory is what a GPU's wait in, and takes more than they are.
    assert choose_storage(400, cuda, pinned=501) == "disk"
    assert choose_storage(50, cuda, working=40, pinned=501) == "device"
    assert choose_storage(400, torch.device("cpu"), pinned=501) == "host"
    assert [pinned_bytes(size) for size in (0, 1, 4096, 4097, 2**27, 2**27 + 1)] == [0, 1, 4096, 8192, 2**27, 2**28]
    assert choose_storage(500, torch.device("cpu")) == "host"
    with pytest.raises(ValueError, match="auto, device, host, disk"):
        prune(torch.nn.Module(), WINDOWS, hidden_states="gpu")


# ---- Through the command line


@pytest.mark.slow
def test_maiht_prune_from_disk(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calibration = ["--pruning.calibration", "PythonDocsCalibration", "--pruning.calibration.samples", "8"]
    options = [
        *("--model.name_or_path", str(tiny_folder), "--data", "PythonDocsDataModule", "--trainer.logger", "false"),
        *("--trainer.accelerator", "cpu", "--pruning.evaluation.perplexity", "[python_docs]"),
        *(*calibration, "--pruning.calibration.seqlen", "64", "--pruning.evaluation.max_windows", "2"),
    ]
    main(["prune", *options, "--output_dir", "memory"])
    main(["prune", *options, "--output_dir", "disk", "--pruning.offload", "disk", "--pruning.hidden_states", "disk"])
    memory, disk = (weights_of(tmp_path / name / "model") for name in ("memory", "disk"))
    assert all(torch.equal(weight, disk[name]) for name, weight in memory.items())
    # The model on disk is read from its journal until the end.
    assert not list((tmp_path / "memory" / "journal").glob("*.safetensors"))
    assert list((tmp_path / "disk" / "journal").glob("*.safetensors"))
    stages = [json.loads((tmp_path / name / "summary.json").read_text())["stages"] for name in ("memory", "disk")]
    for stage in ("dense", "pruned"):
        one, other = (found[stage]["perplexity"]["python_docs"] for found in stages)
        assert one == pytest.approx(other, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["fit", "--pruning.offload", "disk"], "for `maiht prune`"),
        (["prune", "--pruning.offload", "gpu"], "offload"),
        (["prune", "--pruning.hidden_states", "gpu"], "hidden_states"),
        (["prune", "--pruning.offload", "disk", "--pruning.compact", "true"], "maiht export"),
        (["prune", "--pruning.offload", "disk", "--pruning.config", "best"], "best,rescaling_epochs=0"),
    ],
)
def test_what_cannot_be_offloaded_is_refused_before_the_work(options, message, tiny_folder, tmp_path, capsys):
    command, *rest = options
    model = ["--model.name_or_path", str(tiny_folder), "--data", "PythonDocsDataModule", "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit) as stopped:
        main([command, *model, "--trainer.accelerator", "cpu", "--trainer.logger", "false", *rest])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


# ---- Memory

PEAK = """
    import gc, json, sys
    from pathlib import Path
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from maiht_lightning.models.blocks import find_linears
    from maiht_lightning.models.loading import load_model
    from maiht_lightning.pruning.pruner import prune
    from maiht_lightning.solvers import MAIHTConfig

    torch.manual_seed(0)
    WIDTH, INNER, TOKENS = 896, 2432, 64
    settings = dict(vocab_size=4096, num_attention_heads=14, num_key_value_heads=14, max_position_embeddings=64,
                    bos_token_id=None, eos_token_id=None)
    windows = torch.randint(0, 4096, (4, TOKENS))
    # mAIHT as published, but for the number of iterations, which all use the same memory.
    options = dict(config=MAIHTConfig(iterations=1, refine_iterations=0), progress=False)

    def memory(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    if sys.argv[1] == "make":
        for name, blocks in (("small", 2), ("big", 10)):
            LlamaForCausalLM(LlamaConfig(
                hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=blocks, **settings
            )).save_pretrained(name)
        raise SystemExit
    # Whatever the libraries take for themselves they take here.
    prune(load_model("small", blocks_on_disk=True), windows, journal_dir="warm", **options)
    gc.collect()
    before = memory("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5")
    model = load_model("big", blocks_on_disk=True)
    report = prune(model, windows, journal_dir="journal", **options)
    peak = memory("VmHWM:") - before
    layers = {name: linear.weight.shape for name, linear in find_linears(model.model.layers[0]).items()}
    block = 4 * sum(out * into for out, into in layers.values())
    print(json.dumps({
        "peak": peak, "blocks": len(model.model.layers), "block": block, "embeddings": 4 * 2 * 4096 * WIDTH,
        "grams": 8 * (3 * WIDTH**2 + INNER**2), "hidden": 4 * windows.numel() * WIDTH, "sparsity": report.sparsity,
        "solver": 11 * 4 * max(out * into for out, into in layers.values()),
    }))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs /proc of Linux")
def test_ten_blocks_on_disk_are_pruned_in_the_memory_of_three(tmp_path):
    """Embeddings, three blocks, the Gram matrices, the hidden states, and 11 float32 matrices of the largest layer."""
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PEAK))
    # Freed matrices go back to the system at once, as glibc does by itself with those of a 7B model.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**19), "MALLOC_TRIM_THRESHOLD_": str(2**19)}
    # The allocator reads its variables where a process begins.
    for words in ([*python(), program, "make"], [sys.executable, program, "prune"]):
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["blocks"] == 10
    assert found["sparsity"] == pytest.approx(0.5)
    allowed = found["embeddings"] + 3 * found["block"] + found["grams"] + found["hidden"] + found["solver"]
    assert allowed < found["embeddings"] + 9 * found["block"]  # it could not be the whole model
    assert found["peak"] < allowed, f"{found['peak'] / 2**20:.0f} MiB, allowed {allowed / 2**20:.0f} MiB: {found}"
