"""Predictions of memory, operations and time: against formulas, and against what was measured."""

import copy
import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.flop_counter import FlopCounterMode

from helpers.own_module import NoTokenizer, OwnModule, Windows, trainer
from maiht_lightning import MAIHTConfig, MAIHTPruning
from maiht_lightning.capture.grams import add_gram, mirror_, slice_rows
from maiht_lightning.cli import main
from maiht_lightning.estimate.advice import advise
from maiht_lightning.estimate.devices import GIB, SHEETS, _seconds, find_device
from maiht_lightning.estimate.plan import Job, estimate, predict_pruning
from maiht_lightning.estimate.pruning import COMPILING, gram_flops
from maiht_lightning.estimate.shape import ModelShape
from maiht_lightning.estimate.solver import count_inverse, count_solver
from maiht_lightning.pruning.pruner import prune
from maiht_lightning.solvers import LayerResult, PruningSpec, splitting
from maiht_lightning.solvers.config import PRESETS

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

# Counts by hand are those of the algorithm as it was published, in float32.
SINGLE = MAIHTConfig(precision="float32")
published = partial(Job, config=SINGLE)


@pytest.fixture
def measured_once():
    """Here every measurement counts."""


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


# LLaMA-7B by hand: 32 blocks of four matrices 4096 x 4096 and three of 4096 x 11008; embeddings and head of 32,000.
LINEARS = 4 * 4096**2 + 3 * 4096 * 11008
HEAD = 32000 * 4096
TOKENS = 128 * 2048
# A product of a layer's weight with its Gram matrix, 2 · out · in², for all layers of a block.
PRODUCT = 2 * (4096**2 * (4 * 4096 + 2 * 11008) + 4096 * 11008**2)
# Causal attention of a window in one block, its two products of L x L x 4096: half of 4 · L² · 4096.
ATTENTION = 2 * 2048**2 * 4096


def phases_of(shape, job, device="a100-80gb"):
    return {phase.name: phase for phase in estimate(shape, job, SHEETS[device]).phases}


@pytest.mark.slow
def test_operations_of_llama_7b(llama):
    """The solver's 130 products and three more, 2 · out · in² each; the forward passes' 2 a weight and a token."""
    phases = phases_of(llama, published(train_steps=10))
    assert pytest.approx(296e12, rel=0.005) == 130 * PRODUCT
    assert phases["solve"].flops == pytest.approx(32 * 133 * PRODUCT, rel=1e-9)
    # A block runs twice, once without its last layer. Of XᵀX with 4096 columns four slices of 1024 rows are computed,
    # each from its diagonal on: 1, 3/4, 1/2 and 1/4 of a quarter. With 11,008 there are seven of 1408 and one of 1152.
    forward = 32 * (2 * 2 * TOKENS * LINEARS - 2 * TOKENS * 4096 * 11008 + 2 * 128 * ATTENTION)
    wide = sum(1408 * (11008 - 1408 * i) for i in range(7)) + 1152**2
    grams = 32 * 2 * TOKENS * (3 * 0.625 * 4096**2 + wide)
    assert phases["capture"].flops == pytest.approx(forward + grams, rel=1e-9)
    assert grams == pytest.approx(0.58 * 2.9e15, rel=0.02)  # of all of XᵀX
    # With gradient checkpointing, forward passes through the blocks are four: backward counts as two.
    training = 4 * 32 * (2 * 2048 * LINEARS + ATTENTION) + 3 * 2 * 2048 * HEAD
    assert phases["finetune"].flops == pytest.approx(10 * training, rel=1e-9)
    evaluation = 32 * (2 * 2048 * LINEARS + ATTENTION) + 2 * 2048 * HEAD
    assert phases["evaluate"].flops == pytest.approx(2 * 166 * evaluation, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "products", "cubes"),
    [
        # Two products for the error in each. An iteration of mAIHT has two, of AIHT and IHT one, and so has a step of
        # the refining, which begins with one more.
        ("maiht", 2 * 50 + 1 + 30 + 2, 0),
        ("aiht", 50 + 1 + 30 + 2, 0),
        ("iht", 50 + 1 + 30 + 2, 0),
        ("wanda", 2, 0),
        ("magnitude", 2, 0),
        # Later columns are updated by half a product; ADMM has twenty steps and A·B. Factorising and inverting are
        # taken for 2 n³.
        ("sparsegpt", 2.5, 2),
        ("admm", 20 + 1 + 2, 2),
    ],
)
def test_operations_of_the_methods(llama, method, products, cubes):
    flops = phases_of(llama, published(method=method))["solve"].flops
    assert flops == pytest.approx(32 * (products * PRODUCT + cubes * (3 * 4096**3 + 11008**3)), rel=1e-9)


