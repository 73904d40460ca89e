"""Predictions of memory, operations and time: against formulas, and against what was measured."""

import csv
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from maiht_lightning import MAIHTPruning
from maiht_lightning.capture.grams import add_gram, mirror_, slice_rows
from maiht_lightning.cli import main
from maiht_lightning.estimate.advice import advise
from maiht_lightning.estimate.devices import GIB, SHEETS, find_device
from maiht_lightning.estimate.plan import Job, estimate, gram_flops
from maiht_lightning.estimate.run import predict_pruning
from maiht_lightning.estimate.shape import ModelShape
from own_module import NoTokenizer, OwnModule, Windows, trainer

LLAMA_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama") / "config.json"
    path.write_text(json.dumps(LLAMA_7B))
    return path


@pytest.fixture(scope="module")
def llama(config):
    return ModelShape.from_source(str(config))


def test_llama_7b_from_its_config(llama):
    assert llama.parameters == 6_738_415_616
    assert llama.blocks == 32
    assert llama.prunable == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert [[layer.name.split(".")[-1] for layer in group] for group in llama.groups] == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]
    assert llama.grams == (4096, 4096, 4096, 11008)


def test_operations_of_llama_7b(llama):
    """The solver's 130 products and three more, 2 · out · in² each; the forward passes' 2 a weight and a token."""
    phases = {phase.name: phase for phase in estimate(llama, Job(train_steps=1), SHEETS["a100-80gb"]).phases}
    product = 32 * 2 * sum(layer.outputs * layer.inputs**2 for layer in llama.layers)
    assert phases["solve"].flops == pytest.approx(133 * product, rel=1e-6)
    assert 130 * product / 32 == pytest.approx(296e12, rel=0.01)
    tokens = 128 * 2048
    attention = 2 * 32 * 2 * tokens * 2048 * 4096
    forward = 2 * 2 * tokens * llama.prunable - 32 * 2 * tokens * 4096 * 11008
    grams = 32 * sum(2 * tokens * n * n for n in llama.grams)
    assert grams == pytest.approx(2.9e15, rel=0.02)
    assert forward + attention + grams / 2 < phases["capture"].flops < forward + attention + grams
    weights = llama.prunable + 4096 * 32000
    assert phases["finetune"].flops == pytest.approx(
        2048 * (8 * llama.prunable + 6 * 4096 * 32000) + 4 * attention / 2 / 128, rel=1e-6
    )
    assert phases["evaluate"].flops > 2 * 2 * 166 * 2048 * weights


def test_memory_of_llama_7b(llama):
    """In bfloat16: weights, gradients and 8-bit moments are 2 bytes a weight each."""
    job = Job(train_steps=1)
    found = estimate(llama, job, SHEETS["a100-80gb"])
    peaks = {phase.name: phase.device_bytes for phase in found.phases}
    assert 3 * 2 * llama.parameters < peaks["finetune"] < 0.95 * SHEETS["a100-80gb"].memory
    assert peaks["capture"] < 40 * GIB
    offloaded = estimate(llama, Job(offload="cpu"), SHEETS["rtx4090"])
    assert offloaded.peak.device_bytes < 0.95 * SHEETS["rtx4090"].memory
    assert offloaded.host_bytes > 2 * llama.parameters
    assert found.disk_bytes == 2 * (llama.parameters + llama.prunable)


def test_what_does_not_fit_comes_with_advice(llama):
    job, small = Job(train_steps=1, optimizer="adamw", batch_size=64), SHEETS["rtx4090"]
    found = {sentence.split()[0]: sentence for sentence in advise(llama, job, small, estimate(llama, job, small))}
    assert "several GPUs" in found["finetune"]
    assert "batch_size: 1" in found["capture"]
    large = SHEETS["a100-80gb"]
    job = Job(train_steps=1, optimizer="adamw", gradient_checkpointing=False, train_batch_size=16)
    (advice,) = advise(llama, job, large, estimate(llama, job, large))
    assert "optimizer: adamw_8bit, gradient_checkpointing: true" in advice
    assert not advise(llama, Job(train_steps=1), large, estimate(llama, Job(train_steps=1), large))


