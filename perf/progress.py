"""The progress bar of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from perf.load import Load

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID


class Bar:
    """A progress bar with the time left: steps by their estimated seconds, and every measurement as it begins."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task: TaskID | None = None
        self._name, self._completed = "", 0.0

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def begin(self, name: str, seconds: float | None) -> None:
        """The next part of the run, of about so many seconds; None = nobody knows."""
        self.end()
        self._progress.start()
        self._name, self._completed = name, 0.0
        self._task = self._progress.add_task(name, total=seconds)

    def measuring(self, key: Mapping[str, Any]) -> None:
        """A measurement with this key begins."""
        if self._task is not None:
            load = f" {Load.from_dict(key['load'])}" if "load" in key else ""
            self._progress.update(self._task, description=f"{self._name}: {key.get('series', 'peers')}{load}")
            self._progress.advance(self._task, float(key.get("seconds", 0.0)))

    def done(self, seconds: float) -> None:
        """A step of so many seconds is over."""
        self._completed += seconds
        if self._task is not None:
            self._progress.update(self._task, completed=self._completed)

    def end(self) -> None:
        """Takes the bar away."""
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._progress.stop()
            self._task = None
