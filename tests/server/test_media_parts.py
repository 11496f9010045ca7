"""What a request shows: every kind of part, how it is sampled, how it is known again."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image

from server_process import Serve, Served
from tiny_videos import numbered_frames, write_audio, write_video

Ask = Callable[..., httpx2.Response]


def data_url(content: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def png(colour: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (24, 16), (colour, 90, 40)).save(file, "PNG")
    return file.getvalue()


def image(colour: int = 0, **fields: object) -> dict[str, Any]:
    url = data_url(png(colour), "image/png")
    return {"type": "image_url", "image_url": {"url": url}, **fields}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of 4 s at 5 frames a second."""
    folder: Path = tmp_path_factory.mktemp("videos")
    return write_video(folder / "clip.mp4", numbered_frames(20), fps=5)


@pytest.fixture(scope="module")
def video(clip: Path) -> str:
    return data_url(clip.read_bytes(), "video/mp4")


def asking(server: Served, key: str = "") -> Ask:
    def ask(*parts: dict[str, Any], **fields: Any) -> httpx2.Response:
        content = [*parts, {"type": "text", "text": "What is it?"}]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 3}
        headers = {"authorization": f"Bearer {key}"} if key else {}
        url = f"{server.url}/v1/chat/completions"
        return httpx2.post(
            url, json={"model": server.model} | body | fields, headers=headers, timeout=60
        )

    return ask


@pytest.fixture
def ask(server: Served) -> Ask:
    return asking(server)


def told(response: httpx2.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()["x_ppllava"]
    return found


def refused(response: httpx2.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    found: dict[str, Any] = response.json()["error"]
    return found


def test_all_ways_to_send_a_video_are_the_same(ask: Ask, clip: Path, video: str) -> None:
    sent = base64.b64encode(clip.read_bytes()).decode()
    ways: list[dict[str, Any]] = [
        {"type": "video_url", "video_url": {"url": video}},
        {"type": "input_video", "input_video": {"data": sent, "format": "mp4"}},
        {"type": "input_video", "input_video": {"data": video}},
    ]
    found = [ask(way) for way in ways]
    answers = {response.json()["choices"][0]["message"]["content"] for response in found}
    assert len(answers) == 1
    for response in found:
        (seen,) = told(response)["media"]
        assert seen["sha256"] == hashlib.sha256(clip.read_bytes()).hexdigest()
        assert (seen["kind"], seen["uuid"], seen["damage"]) == ("video", None, None)
        assert len(seen["timestamps"]) == told(response)["frames"]["sampled"]
    assert [told(response)["cached"] for response in found] == [False, True, True]


def test_many_who_ask_about_the_same_at_once_have_it_encoded_once(ask: Ask, video: str) -> None:
    part = {"type": "video_url", "video_url": {"url": video}, "num_frames": 7}
    with ThreadPoolExecutor(4) as pool:
        found = [told(response) for response in pool.map(ask, [part] * 4)]
    assert sorted(one["frames"]["encoded"] for one in found) == [0, 0, 0, 7]
    assert sorted(one["cached"] for one in found) == [False, True, True, True]


def test_frames_of_a_video_are_one(ask: Ask) -> None:
    frames = [data_url(png(colour), "image/png") for colour in (10, 60, 110, 160)]
    (seen,) = told(ask({"type": "video", "frames": frames, "fps": 2.0}))["media"]
    hashes = "".join(hashlib.sha256(png(colour)).hexdigest() for colour in (10, 60, 110, 160))
    assert (seen["kind"], seen["timestamps"]) == ("video", [0.0, 0.5, 1.0, 1.5])
    assert seen["sha256"] == hashlib.sha256(hashes.encode()).hexdigest()
    fewer = told(ask({"type": "video", "frames": frames, "fps": 2, "num_frames": 2}))
    assert fewer["frames"]["sampled"] == 2


def test_pictures_are_seen_together(ask: Ask) -> None:
    found = told(ask(image(10), image(200)))
    assert [seen["kind"] for seen in found["media"]] == ["image", "image"]
    assert [seen["timestamps"] for seen in found["media"]] == [[], []]
    assert found["media"][0]["sha256"] == hashlib.sha256(png(10)).hexdigest()
    assert found["frames"]["sampled"] == 2


def test_without_anything_to_see_there_is_nothing_to_tell(ask: Ask) -> None:
    found = told(ask())
    assert (found["media"], found["cached"], found["relevance"]) == ([], False, None)
    assert found["frames"] == {"decoded": 0, "sampled": 0, "encoded": 0}


def test_the_relevance_is_told_as_it_was_asked_for(ask: Ask, video: str) -> None:
    part = {"type": "video_url", "video_url": {"url": video}, "num_frames": 3}
    assert told(ask(part))["relevance"] is None
    curve = told(ask(part, x_ppllava={"relevance": "curve"}))
    found = curve["relevance"]
    assert found["heatmaps"] is None
    assert len(found["curve"]) == 3
    assert all(-1 <= value <= 1 for value in found["curve"])
    assert found["timestamps"] == curve["media"][0]["timestamps"]
    drawn = told(ask(part, x_ppllava={"relevance": "heatmaps"}))["relevance"]
    assert drawn["curve"] == found["curve"]
    for url in drawn["heatmaps"]:
        head, _, content = url.partition(",")
        assert head == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(content))) as picture:
            assert picture.mode == "RGBA"
    assert len(drawn["heatmaps"]) == 3


