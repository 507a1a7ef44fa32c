"""What every request passes before anything looks at it, and what every answer gets on its way out.

In this order: Host (421), Origin (403), the icon, the token (401), size (413) and time (408) of the body. Whatever goes wrong
behind it is logged here, and the client is told one sentence.
"""

import asyncio
import json
import logging
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qs

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from throughline.serving.access import COOKIE, Access

logger = logging.getLogger(__name__)
MOST_BODY_BYTES = 64 * 1024
MOST_DRAINED_BYTES = 8 * 1024 * 1024  # of a body that is refused, so that the client is through sending and reads why
BODY_SECONDS = 10.0
FAILED = "the server failed at this request; its log says why"
COOKIE_SECONDS = 30 * 24 * 3600
NO_CONTENT_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "content-security-policy": NO_CONTENT_POLICY,  # an answer may have its own
    "cache-control": "no-store",
}


class Guard:
    """An ASGI application around another."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        started = False

        async def answer(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                there = {name.lower() for name, _ in message["headers"]}
                more = [(n.encode(), v.encode()) for n, v in HEADERS.items() if n.encode() not in there]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        try:
            await self._pass_on(scope, receive, answer)
        except Exception:
            logger.exception("%s %s failed", scope["method"], scope["path"])
            if not started:
                await refuse(answer, 500, FAILED)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))

        def one(name: str) -> str | None:
            return headers[name][0] if name in headers else None

        method, path, access = scope["method"], scope["path"], self._access
        hosts = headers.get("host", [])
        if not access.knows_host(hosts):
            return await refuse(send, 421, "this server is not called that; open it by the address it printed")
        if not access.trusts_origin(method, hosts[0], one("origin"), one("sec-fetch-site")):
            return await refuse(send, 403, "a page of another site may not change anything here")
        if path == "/favicon.ico":
            return await reply(send, 204, b"")
        if path == "/" and method == "GET" and (given := _link_token(scope)) is not None and access.token:
            return await self._admit(send, given, scope)
        if not access.knows_token(one("authorization"), "; ".join(headers.get("cookie", []))):
            sentence = "a token is needed: open /?token=… once, or send the header Authorization: Bearer …"
            return await refuse(send, 401, sentence, {"www-authenticate": "Bearer"})
        try:
            body = await asyncio.wait_for(_read_body(receive), BODY_SECONDS)
        except TimeoutError:
            return await refuse(send, 408, "the request took too long to arrive", {"connection": "close"})
        if body is None:
            sentence = f"the request is larger than {MOST_BODY_BYTES // 1024} KiB"
            return await refuse(send, 413, sentence, {"connection": "close"})
        return await self._app(scope, _replay(body, receive), send)

    async def _admit(self, send: Send, given: str, scope: Scope) -> None:
        """A browser that opened the link with the token gets a cookie and an address without it."""
        if not self._access.is_token(given):
            return await refuse(send, 401, "this is not the token")
        secure = "; Secure" if scope.get("scheme") == "https" else ""
        kept = f"{COOKIE}={self._access.cookie}; Path=/; HttpOnly; SameSite=Lax; Max-Age={COOKIE_SECONDS}{secure}"
        return await reply(send, 303, b"", {"location": "/", "set-cookie": kept})


async def refuse(send: Send, status: int, sentence: str, headers: dict[str, str] | None = None) -> None:
    """One sentence, as JSON."""
    body = json.dumps({"detail": sentence}).encode()
    await reply(send, status, body, {"content-type": "application/json"} | (headers or {}))


async def reply(send: Send, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    """A whole answer."""
    length = {} if status == HTTPStatus.NO_CONTENT else {"content-length": str(len(body))}
    pairs = [(n.encode("latin-1"), v.encode("latin-1")) for n, v in (length | (headers or {})).items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


def _link_token(scope: Scope) -> str | None:
    return next(iter(parse_qs(scope["query_string"].decode("latin-1")).get("token", [])), None)


async def _read_body(receive: Receive) -> bytes | None:
    """The body; None if it is too large, read to its end or so far that the client has likely sent all."""
    body, num_bytes, more = bytearray(), 0, True
    while more and num_bytes <= MOST_DRAINED_BYTES:
        message: Any = await receive()
        if message["type"] == "http.disconnect":
            break
        num_bytes += len(message.get("body", b""))
        if num_bytes <= MOST_BODY_BYTES:
            body += message.get("body", b"")
        more = message.get("more_body", False)
    return bytes(body) if num_bytes <= MOST_BODY_BYTES else None


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body as one message, and then what comes after it."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
