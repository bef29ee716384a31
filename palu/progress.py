"""Progress bars for everything that takes more than a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column
from rich.text import Text

from palu.terminal import visible

# Where the output is no terminal: at most a line each tenth of the work and each 20 seconds.
LINES, LINE_SECONDS = 10, 20.0


class TimeLeft(ProgressColumn):
    """`0:12:30 left`, from the pace since the work of this total began; empty while unknown and
    when nothing more comes."""

    def render(self, task: Task) -> Text:
        """Return one task's estimate."""
        seconds = task.time_remaining
        if seconds is None or task.finished or task.stop_time is not None:
            return Text("")
        minutes, second = divmod(int(seconds), 60)
        hours, minute = divmod(minutes, 60)
        return Text(f"{hours}:{minute:02}:{second:02} left", style="progress.remaining")


@contextmanager
def bar(console: Console, title: str, note: str = "") -> Iterator[Callable[..., None]]:
    """Show one progress bar with an estimate of the time left; the finished bar stays on the
    screen. Yields `report(done, total, note="")`.

    On a terminal it is redrawn in place. In a file or a pipe it is the finished bar alone, after a
    few lines on the way where that is long.
    """
    title, note = visible(title), visible(note)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeLeft(),
        TextColumn(
            "{task.fields[note]}", style="dim", markup=False, table_column=Column(overflow="fold")
        ),
    )
    # Steps may take minutes each: the pace is that of all of them.
    progress = Progress(*columns, console=console, speed_estimate_period=float("inf"))
    with progress:
        number = progress.add_task(title, total=None, note=note)
        task = progress.tasks[0]
        last_line, lines = time.monotonic(), 0

        def report(done: int, total: int, note: str = "") -> None:
            nonlocal last_line, lines
            progress.update(number, completed=done, total=total, note=visible(note))
            if console.is_terminal or done == 0 or done >= total:
                return
            now = time.monotonic()
            if done * LINES // total != lines and now - last_line >= LINE_SECONDS:
                last_line, lines = now, done * LINES // total
                cells = (column.render(task) for column in (*columns[2:5], columns[5]))
                text = "  ".join(str(cell) for cell in cells if str(cell))
                console.print(f"{title}  {text}", soft_wrap=True, markup=False, highlight=False)

        try:
            yield report
        finally:
            progress.stop_task(number)
