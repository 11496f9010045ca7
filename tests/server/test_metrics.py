"""Each metric moves when what it counts happens, and by how much."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Origin

from load import Withheld, alone, picture, question
from ppllava_runtime.server.metrics import CONTENT_TYPE
from server_process import Serve, Served, served

Samples = dict[str, float]
STAGES = ("decode", "preprocess", "vision", "text", "pool", "prefill", "generate")


def scraped(server: Served) -> Samples:
    """Every sample by its name and labels."""
    answer = httpx2.get(f"{server.url}/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == CONTENT_TYPE
    samples = {}
    for family in text_string_to_metric_families(answer.text):
        assert family.name.startswith("ppllava_")
        assert family.documentation.endswith(".")
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            samples[f"{sample.name}{{{labels}}}"] = sample.value
    return samples


def moved(server: Served, before: Samples) -> Samples:
    """What is not as it was."""
    now = scraped(server)
    return {name: value - before.get(name, 0) for name, value in now.items()
            if value != before.get(name, 0)}  # fmt: skip


def ask(server: Served, number: int) -> dict[str, dict[str, float]]:
    fields = question(server.model, number)
    answer = httpx2.post(f"{server.url}/v1/chat/completions", json=fields, timeout=30)
    assert answer.status_code == 200, answer.text
    told: dict[str, dict[str, float]] = answer.json()
    return told


@pytest.fixture(scope="module")
def quiet(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server that nobody else asks."""
    with served(bundle, tmp_path_factory.mktemp("quiet")) as it:
        yield it


def test_an_answer_moves_what_it_cost(quiet: Served) -> None:
    before = scraped(quiet)
    told = [ask(quiet, 1), ask(quiet, 1)]
    after = moved(quiet, before)
    extras = [answer["x_ppllava"] for answer in told]

    def total(*path: str) -> float:
        values: list[float] = []
        for extra in extras:
            found: object = extra
            for name in path:
                assert isinstance(found, dict)
                found = found[name]
            assert isinstance(found, int | float)
            values.append(found)
        return sum(values)

    for stage in STAGES:
        assert after[f"ppllava_stage_seconds_count{{stage={stage}}}"] == 2
        seconds = after.get(f"ppllava_stage_seconds_sum{{stage={stage}}}", 0.0)
        assert seconds == pytest.approx(total("milliseconds", stage) / 1000, abs=1e-5)
    assert after["ppllava_frames_total{step=decoded}"] == total("frames", "decoded") > 0
    assert after["ppllava_frames_total{step=encoded}"] == total("frames", "encoded") > 0
    assert after["ppllava_frames_total{step=sampled}"] == total("frames", "sampled") == 2
    assert after["ppllava_visual_tokens_total{pooling=before}"] == total("tokens", "before")
    assert after["ppllava_visual_tokens_total{pooling=after}"] == total("tokens", "after")
    used = [answer["usage"] for answer in told]
    prompts = sum(usage["prompt_tokens"] for usage in used)
    answers = sum(usage["completion_tokens"] for usage in used)
    assert after["ppllava_decoder_tokens_total{part=prompt}"] == prompts
    assert after["ppllava_decoder_tokens_total{part=answer}"] == answers
    assert after["ppllava_media_total{cache=miss}"] == 1
    assert after["ppllava_media_total{cache=hit}"] == 1
    route = "/v1/chat/completions"
    assert after[f"ppllava_requests_total{{route={route},status=200}}"] == 2
    assert after[f"ppllava_request_seconds_count{{route={route}}}"] == 2
    assert after["ppllava_cache_bytes{}"] > 0
    assert "ppllava_media_failures_total{}" not in after


def test_what_runs_and_what_waits_is_seen(serve: Serve) -> None:
    with Withheld() as media:
        server = serve("--running", 1, "--queued", 1, "--private-host", media.host)
        before = scraped(server)
        fields = question(server.model, url=media.url)

        async def run() -> Samples:
            several = [asyncio.create_task(alone(server.port, fields)) for _ in range(3)]
            await asyncio.to_thread(media.wait_for, 1)
            done, _ = await asyncio.wait(several, timeout=20, return_when="FIRST_COMPLETED")
            assert [task.result().status for task in done] == [429]
            seen = await asyncio.to_thread(moved, server, before)
            media.release()
            assert sorted(reply.status for reply in await asyncio.gather(*several)) == [
                200, 200, 429,
            ]  # fmt: skip
            return seen

        during = asyncio.run(run())
    assert during["ppllava_requests_running{}"] == 1
    assert during["ppllava_requests_queued{}"] == 1
    assert during["ppllava_requests_total{route=/v1/chat/completions,status=429}"] == 1
    after = moved(server, before)
    assert "ppllava_requests_running{}" not in after
    assert "ppllava_requests_queued{}" not in after
    assert "ppllava_spool_bytes{}" not in after  # nothing is left of the files


