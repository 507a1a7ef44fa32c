"""What was read from a run and is kept until the run has something newer."""

import time
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Generic, TypeVar

T = TypeVar("T")
LOOK_SECONDS = 2.0  # between looks at the files


class Fresh(Generic[T]):
    """A value that is made anew when its stamp changes. Who asks meanwhile gets the one before, and waits for the first only."""

    def __init__(self, stamp: Callable[[], Hashable], make: Callable[[], T]) -> None:
        self._stamp, self._make = stamp, make
        self._lock = Lock()
        self._kept: tuple[Hashable, T] | None = None
        self._looked = 0.0

    def get(self) -> T:
        """The value; raises what making it raises."""
        kept = self._kept
        if kept is not None and time.monotonic() - self._looked < LOOK_SECONDS:
            return kept[1]
        if not self._lock.acquire(blocking=kept is None):
            assert kept is not None
            return kept[1]
        try:
            if self._kept is not None and time.monotonic() - self._looked < LOOK_SECONDS:
                return self._kept[1]  # another made it while this one waited
            stamp = self._stamp()  # before it is made: what is written meanwhile is seen at the next look
            if self._kept is None or self._kept[0] != stamp:
                self._kept = (stamp, self._make())
            self._looked = time.monotonic()
            return self._kept[1]
        finally:
            self._lock.release()
