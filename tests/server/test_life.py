"""From loading to draining, and what may die on the way."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest

from cuda_double import CudaDouble
from load import Withheld, head, picture, question
from ppllava_engines.bundle import Bundle
from ppllava_runtime.decoders.caching import CachingDecoder
from ppllava_runtime.server.service import Service
from ppllava_runtime.server.settings import Settings
from server_process import Serve, Served, ended, start
from tensorrt_double import install, write_plans

SECONDS = 20.0


def children(pid: int) -> list[int]:
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended since
            found += [int(child) for child in path.read_text().split()]
    return found


def links(server: Served) -> list[str]:
    """What the descriptors of the server are of."""
    found = []
    for path in Path(f"/proc/{server.process.pid}/fd").iterdir():
        with suppress(OSError):  # it was closed since
            found.append(str(path.readlink()))
    return found


def wires(server: Served) -> int:
    """How many sockets of the server are not to a client."""
    lines = Path("/proc/net/unix").read_text().splitlines()[1:]
    local = {f"socket:[{line.split()[6]}]" for line in lines}
    return len(local.intersection(links(server)))


def reads_media(server: Served) -> bool:
    """Whether the server has a file of a request open; the folder of all of them it always has."""
    spool = server.log.parent / "spool"
    return any(spool in Path(link).parent.parents for link in links(server))


def wait_until_closed(server: Served) -> None:
    """Returns once it does not listen any more."""
    end = time.monotonic() + SECONDS
    with suppress(ConnectionRefusedError):
        while True:
            with suppress(ConnectionResetError):  # it was in the queue in that moment
                socket.create_connection(("127.0.0.1", server.port), SECONDS).close()
            assert time.monotonic() < end


def ask(server: Served, number: int) -> dict[str, object]:
    answer = httpx2.post(
        f"{server.url}/v1/chat/completions", json=question(server.model, number), timeout=30
    )
    assert answer.status_code == 200, answer.text
    fields: dict[str, object] = answer.json()
    return fields


def test_says_when_it_is_ready_and_what_memory_it_takes(server: Served) -> None:
    assert httpx2.get(f"{server.url}/health/ready").json() == {"status": "ready"}
    assert httpx2.get(f"{server.url}/health").json() == {"status": "ok"}
    for part in ("model ", "cache up to 1024 MiB", "4 KV caches of up to ",
                 "bodies of up to 256 MiB", "2 live windows", "6 decoders of up to "):  # fmt: skip
        assert part in server.memory


@pytest.mark.parametrize("device", ["cpu", "tensorrt"])
def test_the_memory_of_an_answer_is_that_of_its_cache(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    if device == "tensorrt":
        bundle = shutil.copytree(bundle, tmp_path / "planned")
        write_plans(Bundle.open(bundle), tmp_path / "graphs", pool_node="inputs")
        install(monkeypatch, CudaDouble())
    service = Service.open(bundle, Settings(spool=tmp_path / "spool"), device, 1, "hidden")
    try:
        decoder = service.assistant.decoder
        assert isinstance(decoder, CachingDecoder)
        cache: Any = decoder._new_cache(decoder.max_positions)
        held = [cache._buffer.num_bytes] if device == "tensorrt" else [
            buffer.nbytes for buffer in cache._buffers.values()
        ]  # fmt: skip
        assert service.kv_bytes == sum(held) == 256 << 10
        # One of a size that is seen in the line: there is a cache for each that is answered.
        few = dataclasses.replace(service.settings, num_running=3, num_live=0, body_bytes=5 << 20)
        monkeypatch.setattr(service, "settings", few)
        monkeypatch.setattr(type(decoder), "max_positions", 40 << 10)
        line = service.describe_memory()
    finally:
        service.threads.shutdown()
        service.sandbox.close()
        service.spool.close()
    for part in ("3 KV caches of up to 20 MiB", "bodies of up to 20 MiB", "3 decoders of up to "):
        assert part in line


def test_is_asked_too_early(bundle: Path, tmp_path: Path) -> None:
    """While it loads it says so, until the moment in which it does not any more."""
    log, spool = tmp_path / "log", tmp_path / "spool"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = start(bundle, log, "--spool", spool, "--port", port)
    try:
        told: list[httpx2.Response] = []
        end = time.monotonic() + 60
        while not told or told[-1].status_code != 200:
            assert time.monotonic() < end, log.read_text()
            assert process.poll() is None, log.read_text()
            try:
                told.append(httpx2.get(f"http://127.0.0.1:{port}/health/ready"))
                models = httpx2.get(f"http://127.0.0.1:{port}/v1/models")
            except httpx2.TransportError:
                continue
            if told[-1].status_code == 200:
                assert models.status_code == 200
        for answer in told[:-1]:
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "not_ready"
            assert int(answer.headers["retry-after"]) > 0
    finally:
        process.terminate()
        assert ended(process) == 0


def test_a_model_that_cannot_be_loaded_ends_the_server(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    damaged = copy / "decoder" / "model.onnx"
    damaged.write_bytes(bytes(damaged.stat().st_size))
    process = start(copy, tmp_path / "log", "--spool", tmp_path / "spool")
    assert ended(process) == 65
    told = (tmp_path / "log").read_text()
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert "model.onnx" in told


def test_sigterm_ends_it_and_leaves_nothing(serve: Serve) -> None:
    server = serve()
    ask(server, 0)
    several = children(server.process.pid)
    assert several  # what decodes
    assert server.stop() == 0
    assert list((server.log.parent / "spool").iterdir()) == []
    end = time.monotonic() + SECONDS
    while any(Path(f"/proc/{pid}").exists() for pid in several):
        assert time.monotonic() < end
    assert server.log.read_text() == ""


def test_sigterm_before_it_is_ready_leaves_nothing_either(bundle: Path, tmp_path: Path) -> None:
    """At once: its folder is there before the model is, and before it listens to requests."""
    spool = tmp_path / "spool"
    process = start(bundle, tmp_path / "log", "--spool", spool)
    end = time.monotonic() + 60
    while not (spool.exists() and any(spool.iterdir())):
        assert time.monotonic() < end
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    told = process.stdout.read()
    assert not told or told.startswith("listening on ")  # where this test stood still meanwhile
    assert ended(process) == 0, (tmp_path / "log").read_text()
    assert list(spool.iterdir()) == []
    assert (tmp_path / "log").read_text() == ""


def test_while_it_drains_it_takes_nothing_new(serve: Serve) -> None:
    """On a connection that it still owes an answer it says that it is about to end."""
    with Withheld() as media:
        server = serve("--private-host", media.host)
        body = json.dumps(question(server.model, url=media.url)).encode()
        owed = socket.create_connection(("127.0.0.1", server.port), SECONDS)
        # A head without a body is no request yet: it will be one when it is too late.
        late = socket.create_connection(("127.0.0.1", server.port), SECONDS)
        with owed, late:
            late.sendall(head(len(body)) + body[:1])
            owed.sendall(head(len(body)) + body)
            media.wait_for(1)
            server.process.send_signal(signal.SIGTERM)
            wait_until_closed(server)
            late.sendall(body[1:])
            assert late.recv(65536).startswith(b"HTTP/1.1 503 ")
            media.release()
            assert owed.recv(65536).startswith(b"HTTP/1.1 200 ")
        assert server.process.wait(SECONDS) == 0


def test_a_drain_has_an_end(serve: Serve) -> None:
    with Withheld() as media:
        server = serve("--private-host", media.host, "--drain-timeout", 0.5)
        body = json.dumps(question(server.model, url=media.url)).encode()
        with socket.create_connection(("127.0.0.1", server.port), SECONDS) as connection:
            connection.sendall(head(len(body)) + body)
            media.wait_for(1)
            assert server.stop() == 0


def test_a_second_signal_ends_it_at_once(serve: Serve) -> None:
    with Withheld() as media:
        server = serve("--private-host", media.host)
        body = json.dumps(question(server.model, url=media.url)).encode()
        with socket.create_connection(("127.0.0.1", server.port), SECONDS) as connection:
            connection.sendall(head(len(body)) + body)
            media.wait_for(1)
            server.process.send_signal(signal.SIGTERM)
            wait_until_closed(server)  # the first one has been heard
            assert server.stop(signal.SIGTERM) == -signal.SIGTERM
        assert list((server.log.parent / "spool").iterdir()) == []


def test_a_decoder_that_dies_fails_one_request(serve: Serve) -> None:
    """All processes that decode are killed while files come in: some fail, and then none does."""
    server = serve("--cache-size", "1K")  # nothing is remembered
    expected = ask(server, 1)["choices"]
    stop, statuses = threading.Event(), list[int]()

    def keep_asking() -> None:
        number = 2
        with httpx2.Client(base_url=server.url, timeout=30) as client:
            while not stop.is_set():
                fields = question(server.model, number := number + 1)
                statuses.append(client.post("/v1/chat/completions", json=fields).status_code)

    asking = [threading.Thread(target=keep_asking) for _ in range(3)]
    for thread in asking:
        thread.start()
    pause = threading.Event()  # of one who looks again and again, and lets others work
    for _ in range(5):
        end = time.monotonic() + 60
        while not (several := children(server.process.pid)):
            assert time.monotonic() < end
            pause.wait(0.01)
        num_before = len(statuses)
        for zygote in several:
            for pid in (*children(zygote), zygote):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        while len(statuses) < num_before + 6:
            assert time.monotonic() < end
            pause.wait(0.01)
    stop.set()
    for thread in asking:
        thread.join(SECONDS)
    assert set(statuses) <= {200, 400, 503}
    assert len(statuses) - statuses.count(200) <= 5 * len(asking)
    assert ask(server, 1)["choices"] == expected
    assert server.stop() == 0


def test_a_decoder_that_is_gone_is_no_fault_of_the_file(serve: Serve) -> None:
    """What forks ends before it has forked: the request may be sent again, and the log says why."""
    server = serve("--cache-size", "1K")
    ask(server, 0)
    (zygote,) = children(server.process.pid)
    os.kill(zygote, signal.SIGSTOP)  # it takes nothing up
    with httpx2.Client(base_url=server.url, timeout=30) as client, ThreadPoolExecutor(1) as pool:
        num_before = wires(server)
        asking = pool.submit(client.post, "/v1/chat/completions", json=question(server.model, 1))
        end = time.monotonic() + SECONDS
        try:
            # The file is open before both wires are there, and until all was handed over.
            while wires(server) < num_before + 2:
                assert time.monotonic() < end
            while reads_media(server):
                assert time.monotonic() < end
        finally:
            os.kill(zygote, signal.SIGKILL)
        answer = asking.result()
    assert answer.status_code == 503, answer.text
    assert answer.json()["error"]["code"] == "decoder_unavailable"
    assert int(answer.headers["retry-after"]) > 0
    assert "was ended from outside" in server.log.read_text()
    metrics = httpx2.get(f"{server.url}/metrics").text
    assert "\nppllava_media_failures_total 0" in metrics
    assert "\nppllava_sandbox_broken 0" in metrics
    ask(server, 1)


def test_a_spool_left_behind_is_removed(serve: Serve, tmp_path: Path) -> None:
    server = serve("--spool", tmp_path)
    (folder,) = tmp_path.iterdir()
    (folder / "file").write_bytes(picture(0))
    server.process.kill()
    server.process.wait(SECONDS)
    assert folder.exists()
    serve("--spool", tmp_path)
    assert not folder.exists()