def test_operations_follow_the_iterations(llama):
    flops = phases_of(llama, published(config=replace(SINGLE, iterations=7, refine_iterations=5)))["solve"].flops
    assert flops == pytest.approx(32 * (2 * 7 + 1 + 5 + 2) * PRODUCT, rel=1e-9)


@pytest.mark.parametrize(
    "config",
    [
        PRESETS["paper"],
        pytest.param(PRESETS["balanced"], marks=pytest.mark.slow),
        pytest.param(PRESETS["best"], marks=pytest.mark.slow),
        MAIHTConfig(allocation="owl"),
    ],
    ids=["paper", "balanced", "best", "owl"],
)
def test_operations_beside_the_solver_are_those_counted(tiny_llama, monkeypatch, config):
    """Capture and training, of a model that is large enough for what happens once not to matter."""
    model = tiny_llama(vocab_size=64, num_hidden_layers=6)
    windows = torch.randint(0, 64, (6, 16), generator=torch.Generator().manual_seed(0))

    class Halving:
        """In place of the solver, whose products are not counted here."""

        def __init__(self, gram, spec, drift=None):
            assert (drift is not None) == (spec.config.dense_targets > 0)

        def prune(self, weight, pattern):
            mask = weight.abs() > weight.abs().median()
            return LayerResult(weight * mask, mask, 0.5, [], [], 0.0)

    def find(name, width, inner):
        assert (name, width, inner) == ("local", 64, 128)
        return SHEETS["a100-80gb"]

    monkeypatch.setattr("maiht_lightning.pruning.solving.LayerSolver", Halving)
    # What is predicted beside operations is not compared here: neither is the machine measured, nor need layers be
    # solved with many steps to count those.
    monkeypatch.setattr("maiht_lightning.estimate.plan.find_device", find)
    config = replace(config, iterations=2, refine_iterations=1)
    counted, predicted = [], []
    trained = {"reconstruct": config.reconstruction_epochs, "rescale": config.rescaling_epochs}
    for phases in ([], ["reconstruct"], ["rescale"]):
        if not all(trained[phase] for phase in phases):
            continue
        epochs = {"reconstruction_epochs": 2 * ("reconstruct" in phases), "rescaling_epochs": 2 * ("rescale" in phases)}
        spec = PruningSpec.parse(config=replace(config, **epochs))
        with FlopCounterMode(display=False) as flops:
            prune(copy.deepcopy(model), windows, config=spec.config, progress=False)
        counted.append(flops.get_total_flops())
        found = predict_pruning(model, spec, samples=6, seqlen=16, batch_size=1)
        assert found.keys() == {"capture", "solve", *phases}
        assert all(phase["seconds"] > 0 and phase["device_bytes"] > 0 for phase in found.values())
        predicted.append(sum(phase["flops"] for name, phase in found.items() if name != "solve"))
    assert predicted[0] == pytest.approx(counted[0], rel=0.12)
    for of_more, in_fact in zip(predicted[1:], counted[1:], strict=True):
        assert of_more - predicted[0] == pytest.approx(in_fact - counted[0], rel=0.15)


