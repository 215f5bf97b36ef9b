"""The progress of a run, and of what is measured, on the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskProgressColumn, TextColumn

from inverse_flow.training.config import TrainConfig
from inverse_flow.training.log import StepReport

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on

# Weight of the newest step in the displayed averages.
SMOOTHING = 0.1
# Seconds from one line to the next at least, where there is no terminal.
LINE_EVERY = 10.0


class _Display:
    """A bar, of which there is nothing where there is no terminal."""

    def __init__(self, console: Console | None, *columns: ProgressColumn, transient: bool = False) -> None:
        self.console = console or Console()
        self._bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal, transient=transient)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


class MeasuringProgress(_Display):
    """How far a measurement has come, told as :func:`~inverse_flow.training.summary.summarize` tells it: a bar that
    goes when it is done; where there is no terminal, a line every ten seconds."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(
            console, TextColumn("{task.description}"), BarColumn(bar_width=None), TaskProgressColumn(), transient=True
        )
        self._clock = clock
        self._said = clock()
        self._task = self._bar.add_task("measuring")

    def __call__(self, what: str, done: int, count: int) -> None:
        self._bar.update(self._task, description=what, completed=done, total=count)
        if not self.console.is_terminal and self._clock() - self._said >= LINE_EVERY:
            self._said = self._clock()
            self.console.print(f"{what}: {done:,} of {count:,}", soft_wrap=True, highlight=False)


class TrainingProgress(_Display):
    """A bar with loss, bits/dim, images/s and the time left; where there is no terminal, a line at an evaluation, at
    most one in ten seconds."""

    def __init__(self, config: TrainConfig, console: Console | None = None) -> None:
        super().__init__(
            console,
            TextColumn("step {task.fields[step]}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[figures]}"),
            TextColumn("{task.fields[left]} left"),
        )
        self.config = config
        self._said = -LINE_EVERY  # so that the first evaluation is told
        self._bits: float | None = None
        self._loss = 0.0
        self._rate = 0.0
        self._first: StepReport | None = None
        self._validation = ""
        self._task = self._bar.add_task("training", total=1.0, step=0, figures="starting", left="?")

    def __call__(self, report: StepReport) -> None:
        self._smooth(report)
        if report.validation is not None:
            self._validation = f" · validation {report.validation:.3f}"
        figures = f"loss {self._loss:.0f} · {self._bits:.3f} bits/dim{self._validation} · {self._rate:.0f} images/s"
        left = self.time_left(report)
        completed = self.config.progress(report.step, report.seconds)
        self._bar.update(self._task, completed=completed, step=report.step, figures=figures, left=left)
        due = report.step % self.config.evaluate_every == 0 and report.seconds - self._said >= LINE_EVERY
        if due and not self.console.is_terminal:
            self._said = report.seconds
            self.console.print(f"step {report.step} · {figures} · {left} left", soft_wrap=True, highlight=False)

    def time_left(self, report: StepReport) -> str:
        """Hours, minutes and seconds to the end, at the pace since the display began."""
        if self._first is None:
            self._first = report
        by_time = 60 * self.config.minutes - report.seconds if self.config.minutes is not None else float("inf")
        steps = report.step - self._first.step
        pace = (report.seconds - self._first.seconds) / steps if steps else float("inf")
        seconds = max(0.0, min(by_time, pace * (self.config.steps - report.step)))
        if seconds == float("inf"):
            return "?"
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes}:{rest:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"

    def _smooth(self, report: StepReport) -> None:
        weight = 1.0 if self._bits is None else SMOOTHING
        self._bits = report.bits_per_dim + (1 - weight) * ((self._bits or 0.0) - report.bits_per_dim)
        self._loss = report.loss + (1 - weight) * (self._loss - report.loss)
        self._rate = report.images_per_second + (1 - weight) * (self._rate - report.images_per_second)
