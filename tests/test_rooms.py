"""The rule of rooms: what each part of the package may import, read from the source and not by importing it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "maiht_lightning"

# For each room the rooms that it may know; plain data and checks are known to all.
EVERYWHERE = {"records", "validation", "interrupts"}
KNOWS = {
    "records": set(),
    "validation": set(),
    "interrupts": set(),
    "distributed": set(),
    "solvers": set(),
    "models": set(),
    "data": set(),
    "capture": {"models", "solvers"},
    "pruning": {"capture", "data", "distributed", "models", "solvers"},
    "recovery": {"models"},
    "evaluation": {"capture", "data", "distributed", "models"},
    "reporting": {"models"},
    "estimate": {"capture", "models", "reporting", "solvers"},
    # A run with a logger stands beside what it should take.
    "callbacks": {
        "capture",
        "data",
        "distributed",
        "estimate",
        "evaluation",
        "models",
        "pruning",
        "recovery",
        "reporting",
        "solvers",
    },
}
KNOWS["training"] = KNOWS["callbacks"] | {"callbacks"}
KNOWS["command_line"] = KNOWS["training"] | {"training"}
KNOWS["commands"] = KNOWS["training"] | {"command_line"}
KNOWS["cli"] = {"command_line", "commands", "training"}

MAY_IMPORT_LIGHTNING = {"data/module.py", "reporting/loggers.py", "reporting/recorder.py", "reporting/wandb_rows.py"}
LIGHTNING_ROOMS = {"callbacks", "training", "command_line"}


def imports(path):
    """(module, whether it is ours) of every import in a file, also of those inside functions."""
    module = ["maiht_lightning", *path.relative_to(PACKAGE).with_suffix("").parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module[: -node.level] if node.level else []
            name = [*base, *(node.module.split(".") if node.module else [])]
            if len(name) == 1 and name[0] == "maiht_lightning":
                yield from (f"maiht_lightning.{alias.name}" for alias in node.names)
            else:
                yield ".".join(name)


def room(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_knows_only_what_stands_below_it(path):
    known = {name.split(".")[1] for name in imports(path) if name.startswith("maiht_lightning.")} - {"__version__"}
    assert known - {room(path)} - EVERYWHERE <= KNOWS[room(path)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_lightning_stays_above(path):
    if room(path) not in LIGHTNING_ROOMS and str(path.relative_to(PACKAGE)) not in MAY_IMPORT_LIGHTNING:
        assert not [name for name in imports(path) if name.split(".")[0] == "lightning"]


def test_the_rooms_are_all_there():
    assert {room(path) for path in FILES} == set(KNOWS)
    assert len([path for path in PACKAGE.glob("*.py") if path.name != "__init__.py"]) <= 6


def test_runs_are_compared_without_torch():
    program = """
import sys
from maiht_lightning.reporting.comparison import figure, rows, runs, table
sys.exit(any(name in sys.modules for name in ("torch", "transformers", "lightning")))
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
