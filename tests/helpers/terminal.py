"""The real command as a process of its own, with its output in files or on a terminal."""

import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from dataclasses import dataclass
from pathlib import Path

from helpers.warm import python

ROOT = Path(__file__).parents[2]
# What a test before may have set, or who runs the tests, and the command decides itself.
DECIDED = ("TQDM_DISABLE", "GOMP_SPINCOUNT", "COLUMNS", "MAIHT_TRACEBACK")


@dataclass
class Ended:
    """How a process ended, and what it said; on a terminal all of it is `out`."""

    status: int
    out: str
    err: str


def environment(**changes):
    """The variables of a process that finds the package's source."""
    kept = {name: value for name, value in os.environ.items() if name not in DECIDED}
    return {**kept, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", **changes}


def maiht(*arguments, cwd=None, terminal=False, warm=False, program=("-m", "maiht_lightning.cli"), **changes):
    """Run `maiht`, or another program of Python's, to its end; `warm`: with the imports done, see `helpers.warm`."""
    command = [*(python() if warm else [sys.executable]), *program, *map(str, arguments)]
    if not terminal:
        done = subprocess.run(command, cwd=cwd, env=environment(**changes), capture_output=True, text=True, check=False)
        return Ended(done.returncode, done.stdout, done.stderr)
    ours, theirs = pty.openpty()
    # Of 30 lines and 100 columns: a new one has none, in which bars find no room.
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    process = subprocess.Popen(
        command, cwd=cwd, env=environment(TERM="xterm", **changes), stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    said = b""
    # Linux answers with an error where a terminal's other side is closed.
    with contextlib.suppress(OSError):
        while part := os.read(ours, 65536):
            said += part
    os.close(ours)
    return Ended(process.wait(), said.decode(errors="replace"), "")