def test_the_solvers_products_are_counted(llama):
    """Its own count and, beside the factorisations, three products for scaling back and the error."""
    for name in ("fast", "balanced"):
        config = replace(PRESETS[name], precision="float32")
        factorised = 2 * splitting.levels(config.iterations) * (3 * 4096**3 + 11008**3)
        corrected = (4 * (3 * 4096**3 + 11008**3) + PRODUCT) if config.dense_targets else 0
        flops = phases_of(llama, Job(config=config))["solve"].flops
        own = (flops / 32 - factorised - corrected) / PRODUCT
        assert own == pytest.approx(splitting.products(config) + 2, abs=0.01)
        assert splitting.products(config) <= 130 * (0.5 if name == "fast" else 1)


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [0, 1])
def test_what_a_block_sees_is_kept_where_that_fits(llama, monkeypatch, epochs):
    """By hand, LLaMA-7B: of what leads to the inputs of o and down, only these layers run again."""
    config = replace(PRESETS["balanced"], reconstruction_epochs=epochs)

    def found(gigabytes):
        monkeypatch.setitem(SHEETS, "a100-80gb", replace(SHEETS["a100-80gb"], memory=int(gigabytes * 1e9)))
        return phases_of(llama, Job(config=config))

    def passes(square, wide, attention):
        weights = square * 4096**2 + wide * 4096 * 11008
        return 32 * (2 * TOKENS * weights + 128 * attention * ATTENTION)

    # A model's passes up to the inputs of o, of gate and up, of down, and all: with nothing known, with the input of o,
    # and with that of down as well.
    nothing, at_o, at_both = passes(15, 5, 4), passes(6, 5, 1), passes(6, 3, 1)
    # A block that is trained is passed anew as a whole.
    pruned_at_o = at_o + passes(3, 0, 1) * epochs
    pruned_at_both = pruned_at_o if epochs else at_both
    attention, mlp = 2 * TOKENS * 4096, 2 * TOKENS * 11008
    none, all_of_it = found(15), found(1000)
    assert all_of_it["capture"].flops - none["capture"].flops == pytest.approx(
        pruned_at_both + at_both - 2 * nothing, rel=1e-9
    )
    # In half precision, while layers are captured and while they are solved.
    kept = 2 * attention + mlp * (2 - epochs)
    for name in ("capture", "solve"):
        assert all_of_it[name].device_bytes - none[name].device_bytes == pytest.approx(kept, rel=1e-9)
    # A tenth of the memory is left; without room for more, the pruned block's o comes first, and then the dense one's.
    least = none["solve"].device_bytes
    for room, expected in ((attention, pruned_at_o + nothing), (2 * attention, pruned_at_o + at_o)):
        some = found((least + room) / 0.9e9 + 0.01)
        assert some["capture"].flops - none["capture"].flops == pytest.approx(expected - 2 * nothing, rel=1e-9)
        assert some["solve"].device_bytes == pytest.approx(least + room, rel=1e-9)


@pytest.mark.slow
def test_bytes_that_all_but_the_products_move(llama):
    """Counted by hand, in passes over a matrix and for a block's token in tensors of its two widths."""
    # mAIHT, an iteration: the extrapolation 11, for each of two candidates thresholding 8, residual 3, loss 4 and step
    # 3; a step of the refining 13. What is done once, such as choosing the exact support, is a tenth of it at most.
    passes = 50 * (11 + 2 * 18) + 31 * 13
    assert count_solver(PruningSpec.parse(config="paper")).moved == pytest.approx(1.05 * 4 * passes, rel=0.06)
    # Fused, an iteration reads u(S_prev), u(Z), u(V) and B and writes u(S), Z and Z − B; reads u(S) and B and writes V
    # and V − B; for each candidate it reads that, its residual and its gradient and writes its step. A step of the
    # refining reads the last one, support and B and writes two matrices, and reads three and writes one.
    longer, finer = MAIHTConfig(iterations=60), MAIHTConfig(refine_iterations=40)
    fused, of_longer, of_finer = (
        count_solver(PruningSpec.parse(config=config), fused=True).moved for config in ("paper", longer, finer)
    )
    assert of_longer - fused == pytest.approx(10 * 4 * (7 + 4 + 2 * 4), rel=0.03)
    assert of_finer - fused == pytest.approx(10 * 4 * (5 + 4), rel=0.03)
    # Without gradients, bfloat16: two norms, computed in float32, of about 40 bytes an entry; rotary embeddings of q
    # and k with about 22 each; attention 8; two residual additions of 6. The MLP's activation and product, 10.
    forward = 4096 * (2 * 40 + 2 * 22 + 8 + 2 * 6) + 11008 * 10
    assert llama.block_counts(2).forward == pytest.approx(forward, rel=0.1)
    # At once: gate, up, the activation and the product, beside the residual.
    assert llama.block_counts(2).peak == pytest.approx(2 * (4 * 11008 + 4096), rel=0.05)


