"""What a person sees while a video is made: one line with stage, step, ETA and the frames that have arrived."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

STAGES = {
    "start": "starting",
    "queued": "waiting",
    "encode": "encoding the prompt",
    "denoise": "denoising",
    "decode": "decoding",
    "deliver": "storing",
}


class ProgressView:
    """A live bar on a terminal, one line per stage elsewhere."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("[bold]{task.description:<20}"),
            BarColumn(bar_width=28),
            TextColumn("{task.completed:>3.0f}/{task.total:<3.0f}"),
            TextColumn("{task.fields[eta]:<10}"),
            TextColumn("{task.fields[frames]:<14}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID = self._bar.add_task(STAGES["start"], total=1, eta="", frames="")
        self._stage = ""

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def stage(self, stage: str, step: int = 0, total: int = 1, eta_s: float | None = None) -> None:
        """Where the request is: `step` of `total` in a stage, `eta_s` seconds to the last frame."""
        description = STAGES.get(stage, stage)
        if stage != self._stage and not self._console.is_terminal:
            self._console.print(description, highlight=False)
        self._stage = stage
        eta = "" if eta_s is None else f"ETA {eta_s:.1f} s"
        self._bar.update(self._task, description=description, completed=step, total=max(total, 1), eta=eta)

    def frames(self, arrived: int, total: int) -> None:
        self._bar.update(self._task, completed=arrived, total=total, eta="", frames=f"frames {arrived}/{total}")
