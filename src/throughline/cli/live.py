"""News of a running command: a live table in a terminal, plain lines elsewhere, nothing if quiet."""

import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.live import Live as RichLive

from throughline.cli.render import duration, status_view
from throughline.progress import read_status
from throughline.records import Trace
from throughline.run_dir import RunDir

PLAIN_EVERY_SECONDS = 10.0
DRAWN_EVERY_SECONDS = 0.5
WATCHED_EVERY_SECONDS = 2.0


class Live:
    """`say` prints a line; `progress` shows where training is. Use it in a `with`."""

    def __init__(self, quiet: bool = False, run: str | Path | None = None) -> None:
        """`run` is the folder or URL of the run whose training `progress` shows."""
        self._place = run
        self._run: RunDir | None = None
        self._console = Console(file=sys.stderr, quiet=quiet, highlight=False)
        self._live: RichLive | None = None
        self._last = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def say(self, line: str) -> None:
        """A line of news, above the table."""
        self._console.print(line, markup=False, soft_wrap=True)

    def progress(self, progress: Any) -> None:
        """Where a training is: what `throughline status` shows in a terminal, a line every ten seconds elsewhere."""
        finished = progress.step == progress.num_steps
        terminal = self._console.is_terminal
        if not finished and time.monotonic() - self._last < (DRAWN_EVERY_SECONDS if terminal else PLAIN_EVERY_SECONDS):
            return
        self._last = time.monotonic()
        if not terminal:
            self._console.print(training_line(progress), markup=False, soft_wrap=True)
            return
        if self._live is None:
            self._live = RichLive(console=self._console, auto_refresh=False)
            self._live.start()
        if self._run is None:
            assert self._place is not None
            self._run = RunDir(self._place)
        status = read_status(self._run)
        self._live.update(status_view(status), refresh=True)
        if not status["layers"]["running"] + status["layers"]["waiting"]:
            self._stop()

    def first_trace(self, found: Trace) -> None:
        """The trace of a prompt in the first model that is ready, in short."""
        from throughline.cli.traced import first_look

        for line in first_look(found):
            self.say(line)

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def watch(look: Callable[[], dict[str, Any]], as_json: bool = False) -> None:
    """The status of a run, drawn anew every other second until no layer runs any more, or Ctrl-C; as JSON, a line each time."""
    console = Console(highlight=False)
    with (
        RichLive(console=console, auto_refresh=False) if not as_json else nullcontext() as drawn,
        suppress(KeyboardInterrupt),
    ):
        while True:
            status = look()
            if drawn is None:
                print(json.dumps(status), flush=True)  # noqa: T201
            else:
                drawn.update(status_view(status), refresh=True)
            if not status["layers"]["running"]:
                return
            time.sleep(WATCHED_EVERY_SECONDS)


def training_line(progress: Any) -> str:
    """A training in one line."""
    layers = len(progress.layers)
    mean_fvu, worst_dead = sum(progress.fvu) / layers, max(progress.dead)
    return (
        f"{progress.model}: step {progress.step}/{progress.num_steps}, {layers} layers, FVU {mean_fvu:.4f}, "
        f"L0 {sum(progress.l0) / layers:.1f}, dead at most {worst_dead:.0%}, "
        f"{progress.tokens_per_second:,.0f} tokens/s, {duration(progress.eta_seconds)} left"
    )