@pytest.mark.parametrize("size", [3, 256, 257, 1500])
def test_half_of_a_gram_matrix_is_all_of_it(size):
    tokens = torch.randn(40, size, generator=torch.Generator().manual_seed(0))
    gram = torch.zeros(size, size, dtype=torch.float64)
    buffer = torch.empty(slice_rows(size, gram.device) * size)
    for _ in range(2):
        add_gram(gram, tokens, buffer)
    expected = 2 * tokens.double().T @ tokens.double()
    torch.testing.assert_close(mirror_(gram), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(gram, gram.T)
    assert gram_flops(size, 80, gram.device) <= 2 * 80 * size**2


def test_the_command_prints_and_writes(config, tmp_path, capsys):
    output = tmp_path / "found.json"
    main(["estimate", "--model", str(config), "--gpu", "a100-80gb", "--train_steps", "10", "--output", str(output)])
    table = capsys.readouterr().out
    assert all(word in table for word in ("6.74 B", "finetune", "capture", "solve", "evaluate", "All of it fits"))
    found = json.loads(output.read_text())
    assert [phase["name"] for phase in found["phases"]] == ["finetune", "capture", "solve", "evaluate"]
    assert found["job"]["train_steps"] == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "a1000"], "a100-80gb"),
        (["--method", "best"], "method"),
        (["--samples", "0"], "samples"),
        (["--output", "/nowhere/found.json"], "existing folder"),
        (["--gpu", "h100-80gb", "--config.memory_budget", "100"], "memory_budget"),
    ],
)
def test_bad_input_is_named(config, options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["estimate", "--model", str(config), *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


MEASURE = """
    import gc, json, sys, time
    from pathlib import Path
    import torch
    from maiht_lightning.estimate.devices import find_device
    from maiht_lightning.estimate.plan import Job, estimate
    from maiht_lightning.estimate.shape import ModelShape
    from maiht_lightning.evaluation.perplexity import perplexity
    from maiht_lightning.loading import load_model
    from maiht_lightning.pruner import prune
    from maiht_lightning.solvers import MAIHTConfig

    def memory(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    source = sys.argv[1]
    shape, config = ModelShape.from_source(source), MAIHTConfig(iterations=4, refine_iterations=2)
    job = Job(dtype="float32", samples=2, seqlen=512, batch_size=1, config=config, train_steps=2, optimizer="adamw",
              gradient_checkpointing=False, train_batch_size=1, eval_windows=2)
    predicted = {p.name: p for p in estimate(shape, job, find_device("local", shape.hidden, max(shape.grams))).phases}
    model = load_model(source)
    windows = torch.randint(0, 49152, (4, 512), generator=torch.Generator().manual_seed(0))
    peaks, seconds = {}, {}

    def measured(name, work):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        start = time.perf_counter()
        work()
        seconds[name], peaks[name] = time.perf_counter() - start, memory("VmHWM:")

    def train():
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-6)
        for step in range(2):
            tokens = windows[step : step + 1]
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    perplexity(model, windows[:1], progress=False)  # what is slow only once
    measured("evaluate", lambda: [perplexity(model, windows[:2], progress=False) for _ in range(2)])
    measured("prune", lambda: prune(model, windows[:2], config=config, progress=False))
    measured("finetune", train)
    print(json.dumps({
        "peaks": peaks, "seconds": seconds,
        "predicted_peaks": {name: p.device_bytes for name, p in predicted.items()},
        "predicted_seconds": {name: p.seconds for name, p in predicted.items()},
    }))
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="compares with the CPU")
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs /proc of Linux")
def test_predictions_hold_for_a_real_model(smollm2_gguf, tmp_path):
    """SmolLM2: memory of each phase within 20 %, time of all within a factor of 1.5."""
    from maiht_lightning.loading import load_model

    model = load_model(str(smollm2_gguf))
    # Not all of its blocks, so that it takes less time.
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:12], 12
    model.save_pretrained(tmp_path / "model")
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(MEASURE))
    run = [sys.executable, program, tmp_path / "model"]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    peaks, predicted = found["peaks"], found["predicted_peaks"]
    assert predicted["evaluate"] == pytest.approx(peaks["evaluate"], rel=0.2)
    assert max(predicted["capture"], predicted["solve"]) == pytest.approx(peaks["prune"], rel=0.2)
    assert predicted["finetune"] == pytest.approx(peaks["finetune"], rel=0.2)
    total, seconds = sum(found["predicted_seconds"].values()), sum(found["seconds"].values())
    assert seconds / 1.5 < total < seconds * 1.5


def test_this_machine_is_measured():
    device = find_device("local", 64, 128)
    assert min(device.memory, device.half, device.single, device.bandwidth, device.fresh) > 0


def test_a_run_with_a_logger_stands_beside_its_prediction(tiny_llama, tmp_path, text, monkeypatch):
    monkeypatch.setattr("maiht_lightning.callbacks.pruning.find_tokenizer", lambda *_: NoTokenizer())
    logger = CSVLogger(tmp_path)
    fit = trainer(MAIHTPruning(calibration=Windows(), output_dir=str(tmp_path / "run")), logger=logger)
    fit.fit(OwnModule(tiny_llama(vocab_size=64)))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert list(summary["predicted"]) == ["capture", "solve"]
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
    (row,) = [row for row in rows if row.get("predicted/solve_seconds")]
    solve = summary["predicted"]["solve"]
    assert float(row["predicted/solve_seconds"]) == pytest.approx(solve["seconds"])
    assert float(row["tflops/solve"]) == pytest.approx(solve["flops"] / summary["seconds"]["solve"] / 1e12)


def test_models_that_cannot_be_estimated_are_no_error():
    assert predict_pruning(torch.nn.Linear(3, 3), Job()) == {}