# NVIDIA's data sheets: GB; TFLOP/s in bfloat16 without sparsity, float32 and TF32; TB/s; GB/s of PCIe 4 or 5 x 16.
DATA_SHEETS = {
    "a100-40gb": (40, 312, 19.5, 156, 1.555, 32),
    "a100-80gb": (80, 312, 19.5, 156, 2.039, 32),
    "h100-80gb": (80, 989, 67, 494.5, 3.35, 64),
    "h200": (141, 989, 67, 494.5, 4.8, 64),
    "l40s": (48, 362, 91.6, 183, 0.864, 32),
    "rtx4090": (24, 165.2, 82.6, 82.6, 1.008, 32),
}


def test_all_named_gpus_are_compared_with_their_data_sheets():
    assert DATA_SHEETS.keys() == SHEETS.keys()
    assert not any(device.is_host for device in SHEETS.values())


@pytest.mark.slow
@pytest.mark.parametrize("gpu", DATA_SHEETS)
def test_seconds_are_operations_and_bytes_over_the_data_sheets_speeds(llama, gpu):
    """At 70 % of the peak rate of products and 80 % of the memory's: what large ones reach."""
    gigabytes, *rates, terabytes, link = DATA_SHEETS[gpu]
    half, single, tf32 = (0.7e12 * rate for rate in rates)
    bandwidth = 0.8e12 * terabytes
    # The driver counts in GiB and keeps some for itself.
    assert 0.9 * gigabytes * 1e9 < SHEETS[gpu].memory < 1.08 * gigabytes * 1e9

    block, head = llama.block_counts(2), llama.head_counts(2)
    seconds = {name: phase.seconds for name, phase in phases_of(llama, published(train_steps=10), gpu).items()}
    flops = {name: phase.flops for name, phase in phases_of(llama, published(train_steps=10), gpu).items()}
    moved = count_solver(PruningSpec.parse(config="paper"), fused=True).moved * 32 * LINEARS
    assert seconds["solve"] == pytest.approx(flops["solve"] / single + moved / bandwidth + COMPILING, rel=0.01)
    in_tf32 = phases_of(llama, published(config=MAIHTConfig(precision="tf32")), gpu)["solve"].seconds
    assert in_tf32 == pytest.approx(flops["solve"] / tf32 + moved / bandwidth + COMPILING, rel=0.01)

    # Sums in float64 of 16 batches of 8 windows; the inputs are multiplied in half precision, as they are.
    sums = 32 * (16 * 24 / 2 * (3 * 4096**2 + 11008**2))
    expected = flops["capture"] / half + (sums + 32 * 2 * TOKENS * block.forward) / bandwidth
    assert seconds["capture"] == pytest.approx(expected, rel=0.01)

    moved = 2 * 166 * 2048 * (32 * block.forward + head.forward)
    assert seconds["evaluate"] == pytest.approx(flops["evaluate"] / half + moved / bandwidth, rel=0.01)
    # Blocks run forward twice; weights, gradients and moments are read and all but the gradients written.
    moved = 10 * (2048 * (32 * (block.training + block.forward) + head.training) + llama.parameters * (8 + 2 * 2.03))
    assert seconds["finetune"] == pytest.approx(flops["finetune"] / half + moved / bandwidth, rel=0.01)

    offloaded = phases_of(llama, published(offload="cpu"), gpu)
    brought = 2 * 32 * llama.block_parameters / (0.8e9 * link)
    assert offloaded["capture"].seconds - seconds["capture"] == pytest.approx(brought, rel=1e-3)
    assert offloaded["evaluate"].seconds - seconds["evaluate"] == pytest.approx(2 * brought, rel=1e-3)


