"""Ctrl-C and SIGTERM end a run where nothing is lost: after the write or the training step at hand."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM)


class Interrupted(SystemExit):
    """The process was asked to stop, and nothing is half done. Its exit status is 130 or 143, as a shell counts."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)


class Interrupts:
    """What becomes of a signal to stop; only `maiht` listens, since handlers are the process's own affair.

    A signal raises `Interrupted` where it arrives, but within `held` only at its end. While `training` is set it waits
    for Lightning, which ends a fit between two batches after SIGTERM; Ctrl-C is passed on as SIGTERM then. A second
    Ctrl-C stops at once.

    Attributes:
        signum: The first signal that has come, or None.
        training: Whether Lightning's training loop is at work.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.training = False
        self._held = 0
        # What handled the signals before; empty while nobody listens.
        self._before: dict[int, Any] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle both signals inside; what handled them before does so afterwards."""
        self.signum, self.training, self._held = None, False, 0
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._before = {number: signal.signal(number, self._handle) for number in STOPPING}
        try:
            yield
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._before, self.training = {}, False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Finish what is inside before stopping."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        self.check()

    def check(self) -> None:
        """Stop here if a signal has come and nothing holds it."""
        if self.signum is not None and self._before and not self._held:
            raise Interrupted(self.signum)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            if signum == signal.SIGINT and self.signum == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.signum = signum
        if self.training:
            print("maiht: stopping after this training step", file=sys.stderr)
            if signum != signal.SIGTERM:
                signal.raise_signal(signal.SIGTERM)
        elif not self._held:
            raise Interrupted(signum)


interrupts = Interrupts()
