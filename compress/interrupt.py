"""Stopping a long run: the first SIGINT or SIGTERM asks for it, the run stops where nothing is lost."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from compress import console
from compress.errors import CompressError


class Interrupted(CompressError):
    """The user stopped the run; its state is saved (exit code 130)."""

    exit_code = 130


class StopFlag:
    """Set by the first SIGINT or SIGTERM; a second one ends the process as usual."""

    asked = False


@contextmanager
def stoppable() -> Iterator[StopFlag]:
    """Within it the first signal only sets the flag; the handlers that were there come back afterwards."""
    flag = StopFlag()

    def handle(number: int, frame: FrameType | None) -> None:
        if flag.asked:
            raise KeyboardInterrupt
        flag.asked = True
        console.log.print("[yellow]stopping after this step (again to stop at once, without saving)[/]")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