def test_minutes_of_llama_7b_on_an_a100(llama):
    """By hand: 9.7 PFLOP at 13.65 TFLOP/s and 37 TB at 1.63 TB/s; 6.3 and 1.7 PFLOP at 218 TFLOP/s."""
    seconds = {name: phase.seconds for name, phase in phases_of(llama, published(train_steps=1000)).items()}
    assert seconds["solve"] == pytest.approx(711 + 22 + COMPILING, rel=0.02)
    assert seconds["capture"] == pytest.approx(28.9 + 7.7 + 7.2, rel=0.04)
    assert seconds["evaluate"] == pytest.approx(42.8 + 8.7, rel=0.04)
    # 0.112 PFLOP a step, which alone are 0.513 s, and 0.25 TB of activations and state.
    assert seconds["finetune"] == pytest.approx(513 + 155, rel=0.04)
    # In float32 nothing of it is in bfloat16 or TF32.
    single = {name: phase.seconds for name, phase in phases_of(llama, published(dtype="float32")).items()}
    assert single["capture"] == pytest.approx(7.99e15 / 13.65e12 + 11, rel=0.02)
    assert single["solve"] == seconds["solve"]


@pytest.mark.slow
def test_seconds_of_products_from_halves(llama):
    """Three of half precision for one of float32, or one until the last ten products; on a CPU as float32 ones."""
    device = SHEETS["h100-80gb"]
    for name, products in {"fp16x3": 3 * 133, "mixed": 121 + 3 * 12, "auto": 121 + 3 * 12}.items():
        config = MAIHTConfig(precision=name)
        phase = phases_of(llama, published(config=config), "h100-80gb")["solve"]
        moved = 32 * LINEARS * count_solver(PruningSpec.parse(config=config.on("cuda")), fused=True).moved
        assert phase.flops == pytest.approx(32 * products * PRODUCT, rel=1e-9)
        taken = phase.flops / device.flops_bf16 + moved / device.bandwidth + COMPILING
        assert phase.seconds == pytest.approx(taken, rel=1e-9)
    host = replace(device, host_link=float("inf"))
    (_, emulated, *_) = estimate(llama, published(config=config), host).phases
    assert emulated.flops == pytest.approx(32 * 133 * PRODUCT, rel=1e-9)  # where `auto` is float32
    (_, emulated, *_) = estimate(llama, published(config=MAIHTConfig(precision="mixed")), host).phases
    assert emulated.seconds > emulated.flops / host.flops_fp32


def test_inverses_are_mostly_products(llama):
    """Of halves where the solver's are, for every penalty and for the dense targets."""
    device, config = SHEETS["a100-80gb"], PRESETS["balanced"]
    found = phases_of(llama, Job(config=config))["solve"]
    inverses = [count_inverse(4096, "fp16x3")] * 3 + [count_inverse(11008, "fp16x3")]
    number = 32 * (splitting.levels(config.iterations) + 1)
    factorised = number * sum(each.plain for each in inverses)
    counts = count_solver(PruningSpec.parse(config=config.on("cuda")), fused=True)
    moved = 32 * LINEARS * counts.moved + number * sum(each.moved for each in inverses)
    halves = number * sum(each.halves for each in inverses) + 32 * 3 * (2 * (3 * 4096**3 + 11008**3) + PRODUCT)
    halves += 32 * counts.halves * PRODUCT / 2
    assert counts.products == 0
    assert found.flops == pytest.approx(factorised + halves, rel=1e-9)
    taken = factorised / device.flops_fp32 + halves / device.flops_bf16 + moved / device.bandwidth + COMPILING
    assert found.seconds == pytest.approx(taken, rel=1e-9)
    # Far less is factorised than would be otherwise.
    assert factorised < 0.02 * number * sum(count_inverse(size, "plain").plain for size in (4096, 4096, 4096, 11008))


