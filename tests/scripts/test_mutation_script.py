"""`scripts/mutation_test.py` on a tree of its own: what becomes of each kind of mutation, and of the tree."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.small_texts import load_script

SCRIPT = Path(__file__).parents[2] / "scripts" / "mutation_test.py"

CODE = """\
def add(a, b):
    return a + b


def double(a):
    return 2 * a


def unused(a):
    return a
"""

# The second test asks a process of its own, which must import the broken copy as well.
TESTS = """\
import subprocess
import sys

import pytest

from toy import add


def test_add():
    assert add(1, 2) == 3


def test_double():
    code = "import toy; assert toy.double(3) == 6"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skip
def test_skipped():
    assert add(1, 2) == 3
"""

#   id          old             new                    tests                          what must become of it
KINDS = [
    ("killed", "return 2 * a", "return 3 * a", "tests/test_toy.py -k double", "killed"),
    ("survived", "return 2 * a", "return 3 * a", "tests/test_toy.py -k add", "survived"),
    ("stale", "return a", "return 0", "tests/test_toy.py", "stale"),
    ("endless", "return 2 * a", "while True: pass", "tests/test_toy.py -k double", "timed out"),
    ("syntax", "return a + b", "return a +", "tests/test_toy.py", "error"),
    ("import", "def add(a", "def sub(a", "tests/test_toy.py", "error"),
    ("name", "return a + b", "return a + c", "tests/test_toy.py -k add", "error"),
    ("skipped", "return a + b", "return a - b", "tests/test_toy.py -k skipped", "error"),
    ("no-test", "return a + b", "return a - b", "tests/test_toy.py -k nothing", "error"),
]


@pytest.fixture
def tree(tmp_path):
    """A git repository with a package, its tests, the script and a list of mutations; nothing is committed."""
    root = tmp_path / "toy"
    for folder in ("src/toy", "tests", "scripts/mutations"):
        (root / folder).mkdir(parents=True)
    shutil.copy(SCRIPT, root / "scripts")
    (root / "src/toy/__init__.py").write_text(CODE)
    (root / "tests/test_toy.py").write_text(TESTS)
    keys = ("id", "old", "new", "tests")
    entries = [{"file": "src/toy/__init__.py", **dict(zip(keys, kind, strict=False))} for kind in KINDS]
    lines = ["\n".join(["[[mutation]]", *(f"{key} = {value!r}" for key, value in e.items())]) for e in entries]
    (root / "scripts/mutations/toy.toml").write_text("\n\n".join(lines))
    subprocess.run(["git", "init", "-q", root], check=True)
    return root


def run(tree, *options):
    """The exit code, and what became of each mutation."""
    command = [sys.executable, "scripts/mutation_test.py", "--json", "results.json", *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # half the time
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    results = json.loads((tree / "results.json").read_text())
    return done.returncode, {result["id"]: result["status"] for result in results}


def test_killed_mutations_end_well(tree):
    assert run(tree, "--only", "kill*") == (0, {"killed": "killed"})
    assert (tree / "src/toy/__init__.py").read_text() == CODE


@pytest.mark.slow
def test_what_becomes_of_each_mutation(tree):
    expected = {kind[0]: kind[-1] for kind in KINDS if kind[0] != "endless"}
    assert run(tree, "--jobs", "2", "--only", *expected) == (1, expected)


@pytest.mark.slow
def test_tests_that_do_not_end_are_stopped(tree):
    assert run(tree, "--only", "endless", "--timeout", "2") == (1, {"endless": "timed out"})


@pytest.mark.slow
def test_tests_that_fail_unbroken_kill_nothing(tree):
    (tree / "tests/test_toy.py").write_text(TESTS.replace("== 6", "== 7"))
    assert run(tree, "--only", "killed") == (0, {"killed": "killed"})
    assert run(tree, "--only", "killed", "--check-baseline") == (1, {"unbroken": "error"})


def test_the_lists_fit_the_code(monkeypatch):
    """Ids are unique, and each text to be broken is found once."""
    script = load_script("mutation_test", monkeypatch)
    for mutation in script.load_mutations(sorted((SCRIPT.parent / "mutations").glob("*.toml")), []):
        source = (SCRIPT.parents[1] / mutation.file).read_text()
        assert source.count(mutation.old) == 1, mutation
        assert mutation.new != mutation.old, mutation
