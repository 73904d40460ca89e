"""`maiht doctor`: whether pruning can work here, and what is missing for what."""

import argparse
import json
import shutil
import sys
import textwrap
from typing import Any, NoReturn

from .environment_checks import caches, data_folder, devices, disk, features, packages, try_pruning
from .messages import explain
from .network_checks import reachable


class _Parser(argparse.ArgumentParser):
    """The standard library's: the doctor is asked where others cannot be imported."""

    def error(self, message: str) -> NoReturn:
        print(f"maiht: error: {explain(message, self)}\nmaiht doctor --help shows its settings.", file=sys.stderr)
        sys.exit(2)


def doctor(args: list[str]) -> int:
    """Look at everything and print it; returns the exit status, 0 if pruning can work and 1 if not."""
    parser = _Parser(prog="maiht doctor", add_help=False, allow_abbrev=False)
    parser.add_argument("--help_all", action="help", help="Show every setting and exit.")
    parser.add_argument("--json", action="store_true", help="Print JSON, for scripts and bug reports.")
    settings = parser.parse_args(args)
    found = examine()
    if settings.json:
        print(json.dumps(found, indent=2))
    else:
        _show(found)
    return 0 if found["pruning_works"] else 1


def examine() -> dict[str, Any]:
    """All that `maiht doctor` knows, ready for JSON."""
    problems: list[dict[str, str]] = []
    needed, missing = packages()
    problems += missing
    network = reachable()
    found: dict[str, str] = {}
    try:
        found = devices()
        try_pruning()
    except Exception as error:
        # Whatever it is, from a broken library to an unknown processor: it is what a bug report needs.
        problems.append({"what": f"a small layer cannot be pruned: {type(error).__name__}: {error}", "do": REINSTALL})
    return {
        "pruning_works": not problems,
        "problems": problems,
        "versions": needed,
        "devices": found,
        "disk": disk(),
        "caches": caches(),
        "data": data_folder(),
        "network": network,
        "features": features(),
    }


REINSTALL = "pip install --force-reinstall torch lightning transformers maiht-lightning"


def _show(found: dict[str, Any]) -> None:
    sections = [found[name] for name in ("versions", "devices", "disk", "caches", "data", "network")]
    sections.append({f["feature"]: "ready" if f["ready"] else f"missing; {f['do']}" for f in found["features"]})
    indent = max(len(name) for section in sections for name in section) + 2
    columns = max(60, shutil.get_terminal_size().columns) if sys.stdout.isatty() else 10**4
    for section in filter(None, sections):
        for name, value in section.items():
            print(textwrap.fill(value, columns, initial_indent=f"{name:<{indent}}", subsequent_indent=" " * indent))
        print()
    for problem in found["problems"]:
        print(f"Problem: {problem['what']}\n  {problem['do']}")
    print("Pruning can work here." if found["pruning_works"] else "Pruning cannot work here: see the problems.")
