"""A picture is one by what is in the file, upright, and never a video of one frame."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ppllava_engines.errors import DataError, NotFoundError, StorageError
from ppllava_runtime.video import each_picture, read_clip
from tiny_videos import numbered_frames, read_number, write_video

FRAMES = numbered_frames(6)
PICTURES = [Image.fromarray(frame) for frame in FRAMES]


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    return exif


def animated(path: Path, **options: Any) -> Path:
    first, *others = (Image.fromarray(frame) for frame in FRAMES)
    first.save(path, save_all=True, append_images=others, duration=100, **options)
    return path


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("a.png", "PNG"),
        ("a.webp", "WEBP"),
        ("a.gif", "GIF"),
        ("a.bmp", "BMP"),
        ("a.tiff", "TIFF"),
        ("no_suffix", "PNG"),
        ("wrong.mp4", "PNG"),
        ("wrong.JPG", "WEBP"),
    ],
)
def test_is_one_frame(tmp_path: Path, name: str, format: str) -> None:
    PICTURES[5].save(tmp_path / name, format, **{"WEBP": {"lossless": True}}.get(format, {}))
    clip = read_clip(tmp_path / name, 8)
    assert clip.info.is_still
    assert (clip.info.num_frames, clip.info.damage) == (1, None)
    assert [read_number(frame) for frame in clip.frames] == [5]
    if format != "GIF":
        np.testing.assert_array_equal(clip.frames, FRAMES[5:])


@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG", "TIFF", "MPO"])
@pytest.mark.parametrize("name", ["picture", "picture.mp4"])
def test_is_turned_upright_by_exif(tmp_path: Path, format: str, name: str) -> None:
    PICTURES[5].save(tmp_path / name, format, exif=turned())
    (frame,) = read_clip(tmp_path / name, 8).frames
    assert frame.shape == (96, 64, 3)
    assert read_number(np.rot90(frame)) == 5


def test_keeps_colours_of_other_modes(tmp_path: Path) -> None:
    for mode in ("L", "P", "RGBA", "CMYK", "1"):
        path = tmp_path / f"{mode}.tiff"
        PICTURES[5].convert(mode).save(path)
        (frame,) = read_clip(path, 1).frames
        expected = PICTURES[5].convert(mode).convert("RGB")
        np.testing.assert_array_equal(frame, np.asarray(expected))


@pytest.mark.parametrize(
    ("name", "order"), [("a.png", "<u2"), ("little.tiff", "<u2"), ("big.tiff", ">u2")]
)
def test_of_16_bits_is_that_of_8(tmp_path: Path, name: str, order: str) -> None:
    grey = np.asarray(PICTURES[5].convert("L"))
    deep = (grey.astype(np.uint16) << 8 | 0x7F).astype(order)
    Image.fromarray(deep).save(tmp_path / name, exif=turned())
    Image.fromarray(grey).save(tmp_path / "8.png", exif=turned())
    with Image.open(tmp_path / name) as image:
        assert image.mode == ("I;16B" if order == ">u2" else "I;16")
    frame, expected = (read_clip(tmp_path / file, 1).frames for file in (name, "8.png"))
    assert np.ptp(expected) > 100
    np.testing.assert_array_equal(frame, expected)


def test_of_floats_goes_from_0_to_1(tmp_path: Path) -> None:
    grey = np.asarray(PICTURES[5].convert("L"))
    path = tmp_path / "f.tiff"
    Image.fromarray(grey.astype(np.float32) / 255).save(path)
    (frame,) = read_clip(path, 1).frames
    np.testing.assert_array_equal(frame, np.repeat(grey[..., None], 3, 2))
    for worst in (1.5, -0.1, np.nan):
        values = np.full((4, 4), 0.5, np.float32)
        values[1, 2] = worst
        Image.fromarray(values).save(path)
        with pytest.raises(DataError, match="greys are floats, expected from 0 to 1"):
            read_clip(path, 1)


def test_of_32_bits_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 70_000, np.int32)).save(tmp_path / "i.tiff")
    with pytest.raises(DataError, match="greys are integers of 32 bits: save it with 8 or 16"):
        read_clip(tmp_path / "i.tiff", 1)


def test_of_many_pixels_is_read_without_a_warning_and_of_too_many_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    PICTURES[5].save(tmp_path / "a.png")
    pixels = 96 * 64
    # Warnings are errors in these tests.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels - 1)
    assert read_clip(tmp_path / "a.png", 1).frames.shape == (1, 64, 96, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels // 2 - 1)
    with pytest.raises(DataError) as caught:
        read_clip(tmp_path / "a.png", 1)
    assert str(caught.value) == (
        f"image {tmp_path / 'a.png'}: it has more than the {pixels - 2} pixels that are read: make "
        "it smaller"
    )


@pytest.mark.parametrize("name", ["a.gif", "a.png", "gif"])
def test_that_moves_is_a_video(tmp_path: Path, name: str) -> None:
    path = animated(tmp_path / name, format="PNG" if name.endswith("png") else "GIF")
    clip = read_clip(path, 6)
    assert not clip.info.is_still
    assert clip.info.num_frames == 6
    assert [read_number(frame) for frame in clip.frames] == list(clip.info.indices)


@pytest.mark.parametrize("name", ["a.webp", "a.tiff"])
def test_of_which_there_are_more_in_the_file_says_so(tmp_path: Path, name: str) -> None:
    path = animated(tmp_path / name)
    clip = read_clip(path, 6)
    assert [read_number(frame) for frame in clip.frames] == [0]
    assert clip.info.damage == f"image {path}: only the first of its 6 pictures is looked at"


def test_and_others_keep_their_sizes(tmp_path: Path) -> None:
    paths = [tmp_path / "0.png", animated(tmp_path / "1.webp", lossless=True)]
    PICTURES[0].save(paths[0], exif=turned())
    found = list(each_picture(paths))
    pictures, notes = zip(*found, strict=True)
    assert [picture.shape for picture in pictures] == [(96, 64, 3), (64, 96, 3)]
    np.testing.assert_array_equal(pictures[1], FRAMES[0])
    assert notes == (None, f"image {paths[1]}: only the first of its 6 pictures is looked at")
    with pytest.raises(DataError, match=r"clip\.mp4: not an image, give a video alone"):
        list(each_picture([paths[0], write_video(tmp_path / "clip.mp4", FRAMES)]))
    with pytest.raises(NotFoundError, match=r"image .*none\.png: no such file"):
        list(each_picture([tmp_path / "none.png"]))
    with pytest.raises(DataError, match=r"image .*: not an image that can be read"):
        list(each_picture([tmp_path]))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.webp", "a.tiff"])
@pytest.mark.parametrize("kept", [0.05, 0.5, 0.9])
def test_that_is_cut_off_is_one_sentence(tmp_path: Path, name: str, kept: float) -> None:
    PICTURES[5].save(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: round(len(data) * kept)])
    with pytest.raises(DataError, match=rf"^(image|video) .*{name}: "):
        read_clip(tmp_path / name, 1)


def test_by_name_only_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"image .*: not an image that can be read"):
        read_clip(path, 1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_without_permission(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    PICTURES[0].save(path)
    path.chmod(0)
    with pytest.raises(StorageError, match=r"image .*: no permission to read it"):
        read_clip(path, 1)
