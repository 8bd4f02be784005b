"""What is looked at before a request is read: host, key, size. Plain ASGI."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from textgen.serve.schema import error_body

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

OPEN_PATHS = ("/", "/health")
"""Served without the key: the page asks for it, and a load balancer has none."""

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


class Guard:
    """Refuses what should not reach the application.

    Args:
        app: the application.
        api_key: None: everybody on this machine may ask. Web pages of others still may not: their
            Host header is another one, and only JSON is read, which browsers ask about first.
        max_bytes: of a body.
        body_seconds: a body must be here by then.
        on_refused: called with path and status.
    """

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        *,
        api_key: str | None,
        max_bytes: int,
        body_seconds: float,
        on_refused: Callable[[str, int], None],
    ) -> None:
        self._app, self._key = app, None if api_key is None else api_key.encode()
        self._max_bytes, self._body_seconds = max_bytes, body_seconds
        self._on_refused = on_refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        fault = self._fault(scope["path"], headers)
        body = b""
        if fault is None and scope["method"] == "POST":
            try:
                read = await asyncio.wait_for(self._body(receive, headers), self._body_seconds)
            except asyncio.TimeoutError:  # another class before Python 3.11
                fault = (408, "the request did not arrive in time", "timeout")
            else:
                if read is None:
                    return  # left while sending
                fault, body = (read, b"") if isinstance(read, tuple) else (None, read)
        if fault is not None:
            await self._refuse(scope["path"], send, *fault)
            return
        given = False

        async def again() -> MutableMapping[str, Any]:
            nonlocal given
            if given or scope["method"] != "POST":
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, again, send)

    def _fault(self, path: str, headers: dict[bytes, bytes]) -> tuple[int, str, str] | None:
        if self._key is None:
            host = headers.get(b"host", b"").decode("latin-1")
            if _host_name(host) not in LOCAL_NAMES:
                return 403, f"host {host[:80]!r} is not this machine", "host_not_allowed"
        elif path not in OPEN_PATHS:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self._key):
                return 401, "the API key is missing or wrong", "invalid_api_key"
        return None

    async def _body(
        self, receive: Receive, headers: dict[bytes, bytes]
    ) -> bytes | tuple[int, str, str] | None:
        too_large = (
            413,
            f"the body must have at most {self._max_bytes} bytes",
            "request_too_large",
        )
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if kind != b"application/json":
            return 415, "the content type must be application/json", "unsupported_media_type"
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_bytes:
            return too_large
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._max_bytes:
                return too_large
            if not message.get("more_body", False):
                return bytes(body)

    async def _refuse(self, path: str, send: Send, status: int, message: str, code: str) -> None:
        self._on_refused(path, status)
        body = json.dumps(error_body(message, "invalid_request_error", code)).encode()
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        if status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def _host_name(host: str) -> str:
    if host.startswith("["):
        return host[1:].split("]")[0].lower()
    return host.rsplit(":", 1)[0].lower()
