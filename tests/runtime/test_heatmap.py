"""Heatmaps are files that show the warm spot where it is, or are not there at all."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ppllava_engines.errors import StorageError, UnavailableError, UsageError
from ppllava_runtime import Assistant
from ppllava_runtime.heatmap import each_overlay, overlay, write_heatmap
from ppllava_runtime.memory import thumbnails
from ppllava_runtime.video import read_clip
from tiny_videos import numbered_frames, write_video

FRAMES = numbered_frames(5)
CAPTIONS = [f"{i}:00.00" for i in range(5)]
RELEVANCE = np.random.default_rng(0).normal(0.1, 0.01, (5, 4, 6)).astype(np.float32)
RELEVANCE[:, 1, 4] = 0.3


def write(path: Path, question: str = "Where is it?") -> None:
    write_heatmap(path, [*FRAMES], CAPTIONS, [*RELEVANCE], question)


def test_a_picture_shows_every_frame(tmp_path: Path) -> None:
    write(tmp_path / "map.png", "Where is the circle, " * 40)
    with Image.open(tmp_path / "map.png") as picture:
        assert picture.format == "PNG"
        assert picture.mode == "RGB"
        assert picture.width > 5 * 160


def test_a_film_shows_one_frame_after_the_other(tmp_path: Path) -> None:
    write(tmp_path / "map.mp4")
    clip = read_clip(tmp_path / "map.mp4", 5)
    assert clip.info.num_frames == 5
    assert clip.info.fps == 2
    assert clip.info.damage is None


def test_the_spot_is_warm_and_the_rest_is_not() -> None:
    grey = np.full((40, 60, 3), 128, np.uint8)
    pixels = np.asarray(overlay(grey, RELEVANCE[0], (0.1, 0.3), (60, 40))).astype(int)
    redness = pixels[..., 0] - pixels[..., 2]
    assert redness[15, 45] > 60
    assert abs(redness[:, :30]).max() < 20
    assert pixels[:, :30].mean() < 100


def opened(png: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(png)) as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGBA")
        return np.asarray(picture)


def test_layers_show_the_spot_and_nothing_else() -> None:
    layers = [opened(png) for png in each_overlay([*RELEVANCE])]
    assert len(layers) == 5
    for pixels in layers:
        height, width, _ = pixels.shape
        scale = height // 4
        assert (height, width) == (4 * scale, 6 * scale)
        assert scale >= 4
        alpha = pixels[..., 3]
        middle = (scale + scale // 2, 4 * scale + scale // 2)
        assert alpha[middle] > 150
        assert (alpha == 0).mean() > 0.3
        assert alpha[:, : 3 * scale].mean() < 20
        red, _, blue, _ = (int(value) for value in pixels[middle])
        assert red - blue > 60
        # Smooth: no step between neighbours is a patch's.
        assert np.abs(np.diff(alpha.astype(int), axis=1)).max() < 100


def test_layers_have_one_scale_for_all_frames() -> None:
    faint = RELEVANCE.copy()
    faint[1:, 1, 4] = 0.14
    first, *others = (opened(png)[..., 3].max() for png in each_overlay([*faint]))
    assert first > 180
    assert max(others) < first / 2
    # Laid over a frame, a layer is as warm as in the file.
    low, high = np.percentile(faint, (50, 99.5))
    grey = np.full((32, 48, 3), 128, np.uint8)
    drawn = np.asarray(overlay(grey, faint[0], (low, high), (48, 32))).astype(float)
    layer = opened(each_overlay([*faint])[0]).astype(float)
    assert layer.shape[:2] == (32, 48)
    warmest = np.unravel_index(layer[..., 3].argmax(), (32, 48))
    share = layer[warmest][3] / 255
    mixed = 128 * (1 - share) + layer[warmest][:3] * share
    np.testing.assert_allclose(drawn[warmest], mixed, atol=2)


def test_layers_of_what_is_the_same_everywhere_are_empty() -> None:
    for pixels in map(opened, each_overlay([np.full((4, 6), 0.2, np.float32)] * 2)):
        assert pixels[..., 3].max() == 0
    assert each_overlay([]) == []


def test_an_answer_gives_its_curve_and_its_layers(bundle: Path, tmp_path: Path) -> None:
    assistant = Assistant.open(bundle)
    path = write_video(tmp_path / "clip.mp4", numbered_frames(12))
    answer = assistant.watch(path, 5).ask("Where is it?", max_new_tokens=1)
    np.testing.assert_allclose(answer.curve(), answer.relevance.mean((1, 2)), rtol=1e-5)
    assert all(type(value) is float for value in answer.curve())
    assert answer.overlays() == each_overlay([*answer.relevance])
    assert len(answer.thumbnails) == len(answer.timestamps) == 5
    assert answer.timestamps[0] < answer.timestamps[-1]

    Image.fromarray(numbered_frames(1, 96, 48)[0]).save(tmp_path / "a.png")
    tiled = assistant.watch(tmp_path / "a.png").ask("Where is it?", max_new_tokens=1)
    assert len(tiled.relevance) > 1 == len(tiled.curve()) == len(tiled.overlays())
    nothing = assistant.ask("Where?", max_new_tokens=1)
    assert (nothing.curve(), nothing.overlays(), nothing.thumbnails) == ([], [], ())
    assert len(nothing.timestamps) == 0


def test_relevance_that_is_the_same_everywhere_is_cold(tmp_path: Path) -> None:
    flat = np.full_like(RELEVANCE, 0.2)
    write_heatmap(tmp_path / "map.png", [*FRAMES], CAPTIONS, [*flat], "Nothing?")
    assert (tmp_path / "map.png").is_file()


@pytest.mark.parametrize("name", ["map.png", "map.mp4"])
def test_is_replaced_whole_or_not_at_all(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    path.write_bytes(b"before")

    def fail(*_: object) -> None:
        raise RuntimeError("half-way")

    with monkeypatch.context() as patch:
        patch.setattr("ppllava_runtime.heatmap._draw_legend", fail)
        with pytest.raises(RuntimeError, match="half-way"):
            write(path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
    write(path)
    assert len(path.read_bytes()) > 1000
    assert list(tmp_path.iterdir()) == [path]


def test_refuses_other_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected a name that ends in \.png or \.mp4"):
        write(tmp_path / "map.gif")
    with pytest.raises(StorageError, match="cannot write there"):
        write(tmp_path / "nowhere" / "map.png")


@pytest.mark.parametrize("name", ["map.png", "map.mp4"])
def test_pictures_keep_their_proportions(tmp_path: Path, name: str) -> None:
    shapes = [(60, 90), (90, 60), (60, 90)]
    pictures = [np.full((*shape, 3), 255, np.uint8) for shape in shapes]
    maps = [np.zeros((2, 3), np.float32), np.zeros((6, 4), np.float32), RELEVANCE[0]]
    write_heatmap(tmp_path / name, pictures, ["a", "b", "c"], maps, "Which?")
    if name.endswith(".mp4"):  # boxes of 360×240
        (page,) = read_clip(tmp_path / name, 1, start=0.5, end=0.5).frames
        row, height = page[120], 240
    else:  # the second of two columns of 420×280
        with Image.open(tmp_path / name) as sheet:
            row, height = np.asarray(sheet)[180, 12 + 420 + 12 :], 280
    bright = row.mean(axis=1) > 60  # as a cold white picture is, and nothing around it
    assert abs(bright.sum() - height * 2 / 3) <= 4


@pytest.mark.parametrize("shape", [(1000, 1), (1, 1000)])
@pytest.mark.parametrize("name", ["map.png", "map.mp4"])
def test_a_line_is_drawn_in_a_box_of_sensible_size(
    tmp_path: Path, name: str, shape: tuple[int, int]
) -> None:
    pictures = thumbnails([np.full((*shape, 3), 255, np.uint8)])
    write_heatmap(tmp_path / name, pictures, [""], [RELEVANCE[0]], "Which?")
    if name.endswith(".mp4"):
        (page,) = read_clip(tmp_path / name, 1).frames
    else:
        with Image.open(tmp_path / name) as sheet:
            page = np.asarray(sheet)
    height, width, _ = page.shape
    assert max(height, width) <= 3000
    assert min(height, width) >= 100
    # Between title and legend there is the line alone, in the middle of its box.
    rows, columns = np.nonzero(page[40:-48].mean(axis=2) > 60)
    assert rows.size
    if shape[1] == 1:
        middle = 12 + 420 / 2 if name.endswith(".png") else width / 2
        assert np.abs(columns - middle).max() <= 4
    else:
        assert np.ptp(rows) <= 4


def test_a_film_that_cannot_be_made_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ppllava_runtime.heatmap._ENCODER", "none")
    with pytest.raises(UnavailableError, match="this PyAV has no encoder none: give a name that"):
        write(tmp_path / "map.mp4")
    monkeypatch.setattr("ppllava_runtime.heatmap._ENCODER", "png")  # takes no yuv420p
    with pytest.raises(StorageError, match=r"map\.mp4: cannot write it \(FFmpeg: "):
        write(tmp_path / "map.mp4")
    assert not [*tmp_path.iterdir()]


def test_thumbnails_are_small_and_keep_the_proportions() -> None:
    large, tall = np.zeros((1080, 1920, 3), np.uint8), np.zeros((481, 20, 3), np.uint8)
    shapes = [thumbnail.shape for thumbnail in thumbnails([large, tall, FRAMES[0]])]
    assert shapes == [(270, 480, 3), (480, 20, 3), FRAMES[0].shape]
