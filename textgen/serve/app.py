"""The HTTP side: routes, streams, and what becomes of a client that leaves.

Longer than 300 lines: all routes of one small server.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ds_gradprune.errors import GradPruneError
from textgen.serve.engine import End, Engine, Job, Piece, QueueFull
from textgen.serve.metrics import Metrics
from textgen.serve.schema import Answer, Asked, Chat, Completion, error_body

PAGE_RULES = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The page loads nothing, and talks to this server only."""

STATUS = {"timeout": 504, "cancelled": 499, "error": 500}


@dataclass(frozen=True)
class Limits:
    """What one request may take.

    Attributes:
        usual_tokens: of a reply, when the request does not say.
        max_tokens: of a reply; more is cut to it.
        seconds: from the request to the end of its reply.
    """

    usual_tokens: int = 80
    max_tokens: int = 512
    seconds: float = 120.0


class Api:
    """Routes over an engine.

    Args:
        engine: started and closed by the caller.
        limits: of a request.
        metrics: counted into.
    """

    def __init__(self, engine: Engine, limits: Limits, metrics: Metrics) -> None:
        self._engine, self._limits, self._metrics = engine, limits, metrics

    def app(self) -> FastAPI:
        """The application."""
        app = FastAPI(title="ds_gradprune serve", docs_url=None, redoc_url=None)
        app.add_exception_handler(RequestValidationError, self._invalid)
        app.add_exception_handler(HTTPException, self._http_error)
        app.add_api_route("/", self.page, methods=["GET"], response_class=HTMLResponse)
        app.add_api_route("/health", self.health, methods=["GET"])
        app.add_api_route("/metrics", self.metrics, methods=["GET"])
        app.add_api_route("/v1/models", self.models, methods=["GET"])
        app.add_api_route("/v1/models/{name:path}", self.model, methods=["GET"])
        app.add_api_route("/v1/completions", self.complete, methods=["POST"], response_model=None)
        app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"], response_model=None)
        return app

    # ---- what is asked without a prompt --------------------------------------------------------

    async def page(self) -> Response:
        """The page to chat with."""
        text = resources.files("textgen.serve").joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers={"content-security-policy": PAGE_RULES})

    async def health(self) -> Response:
        """200 while the model can be asked."""
        served = self._engine.served
        body = {"status": "ok", "model": served.name, "version": served.version}
        if not self._engine.is_alive:
            return JSONResponse(body | {"status": "the engine has ended"}, 503)
        return JSONResponse(body)

    async def metrics(self) -> Response:
        """For Prometheus."""
        engine = self._engine
        text = self._metrics.text(
            waiting=engine.num_waiting,
            running=engine.num_running,
            draining=engine.is_draining,
        )
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def models(self) -> dict[str, Any]:
        """The one model, in a list."""
        return {"object": "list", "data": [self._card()]}

    async def model(self, name: str) -> Response:
        """The one model, by its name."""
        if name != self._engine.served.name:
            return self._no_model(name)
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        served = self._engine.served
        return {
            "id": served.name,
            "object": "model",
            "created": 0,
            "owned_by": "local",
            "version": served.version,
            "context": served.context,
            "max_tokens": self._limits.max_tokens,
        }

    # ---- replies -------------------------------------------------------------------------------

    async def complete(self, body: Completion, request: Request) -> Response:
        """Continue a text."""
        return await self._reply(body, body.prompt, request, is_chat=False)

    async def chat(self, body: Chat, request: Request) -> Response:
        """Reply to a conversation."""
        try:
            prompt = self._engine.served.chat_text(body.turns())
        except GradPruneError as exc:
            return self._error("chat", 400, str(exc), "invalid_request_error")
        return await self._reply(body, prompt, request, is_chat=True)

    async def _reply(self, body: Asked, prompt: str, request: Request, is_chat: bool) -> Response:
        path = "chat" if is_chat else "completions"
        served = self._engine.served
        if body.model not in ("", served.name):
            return self._no_model(body.model, path)
        sampling = body.sampling(
            self._limits.usual_tokens, min(self._limits.max_tokens, served.context - 1)
        )
        reply = _Reply(self._engine, self._metrics, Answer(is_chat, served.name, served.version))
        ids, num_cut = served.encode(prompt, sampling.max_new_tokens)
        reply.usage = {"prompt_tokens": len(ids), "cut_tokens": num_cut}
        deadline = self._engine.clock() + self._limits.seconds
        reply.job = Job(served, prompt, ids, sampling, deadline, reply.emit, body.stop, body.top_k)
        try:
            self._engine.submit([reply.job])
        except QueueFull as exc:
            wait = {"retry-after": str(exc.retry_after)}
            return self._error(path, 429, str(exc), "rate_limit_error", "queue_full", wait)
        if not body.stream:
            return await self._whole(reply, request, path)
        first = await reply.first(request)
        if isinstance(first, End) and first.reason in STATUS:
            return self._error(path, STATUS[first.reason], first.message, "server_error")
        self._metrics.count("requests", path=path, status="200")
        return StreamingResponse(
            reply.stream(first, body.wants_usage),
            media_type="text/event-stream",
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
        )

    async def _whole(self, reply: _Reply, request: Request, path: str) -> Response:
        text, end = await reply.whole(request)
        if end.reason in STATUS:
            return self._error(path, STATUS[end.reason], end.message, "server_error", end.reason)
        self._metrics.count("requests", path=path, status="200")
        return JSONResponse(reply.answer.whole(text, end.reason, reply.counts(end)))

    # ---- faults --------------------------------------------------------------------------------

    def refused(self, path: str, status: int) -> None:
        """Count what the guard has refused."""
        self._metrics.count("requests", path="refused", status=str(status))

    def _no_model(self, name: str, path: str = "models") -> Response:
        message = f"model must be {self._engine.served.name!r}, got {name[:80]!r}"
        return self._error(path, 404, message, "invalid_request_error", "model_not_found")

    def _error(
        self,
        path: str,
        status: int,
        message: str,
        kind: str,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> Response:
        self._metrics.count("requests", path=path, status=str(status))
        return JSONResponse(error_body(message, kind, code), status, headers)

    async def _invalid(self, request: Request, exc: Exception) -> Response:
        assert isinstance(exc, RequestValidationError)
        first = exc.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body") or "the body"
        message = f"{where}: {first['msg']}"[:300]
        return self._error("invalid", 400, message, "invalid_request_error")

    async def _http_error(self, request: Request, exc: Exception) -> Response:
        assert isinstance(exc, HTTPException)
        return self._error(
            "invalid",
            exc.status_code,
            str(exc.detail),
            "invalid_request_error",
            None,
            exc.headers,  # type: ignore[arg-type]
        )


class _Reply:
    """One reply under way: the engine's events on one side, a client on the other."""

    job: Job

    def __init__(self, engine: Engine, metrics: Metrics, answer: Answer) -> None:
        self.answer = answer
        self.usage: dict[str, int] = {}
        self._engine, self._metrics = engine, metrics
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Piece | End] = asyncio.Queue()
        self._begun = engine.clock()
        self._is_first = True

    def emit(self, event: Piece | End) -> None:
        """From the engine's thread."""
        now = self._engine.clock() - self._begun
        if isinstance(event, Piece) and self._is_first:
            self._is_first = False
            self._metrics.time("first_token_seconds", now)
            self._metrics.count("prompt_tokens", self.usage["prompt_tokens"])
        elif isinstance(event, End):
            self._metrics.count("replies", reason=event.reason)
            self._metrics.count("reply_tokens", event.num_new)
            self._metrics.time("reply_seconds", now)
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody listens
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def counts(self, end: End) -> dict[str, Any]:
        """Tokens as clients read them, and how many of the prompt did not fit."""
        prompt = self.usage["prompt_tokens"]
        return {
            "prompt_tokens": prompt,
            "completion_tokens": end.num_new,
            "total_tokens": prompt + end.num_new,
            "prompt_tokens_cut": self.usage["cut_tokens"],
        }

    async def first(self, request: Request) -> Piece | End:
        """The first event, or an end when the client has left before."""
        async with self._watched(request):
            return await self._events.get()

    async def whole(self, request: Request) -> tuple[str, End]:
        """The text and how it ended."""
        pieces: list[str] = []
        async with self._watched(request):
            while True:
                event = await self._events.get()
                if isinstance(event, End):
                    return "".join(pieces), event
                pieces.append(event.text)

    async def stream(self, event: Piece | End, wants_usage: bool) -> AsyncIterator[str]:
        """Server-sent events; left early, it cancels the reply."""
        first = True
        try:
            while not isinstance(event, End):
                if event.text or first:
                    yield _event(self.answer.piece(event.text, first=first))
                    first = False
                event = await self._events.get()
            if event.reason in STATUS:
                yield _event(error_body(event.message, "server_error", event.reason))
            else:
                yield _event(self.answer.piece("", event.reason, first=first))
                if wants_usage:
                    yield _event(self.answer.counts(self.counts(event)))
            yield "data: [DONE]\n\n"
        finally:
            self.job.cancel()

    @contextlib.asynccontextmanager
    async def _watched(self, request: Request) -> AsyncIterator[None]:
        """Cancel the reply when the client leaves inside the block."""

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            self.job.cancel()

        watcher = asyncio.create_task(watch())
        try:
            yield
        except asyncio.CancelledError:
            self.job.cancel()
            raise
        finally:
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
