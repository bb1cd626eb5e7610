"""How far long work has come, on stderr, so that stdout stays clean: a bar on a terminal, else a line now and then."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich import progress
from rich.console import Console

EVERY = 10.0  # seconds between two lines
T = TypeVar("T")


class Progress(progress.Progress):
    """rich's, gone when the work is done. In a file or pipe: a plain line after each `EVERY` seconds of work."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        columns = progress.BarColumn(), progress.MofNCompleteColumn(), progress.TimeElapsedColumn()
        console = Console(stderr=True)
        bar = sys.stderr.isatty() and console.is_terminal and not console.is_dumb_terminal  # FORCE_COLOR is no terminal
        super().__init__(
            *(progress.TextColumn("{task.description}"), *columns),
            console=console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            get_time=clock,
            disable=not bar,
        )
        self._said = clock()

    def stop(self) -> None:
        if not self.disable:  # before rich 14 an empty line
            super().stop()

    def advance(self, task_id: progress.TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        now = self.get_time()
        if self.disable and now - self._said >= EVERY:
            self._said, task = now, self._tasks[task_id]
            words = f"{task.description}: {task.completed:.0f} of {task.total:.0f} after {task.elapsed:.0f} s"
            print(words, file=sys.stderr, flush=True)


@contextmanager
def steps(words: str, total: int, clock: Callable[[], float] = time.monotonic) -> Iterator[Callable[[], None]]:
    """Shows `words` and how many of `total` steps are done; what it gives is called after each."""
    with Progress(clock) as shown:
        task = shown.add_task(words, total=total)
        yield lambda: shown.advance(task)


def each(things: Sequence[T], words: str) -> Iterator[T]:
    """The things, one after the other, and how many are done."""
    with steps(words, len(things)) as step:
        for thing in things:
            yield thing
            step()