def test_factorisations_are_in_float32_whatever_the_products_are_in(llama):
    device = SHEETS["a100-80gb"]
    config = replace(PRESETS["balanced"], precision="tf32")
    found = phases_of(llama, Job(config=config))["solve"]
    factorised = 32 * 2 * (splitting.levels(config.iterations) + 1) * (3 * 4096**3 + 11008**3)
    moved = 32 * LINEARS * count_solver(PruningSpec.parse(config=config), fused=True).moved
    expected = factorised / device.flops_fp32 + (found.flops - factorised) / device.flops_tf32 + COMPILING
    assert found.seconds == pytest.approx(expected + moved / device.bandwidth, rel=1e-6)


@pytest.mark.slow
def test_passes_are_fused_where_there_are_kernels(llama):
    """On GPUs, unless N of M are kept; what compiling takes is among the seconds."""
    device = SHEETS["h100-80gb"]

    def bytes_moved(device=device, **settings):
        job = published(config=MAIHTConfig(precision="float32"), **settings)
        found = next(phase for phase in estimate(llama, job, device).phases if phase.name == "solve")
        return (found.seconds - found.flops / device.flops_fp32) * device.bandwidth / 32 / LINEARS

    spec, fewest = PruningSpec.parse(config="paper"), COMPILING * device.bandwidth / 32 / LINEARS
    assert bytes_moved() == pytest.approx(count_solver(spec, fused=True).moved + fewest, rel=1e-6)
    two_of_four = PruningSpec.parse(config="paper", pattern="2:4")
    assert bytes_moved(pattern="2:4") == pytest.approx(count_solver(two_of_four).moved, rel=1e-6)
    host = replace(device, host_link=float("inf"))
    assert bytes_moved(host) == pytest.approx(count_solver(spec).moved, rel=1e-6)


def test_bytes_of_products_from_halves():
    """By hand, for a matrix (out, in): its rows' largest entries, a high and a low part, the sum scaled back.

    And the matrix itself once more, which is no longer there.
    """
    single, three, mixed = (
        count_solver(PruningSpec.parse(config=MAIHTConfig(precision=name, iterations=7, refine_iterations=5))).moved
        for name in ("float32", "fp16x3", "mixed")
    )
    one_half = 4 + (4 + 2) + 8 + 12
    # The high part is written twice, for which the matrix is read twice.
    three_halves = one_half + (4 + 2) + (4 + 2 + 2)
    # What is done for a row, for its power of two, is not nothing in the small layers that are counted.
    assert three - single == pytest.approx(22 * three_halves, rel=0.1)
    assert mixed - single == pytest.approx(14 * one_half + 8 * three_halves, rel=0.1)


