"""Answers that are given again as they are: what is read of a run stays the same until the run changes.

An answer to a GET below /api/ is kept by its address, with the state of the run in which it was made. States are looked at every
two seconds, so an answer is at most as old as that. Where training is, and jobs, are never kept.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import NamedTuple

from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_BYTES = 64 * 1024 * 1024
MOST_OF_ONE = 1024 * 1024
NEVER = ("/api/status", "/api/jobs/", "/api/openapi.json")


class _Kept(NamedTuple):
    """An answer and the state of the run it was made in."""

    state: Hashable
    messages: list[Message]
    num_bytes: int


class Remembering:
    """An ASGI application around another. `state()` is another when the run has changed; used from one event loop."""

    def __init__(self, app: ASGIApp, state: Callable[[], Hashable]) -> None:
        self._app, self._state = app, state
        self._kept: OrderedDict[tuple[str, bytes], _Kept] = OrderedDict()
        self._num_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not _is_kept(scope):
            await self._app(scope, receive, send)
            return
        key = (scope["path"], scope["query_string"])
        state = await run_in_threadpool(self._state)
        known = self._kept.get(key)
        if known is not None and known.state == state:
            self._kept.move_to_end(key)
            for message in known.messages:
                await send(dict(message))
            return
        messages: list[Message] = []

        async def keep(message: Message) -> None:
            messages.append(dict(message))
            await send(message)

        await self._app(scope, receive, keep)
        self._keep(key, state, messages)

    def _keep(self, key: tuple[str, bytes], state: Hashable, messages: list[Message]) -> None:
        num_bytes = sum(len(message.get("body", b"")) for message in messages)
        whole = messages and not messages[-1].get("more_body", False)
        if not whole or messages[0].get("status") != 200 or num_bytes > MOST_OF_ONE:
            return
        self._drop(key)
        self._kept[key] = _Kept(state, messages, num_bytes)
        self._num_bytes += num_bytes
        while self._num_bytes > MOST_BYTES:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: tuple[str, bytes]) -> None:
        gone = self._kept.pop(key, None)
        self._num_bytes -= gone.num_bytes if gone else 0


def _is_kept(scope: Scope) -> bool:
    path = scope.get("path", "")
    return (
        scope["type"] == "http" and scope["method"] == "GET" and path.startswith("/api/") and not path.startswith(NEVER)
    )
