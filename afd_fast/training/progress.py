"""What runs and comparisons show and hear in a terminal: progress bars, of which on a narrow one the note goes first, and count,
percentage and time stay; and Ctrl-C."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from afd_fast.errors import extra

with extra("train"):
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column
    from rich.text import Text

DESCRIPTION = 24  # columns of a terminal


class Note(ProgressColumn):
    """A task's note, cut where the line ends."""

    def render(self, task: Task) -> Text:
        return Text(task.fields.get("note", ""), no_wrap=True, overflow="ellipsis")


def progress(console: Console) -> Progress:
    """Bars with a count, a percentage, the time since the start and the time left; `note` is a field of every task."""

    def fixed() -> Column:
        return Column(no_wrap=True)

    return Progress(
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, max_width=DESCRIPTION, overflow="ellipsis")),
        BarColumn(bar_width=10, table_column=fixed()), MofNCompleteColumn(table_column=fixed()), TaskProgressColumn(table_column=fixed()),
        TimeElapsedColumn(table_column=fixed()), TimeRemainingColumn(table_column=fixed()), Note(), console=console,
    )  # fmt: skip


@contextlib.contextmanager
def on_stop_signal(ask: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Inside the block Ctrl-C and SIGTERM call `ask(signal, frame)` and nothing else. Without effect outside the main
    thread, where Python cannot handle signals."""
    try:
        previous = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:
        previous = {}
    try:
        yield
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)
