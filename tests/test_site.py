"""The documentation's site: it builds, what it takes from the code is the code's, and its scripts do what they say."""

import ast
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import yaml

import maiht_lightning
from helpers import oracle
from helpers.small_texts import load_script
from maiht_lightning.command_line.catalog import COMMANDS, group_help

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def hooks():
    spec = spec_from_file_location("docs_hooks", ROOT / "scripts" / "docs_hooks.py")
    module = module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


# ---- The site


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    if find_spec("mkdocs") is None or find_spec("material") is None or find_spec("mkdocstrings") is None:
        pytest.skip("the extra docs is not installed")
    site = tmp_path / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", site],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    settings = (site / "reference" / "settings.html").read_text()
    # Every setting stands in a list of arguments, with what the docstring says of it.
    for setting in ("prune_at", "reconstruction_epochs", "max_windows", "sampling", "gradient_checkpointing", "warmup"):
        assert f"<code>{setting}" in settings, setting
    assert "Fraction of zeros, in [0, 1)" in settings
    assert "usage: maiht COMMAND" in (site / "reference" / "command-line.html").read_text()
    assert "Adding a solver" in (site / "contributing.html").read_text()
    # Nothing is fetched from elsewhere by who reads it.
    for page in site.rglob("*.html"):
        for address in re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)', page.read_text()):
            pytest.fail(f"{page.name} loads {address}")


def pages_in(entries):
    for entry in entries:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            yield from pages_in(value) if isinstance(value, list) else [value]


def test_the_navigation_has_every_page_once():
    settings = yaml.safe_load(re.sub(r"!!\S+", "", (ROOT / "mkdocs.yml").read_text()))
    there = sorted([*(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")), "contributing.md"])
    assert sorted(pages_in(settings["nav"])) == there


def test_the_hooks_make_pages_of_the_repositorys_files():
    made = hooks()
    page = made.on_page_markdown((DOCS / "reference" / "command-line.md").read_text(), page=None)
    assert group_help() in page
    for name, command in COMMANDS.items():
        assert command.example in page, name
    assert "<!-- help" not in page
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", made.contributing()):
        assert (DOCS / link).exists(), link


@pytest.mark.parametrize("page", ["slurm.md", "sweeps.md"])
def test_the_hooks_show_the_files_that_a_page_names(page):
    text = (DOCS / "guides" / page).read_text()
    (named,) = re.findall(r"<!-- file (\S+) -->", text)
    shown = hooks().on_page_markdown(text, page=None)
    assert "<!-- file" not in shown
    content = (DOCS / named).read_text().strip()
    assert f"```{named.rpartition('.')[2]}\n{content}\n```" in shown


def test_the_hooks_load_nothing_heavy():
    """The site is built where there is no torch."""
    program = (
        "import runpy, sys; runpy.run_path('scripts/docs_hooks.py'); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'lightning', 'transformers', 'jsonargparse')))"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


def test_every_public_name_has_its_documentation():
    text = (DOCS / "reference" / "api.md").read_text() + (DOCS / "reference" / "settings.md").read_text()
    documented = re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)
    assert len(documented) == len(set(documented))
    names = {path.rpartition(".")[2] for path in documented}
    assert set(maiht_lightning.__all__) <= names


# ---- Troubleshooting


def templates():
    """The strings of the sources, with … for what is filled in."""
    found = []
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(p.value if isinstance(p, ast.Constant) else "…" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_messages_are_those_of_the_code():
    messages = re.findall(r"^### `(.+)`$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(messages) > 20
    known = templates()
    for message in messages:
        if message == "CUDA out of memory":  # PyTorch's own
            continue
        wanted = message.removeprefix("… ").removesuffix("…").strip()
        assert any(wanted in template for template in known), message


# ---- Figures


@pytest.mark.slow
def test_the_figures_of_layers_are_what_the_code_computes(tmp_path, monkeypatch):
    from PIL import Image

    script = load_script("draw_layers", monkeypatch)
    if not oracle.FOLDER.is_dir():
        pytest.skip(oracle.MISSING)
    layers = script.load_layers(oracle.FOLDER)

    def drawn(name):
        with Image.open(DOCS / "figures" / f"{name}.png") as image:
            return json.loads(image.text["results"])

    errors = script.draw_methods(layers)[1]
    for layer, found in drawn("methods").items():
        assert found == pytest.approx(errors[layer], rel=1e-3)
        # What the page says beside the figure.
        assert max(found[m] for m in ("sparsegpt", "admm", "maiht")) < min(found[m] for m in ("magnitude", "wanda"))
    courses = script.draw_objective(layers)[1]
    for layer, course in drawn("objective").items():
        assert course == pytest.approx(courses[layer], rel=1e-2)
        assert course[0] < 0.05 * course[-1]
        refined = course[script.CONFIG.iterations :]
        assert refined[-1] <= refined[0]
    assert drawn("supports") == pytest.approx(script.draw_supports(layers)[1], rel=0.02)