@pytest.mark.slow
def test_memory_of_llama_7b(llama):
    """The largest terms by hand, in bytes: weights, gradients and 8-bit moments take 2 a weight each, and so on."""
    weights, libraries = 2 * 6_738_415_616, 2**29
    grams, largest, hidden = 3 * 4096**2 + 11008**2, 4096 * 11008, 2 * TOKENS * 4096
    found = estimate(llama, published(train_steps=1), SHEETS["a100-80gb"])
    peaks = {phase.name: phase.device_bytes for phase in found.phases}
    # Activations: the inputs of 32 blocks and all of one, about 24 tensors of the width and 4 of the MLP's; logits in
    # bfloat16 and float32, their loss and gradients.
    activations = 2048 * 2 * (32 * 4096 + 12 * 4096 + 4 * 11008) + 2048 * 32000 * 11
    assert peaks["finetune"] == pytest.approx(libraries + 3.016 * weights + activations, rel=0.01)
    # Sums in float64, a slice of a product in float32, and 8 windows in the MLP.
    batch = 8 * 2048 * 2 * (4 * 11008 + 4096)
    capture = 8 * grams + 4 * 1408 * 11008 + hidden + batch
    assert peaks["capture"] == pytest.approx(libraries + weights + capture, rel=0.01)
    # Gram matrices in float32, one of them scaled, and once more with the ridge; 11 matrices of the largest layer and
    # the block's pruned weights.
    solve = 4 * (grams + 2 * 11008**2) + 11 * 4 * largest + hidden
    assert peaks["solve"] == pytest.approx(libraries + weights + solve + 2 * LINEARS, rel=0.01)
    assert peaks["evaluate"] == pytest.approx(libraries + weights + 2048 * (96e3 + 2 * 32000) + 2**28, rel=0.01)
    assert found.disk_bytes == 2 * (llama.parameters + llama.prunable)

    offloaded = estimate(llama, published(offload="cpu"), SHEETS["rtx4090"])
    peaks = {phase.name: phase.device_bytes for phase in offloaded.phases}
    resident = 2 * (2 * HEAD + 2 * 202_383_360)  # embeddings, head and two blocks
    assert peaks["capture"] == pytest.approx(libraries + resident + capture, rel=0.01)
    assert peaks["solve"] == pytest.approx(libraries + resident + solve, rel=0.01)
    assert offloaded.host_bytes == pytest.approx(3 * GIB + weights, rel=1e-3)
    budget = estimate(llama, published(config=replace(SINGLE, memory_budget=2**28)), SHEETS["a100-80gb"])
    saved = 11 * 4 * largest - 2**28
    assert found.phases[2].device_bytes - budget.phases[1].device_bytes == pytest.approx(saved, rel=0.01)
    double = estimate(llama, published(config=MAIHTConfig(precision="float64")), SHEETS["a100-80gb"])
    more = double.phases[1].device_bytes - found.phases[2].device_bytes
    assert more == pytest.approx(4 * (grams + 2 * 11008**2) + 11 * 4 * largest, rel=0.01)
    # High and low parts of what the solver multiplies with, and the high ones once more: 6 bytes for 4.
    halves = estimate(llama, published(config=MAIHTConfig(precision="mixed")), SHEETS["a100-80gb"])
    more = halves.phases[1].device_bytes - found.phases[2].device_bytes
    assert more == pytest.approx(2 * 11008**2, rel=1e-6)


def test_what_does_not_fit_comes_with_advice(llama):
    job, small = published(train_steps=1, optimizer="adamw", batch_size=64), SHEETS["rtx4090"]
    found = {sentence.split()[0]: sentence for sentence in advise(llama, job, small, estimate(llama, job, small))}
    assert "several GPUs" in found["finetune"]
    assert "batch_size: 1" in found["capture"]
    large = SHEETS["a100-80gb"]
    job = published(train_steps=1, optimizer="adamw", gradient_checkpointing=False, train_batch_size=16)
    (advice,) = advise(llama, job, large, estimate(llama, job, large))
    assert "optimizer: adamw_8bit, gradient_checkpointing: true" in advice
    assert not advise(llama, published(train_steps=1), large, estimate(llama, published(train_steps=1), large))


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


@pytest.mark.parametrize("size", [3, 256, 257, 1500])
def test_half_of_a_gram_matrix_takes_as_many_operations_as_predicted(size):
    tokens, gram = torch.zeros(40, size), torch.zeros(size, size, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        add_gram(gram, tokens, torch.empty(slice_rows(size, gram.device) * size))
    assert gram_flops(size, 40, gram.device) == counter.get_total_flops()


def test_the_command_prints_and_writes(config, tmp_path, capsys):
    output = tmp_path / "found.json"
    options = ["--gpu", "a100-80gb", "--method", "wanda", "--train_steps", "10", "--output", str(output)]
    main(["estimate", "--model", str(config), *options])
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


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="compares with the CPU")
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs /proc of Linux")
def test_predicted_memory_is_that_of_a_real_model(smollm2_folder, tmp_path):
    """SmolLM2: each phase within 20 %. Its seconds are the machine's, and printed by the script only."""
    script, output = Path(__file__).parents[2] / "scripts" / "check_estimate.py", tmp_path / "found.json"
    run = [sys.executable, script, "--model", smollm2_folder, "--blocks", "5", "--json", output]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    found = json.loads(output.read_text())
    for phase in ("evaluate", "prune", "finetune"):
        predicted, measured = (found[kind][phase]["bytes"] for kind in ("predicted", "measured"))
        assert predicted == pytest.approx(measured, rel=0.2), phase


