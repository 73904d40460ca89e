"""Break the code in known ways, one at a time, and see that a test fails each time.

    python scripts/mutation_test.py                       # all of scripts/mutations/*.toml
    python scripts/mutation_test.py --file solvers.toml --only 'maiht-*' --check-baseline

A mutation names a text of one file, what to put in its place, and the tests that must then fail. It is made in a
temporary copy of the working tree, never in the tree itself. What can become of it:

- killed: a test failed, as it should;
- survived: all of them passed, so nothing tests what was broken;
- stale: the text is not found exactly once in the file any more;
- timed out: the tests did not end in time, which may be the mutation's doing or a busy machine's;
- error: nothing can be said, because the broken file is no valid Python, no test ran, or they fail unbroken too.

The exit code is 0 if all mutations were killed, otherwise 1.
"""

import argparse
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from queue import SimpleQueue

from rich.console import Console
from rich.markup import escape
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
STYLES = {"killed": "green", "survived": "bold red"}
# A mutation that raises one of these is a slip of whoever wrote it, and any test would notice.
BROKEN_CODE = ("SyntaxError", "IndentationError", "NameError", "UnboundLocalError", "ImportError", "ModuleNotFound")
# Importing these takes most of a short test's time. Where the package uses them they are imported once, by a process
# that is forked for each mutation. Nothing of the package itself is.
SLOW_IMPORTS = ("torch", "torchmetrics", "lightning.pytorch", "transformers.models.llama.modeling_llama")
FORKS = multiprocessing.get_context("forkserver")
RUNNING: set[ForkServerProcess] = set()


@dataclass(frozen=True)
class Mutation:
    """One way to break the code: `old` becomes `new` in `file`, and `tests` (arguments of pytest) must fail."""

    id: str
    file: str
    old: str
    new: str
    tests: str


@dataclass(frozen=True)
class Result:
    """What became of a mutation; `detail` is the first failure, or why there is none."""

    id: str
    status: str
    seconds: float
    tests: str
    detail: str


def load_mutations(files: list[Path], patterns: list[str]) -> list[Mutation]:
    """The mutations of all files whose id matches one of the patterns (all of them without patterns)."""
    found: dict[str, Mutation] = {}
    for file in files:
        for entry in tomllib.loads(file.read_text()).get("mutation", []):
            try:
                mutation = Mutation(**entry)
            except TypeError as error:
                sys.exit(f"{file}: a mutation must have id, file, old, new and tests, but found {entry}: {error}")
            if mutation.id in found:
                sys.exit(f"{file}: ids must be unique, but found `{mutation.id}` twice: rename one")
            found[mutation.id] = mutation
    return [m for m in found.values() if not patterns or any(fnmatch(m.id, pattern) for pattern in patterns)]


