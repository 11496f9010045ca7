"""Who gets in: keys, hosts, origins and sizes."""

from __future__ import annotations

import asyncio
import base64
import json
import select
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx2
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Origin, Subprotocol

from ppllava_runtime.server.app import create_app
from ppllava_runtime.server.settings import Settings
from server_process import Served, served

KEY, OTHER = "k" * 16, "another-key-of-somebody"
BODY_BYTES = 1 << 20
ROUTE = "/v1/chat/completions"
STREAM = "/v1/video/chat/stream"


@pytest.fixture(scope="module")
def locked(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server that wants a key, one of two."""
    folder = tmp_path_factory.mktemp("locked")
    keys = folder / "keys"
    keys.write_text(f"{KEY}\n{OTHER}\n")
    with served(bundle, folder, "--api-keys", keys, "--body-size", BODY_BYTES, key=KEY) as it:
        yield it


def _told(connection: socket.socket) -> bytes:
    """A response with one of our errors, or with as much as comes."""
    told = b""
    while b"}}" not in told and (piece := connection.recv(4096)):
        told += piece
    return told


def asked_raw(port: int, request: bytes) -> tuple[int, dict[str, object]]:
    """Status and error of a request as it stands."""
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(request)
        told = _told(connection)
    head, _, body = told.partition(b"\r\n\r\n")
    error = json.loads(body)["error"] if b'"error"' in body else {}
    return int(head.split()[1]), error


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (f"Bearer {KEY}", 200),
        (f"bearer   {OTHER}", 200),
        (None, 401),
        ("", 401),
        ("Bearer", 401),
        (f"Bearer {KEY}x", 401),
        (f"Bearer {KEY[:-1]}", 401),
        (f"Bearer {KEY} {KEY}", 401),
        (f"Basic {KEY}", 401),
        (KEY, 401),
        (f"Bearer {KEY}\n{OTHER}".replace("\n", ","), 401),
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/metrics"])
def test_a_key_opens(locked: Served, path: str, authorization: str | None, status: int) -> None:
    headers = {} if authorization is None else {"authorization": authorization}
    answer = httpx2.get(locked.url + path, headers=headers)
    assert answer.status_code == status
    if status == 401:
        error = answer.json()["error"]
        assert error["code"] in ("missing_api_key", "invalid_api_key")
        assert error["type"] == "authentication_error"
        assert answer.headers["www-authenticate"] == "Bearer"
        assert KEY[:8] not in answer.text


@pytest.mark.parametrize("path", ["/", "/health", "/health/ready"])
def test_what_is_no_secret_needs_no_key(locked: Served, path: str) -> None:
    assert httpx2.get(locked.url + path).status_code == 200


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1//models", "/v1/%6dodels", "/%761/models", "/v1/../v1/models"]
)
def test_no_spelling_of_a_path_goes_past_the_key(locked: Served, path: str) -> None:
    status, _ = asked_raw(locked.port, f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
    assert status in (401, 404)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:1234", 200),
        ("127.0.0.1:99", 200),
        ("[::1]:8000", 200),
        ("[::1]", 200),
        ("127.0.0.2:8000", 200),
        ("127.255.255.254", 200),
        ("[0:0:0:0:0:0:0:1]", 200),
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("localhost.evil.example", 403),
        ("localhost:8000@evil.example", 403),
        ("127.0.0.1.nip.io", 403),
        ("127.1", 403),
        ("127.0.0.1.evil.com", 403),
        ("127.evil.com", 403),
        ("127.0.0.1.", 403),
        ("127.0.0.01", 403),
        ("2130706433", 403),
        ("0x7f.1", 403),
        ("128.0.0.1", 403),
        ("[::2]", 403),
        ("[::1%25lo]", 403),
        ("::1", 403),
        ("localhost:x", 403),
        ("", 403),
    ],
)
def test_without_keys_only_the_loopback_is_answered(server: Served, host: str, status: int) -> None:
    request = f"GET /v1/nowhere HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
    got, error = asked_raw(server.port, request)
    assert got == (404 if status == 200 else 403)
    assert error["code"] == ("not_found" if status == 200 else "host_not_allowed")


def test_with_keys_any_name_is_good(locked: Served) -> None:
    headers = {"host": "media.example:99", "authorization": f"Bearer {KEY}"}
    assert httpx2.get(f"{locked.url}/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("host", "origin", "is_ours"),
    [
        ("localhost:8000", "http://localhost:8000", True),
        ("localhost", "http://localhost", True),
        ("localhost", "https://localhost", True),  # behind a proxy that speaks TLS
        ("localhost:443", "https://localhost", True),
        ("LocalHost:8000", "http://localhost:8000", True),
        ("localhost:8000", "http://localhost:8001", False),
        ("localhost:8000", "http://localhost", False),
        ("localhost:8000", "http://127.0.0.1:8000", False),
        ("localhost:8000", "http://evil.example", False),
        ("localhost:8000", "http://evil.example@localhost:8000", False),
        ("localhost:8000", "null", False),
        ("localhost:8000", "", False),
        ("localhost:8000", "file://", False),
    ],
)
def test_a_browser_must_come_from_our_page(
    server: Served, host: str, origin: str, is_ours: bool
) -> None:
    request = (
        f"POST /v1/nowhere HTTP/1.1\r\nHost: {host}\r\nOrigin: {origin}\r\n"
        "Content-Length: 0\r\n\r\n"
    )
    status, error = asked_raw(server.port, request.encode())
    expected = (404, "not_found") if is_ours else (403, "origin_not_allowed")
    assert (status, error["code"]) == expected


def encoded(key: str) -> Subprotocol:
    return Subprotocol("key." + base64.urlsafe_b64encode(key.encode()).decode().rstrip("="))


@pytest.mark.parametrize("offered", [None, "wrong-key-of-nobody", ""])
def test_a_socket_wants_a_key(locked: Served, offered: str | None) -> None:
    protocols = [] if offered is None else [Subprotocol("ppllava"), encoded(offered)]
    with pytest.raises(InvalidStatus) as refused:
        connect(f"ws://127.0.0.1:{locked.port}{STREAM}", subprotocols=protocols or None)
    response = refused.value.response
    assert response.status_code == 401
    assert response.body is not None
    assert json.loads(response.body)["error"]["type"] == "authentication_error"
    assert locked.log.read_text() == ""


def test_a_socket_takes_a_key_as_a_browser_sends_it(locked: Served) -> None:
    url = f"ws://127.0.0.1:{locked.port}{STREAM}"
    with connect(url, subprotocols=[Subprotocol("ppllava"), encoded(KEY)]) as socket_:
        assert socket_.subprotocol == "ppllava"  # and the key is not sent back
    with connect(url, additional_headers={"authorization": f"Bearer {OTHER}"}) as socket_:
        assert socket_.subprotocol is None


def test_a_socket_of_another_page_is_refused(server: Served) -> None:
    url = f"ws://127.0.0.1:{server.port}{STREAM}"
    with pytest.raises(InvalidStatus) as refused:
        connect(url, origin=Origin("http://evil.example"))
    assert refused.value.response.status_code == 403
    with connect(url, origin=Origin(f"http://127.0.0.1:{server.port}")):
        pass


@pytest.mark.parametrize("path", ["/nowhere", "/v1/models", "/v1/video/chat/stream/"])
def test_a_socket_to_anywhere_else_is_told_where_it_is(server: Served, path: str) -> None:
    with pytest.raises(InvalidStatus) as refused:
        connect(f"ws://127.0.0.1:{server.port}{path}")
    response = refused.value.response
    assert response.status_code == 404
    assert response.body is not None
    error = json.loads(response.body)["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "not_found")
    assert STREAM in error["message"]


def test_a_body_is_refused_by_its_stated_length(locked: Served) -> None:
    """At once: not a byte of it is there."""
    request = (
        f"POST {ROUTE} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {BODY_BYTES + 1}\r\n\r\n"
    )
    status, error = asked_raw(locked.port, request.encode())
    assert (status, error["code"]) == (413, "request_too_large")
    assert str(BODY_BYTES) in str(error["message"])


def test_a_body_is_refused_by_what_comes(locked: Served) -> None:
    """In chunks it states no length; the client that sends all of it first is told all the same."""
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    pieces = (b" " * 65536 for _ in range(2 * BODY_BYTES // 65536))
    answer = httpx2.post(locked.url + ROUTE, content=pieces, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


@pytest.mark.parametrize("piece_bytes", [BODY_BYTES, 1 << 15], ids=["one by one", "in turns"])
def test_bodies_together_are_bounded(locked: Served, piece_bytes: int) -> None:
    """Six that are nearly sent: four fit, and what they held is free again when they go.

    In turns, all six are half there when the first is refused: what it held has to be free while
    it is told so, or others are refused for it.
    """
    head = (
        f"POST {ROUTE} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {BODY_BYTES}\r\n\r\n"
    )
    sent = head.encode() + b" " * (BODY_BYTES - 1)
    several = [socket.create_connection(("127.0.0.1", locked.port), 10) for _ in range(6)]
    try:
        for start in range(0, len(sent), piece_bytes):
            for connection in several:
                # One that is refused takes no more for long.
                with suppress(ConnectionError):
                    if not select.select([connection], [], [], 0)[0]:
                        connection.sendall(sent[start : start + piece_bytes])
        refused: list[socket.socket] = []
        while len(refused) < 2:
            readable, _, _ = select.select(
                [one for one in several if one not in refused], [], [], 10
            )
            assert readable, "nobody was refused"
            refused += readable
        for connection in several:
            if connection not in refused:
                connection.sendall(b" ")
        answers = [_told(connection) for connection in several]
    finally:
        for connection in several:
            connection.close()
    busy = [answer for answer in answers if answer.startswith(b"HTTP/1.1 429 ")]
    assert len(busy) == 2
    assert all(b"retry-after: " in answer and b"server_busy" in answer for answer in busy)
    # Of white space: the four were read to their ends.
    assert sum(answer.startswith(b"HTTP/1.1 400 ") for answer in answers) == 4
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    body = b" " * (BODY_BYTES - 1)
    statuses = {httpx2.post(locked.url + ROUTE, content=body, headers=headers).status_code
                for _ in range(6)}  # fmt: skip
    assert statuses == {400}  # of white space; nobody is busy any more


def test_every_response_says_what_a_browser_needs(server: Served) -> None:
    for path in ("/", "/health", "/v1/models", "/v1/nowhere", "/metrics", "/openapi.json"):
        headers = httpx2.get(server.url + path).headers
        assert headers["x-content-type-options"] == "nosniff", path
        assert headers["content-security-policy"].startswith("default-src 'none'"), path
        assert headers["referrer-policy"] == "no-referrer", path
        assert "server" not in headers


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/v1/models/", 404, "model_not_found"),
        ("GET", "/health/", 404, "not_found"),
        ("POST", f"{ROUTE}/", 404, "not_found"),
        ("GET", "/v1/models/nothing", 404, "model_not_found"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", ROUTE, 405, "method_not_allowed"),
    ],
)
def test_every_refusal_is_an_error_of_openais(
    server: Served, method: str, path: str, status: int, code: str
) -> None:
    answer = httpx2.request(method, server.url + path)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_failure_inside_says_nothing_of_it(
    bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(bundle, Settings(spool=tmp_path))
    service = app.state.service

    def fail() -> float:
        raise ValueError("a secret of the inside")

    service.metrics.show("ppllava_broken", "It cannot be read.", fail)

    async def ask() -> httpx2.Response:
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get("/metrics")

    try:
        answer = asyncio.run(ask())
    finally:
        asyncio.run(service.close())
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "secret" not in answer.text
    assert "a secret of the inside" in caplog.text  # for who runs it
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (f"POST {ROUTE} HTTP/1.1\r\nHost: a\r\nContent-Length: {1 << 30}\r\n", 401),
        (f"POST {ROUTE} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n", 401),
        (f"POST /nowhere HTTP/1.1\r\nHost: a\r\nContent-Length: {BODY_BYTES}\r\n", 404),
        (f"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {1 << 30}\r\n", 413),
    ],
)
def test_a_body_that_is_not_wanted_is_not_taken(locked: Served, head: str, status: int) -> None:
    """The answer comes at once, and ends the connection: what is sent on and on finds nobody."""
    chunk = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
    with socket.create_connection(("127.0.0.1", locked.port), 10) as connection:
        connection.sendall(f"{head}\r\n".encode())
        told = b""
        while b"}}" not in told:
            told += (piece := connection.recv(4096))
            assert piece, told
        assert told.startswith(f"HTTP/1.1 {status} ".encode())
        assert b"\r\nconnection: close\r\n" in told
        num_taken = 0
        with pytest.raises(ConnectionError):
            while num_taken < 64:
                connection.sendall(chunk)
                num_taken += 1
    assert num_taken < 32  # what is forgotten, and what the kernel holds


def test_before_the_model_is_there_nothing_is_asked_of_it(bundle: Path, tmp_path: Path) -> None:
    app = create_app(bundle, Settings(spool=tmp_path))

    async def ask() -> list[httpx2.Response]:
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            paths = ("/health", "/health/ready", "/v1/models")
            told = [await client.get(path) for path in paths]
        await app.state.service.close()
        return told

    there, ready, models = asyncio.run(ask())
    assert there.status_code == 200
    for answer in (ready, models):
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
        assert int(answer.headers["retry-after"]) > 0
