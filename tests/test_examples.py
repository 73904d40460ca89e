"""The examples that nothing else runs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[1]
OWN_DATA = ROOT / "docs" / "examples" / "own_data.py"


@pytest.mark.slow
def test_somebodys_module_on_their_own_data(tmp_path):
    done = subprocess.run(
        [sys.executable, OWN_DATA, "--output", "run", "--epochs", "1"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "MAIHT_DATA_DIR": "/absent"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["measured_sparsity"] == 0.5
    assert summary["failures"] == []
    assert list(summary["stages"]) == ["dense", "pruned"]
    for stage in summary["stages"].values():
        assert 1 < stage["perplexity"]["held out"] < 256
        assert 0 <= stage["metrics"]["bytes foreseen"] <= 1
    assert "bytes foreseen" in done.stdout
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
