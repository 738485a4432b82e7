"""The progress bars of runs and comparisons: on a narrow terminal the note goes first, and count, percentage and time stay."""

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
