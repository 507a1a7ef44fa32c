"""News of a running command: a live table in a terminal, plain lines elsewhere, nothing if quiet."""

import sys
import time
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live as RichLive
from rich.table import Table
from rich.text import Text

PLAIN_EVERY_SECONDS = 10.0


class Live:
    """`say` prints a line; `progress` shows where a training is. Use it in a `with`."""

    def __init__(self, quiet: bool = False) -> None:
        self._console = Console(file=sys.stderr, quiet=quiet, highlight=False)
        self._live: RichLive | None = None
        self._last = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def say(self, line: str) -> None:
        """A line of news; ends the table of a training that is over."""
        self._stop()
        self._console.print(line, markup=False, soft_wrap=True)

    def progress(self, progress: Any) -> None:
        """Where a training is: table of model × layer in a terminal, a line every ten seconds elsewhere."""
        finished = progress.step == progress.num_steps
        if self._console.is_terminal:
            if self._live is None:
                self._live = RichLive(console=self._console, refresh_per_second=4)
                self._live.start()
            self._live.update(training_table(progress))
            if finished:
                self._stop()
        elif finished or time.monotonic() - self._last >= PLAIN_EVERY_SECONDS:
            self._last = time.monotonic()
            self._console.print(training_line(progress), markup=False, soft_wrap=True)

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def training_line(progress: Any) -> str:
    """A training in one line."""
    layers = len(progress.layers)
    mean_fvu, worst_dead = sum(progress.fvu) / layers, max(progress.dead)
    return (
        f"{progress.model}: step {progress.step}/{progress.num_steps}, {layers} layers, FVU {mean_fvu:.4f}, "
        f"L0 {sum(progress.l0) / layers:.1f}, dead at most {worst_dead:.0%}, "
        f"{progress.tokens_per_second:,.0f} tokens/s, {_duration(progress.eta_seconds)} left"
    )


def training_table(progress: Any) -> Group:
    """A training layer by layer."""
    title = (
        f"{progress.model}  step {progress.step}/{progress.num_steps}  "
        f"{progress.tokens_per_second:,.0f} tokens/s  {_duration(progress.eta_seconds)} left"
    )
    table = Table(box=None, pad_edge=False)
    for column in ("layer", "loss", "L0", "FVU", "dead"):
        table.add_column(column, justify="right")
    rows = zip(progress.layers, progress.loss, progress.l0, progress.fvu, progress.dead, strict=True)
    for layer, loss, l0, fvu, dead in rows:
        table.add_row(str(layer), f"{loss:.4f}", f"{l0:.1f}", f"{fvu:.4f}", f"{dead:.0%}")
    return Group(Text(title), table)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
