"""What the OpenAPI document says is what the server does, whatever is sent."""

from __future__ import annotations

import asyncio
import base64
import io
from pathlib import Path
from typing import Any

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from PIL import Image
from schemathesis import BaseSchema, Case, GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from ppllava_runtime.server import openapi
from ppllava_runtime.server.app import create_app
from ppllava_runtime.server.openapi import document
from ppllava_runtime.server.settings import Settings
from server_process import Served

# What a request is refused for by its form alone: of one that the document allows, no code of these
# may come. By its meaning (a URL that leads nowhere, two questions in a row) it may be refused.
FORM = ("invalid_json", "invalid_type", "missing_field", "unknown_field", "invalid_content_type")
# By their meaning, and the word that says so.
REFUSABLE = (
    ("response_format", "schema"),
    ("mm_processor_kwargs", "kernel"),
    ("mm_processor_kwargs", "tokens"),
)
SECONDS = 60.0  # no response takes that long
MANY = settings(max_examples=200, suppress_health_check=list(HealthCheck))


def of(mode: GenerationMode) -> BaseSchema:
    # The name of the model is that of the fixture `bundle`.
    schema = schemathesis.openapi.from_dict(document("bundle", needs_key=False))
    schema.config.generation.update(modes=[mode])
    return schema


@pytest.fixture(scope="module")
def picture() -> str:
    file = io.BytesIO()
    Image.new("RGB", (24, 16), (200, 40, 40)).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def takes_something(found: Any) -> bool:
    """Whether something can be wrong with what an operation is sent."""
    raw = found.operation.definition.raw
    return "requestBody" in raw or "parameters" in raw


allowed, broken = of(GenerationMode.POSITIVE), of(GenerationMode.NEGATIVE)


@allowed.parametrize()
@MANY
def test_what_the_document_allows_is_answered_as_it_says(case: Case[Any], server: Served) -> None:
    excluded: list[Any] = [positive_data_acceptance]
    response = case.call_and_validate(
        base_url=server.url, excluded_checks=excluded, timeout=SECONDS
    )
    error = response.json()["error"] if response.status_code == 400 else None
    assert error is None or error["code"] not in FORM, error


@allowed.include(method="POST").parametrize()
@MANY
def test_a_question_with_all_kinds_of_fields_is_answered(
    case: Case[Any], server: Served, picture: str
) -> None:
    """What is generated has hardly ever messages that have a meaning together: here they have."""
    shown = {"type": "image_url", "image_url": {"url": picture}}
    asked = {"role": "user", "content": [shown, {"type": "text", "text": "What is it?"}]}
    body: Any = case.body
    body = {
        name: value
        for name, value in body.items()
        if name not in ("media_io_kwargs", "max_tokens", "stream_options")
    } | {"messages": [asked], "max_completion_tokens": 4}
    if not body.get("response_format"):
        body.pop("mm_processor_kwargs", None)  # hardly ever of a window that fits
    case.body = body
    excluded: list[Any] = [positive_data_acceptance]
    response = case.call_and_validate(
        base_url=server.url, excluded_checks=excluded, timeout=SECONDS
    )
    if response.status_code != 200:  # of a schema that none can follow, or a window that fits not
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, None), response.text
        assert error["code"] in ("invalid_value", "unsupported"), error
        words = [word for name, word in REFUSABLE if body.get(name)]
        assert any(word in error["message"] for word in words), error


@broken.include(func=takes_something).parametrize()
@MANY
def test_what_it_does_not_allow_is_refused(case: Case[Any], server: Served) -> None:
    response = case.call_and_validate(base_url=server.url, timeout=SECONDS)
    assert 400 <= response.status_code < 500


def test_the_document_is_of_every_route(server: Served) -> None:
    found = httpx2.get(f"{server.url}/openapi.json").json()
    assert found == document(server.model, needs_key=False)
    assert {path: list(operations) for path, operations in found["paths"].items()} == {
        "/v1/chat/completions": ["post"],
        "/v1/models": ["get"],
        "/v1/models/{model}": ["get"],
        "/health": ["get"],
        "/health/ready": ["get"],
        "/metrics": ["get"],
        "/openapi.json": ["get"],
    }


def test_the_document_is_sent_to_who_has_it_not(server: Served) -> None:
    url = f"{server.url}/openapi.json"
    whole = httpx2.get(url)
    assert whole.headers["content-type"] == "application/json"
    again = httpx2.get(url, headers={"if-none-match": whole.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert httpx2.get(url, headers={"if-none-match": '"another"'}).content == whole.content


def test_the_document_is_made_once(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the application: to make it takes as long as many other responses together."""
    app = create_app(bundle, Settings(spool=tmp_path))

    def again(*_: object, **__: object) -> None:
        raise AssertionError("it is made again")

    monkeypatch.setattr(openapi, "models_json_schema", again)

    async def ask() -> httpx2.Response:
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            answer = await client.get("/openapi.json")
        await app.state.service.close()
        return answer

    assert asyncio.run(ask()).status_code == 200
