"""What a user sees while the tool works: the log and progress bars on stderr, so that stdout carries results alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = Console(stderr=True, highlight=False)
_QUIET_SECONDS = 20.0  # without a terminal, say where a long task stands this often


class Task:
    """One running task; `update` moves its bar, or writes a line now and then where there is no terminal."""

    def __init__(self, name: str, total: int, progress: Progress, task: TaskID) -> None:
        self._name, self._total, self._progress, self._task = name, total, progress, task
        self._said = time.monotonic()

    def update(self, done: int, note: str = "", total: int | None = None) -> None:
        """`done` of the total so far; `note` is what to show beside it; `total` corrects the total."""
        self._total = total or self._total
        self._progress.update(self._task, completed=done, note=note, total=self._total)
        now = time.monotonic()
        if not log.is_terminal and (now - self._said > _QUIET_SECONDS or done == self._total):
            self._said = now
            log.print(f"{self._name}: {done}/{self._total} {note}", soft_wrap=True)


@contextmanager
def task(name: str, total: int, done: int = 0) -> Iterator[Task]:
    """A progress bar on stderr, drawn only on a terminal."""
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=log, disable=not log.is_terminal, transient=True) as progress:
        yield Task(name, total, progress, progress.add_task(name, total=total, completed=done, note=""))