def test_pooling_is_as_it_was_asked_for(ask: Ask, video: str) -> None:
    part = {"type": "video_url", "video_url": {"url": video}, "num_frames": 4}
    own = told(ask(part))["tokens"]
    few = told(ask(part, mm_processor_kwargs={"num_tokens": 2}))["tokens"]
    assert few["before"] == own["before"]
    assert few["after"] <= 2 < own["after"] <= own["before"]
    window = {"kernel": [4, 1, 1], "stride": [4, 1, 1]}
    assert told(ask(part, mm_processor_kwargs=window))["tokens"]["after"] == own["before"] // 4
    error = refused(ask(part, mm_processor_kwargs={"kernel": [400, 1, 1]}))
    assert "does not fit" in error["message"]


# Of one second of video there is one frame by fps 1, two by fps 2 and so on.
@pytest.mark.parametrize(
    ("inside", "beside", "general", "sampled"),
    [
        ({"num_frames": 2}, {"num_frames": 3}, {"num_frames": 4}, 2),
        ({}, {"num_frames": 3}, {"num_frames": 4}, 3),
        ({}, {}, {"num_frames": 4}, 4),
        ({"fps": 1}, {"fps": 2}, {}, 4),
        ({}, {"fps": 0.5}, {"fps": 2}, 2),
        ({}, {}, {"fps": 1}, 4),
        ({"fps": 1}, {}, {"num_frames": 3}, 3),  # each of the two by itself
        ({"num_frames": 2}, {}, {"fps": 0.25}, 1),
    ],
)
def test_what_is_nearer_to_the_video_decides_on_its_sampling(
    ask: Ask,
    video: str,
    inside: dict[str, Any],
    beside: dict[str, Any],
    general: dict[str, Any],
    sampled: int,
) -> None:
    part = {"type": "video_url", "video_url": {"url": video} | inside} | beside
    found = told(ask(part, media_io_kwargs={"video": general}))
    assert found["frames"]["sampled"] == sampled


def test_pictures_are_known_again_by_all_their_uuids(ask: Ask) -> None:
    first = told(ask(image(5, uuid="left"), image(6, uuid="right")))
    named = [{"type": "image_url", "image_url": None, "uuid": name} for name in ("left", "right")]
    again = told(ask(*named))
    assert (again["cached"], again["media"]) == (True, first["media"])
    for others in (named[:1], named[::-1]):
        assert refused(ask(*others), 404)["code"] == "media_not_found"
    assert "all or none" in refused(ask(named[0], image(6, uuid="right")))["message"]


def test_the_same_is_told_of_what_is_known_again(ask: Ask, video: str) -> None:
    file = io.BytesIO()
    pages = [Image.new("RGB", (24, 16), (colour, 90, 40)) for colour in (0, 50)]
    pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:])
    url = data_url(file.getvalue(), "image/tiff")
    first = told(ask(image(3, uuid="whole"), image(uuid="pages") | {"image_url": {"url": url}}))
    named = [{"type": "image_url", "uuid": name} for name in ("whole", "pages")]
    assert told(ask(*named))["media"] == first["media"]
    damages = [seen["damage"] for seen in first["media"]]
    assert damages[0] is None
    assert damages[1].startswith("image messages[0].content[1]: only the first of its 2 pictures")
    for part, content in (
        ({"type": "video_url", "num_frames": 3}, {"video_url": {"url": video}}),
        ({"type": "video", "fps": 4}, {"frames": [url, data_url(png(9), "image/png")]}),
    ):
        part["uuid"] = "told again"
        (seen,) = told(ask(part | content))["media"]
        again = told(ask(part))
        assert (again["cached"], again["media"]) == (True, [seen])
        assert (seen["kind"], seen["uuid"]) == ("video", "told again")
        assert seen["timestamps"]


