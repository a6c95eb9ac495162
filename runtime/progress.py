"""Progress of long work: what is told of it, and how it is shown on stderr: bars on a terminal, else a line a phase."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

Progress = Callable[[str, int, int], None]  # (phase, steps done, steps in all)


def silent(phase: str, done: int, total: int) -> None:
    """A Progress that tells nobody."""


class PhaseBars:
    """A Progress with a bar for each phase, which appears when it begins. Use as a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        self.console = console or Console(stderr=True)
        self._bars = Bars(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, phase: str, done: int, total: int) -> None:
        if phase not in self._tasks:
            self._tasks[phase] = self._bars.add_task(phase, total=total)
            if not self.console.is_terminal:
                self.console.print(f"{phase}: {total:,}", highlight=False)
        self._bars.update(self._tasks[phase], completed=done)

    def __enter__(self) -> PhaseBars:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