def test_a_file_that_is_refused_is_counted(quiet: Served) -> None:
    before = scraped(quiet)
    # A picture that says it is 16,384 pixels wide, which is more than one may be.
    large = picture(0).replace(struct.pack(">II", 48, 32), struct.pack(">II", 16384, 8192))
    url = f"data:image/png;base64,{base64.b64encode(large).decode()}"
    fields = question(quiet.model, url=url)
    answer = httpx2.post(f"{quiet.url}/v1/chat/completions", json=fields)
    assert answer.status_code == 400, answer.text
    after = moved(quiet, before)
    assert after["ppllava_media_failures_total{}"] == 1
    assert after["ppllava_requests_total{route=/v1/chat/completions,status=400}"] == 1


def test_a_live_session_is_counted(quiet: Served) -> None:
    before = scraped(quiet)
    with connect(f"ws://127.0.0.1:{quiet.port}/v1/video/chat/stream") as session:
        config = {"type": "session.config", "model": quiet.model}
        session.send(json.dumps(config | {"seconds": 4, "fps": 1}))
        assert json.loads(session.recv(20))["type"] == "session.started"
        assert moved(quiet, before)["ppllava_live_sessions{}"] == 1
        for number in range(3):
            data = base64.b64encode(picture(number)).decode()
            session.send(json.dumps({"type": "video.frame", "data": data, "timestamp": number}))
        session.send(json.dumps({"type": "video.query", "text": "What is it?", "max_tokens": 4}))
        session.send(json.dumps({"type": "video.done"}))
        events = [json.loads(event) for event in session]
    assert events[-1]["type"] == "session.done", events
    after = moved(quiet, before)
    assert "ppllava_live_sessions{}" not in after
    route = "/v1/video/chat/stream"
    assert after[f"ppllava_requests_total{{route={route},status=101}}"] == 1
    assert after["ppllava_live_frames_total{fate=received}"] == 3
    done = sum(after.get(f"ppllava_live_frames_total{{fate={fate}}}", 0)
               for fate in ("dropped", "encoded"))  # fmt: skip
    assert done == 3
    assert after["ppllava_stage_seconds_count{stage=generate}"] == 1


def test_a_socket_that_is_refused_is_counted(quiet: Served) -> None:
    before = scraped(quiet)
    stream = f"ws://127.0.0.1:{quiet.port}/v1/video/chat/stream"
    with pytest.raises(InvalidStatus) as caught, connect(stream, origin=Origin("http://evil.it")):
        pass
    assert caught.value.response.status_code == 403
    assert caught.value.response.headers["x-content-type-options"] == "nosniff"
    after = moved(quiet, before)
    assert after["ppllava_requests_total{route=/v1/video/chat/stream,status=403}"] == 1


def test_a_socket_to_nowhere_is_counted(quiet: Served) -> None:
    before = scraped(quiet)
    for number in range(2):
        with pytest.raises(InvalidStatus), connect(f"ws://127.0.0.1:{quiet.port}/v2/{number}"):
            pass
    after = moved(quiet, before)
    assert after["ppllava_requests_total{route=other,status=404}"] == 2
    assert not any("v2" in name for name in after)


def test_names_of_others_making_are_not_kept(quiet: Served) -> None:
    before = scraped(quiet)
    for number in range(5):
        httpx2.get(f"{quiet.url}/nowhere/{number}")
        httpx2.get(f"{quiet.url}/v1/models/{number}")
    after = moved(quiet, before)
    assert after["ppllava_requests_total{route=other,status=404}"] == 5
    assert after["ppllava_requests_total{route=/v1/models/{model},status=404}"] == 5
    assert not any(re.search(r"nowhere|models/\d", name) for name in after)


def test_what_runs_here_is_told(quiet: Served) -> None:
    (name,) = (name for name in scraped(quiet) if name.startswith("ppllava_build_info"))
    assert f"model={quiet.model}" in name
    assert "device=cpu" in name
    assert Path(quiet.log).read_text() == ""
