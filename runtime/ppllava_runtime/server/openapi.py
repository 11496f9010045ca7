"""GET /openapi.json: what can be asked of this server, and every way in which it answers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from ppllava_runtime.server.page import Asset
from ppllava_runtime.server.replies import (
    ChatCompletion,
    ChatCompletionChunk,
    ErrorBody,
    Health,
    ModelCard,
    ModelList,
)
from ppllava_runtime.server.schema import ChatCompletionRequest

_REQUESTS: tuple[type[BaseModel], ...] = (ChatCompletionRequest,)
_REPLIES: tuple[type[BaseModel], ...] = (
    ChatCompletion,
    ChatCompletionChunk,
    ErrorBody,
    Health,
    ModelCard,
    ModelList,
)
_FAILURES = {
    400: "It has no meaning, its media cannot be read, or it takes too long to answer; the message "
    "says what to change.",
    401: "There is no key, or a wrong one.",
    403: "It comes from another place than it may.",
    404: "There is no such model, or no media of that uuid: send them again.",
    408: "It took too long to arrive.",
    413: "It is larger than the server takes.",
    429: "Too much is asked at once.",
    500: "The server failed; its log says why.",
    503: "The server is not ready yet, is about to end, has too many connections, or lost what "
    "decodes media.",
}
_RETRY_AFTER = {
    "retry-after": {
        "description": "Seconds after which to try again.",
        "schema": {"type": "integer", "minimum": 1},
    }
}
# Of a stream, this is one event.
_EVENT = {
    "type": "object",
    "description": "With `stream`: pieces of the answer or, where answering fails half-way, the "
    "failure; then, as the last one, [DONE].",
    "required": ["data"],
    "properties": {
        "data": {
            "if": {"const": "[DONE]"},
            "then": {"type": "string"},
            "else": {
                "type": "string",
                "contentMediaType": "application/json",
                "contentSchema": {
                    "anyOf": [
                        {"$ref": "#/components/schemas/ChatCompletionChunk"},
                        {"$ref": "#/components/schemas/ErrorBody"},
                    ]
                },
            },
        }
    },
}
_ANY = (400, 403, 408, 413, 503)
_WITH_KEY = (*_ANY, 401)


def openapi(model: str, *, needs_key: bool) -> Asset:
    """The document of a server as it is sent: to make it takes long enough to hold others up.

    Args:
        model: See `document`.
        needs_key: See `document`.
    """
    told = json.dumps(document(model, needs_key=needs_key), separators=(",", ":"))
    return Asset.of(told.encode("ascii"), "application/json")


def document(model: str, *, needs_key: bool) -> dict[str, Any]:
    """The document of a server.

    Args:
        model: What requests have to name as their model.
        needs_key: Whether a key is asked for.
    """
    modes: list[tuple[type[BaseModel], JsonSchemaMode]] = [
        *((kind, "validation") for kind in _REQUESTS),
        *((kind, "serialization") for kind in _REPLIES),
    ]
    _, found = models_json_schema(modes, ref_template="#/components/schemas/{model}")
    schemas = found["$defs"]
    schemas["ChatCompletionRequest"]["properties"]["model"]["enum"] = [model]
    components: dict[str, Any] = {"schemas": schemas}
    if needs_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    security: list[dict[str, list[str]]] = [{"key": []}] if needs_key else []
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "PPLLaVA Edge",
            "description": "Answers questions about videos and pictures, as OpenAI's chat "
            "completions do. Live video is asked about over the WebSocket /v1/video/chat/stream.",
            "version": version("ppllava-edge"),
        },
        "paths": _paths(model, security),
        "components": components,
    }


def _paths(model: str, security: list[dict[str, list[str]]]) -> dict[str, Any]:
    completion = _operation(
        "An answer, whole or as a stream.",
        _json("The answer.", "ChatCompletion"),
        (*_WITH_KEY, 404, 429, 500),
        security,
    )
    completion["requestBody"] = {
        "required": True,
        "content": {"application/json": {"schema": _ref("ChatCompletionRequest")}},
    }
    completion["responses"]["200"]["content"]["text/event-stream"] = {"schema": _EVENT}
    name = {
        "name": "model",
        "in": "path",
        "required": True,
        "schema": {"type": "string", "enum": [model]},
    }
    one_model = _operation(
        "The model that is served.",
        _json("The model.", "ModelCard"),
        (*_WITH_KEY, 404),
        security,
    )
    this = _operation(
        "This document.",
        _content("The document.", "application/json", {"type": "object"}),
        _ANY,
    )
    this["responses"]["304"] = {"description": "It is the one that If-None-Match names."}
    return {
        "/v1/chat/completions": {"post": completion},
        "/v1/models": {
            "get": _operation(
                "The models that are served: one.",
                _json("The models.", "ModelList"),
                _WITH_KEY,
                security,
            )
        },
        "/v1/models/{model}": {"get": one_model | {"parameters": [name]}},
        "/health": {
            "get": _operation("Whether the server is there.", _json("It is.", "Health"), _ANY)
        },
        "/health/ready": {
            "get": _operation("Whether the server answers.", _json("It does.", "Health"), _ANY)
        },
        "/metrics": {
            "get": _operation(
                "What the server counts, for Prometheus.",
                _content("The counts.", "text/plain", {"type": "string"}),
                (*_WITH_KEY, 500),
                security,
            )
        },
        "/openapi.json": {"get": this},
    }


def _operation(
    summary: str,
    answer: Mapping[str, Any],
    failures: Iterable[int],
    security: list[dict[str, list[str]]] | None = None,
) -> dict[str, Any]:
    responses: dict[str, Any] = {"200": answer}
    for status in sorted(failures):
        failure = _json(_FAILURES[status], "ErrorBody")
        if status in (429, 503):
            failure["headers"] = _RETRY_AFTER
        responses[str(status)] = failure
    operation: dict[str, Any] = {"summary": summary, "responses": responses}
    return operation | ({"security": security} if security else {})


def _json(description: str, schema: str) -> dict[str, Any]:
    return _content(description, "application/json", _ref(schema))


def _content(description: str, media_type: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {media_type: {"schema": schema}}}


def _ref(schema: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{schema}"}
