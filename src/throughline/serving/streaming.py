"""Answers that go on: how many there may be, and their end when the server stops."""

from collections.abc import AsyncIterator

from fastapi.responses import StreamingResponse

from throughline.views.refusals import RefusedError

MOST_STREAMS = 200
RETRY_SECONDS = 5


class Streams:
    """The streams of one server. Used from its event loop alone, but for `stop`."""

    def __init__(self) -> None:
        self._open = 0
        self._stopping = False

    def stop(self) -> None:
        """Every stream ends at its next look."""
        self._stopping = True

    def is_stopping(self) -> bool:
        """True once the server stops."""
        return self._stopping

    def answer(self, events: AsyncIterator[str]) -> StreamingResponse:
        """`events` as a stream; RefusedError 429 if there are too many."""
        if self._open >= MOST_STREAMS:
            raise RefusedError(429, f"{MOST_STREAMS} streams are open already; ask again later", RETRY_SECONDS)
        headers = {"x-accel-buffering": "no"}  # proxies are not to collect them
        return StreamingResponse(self._counted(events), media_type="text/event-stream", headers=headers)

    async def _counted(self, events: AsyncIterator[str]) -> AsyncIterator[str]:
        self._open += 1
        try:
            async for event in events:
                yield event
        finally:
            self._open -= 1
