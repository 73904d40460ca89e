"""Triton kernels where there is no GPU: by Triton's interpreter, and compiled for GPUs that are elsewhere."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers.problems import make_problem
from maiht_lightning import prune_layer
from maiht_lightning.solvers import resolve_config
from maiht_lightning.solvers.fusing import run_by

pytestmark = pytest.mark.slow
triton = pytest.importorskip("triton", reason="Triton is not installed: the extra `dev` has it on Linux")
HERE = Path(__file__).parent


def test_kernels_do_what_their_passes_do():
    """In a process of its own: whether Triton interprets is settled when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "kernels_interpreted.py")]
    variables = {**os.environ, "TRITON_INTERPRET": "1"}
    found = subprocess.run(command, cwd=HERE.parents[1], env=variables, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-6000:]
    assert "skipped" not in found.stdout


@pytest.mark.parametrize(
    ("preset", "precision", "capability"), [("paper", "float32", 80), ("paper", "mixed", 90), ("balanced", "mixed", 80)]
)
def test_kernels_compile_for_gpus(monkeypatch, preset, precision, capability):
    """Every kernel that a layer takes, with the arguments that it gets, to machine code."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    from maiht_lightning.solvers import kernels

    kinds = {torch.float32: "*fp32", torch.float16: "*fp16", torch.int32: "*i32", torch.bool: "*i1"}
    compiled = {}

    def launch(kernel, *args, grid, warmup, num_warps, **constants):
        given = dict(zip(kernel.arg_names, args, strict=False))
        kind = {
            name: kinds[value.dtype] if isinstance(value, torch.Tensor) else {int: "i32", float: "fp32"}[type(value)]
            for name, value in given.items()
        }
        key = kernel.__name__, *kind.values(), *constants.values()
        if key not in compiled:
            signature = kind | dict.fromkeys(constants, "constexpr")
            places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
            source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, places)
            target = GPUTarget("cuda", capability, 32)
            compiled[key] = triton.compile(source, target=target, options={"num_warps": num_warps}).asm["cubin"]

    monkeypatch.setattr(JITFunction, "run", launch)

    def compiled_only(function, scratch, *args):
        getattr(kernels, function.__name__)(*args)
        return function(*args, scratch=scratch)

    weight, gram = (tensor.float() for tensor in make_problem(7, 24, 1100, spread=1.5))
    config = replace(resolve_config(preset), precision=precision, iterations=7, refine_iterations=11)
    with run_by(compiled_only):
        prune_layer(weight, gram, config=config)
    names = {key[0] for key in compiled}
    assert names >= ({"_threshold", "_descend"} if preset == "paper" else {"_combine", "_separate", "_curve", "_move"})
    assert "_compare" in names
    assert all(compiled.values())