def test_another_sampling_is_not_remembered(ask: Ask, video: str) -> None:
    def part(url: str | None, num_frames: int) -> dict[str, Any]:
        inside = {"url": url, "uuid": "sampled", "num_frames": num_frames}
        return {"type": "video_url", "video_url": inside}

    told(ask(part(video, 2)))
    assert told(ask(part(None, 2)))["cached"] is True
    error = refused(ask(part(None, 3)), 404)
    assert (error["code"], error["param"]) == ("media_not_found", "messages[0].content[0]")
    assert "send it again" in error["message"]


def test_a_name_is_of_what_was_sent_last(ask: Ask) -> None:
    first = told(ask(image(31, uuid="name")))["media"]
    second = told(ask(image(32, uuid="name")))["media"]
    assert first != second
    assert told(ask({"type": "image_url", "image_url": None, "uuid": "name"}))["media"] == second


def test_tenants_share_neither_names_nor_memories(serve: Serve) -> None:
    keys = [f"a-key-of-tenant-{i}" for i in range(2)]
    one = serve(env={"PPLLAVA_API_KEYS": " ".join(keys)}, key=keys[0])
    ask, other = (asking(one, key) for key in keys)
    told(ask(image(7, uuid="mine")))
    named = {"type": "image_url", "image_url": None, "uuid": "mine"}
    assert told(ask(named))["cached"] is True
    assert refused(other(named), 404)["code"] == "media_not_found"
    assert told(other(image(7)))["cached"] is False
    assert told(ask(image(7)))["cached"] is True


@pytest.mark.parametrize(
    "content", [b"nothing that could be seen", b"", png()[:40]], ids=["text", "empty", "cut"]
)
def test_what_cannot_be_read_is_named_by_its_place(ask: Ask, content: bytes) -> None:
    error = refused(ask(image(), image(1) | {"image_url": {"url": data_url(content, "image/png")}}))
    assert error["code"] in ("invalid_media", "media_refused")
    assert error["param"] == "messages[0].content[1]"
    assert "messages[0].content[1]" in error["message"]
    assert "/" not in error["message"]  # of the server's own folders


def test_a_frame_that_cannot_be_read_is_named_too(ask: Ask) -> None:
    frames = [data_url(png(), "image/png"), data_url(b"?", "image/png")]
    error = refused(ask({"type": "video", "frames": frames, "fps": 1}))
    assert error["param"] == "messages[0].content[0].frames[1]"


def test_sound_alone_is_no_video(ask: Ask, tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    write_audio(path)
    url = data_url(path.read_bytes(), "video/mp4")
    error = refused(ask({"type": "video_url", "video_url": {"url": url}}))
    assert error["param"] == "messages[0].content[0]"


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("http://127.0.0.1:1/", "media_not_allowed"),
        ("file:///etc/hostname", "media_not_allowed"),
        ("ftp://example.org/a.mp4", "media_not_allowed"),
        ("nothing", "invalid_url"),
        ("data:video/mp4;base64,%%%", "invalid_url"),
    ],
)
def test_a_url_that_may_not_be_opened_is_named_by_its_place(ask: Ask, url: str, code: str) -> None:
    error = refused(ask({"type": "video_url", "video_url": {"url": url}}))
    assert (error["code"], error["param"]) == (code, "messages[0].content[0]")


def test_a_file_of_an_allowed_folder_is_seen(serve: Serve, clip: Path) -> None:
    ask = asking(serve("--media-root", clip.parent))
    url = f"file://{clip}"
    found = told(ask({"type": "video_url", "video_url": {"url": url}, "num_frames": 2}))
    assert found["media"][0]["sha256"] == hashlib.sha256(clip.read_bytes()).hexdigest()
    assert refused(ask({"type": "video_url", "video_url": {"url": "file:///etc/hostname"}}))
