"""Progress bars for everything that takes more than a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from transformers import TrainerCallback


@contextmanager
def bar(console: Console, title: str, note: str = "") -> Iterator[Callable[..., None]]:
    """One progress bar. Yields `report(done, total, note="")`; the finished bar stays on the
    screen."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
        console=console,
    )
    with progress:
        task = progress.add_task(title, total=None, note=note)

        def report(done: int, total: int, note: str = "") -> None:
            progress.update(task, completed=done, total=total, note=note)

        yield report


class TrainingBar(TrainerCallback):
    """Shows a Trainer's steps and the last logged terms through `report`."""

    def __init__(self, report: Callable[..., None]) -> None:
        self.report = report
        self.note = ""

    def on_step_end(self, args, state, control, **kwargs):
        self.report(state.global_step, state.max_steps, self.note)

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = [f"{n} {logs[n]:.3f}" for n in ("forget", "retain") if n in (logs or {})]
        if shown:
            self.note = "  ".join(shown)
            self.report(state.global_step, state.max_steps, self.note)
