"""Check on a GPU, within ten minutes, what is said and predicted of GPUs.

    python scripts/gpu_check.py --output gpu_check.json
    python scripts/gpu_check.py --device cpu --small        # rehearses all parts with tiny shapes

The parts are tests marked `gpu`, every precision beside float32, and the pruning of LLaMA-7B's shape with random
weights, phase by phase beside what `maiht estimate` says. Each runs in a process of its own: one that fails, hangs or
takes longer than its share of the time is ended, and the others run all the same. It ends with a table and a line
on what fell short, and then its exit code is 1.
"""

import os

# Before torch is loaded: OpenMP's threads wait at barriers by spinning, beside other work for whole time slices.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from gpu_parts import PARTS, Part, Row, Setting, Skipped
from maiht_lightning.reporting.environment import environment


@dataclass
class Outcome:
    """What became of a part.

    Args:
        part: Its name.
        seconds: How long it took.
        failure: Why it did not come to its end; empty if it did.
        skipped: Why it was not done; empty if it was.
        rows: What it has found, also if it was ended.
    """

    part: str
    seconds: float = 0.0
    failure: str = ""
    skipped: str = ""
    rows: list[Row] = field(default_factory=list)

    @property
    def shortcomings(self) -> list[str]:
        """What fell short, in words."""
        found = [f"{self.part}: {row.what}" for row in self.rows if row.fell_short]
        return [*found, *([f"{self.part} ({self.failure})"] if self.failure else [])]

    @property
    def omissions(self) -> list[str]:
        """What was not looked at, and why."""
        found = [f"{self.part}: {row.what} ({row.note})" for row in self.rows if row.found is None]
        return [*found, *([f"{self.part} ({self.skipped})"] if self.skipped else [])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="only these")
    parser.add_argument("--output", type=Path, help="JSON file")
    # How this script calls itself for one part.
    for name, kind in (("--only", str), ("--seconds", float), ("--rows", Path)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device: --device cpu --small rehearses the check without one")
    if options.only:
        look(PARTS[options.only], options.device, options.small, options.seconds, options.rows)
        return

    def command(name: str, seconds: float, rows: Path) -> list[str]:
        words = [sys.executable, __file__, "--only", name, "--seconds", str(seconds), "--rows", str(rows)]
        return [*words, "--device", options.device, *(["--small"] if options.small else [])]

    # What measures "this machine" would take a GPU that is there.
    variables = {"CUDA_VISIBLE_DEVICES": ""} if options.device == "cpu" else {}
    parts = {name: part for name, part in PARTS.items() if name in options.parts}
    outcomes = run_parts(parts, command, 60 * options.minutes, variables)
    Console(width=160).print(table_of(outcomes))
    shortcomings = [each for outcome in outcomes for each in outcome.shortcomings]
    omissions = [each for outcome in outcomes for each in outcome.omissions]
    if options.output is not None:
        found = {"environment": environment(), "small": options.small, "minutes": options.minutes}
        found |= {"parts": [asdict(outcome) for outcome in outcomes]}
        found |= {"fell_short": shortcomings, "not_looked_at": omissions}
        options.output.write_text(json.dumps(found, indent=2) + "\n")
    if omissions:
        print(f"not looked at: {'; '.join(omissions)}")
    print(f"fell short: {'; '.join(shortcomings) or 'nothing'}")
    sys.exit(1 if shortcomings else 0)


def look(part: Part, device: str, small: bool, seconds: float, path: Path) -> None:
    """Do one part, and write each row to a file at once."""
    setting = Setting(torch.device(device), small, time.monotonic() + seconds)
    with path.open("a") as file:
        try:
            for row in part.look(setting):
                print(json.dumps(asdict(row)), file=file, flush=True)
        except Skipped as reason:
            print(json.dumps({"skipped": str(reason)}), file=file, flush=True)


def run_parts(
    parts: dict[str, Part],
    command: Callable[[str, float, Path], list[str]],
    seconds: float,
    variables: dict[str, str],
) -> list[Outcome]:
    """Run parts one after another, each within its share of the time that is left.

    Args:
        parts: By name.
        command: Makes the command line of a part, of its name, its seconds and the file for its rows.
        seconds: For all of them.
        variables: Of their environment, beside this process's.
    """
    deadline = time.monotonic() + seconds
    outcomes, to_come = [], sum(part.share for part in parts.values())
    for name, part in parts.items():
        granted = (deadline - time.monotonic()) * part.share / to_come
        to_come -= part.share
        print(f"{name}: at most {max(granted, 0):.0f} s", flush=True)
        if granted < part.least:
            outcomes.append(Outcome(name, skipped=f"the time is out: it needs {part.least:.0f} s at least"))
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder) / "rows.jsonl"
            rows.touch()
            outcomes.append(run_part(name, command(name, granted, rows), granted, rows, variables))
    return outcomes


def run_part(name: str, command: list[str], seconds: float, path: Path, variables: dict[str, str]) -> Outcome:
    """Run a part's process, and end it with all that it has started when its time is out."""
    outcome, start = Outcome(name), time.monotonic()
    said = path.with_name("said.txt")
    with said.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env={**os.environ, **variables}, start_new_session=True
        )
        try:
            if code := process.wait(seconds):
                lines = said.read_text(errors="replace").split("\n")
                last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
                outcome.failure = f"exit code {code}: {last}"
        except subprocess.TimeoutExpired:
            outcome.failure = f"ended after {seconds:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    outcome.seconds = time.monotonic() - start
    for line in path.read_text().split("\n"):
        # The last line of a process that was ended may not be whole.
        with suppress(json.JSONDecodeError):
            found: dict[str, Any] = json.loads(line)
            if "skipped" in found:
                outcome.skipped = found["skipped"]
            else:
                outcome.rows.append(Row(**found))
    return outcome


def table_of(outcomes: list[Outcome]) -> Table:
    """A line for each row, but one for all tests that passed."""
    table = Table("part", "what")
    for heading in ("found", "predicted", "limit"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for outcome in outcomes:
        passed = [row for row in outcome.rows if row.unit == "failures" and row.found == 0]
        if passed:
            table.add_row(outcome.part, "tests passed", str(len(passed)), "", "", "")
        for row in outcome.rows:
            if row in passed:
                continue
            limits = [f"{sign} {value:.4g}" for sign, value in (("≥", row.least), ("≤", row.most)) if value is not None]
            found, predicted = (
                "" if value is None else f"{value:.4g} {row.unit}".strip() for value in (row.found, row.predicted)
            )
            verdict = "FELL SHORT" if row.fell_short else ""
            remark = ", ".join(filter(None, (verdict, row.note)))
            table.add_row(outcome.part, row.what, found, predicted, " and ".join(limits), remark)
        state = f"FAILED, {outcome.failure}" if outcome.failure else outcome.skipped and f"skipped: {outcome.skipped}"
        table.add_row(outcome.part, "time", f"{outcome.seconds:.3g} s", "", "", state or "", end_section=True)
    return table


if __name__ == "__main__":
    main()
