"""The examples that nothing else runs."""

import base64
import importlib.util
import json
import os
import re
import subprocess
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from transformers import AutoModelForCausalLM

from helpers.byte_model import save_folder
from helpers.warm import python
from maiht_lightning import count_zeros

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs" / "examples"
OWN_DATA = EXAMPLES / "own_data.py"


def run_example(name, folder, *options):
    """Run a script as who copied it does, in a folder and without a network; returns what it printed."""
    done = subprocess.run(
        [*python(), EXAMPLES / name, *map(str, options)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "MAIHT_DATA_DIR": "/absent"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_somebodys_module_on_their_own_data(tmp_path):
    printed = run_example("own_data.py", tmp_path, "--output", "run", "--epochs", "1")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["measured_sparsity"] == 0.5
    assert summary["failures"] == []
    assert list(summary["stages"]) == ["dense", "pruned"]
    for stage in summary["stages"].values():
        assert 1 < stage["perplexity"]["held out"] < 256
        assert 0 <= stage["metrics"]["bytes foreseen"] <= 1
    assert "bytes foreseen" in printed
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")


def test_four_lines_are_added_and_the_rest_knows_nothing_of_them():
    lines = OWN_DATA.read_text().splitlines()
    added = [line for line in lines if line.endswith("# added")]
    rest = "\n".join(line for line in lines if not line.endswith("# added"))
    assert len(added) == 4
    compile(rest, OWN_DATA.name, "exec")
    words = set(re.findall(r"\w+", rest.split('"""', 2)[2]))
    assert "Trainer" in words
    assert not {"maiht_lightning", "MAIHTPruning", "Evaluation", "measures"} & words


@pytest.mark.slow
def test_a_loop_of_ones_own_keeps_the_zeros(tmp_path):
    """With Fabric, whose optimizer and module are wrapped; weight decay and momentum would move the zeros."""
    dense = save_folder(tmp_path / "dense")
    options = ["--model", dense, "--output", "recovered", "--samples", "8", "--seqlen", "32", "--sparsity", "0.6"]
    printed = run_example("fabric_loop.py", tmp_path, *options, "--epochs", "3", "--learning_rate", "1e-2")
    losses = [float(loss) for loss in re.findall(r"epoch \d: loss ([\d.]+)", printed)]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    recovered, before = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("recovered", "dense"))
    layers = count_zeros(recovered)
    asked = 0.6 * sum(layer.size for layer in layers)
    # Each layer's number is rounded down.
    assert asked - len(layers) <= sum(layer.zeros for layer in layers) <= asked
    # Trained, kept weights are others, in layers and beside them.
    for name, weight in recovered.named_parameters():
        assert not torch.equal(weight, before.get_parameter(name)), name
    (found,) = re.findall(r"before the training ([\d.]+)%, after it ([\d.]+)%", printed)
    assert found[0] == found[1]


# ---- Notebooks

NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
PNG = b"\x89PNG\r\n"


def run_notebook(name, folder, monkeypatch, **parameters):
    """Run a notebook in a folder, without a network and with other parameters than its own; returns what it shows.

    As papermill does it, a cell after the one tagged `parameters` sets them anew.

    Returns:
        The text that was printed, and the number of figures.
    """
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    (place,) = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    own = {}
    exec(notebook.cells[place].source, own)
    assert parameters.keys() <= own.keys()
    lines = [f"{parameter} = {value!r}" for parameter, value in parameters.items()]
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell("\n".join(lines)))
    for variable, value in {
        "PYTHONPATH": str(ROOT / "src"),
        "HF_HUB_OFFLINE": "1",
        "MAIHT_DATA_DIR": "/absent",
    }.items():
        monkeypatch.setenv(variable, value)
    # Jupyter chooses how figures are shown.
    monkeypatch.delenv("MPLBACKEND", raising=False)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=None, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    figures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert all(base64.b64decode(figure).startswith(PNG) for figure in figures)
    return "".join(output.text for output in outputs if output.get("name") == "stdout"), len(figures)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_kept_without_what_they_showed(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", cell.source if cell.cell_type == "markdown" else ""):
            assert (EXAMPLES / link).exists(), link


def numbers_by_name(printed, pattern):
    return {name.strip(): float(number) for name, number in re.findall(pattern, printed, re.MULTILINE)}


@pytest.mark.slow
def test_the_notebook_of_one_layer(smollm2_folder, tmp_path, monkeypatch):
    """On the real model, with a sixth of the text."""
    printed, figures = run_notebook(
        "one_layer.ipynb", tmp_path, monkeypatch, model_name=str(smollm2_folder), samples=5, sparsity=0.6
    )
    assert figures == 4
    assert "weight (192, 576), inputs (1280, 576), Gram matrix (576, 576)" in printed
    errors = numbers_by_name(printed, r"^([A-Z]?[a-zA-Z, -]{1,16}?) +(\d\.\d{5})  ")
    assert list(errors) == ["magnitude", "Wanda", "SparseGPT", "ADMM-Grad", "mAIHT, paper", "mAIHT, balanced"]
    # By the definition, which the notebook computes, not by what the solvers say of themselves.
    assert errors["mAIHT, balanced"] < errors["SparseGPT"] < errors["Wanda"] < errors["magnitude"] < 1
    zeros = {int(each.replace(",", "")) for each in re.findall(r"([\d,]+) zeros", printed)}
    # floor(0.6 · 192 · 576), and for Wanda floor(0.6 · 576) in each of 192 rows.
    assert zeros == {66355, 66240}
    variants = numbers_by_name(printed, r"^(maiht|aiht|iht) +(\d\.\d{5})$")
    assert variants["maiht"] == errors["mAIHT, paper"] < variants["iht"]
    (taken,) = re.findall(r"in (\d+)% of 50 iterations", printed)
    assert 0 < int(taken) < 100
    shared = numbers_by_name(printed, r"^(.+?) +([\d.]+)%$")
    assert shared["mAIHT, paper"] == 100 > shared["ADMM-Grad"] > shared["mAIHT, 2:4"]


@pytest.mark.slow
def test_the_quickstart_as_a_notebook(tmp_path, monkeypatch):
    model = save_folder(tmp_path / "small")
    printed, figures = run_notebook(
        "quickstart.ipynb", tmp_path, monkeypatch, model_name=str(model), steps=2, samples=4, seqlen=64, sparsity=0.6
    )
    summary = json.loads((tmp_path / "runs" / "notebook" / "summary.json").read_text())
    assert summary["failures"] == []
    assert figures == len(list((tmp_path / "runs" / "notebook" / "figures").glob("*.png"))) > 0
    for stage in ("dense", "pruned"):
        assert f"{stage:10} perplexity {summary['stages'][stage]['perplexity']['python_docs']:.2f}" in printed
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "notebook" / "model")
    assert f"{sum(layer.zeros for layer in count_zeros(pruned))} zeros" in printed
    assert 0.59 < summary["measured_sparsity"] <= 0.6
    assert f"{summary['measured_sparsity']:.2%} of the weights are 0" in printed
    assert "A Python dictionary is" in printed


@pytest.fixture
def first_cell(tmp_path, monkeypatch):
    """Runs the quickstart's first cell of code in an empty folder; returns the commands that it starts."""
    cell = next(c for c in nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4).cells if c.cell_type == "code")
    monkeypatch.chdir(tmp_path)
    started = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: started.append(command))

    def run():
        exec(cell.source, {})
        return started

    return run


def test_the_notebook_installs_nothing_where_the_package_is(first_cell):
    assert first_cell() == []


def test_the_notebook_installs_the_package_where_it_is_missing(first_cell, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", {}.get)
    with pytest.raises(FileNotFoundError, match="upload one"):
        first_cell()
    (tmp_path / "maiht_lightning-0.1.0-py3-none-any.whl").touch()
    (command,) = first_cell()
    assert command[1:4] == ["-m", "pip", "install"]
    assert command[-1] == "maiht_lightning-0.1.0-py3-none-any.whl"
