"""The application: its routes, and its life from loading to draining."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator
from http import HTTPStatus
from pathlib import Path

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from ppllava_engines.memory_layout import MemoryKind
from ppllava_runtime.server import metrics, page
from ppllava_runtime.server.completions import chat_completions
from ppllava_runtime.server.errors import ApiError, error_response
from ppllava_runtime.server.gate import Gate
from ppllava_runtime.server.live_socket import live_socket
from ppllava_runtime.server.openapi import openapi
from ppllava_runtime.server.protocol import HEADERS
from ppllava_runtime.server.service import Service
from ppllava_runtime.server.settings import Settings

_STREAM = "/v1/video/chat/stream"
_Names = tuple[tuple[re.Pattern[str], str], ...]


def create_app(
    bundle: Path,
    settings: Settings | None = None,
    *,
    device: str = "cpu",
    threads: int | None = None,
    memory: MemoryKind = "hidden",
) -> Starlette:
    """The whole server as an application of ASGI; its lifespan loads the model.

    Args:
        bundle: The exported model.
        settings: See there; None is the defaults.
        device: See `Assistant`.
        threads: See `Assistant`.
        memory: See `Assistant`.

    Raises:
        DataError, IncompatibleError, NotFoundError, UsageError: See `Assistant.open`.
        StorageError: No folder for media can be made.
    """
    service = Service.open(bundle, settings or Settings(), device, threads, memory)
    return app_of(service)


def app_of(service: Service) -> Starlette:
    """The application around a service that is there."""
    routes = _routes(service)
    names = tuple(
        (route.path_regex, route.path_format)
        for route in routes
        if isinstance(route, Route | WebSocketRoute)
    )
    app = Starlette(
        # The last one is not among the names: else it would be that of all that is nowhere.
        routes=[*routes, WebSocketRoute("/{path:path}", _no_socket)],
        middleware=[
            Middleware(_Ledger, service=service, names=names),
            Middleware(Gate, service=service),
        ],
        exception_handlers={
            HTTPException: _http_error,
            ApiError: error_response,
        },
        lifespan=_lifespan,
    )
    app.state.service = service
    app.router.redirect_slashes = False  # a redirect would have no body that says anything
    return app


def _routes(service: Service) -> list[BaseRoute]:
    document = openapi(service.model_id, needs_key=bool(service.settings.api_keys))
    return [
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/models", _models, methods=["GET"]),
        Route("/v1/models/{model:path}", _model, methods=["GET"]),
        Route("/health", _health, methods=["GET"]),
        Route("/health/ready", _ready, methods=["GET"]),
        Route("/metrics", _metrics, methods=["GET"]),
        Route("/openapi.json", document.answer, methods=["GET"]),
        WebSocketRoute(_STREAM, live_socket),
        *page.page_routes(),
    ]


@contextlib.asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    """Loads the model while /health/ready already answers, and puts everything away at the end."""
    service: Service = app.state.service
    service.loading = asyncio.create_task(service.load())
    try:
        yield
    finally:
        service.drain()
        await service.close()


async def _models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_card(request.app.state.service)]})


async def _model(request: Request) -> Response:
    service, asked = request.app.state.service, request.path_params["model"]
    if asked != service.model_id:
        raise ApiError(
            404,
            f"model {asked!r}: there is no such model here, expected {service.model_id!r}",
            code="model_not_found",
            param="model",
        )
    return JSONResponse(_card(service))


def _card(service: Service) -> dict[str, object]:
    return {
        "id": service.model_id,
        "object": "model",
        "created": service.created,
        "owned_by": "ppllava-edge",
    }


async def _health(_: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def _ready(request: Request) -> Response:
    request.app.state.service.check_ready()
    return JSONResponse({"status": "ready"})


async def _metrics(request: Request) -> Response:
    shown = request.app.state.service.metrics.render()
    return Response(shown, headers={"content-type": metrics.CONTENT_TYPE})


async def _no_socket(websocket: WebSocket) -> None:
    """What Starlette would refuse without a word."""
    error = ApiError(
        404,
        f"route {websocket.scope['path']!r}: there is no WebSocket here, expected {_STREAM!r}",
        code="not_found",
    )
    await error.response()(websocket.scope, websocket.receive, websocket.send)


async def _http_error(request: Request, error: Exception) -> Response:
    """What Starlette refuses by itself, in OpenAI's words."""
    assert isinstance(error, HTTPException)
    status, path = error.status_code, request.scope["path"]
    message = {
        404: f"route {path!r}: there is nothing here, expected one of those in /openapi.json",
        405: f"route {path!r}: {request.method} has no meaning here, see /openapi.json",
    }.get(status, f"route {path!r}: {error.detail}")
    code = HTTPStatus(status).phrase.lower().replace(" ", "_")
    response = ApiError(status, message, code=code).response()
    response.headers.update(error.headers or {})
    return response


class _Ledger:
    """Counts responses, adds the headers that all of them have, and answers where nobody could."""

    def __init__(self, app: ASGIApp, service: Service, names: _Names) -> None:
        self._app = app
        self._metrics = service.metrics
        self._names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self._app(scope, receive, self._counting(scope, send))
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, has_begun, is_counted = time.perf_counter(), False, False
        num_left: int | None = None  # bytes of the response, where it says how many it has
        status = 499  # nobody waited for the response

        def count() -> None:
            nonlocal is_counted
            if not is_counted:
                is_counted = True
                told = scope.get("state", {}).get("refused", status)
                self._metrics.responded(self._route(scope), told, time.perf_counter() - began)

        async def noting(message: Message) -> None:
            nonlocal has_begun, status, num_left
            if message["type"] == "http.response.start":
                has_begun, status = True, message["status"]
                headers = MutableHeaders(scope=message)
                length = headers.get("content-length")
                num_left = None if length is None else int(length)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            else:
                num_left = None if num_left is None else num_left - len(message.get("body", b""))
                if num_left == 0 or not message.get("more_body", False):
                    count()  # before its last word, so that who has that finds it counted
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception as error:
            if has_begun:  # half an answer must not look like a whole one
                raise
            await ApiError.of(error).response()(scope, receive, noting)
        finally:
            count()

    def _counting(self, scope: Scope, send: Send) -> Send:
        """Counts how a WebSocket is answered: accepted, though maybe for no session, or not."""

        async def counting(message: Message) -> None:
            if message["type"] == "websocket.accept":
                self._metrics.responded(self._route(scope), 101)
            elif message["type"] == "websocket.http.response.start":
                self._metrics.responded(self._route(scope), message["status"])
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        return counting

    def _route(self, scope: Scope) -> str:
        # Names of others' making would be as many as they like.
        path = scope["path"]
        return next((name for regex, name in self._names if regex.match(path)), "other")