def copy_tree(target: Path) -> Path:
    """Copy the files that git tracks or would track, with all changes."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():  # a file may be deleted, but not yet for git
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def set_environment() -> None:
    """Set the variables that tests inherit, and what is imported once for all of them."""
    given = {name: str(Path(value).resolve()) for name, value in os.environ.items() if fnmatch(name, "MAIHT_*_DIR")}
    # As tests/conftest.py does, but before the slow imports.
    defaults = {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000", "HF_HUB_OFFLINE": "1"}
    # No bytecode: a file that is broken and mended within a second would be taken for unchanged by its size and time.
    os.environ.update({**defaults, **os.environ, **given, "PYTHONDONTWRITEBYTECODE": "1"})
    sources = "".join(path.read_text() for path in ROOT.glob("src/**/*.py"))
    used = [name for name in SLOW_IMPORTS if re.search(rf"\b(import|from) {name.partition('.')[0]}\b", sources)]
    FORKS.set_forkserver_preload(used)


def run_pytest(tree: Path, tests: list[str], output: Path) -> None:
    """In a process of its own: run pytest, which imports packages from the copy, as do the processes it starts."""
    os.setsid()
    os.chdir(tree)
    written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(written, 1)
    os.dup2(written, 2)
    os.environ["PYTHONPATH"] = str(tree / "src")
    sys.path[:0] = [str(tree / "src"), str(tree)]
    sys.argv = ["pytest", *tests]
    import pytest

    for package in (path.parent.name for path in tree.glob("src/*/__init__.py")):
        # Here, and in a process that tests start: an installed package may win by its place or by an import hook.
        ask = f"import importlib.util; print(importlib.util.find_spec({package!r}).origin)"
        spec = importlib.util.find_spec(package)
        for found in (spec and spec.origin, subprocess.check_output([sys.executable, "-c", ask], text=True).strip()):
            if not found or not Path(found).is_relative_to(tree) or package in sys.modules:
                sys.exit(f"`{package}` must be imported from the copy {tree}, but found {found}: uninstall it")
    sys.exit(pytest.main(tests))


def run_tests(tree: Path, tests: str, limit: float) -> tuple[str, str]:
    """Run the tests in a copy: "passed", "failed", "timed out" or "error", and a line that says more."""
    report, output = tree.with_suffix(".xml"), tree.with_suffix(".txt")
    report.unlink(missing_ok=True)
    options = ["-x", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *shlex.split(tests)]
    process = FORKS.Process(target=run_pytest, args=(tree, options, output))
    process.start()
    RUNNING.add(process)
    process.join(limit)
    RUNNING.discard(process)
    code = process.exitcode
    kill(process)
    if code is None:
        return "timed out", f"after {limit:.0f} s"
    if code not in (0, 1) or not report.exists():
        last = (output.read_text().strip().splitlines() or [""])[-1]
        return "error", f"pytest ended with {code}: {last}"
    cases = list(ET.parse(report).iter("testcase"))
    failures = [found for case in cases for found in (*case.iter("failure"), *case.iter("error"))]
    messages = [(failure.get("message") or "").split("\n")[0] for failure in failures]
    if code == 0:
        skipped = all(case.find("skipped") is not None for case in cases)
        return ("error", "all tests were skipped") if skipped else ("passed", f"{len(cases)} tests passed")
    # The message of a test that fails is "NameError: ..."; that of a fixture 'failed on setup with "NameError: ..."'.
    broken = any(part.startswith(BROKEN_CODE) for message in messages for part in message.split('"'))
    collected = not any(message == "collection failure" for message in messages)
    return ("failed" if messages and collected and not broken else "error"), " | ".join(messages)


def kill(process: ForkServerProcess) -> None:
    """End a process and those that it started."""
    assert process.pid is not None
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def try_mutation(tree: Path, mutation: Mutation, limit: float) -> tuple[str, str]:
    """Break the copy, run the tests and mend it again; what became of the mutation, and a line that says more."""
    file = tree / mutation.file
    source = file.read_text() if file.is_file() else ""
    if source.count(mutation.old) != 1:
        return "stale", f"`old` must occur once in {mutation.file}, but found it {source.count(mutation.old)} times"
    broken = source.replace(mutation.old, mutation.new)
    if file.suffix == ".py":
        try:
            compile(broken, mutation.file, "exec")
        except SyntaxError as error:
            return "error", f"the broken file is no valid Python: {error}"
    try:
        file.write_text(broken)
        status, detail = run_tests(tree, mutation.tests, limit)
    finally:
        file.write_text(source)
    return {"failed": "killed", "passed": "survived"}.get(status, status), detail


def try_all(mutations: list[Mutation], jobs: int, limit: float, baseline: bool) -> Iterator[Result]:
    """Test the mutations in as many copies of the tree as there are jobs; yields each result when it is there."""
    with tempfile.TemporaryDirectory(prefix="mutations-", ignore_cleanup_errors=True) as folder:
        (Path(folder) / "shared").symlink_to(ROOT.parent / "shared")  # where the tests look for data by default
        trees: SimpleQueue[Path] = SimpleQueue()
        for job in range(jobs):
            trees.put(copy_tree(Path(folder).resolve() / f"tree{job}"))

        def work(id: str, tests: str, mutation: Mutation | None = None) -> Result:
            tree, start = trees.get(), time.monotonic()
            try:
                found = try_mutation(tree, mutation, limit) if mutation else run_tests(tree, tests, limit)
            finally:
                trees.put(tree)
            return Result(id, found[0], time.monotonic() - start, tests, found[1])

        pool = ThreadPoolExecutor(jobs)
        try:
            unbroken = sorted({m.tests for m in mutations}) if baseline else []
            failing = set()
            for result in pool.map(lambda tests: work("unbroken", tests), unbroken):
                if result.status == "passed":
                    yield result
                else:
                    failing.add(result.tests)
                    yield dataclasses.replace(result, status="error", detail=f"{result.status}: {result.detail}")
            todo = [m for m in mutations if m.tests not in failing]
            for future in as_completed([pool.submit(work, m.id, m.tests, m) for m in todo]):
                yield future.result()
        finally:  # when interrupted as well: nothing outlives this program, and no thread writes into a deleted copy
            pool.shutdown(wait=False, cancel_futures=True)
            for process in tuple(RUNNING):
                kill(process)
            pool.shutdown()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="ID", help="ids or patterns such as 'maiht-*'")
    parser.add_argument(
        "--file", nargs="+", type=Path, default=[], metavar="NAME", help="files of scripts/mutations, or paths"
    )
    parser.add_argument("--check-baseline", action="store_true", help="run the unbroken tests first")
    parser.add_argument("--jobs", type=int, default=1, help="mutations at a time (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="list the mutations and end")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file as well")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    folder = ROOT / "scripts" / "mutations"
    files = [path if path.is_file() else folder / path for path in args.file] or sorted(folder.glob("*.toml"))
    mutations = load_mutations(files, args.only)
    console = Console(highlight=False, soft_wrap=True)
    if args.list:
        for mutation in mutations:
            console.print(f"{mutation.id}: {mutation.file}, {mutation.tests}", markup=False)
        return 0
    if not mutations:
        sys.exit("no mutation has one of these ids: see --list")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that an ended program cleans up
    set_environment()
    start = time.monotonic()
    results = []
    for result in try_all(mutations, args.jobs, args.timeout, args.check_baseline):
        results.append(result)
        style = STYLES.get(result.status, "yellow" if result.status != "passed" else "dim")
        console.print(f"[{style}]{result.status:9}[/] {result.seconds:6.1f} s  {result.id}")
    if args.json:
        args.json.write_text(json.dumps([dataclasses.asdict(result) for result in results], indent=2) + "\n")
    bad = [result for result in results if result.status not in ("killed", "passed")]
    if bad:
        table = Table("mutation", "became", "tests", "why", title="Not killed")
        for result in bad:
            table.add_row(result.id, result.status, escape(result.tests), escape(result.detail))
        console.print(table, soft_wrap=False)
    killed = sum(result.status == "killed" for result in results)
    console.print(f"{killed} of {len(mutations)} mutations killed in {time.monotonic() - start:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
