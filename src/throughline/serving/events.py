"""Server-sent events: of one job until it ends, and of training while it changes.

Streams look several times a second at what threads have noted. An event's `id` is its number, so a browser that lost the
connection goes on where it was (`Last-Event-ID`).
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.concurrency import run_in_threadpool

from throughline.serving.jobs import ENDED, Job, JobQueue
from throughline.views.answers import StatusAnswer

LOOK_SECONDS = 0.1
STATUS_SECONDS = 2.0
BEAT_SECONDS = 15.0  # a comment, so that proxies and browsers keep a silent stream


def format_event(name: str, data: Any, number: int | None = None) -> str:
    """One event as it is sent. JSON has no line breaks, so data cannot begin an event of its own."""
    head = "" if number is None else f"id: {number}\n"
    return f"{head}event: {name}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"


async def follow_job(
    queue: JobQueue, job: Job, after: int | None, is_stopping: Callable[[], bool]
) -> AsyncIterator[str]:
    """Events of a job from the one after number `after`, and `position` while it waits; ends with the job."""
    number, position, beat = 0 if after is None else after + 1, None, time.monotonic()
    while not is_stopping():
        answer, events = queue.answer(job), job.events[number:]
        for event in events:
            yield format_event(event.name, event.data | {"id": job.id}, number)
            number += 1
        if answer.phase == "queued" and answer.position != position:
            position = answer.position
            yield format_event("position", {"id": job.id, "position": position})
        if answer.phase in ENDED and number >= len(job.events):
            return
        if time.monotonic() - beat > BEAT_SECONDS:
            beat = time.monotonic()
            yield ": still here\n\n"
        await asyncio.sleep(LOOK_SECONDS)


async def follow_status(read: Callable[[], StatusAnswer], is_stopping: Callable[[], bool]) -> AsyncIterator[str]:
    """The status whenever it is another than before."""
    before, beat, number = None, time.monotonic(), 0
    while not is_stopping():
        now = (await run_in_threadpool(read)).model_dump(mode="json")
        if now != before:
            before = now
            yield format_event("status", now, number)
            number += 1
        if time.monotonic() - beat > BEAT_SECONDS:
            beat = time.monotonic()
            yield ": still here\n\n"
        for _ in range(int(STATUS_SECONDS / LOOK_SECONDS)):
            if is_stopping():
                return
            await asyncio.sleep(LOOK_SECONDS)
