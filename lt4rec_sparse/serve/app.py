"""The routes, as an ASGI application."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.resources
import json
import re
import signal
import threading
import time
import uuid
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lt4rec_sparse import __version__
from lt4rec_sparse.errors import InputError, shown
from lt4rec_sparse.serve import body, oip
from lt4rec_sparse.serve.service import Service, Trace, log
from lt4rec_sparse.serve.settings import Limits, RequestError

EXTENSIONS = ("binary_tensor_data", "model_repository", "statistics")
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
CLOSING = (408, 413, 503)  # after these the body may be unread: the connection ends


def create_app(service: Service) -> ASGIApp:
    """Return the application of a service whose model is loaded.

    Its life cycle watches the artefact, and turns a SIGTERM into a while of not being ready before the server stops.
    """
    routes = _Routes(service)
    app = Starlette(
        routes=routes.listed(),
        exception_handlers={
            InputError: _refused,
            HTTPException: _unrouted,
            ClientDisconnect: _gone,
            Exception: _failed,
        },
        lifespan=lambda app: _life(service),
    )
    return _Observed(app, service)


@asynccontextmanager
async def _life(service: Service) -> AsyncIterator[None]:
    watching = asyncio.create_task(_watch(service)) if service.settings.watch_seconds else None
    if threading.current_thread() is threading.main_thread():
        _drain_first(service, asyncio.get_running_loop())
    try:
        yield
    finally:
        if watching:
            watching.cancel()
        service.pool.shutdown(wait=False, cancel_futures=True)


async def _watch(service: Service) -> None:
    while True:
        await asyncio.sleep(service.settings.watch_seconds)
        await asyncio.to_thread(service.refresh)


def _drain_first(service: Service, loop: asyncio.AbstractEventLoop) -> None:
    """On SIGTERM say that the server is not ready, serve on for a while, and then let the server stop as it does."""
    stop = signal.getsignal(signal.SIGTERM)

    def drain(number: int, frame: Any) -> None:
        if service.is_draining or not callable(stop):
            return
        service.is_draining = True
        log("draining", seconds=service.settings.drain_seconds)
        loop.call_soon_threadsafe(loop.call_later, service.settings.drain_seconds, stop, number, None)

    signal.signal(signal.SIGTERM, drain)


class _Routes:
    """What is done on each path."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._limits = service.settings.limits
        page = importlib.resources.files("lt4rec_sparse.serve").joinpath("page.html").read_text(encoding="utf-8")
        self._page = page.encode()
        self._policy = _content_policy(page)

    def listed(self) -> list[Route]:
        model, versioned = "/v2/models/{model}", "/v2/models/{model}/versions/{version}"
        repository = "/v2/repository/models/{model}"
        get = {
            "/": self.page,
            "/page.json": self.about,
            "/metrics": self.metrics,
            "/v2": self.server,
            "/v2/health/live": self.live,
            "/v2/health/ready": self.ready,
            "/v2/models/stats": self.statistics,
            model: self.model,
            versioned: self.model,
            f"{model}/ready": self.model_ready,
            f"{versioned}/ready": self.model_ready,
            f"{model}/stats": self.statistics,
            f"{versioned}/stats": self.statistics,
        }
        post = {
            "/rank": self.rank,
            f"{model}/infer": self.infer,
            f"{versioned}/infer": self.infer,
            "/v2/repository/index": self.index,
            f"{repository}/load": self.load,
            f"{repository}/unload": self.unload,
        }
        return [
            *(Route(path, endpoint, methods=["GET"]) for path, endpoint in get.items()),
            *(Route(path, endpoint, methods=["POST"]) for path, endpoint in post.items()),
        ]

    async def page(self, request: Request) -> Response:
        return Response(self._page, media_type="text/html", headers={"Content-Security-Policy": self._policy})

    async def about(self, request: Request) -> Response:
        model = self._service.model()
        about = {"model": model.name, "version": model.version, "tasks": model.tasks}
        # As text: the page's numbers are float64, and an int of 64 bits would be rounded by it.
        examples = [{"name": e["name"], "text": json.dumps(e, indent=1, ensure_ascii=False)} for e in model.examples]
        precisions = {"precision": model.precision, "precisions": model.precisions}
        return JSONResponse(about | precisions | {"examples": examples})

    async def metrics(self, request: Request) -> Response:
        text = await asyncio.to_thread(self._service.metrics.text)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def server(self, request: Request) -> Response:
        return JSONResponse({"name": "lt4rec_sparse", "version": __version__, "extensions": EXTENSIONS})

    async def live(self, request: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(self, request: Request) -> Response:
        is_ready = self._service.is_ready()
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    async def model(self, request: Request) -> Response:
        model = self._named(request)
        tensors = {"inputs": model.columns.inputs(), "outputs": oip.outputs(model.tasks)}
        about = {"name": model.name, "versions": [model.version], "platform": "lt4rec_sparse"}
        return JSONResponse(about | tensors)

    async def model_ready(self, request: Request) -> Response:
        model = self._named(request)
        is_ready = self._service.is_ready()
        return JSONResponse({"name": model.name, "ready": is_ready}, 200 if is_ready else 503)

    async def statistics(self, request: Request) -> Response:
        model = self._named(request) if "model" in request.path_params else self._service.model()
        found = await asyncio.to_thread(self._service.statistics, model)
        return JSONResponse({"model_stats": [found]})

    async def infer(self, request: Request) -> Response:
        model, trace = self._named(request), request.scope["trace"]
        trace.model = model
        with self._service.admitted():
            length = request.headers.get(oip.HEADER_LENGTH)
            data = await self._body(request, trace, has_binary=length is not None)
            answer, json_length = await asyncio.get_running_loop().run_in_executor(
                self._service.pool, self._service.infer, model, data, length, trace, time.perf_counter_ns()
            )
        if json_length is None:
            return Response(answer, media_type="application/json")
        headers = {oip.HEADER_LENGTH: str(json_length)}
        return Response(answer, media_type="application/octet-stream", headers=headers)

    async def rank(self, request: Request) -> Response:
        model, trace = self._service.model(), request.scope["trace"]
        trace.model = model
        with self._service.admitted():
            data = await self._body(request, trace)
            answer = await asyncio.get_running_loop().run_in_executor(
                self._service.pool, self._service.rank, model, data, trace, time.perf_counter_ns()
            )
        return Response(answer, media_type="application/json")

    async def index(self, request: Request) -> Response:
        wanted = await self._object(request)
        slot = self._service.slot
        is_served = slot.is_served()
        if slot.current is None or (wanted.get("ready") is True and not is_served):
            return JSONResponse([])
        state = (
            {"state": "READY", "reason": slot.reason} if is_served else {"state": "UNAVAILABLE", "reason": "unloaded"}
        )
        return JSONResponse([{"name": slot.current.name, "version": slot.current.version, **state}])

    async def load(self, request: Request) -> Response:
        await self._control(request)
        await asyncio.to_thread(self._service.load)
        self._service.slot.resume()
        return JSONResponse({})

    async def unload(self, request: Request) -> Response:
        await self._control(request)
        self._service.slot.unload()
        log("unloaded", model=request.path_params["model"])
        return JSONResponse({})

    def _named(self, request: Request) -> Any:
        return self._service.model(request.path_params["model"], request.path_params.get("version"))

    async def _control(self, request: Request) -> None:
        """Refuse to load and unload where the server was not started for it, or in a way of which it has only one."""
        if not self._service.settings.control:
            raise RequestError(
                "load: got a request to change the model, wanted a server that was started with --control", 403
            )
        name, current = request.path_params["model"], self._service.slot.current
        if current is not None and name != current.name:
            raise RequestError(f"model: got {shown(name)}, wanted {current.name!r}", 404)
        parameters = (await self._object(request)).get("parameters", {})
        if not isinstance(parameters, dict) or not parameters.keys() <= {"unload_dependents"}:
            raise RequestError(
                f"parameters: got {shown(parameters)}, wanted none: the artefact is the one it was started with"
            )

    async def _body(self, request: Request, trace: Trace, has_binary: bool = False) -> bytes:
        started = time.perf_counter_ns()
        data = await _read(request, self._limits, has_binary)
        trace.us["read"] = (time.perf_counter_ns() - started) / 1000
        return data

    async def _object(self, request: Request) -> dict[str, Any]:
        data = await _read(request, self._limits)
        return body.parse(data, self._limits.depth) if data.strip() else {}


async def _read(request: Request, limits: Limits, has_binary: bool = False) -> bytes:
    """Return a body, of which no more is held than the limit: that of JSON, unless bytes follow it.

    Raises:
        RequestError: If it is longer (413), compressed (415), or does not come in time (408).
    """
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise RequestError(f"Content-Encoding: got {shown(encoding)}, wanted none", 415)
    most = limits.body_bytes if has_binary else min(limits.json_bytes, limits.body_bytes)
    too_long = RequestError(f"body: got more than {most} bytes, wanted at most that", 413)
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or len(length) > 18 or int(length) > most:
        raise too_long
    parts, total = [], 0
    try:
        with anyio.fail_after(limits.body_seconds):
            async for part in request.stream():
                total += len(part)
                if total > most:
                    raise too_long
                parts.append(part)
    except TimeoutError:
        raise RequestError(f"body: got {total} bytes in {limits.body_seconds:g} s, wanted all of it", 408) from None
    return b"".join(parts)


class _Observed:
    """Gives each request an id, and writes it to log and metrics when it is answered."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value.decode("latin-1") for key, value in scope["headers"] if key == b"x-request-id"), "")
        trace = Trace(given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex)
        scope["trace"] = trace
        started, status = time.perf_counter_ns(), 0

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", trace.request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, sent)
        finally:
            if trace.model is not None and status >= 400:
                self._service.metrics.failed(trace.model.name, trace.model.version)
            if self._service.settings.access_log:
                log(
                    "request",
                    method=scope["method"],
                    path=scope["path"],
                    status=status,
                    rows=trace.rows,
                    us={stage: round(us) for stage, us in trace.us.items()},
                    total_us=(time.perf_counter_ns() - started) // 1000,
                    request_id=trace.request_id,
                )


async def _refused(request: Request, error: Exception) -> Response:
    status = error.status if isinstance(error, RequestError) else 400
    headers = {"Connection": "close"} if status in CLOSING else {}
    return JSONResponse({"error": str(error)}, status, headers=headers)


async def _unrouted(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    got = f"{request.method} {shown(request.url.path)}"
    message = f"path: got {got}, which there is not, wanted one of the documented paths"
    return JSONResponse({"error": message}, error.status_code, headers=error.headers)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=400)  # nobody reads it: the client has gone while it sent


async def _failed(request: Request, error: Exception) -> Response:
    log("error", request_id=request.scope["trace"].request_id, error=f"{type(error).__name__}: {error}")
    return JSONResponse({"error": "server: got an error of its own, which its log names"}, 500)


def _content_policy(page: str) -> str:
    """Return a policy under which a browser runs the page's own script and style and nothing else."""

    def hashed(tag: str) -> str:
        content = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        return f"'sha256-{b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"

    own = f"script-src {hashed('script')}; style-src {hashed('style')}; connect-src 'self'; img-src data:"
    return f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