@pytest.mark.slow
def test_this_machine_is_measured():
    device = find_device("local", 64, 128)
    assert min(device.memory, device.flops_bf16, device.flops_fp32, device.bandwidth, device.bandwidth_uncached) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the CPU")
def test_speeds_are_operations_and_bytes_over_seconds(monkeypatch):
    """As if every call took half a second, except sums into fresh memory: a whole one."""
    works = []

    def seconds(place, work):
        works.append(work().dtype)
        return 1.0 if len(works) == 4 else 0.5

    monkeypatch.setattr("maiht_lightning.estimate.devices._seconds", seconds)
    device = find_device("local", 64, 128)
    assert works == [torch.float32, torch.bfloat16, torch.float32, torch.float32]
    assert device.flops_fp32 == device.flops_bf16 == 2 * 2048 * 64 * 128 / 0.5
    assert device.flops_tf32 == device.flops_fp32  # CPUs have none
    assert device.bandwidth == 3 * 4 * 2**24 / 0.5
    assert device.bandwidth_uncached == device.bandwidth / 2
    assert device.host_link == float("inf")
    assert device.is_host
    assert device.memory == psutil.virtual_memory().total


def test_seconds_are_those_of_one_call_in_the_middle(monkeypatch):
    """Of seven groups of three calls: a slow moment does not count, nor a fast one."""
    clock, calls = [0.0], []

    def work():
        calls.append(None)
        clock[0] += {0: 0.09, 6: 0.001}.get((len(calls) - 1) // 3, 0.02)

    monkeypatch.setattr("maiht_lightning.estimate.devices.time.perf_counter", lambda: clock[0])
    assert _seconds(torch.device("cpu"), work) == pytest.approx(0.02)
    assert len(calls) == 21


def test_work_that_takes_long_is_measured_less_often(monkeypatch):
    clock, calls = [0.0], []

    def work():
        calls.append(None)
        clock[0] += 0.15

    monkeypatch.setattr("maiht_lightning.estimate.devices.time.perf_counter", lambda: clock[0])
    assert _seconds(torch.device("cpu"), work) == pytest.approx(0.15)
    assert len(calls) == 9  # three groups are the first to take more than a second


@pytest.mark.slow
def test_a_run_with_a_logger_stands_beside_its_prediction(tiny_llama, tmp_path, text, monkeypatch):
    monkeypatch.setattr("maiht_lightning.callbacks.preparation.find_tokenizer", lambda *_: NoTokenizer())
    logger = CSVLogger(tmp_path)
    fit = trainer(MAIHTPruning(calibration=Windows(), output_dir=str(tmp_path / "run")), logger=logger)
    fit.fit(OwnModule(tiny_llama(vocab_size=64)))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert list(summary["predicted"]) == ["capture", "solve", "reconstruct"]
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
    (row,) = [row for row in rows if row.get("predicted/solve_seconds")]
    solve = summary["predicted"]["solve"]
    assert float(row["predicted/solve_seconds"]) == pytest.approx(solve["seconds"])
    assert float(row["tflops/solve"]) == pytest.approx(solve["flops"] / summary["seconds"]["solve"] / 1e12)


def test_models_that_cannot_be_estimated_are_no_error():
    sizes = {"samples": 4, "seqlen": 16, "batch_size": 2, "offload": "none"}
    assert predict_pruning(torch.nn.Linear(3, 3), PruningSpec.parse(config="paper"), **sizes) == {}
