"""Relevance over frames, as a picture or a video: where a question made the model look."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ppllava_engines.errors import StorageError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont, ImageFont

    Font = FreeTypeFont | ImageFont

SUFFIXES = (".png", ".mp4")

# Of the relevance of one video: below the first is cold, above the second as warm as can be.
_COLD_PERCENTILE, _WARM_PERCENTILE = 50.0, 99.5
_RAMP = ((24, 20, 68), (106, 23, 110), (187, 55, 84), (246, 125, 21), (252, 255, 164))
_STRENGTH = 0.75  # of the warmest spot's colour over the frame
_BACKGROUND, _INK, _FAINT_INK = (18, 18, 22), (240, 240, 240), (160, 160, 168)

_SHEET_WIDTH = 1280
_TILE_WIDTHS = (160, 420)
_MARGIN = 12
_VIDEO_FPS = 2  # frames that were sampled far apart want to be looked at one by one
_VIDEO_HEIGHTS = (240, 720)


def write_heatmap(
    path: str | Path,
    frames: NDArray[np.uint8],
    timestamps: NDArray[np.float64],
    relevance: NDArray[np.float32],
    question: str,
) -> None:
    """Writes the file `path`, whole or not at all.

    A .png shows all frames at once, a .mp4 one after the other. Colours are spread over the values
    of this video: from its median, cold, to its highest, warm.

    Args:
        path: Ends in .png or .mp4.
        frames: (T,H,W,3) uint8 RGB.
        timestamps: (T,) seconds.
        relevance: (T,h,w), in [-1,1].
        question: The title.

    Raises:
        UsageError: Another suffix.
        StorageError: The file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"heatmap {path}: expected a name that ends in {' or '.join(SUFFIXES)}")
    writer = _write_sheet if path.suffix.lower() == ".png" else _write_film
    low, high = np.percentile(relevance, (_COLD_PERCENTILE, _WARM_PERCENTILE))
    with _replaced(path) as partial:
        writer(partial, frames, timestamps, relevance, (float(low), float(high)), question)


def overlay(
    frame: NDArray[np.uint8],
    relevance: NDArray[np.float32],
    scale: tuple[float, float],
    size: tuple[int, int],
) -> Image:
    """One frame at `size` (width, height), warm where relevance (h,w) is high on `scale`."""
    from PIL import Image

    low, high = scale
    picture = Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)
    smooth = Image.fromarray(relevance.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
    warmth = ((np.asarray(smooth) - low) / max(high - low, 1e-9)).clip(0, 1)[..., None]
    pixels = np.asarray(picture, np.float32)
    # Cold parts lose some colour and light, so that warm ones stand out on any picture.
    grey = pixels @ np.array([0.299, 0.587, 0.114], np.float32)
    calm = 0.7 * (0.5 * pixels + 0.5 * grey[..., None])
    share = _STRENGTH * warmth**0.8
    base = calm + (pixels - calm) * warmth
    mixed = base * (1 - share) + _colours(warmth[..., 0]) * share
    return Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))


def _colours(warmth: NDArray[Any]) -> NDArray[np.float64]:
    """(…,3) RGB in [0,255] for warmth (…) in [0,1]."""
    steps = np.linspace(0, 1, len(_RAMP))
    return np.stack([np.interp(warmth, steps, channel) for channel in zip(*_RAMP, strict=True)], -1)


def _write_sheet(
    path: Path,
    frames: NDArray[np.uint8],
    timestamps: NDArray[np.float64],
    relevance: NDArray[np.float32],
    scale: tuple[float, float],
    question: str,
) -> None:
    from PIL import Image, ImageDraw

    count, height, width, _ = frames.shape
    columns = min(count, max(2, math.ceil(math.sqrt(count * height / width * 1.6))))
    rows = -(-count // columns)
    narrow, wide = _TILE_WIDTHS
    tile_width = max(narrow, min(wide, (_SHEET_WIDTH - _MARGIN) // columns - _MARGIN))
    tile = (tile_width, max(1, round(tile_width * height / width)))
    title_font, font = _font(22), _font(14)

    sheet_width = max(columns * (tile[0] + _MARGIN) + _MARGIN, 480)
    title = _wrapped(question, title_font, sheet_width - 2 * _MARGIN)
    top = _MARGIN + 28 * len(title) + 8
    row_height = tile[1] + 24
    bottom = top + rows * row_height
    sheet = Image.new("RGB", (sheet_width, bottom + 44), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for line, text in enumerate(title):
        draw.text((_MARGIN, _MARGIN + 28 * line), text, _INK, title_font)
    for i in range(count):
        x = _MARGIN + i % columns * (tile[0] + _MARGIN)
        y = top + i // columns * row_height
        sheet.paste(overlay(frames[i], relevance[i], scale, tile), (x, y))
        draw.text((x, y + tile[1] + 3), _clock(timestamps[i]), _FAINT_INK, font)
    _draw_legend(sheet, (_MARGIN, bottom + 8), scale, font)
    sheet.save(path, format="PNG")


def _draw_legend(
    sheet: Image, corner: tuple[int, int], scale: tuple[float, float], font: Font
) -> None:
    from PIL import Image, ImageDraw

    draw = ImageDraw.Draw(sheet)
    x, y = corner
    for text in (f"relevance {scale[0]:.3f}", None, f"{scale[1]:.3f}"):
        if text is None:
            ramp = np.tile(_colours(np.linspace(0, 1, 160)), (14, 1, 1)).astype(np.uint8)
            sheet.paste(Image.fromarray(ramp), (x, y + 3))
            x += 160 + 8
        else:
            draw.text((x, y), text, _FAINT_INK, font)
            x += math.ceil(draw.textlength(text, font)) + 8


def _write_film(
    path: Path,
    frames: NDArray[np.uint8],
    timestamps: NDArray[np.float64],
    relevance: NDArray[np.float32],
    scale: tuple[float, float],
    question: str,
) -> None:
    import av
    from PIL import Image, ImageDraw

    _, height, width, _ = frames.shape
    least, most = _VIDEO_HEIGHTS
    tall = min(max(height, least), most)
    picture = (2 * round(width * tall / height / 2), 2 * round(tall / 2))
    font = _font(16)
    title = _wrapped(question, font, picture[0] - 2 * _MARGIN)
    top = 2 * ((2 * _MARGIN + 22 * len(title)) // 2)
    size = (picture[0], top + picture[1] + 36)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=_VIDEO_FPS, options={"crf": "18"})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for i in range(len(frames)):
            page = Image.new("RGB", size, _BACKGROUND)
            draw = ImageDraw.Draw(page)
            for line, text in enumerate(title):
                draw.text((_MARGIN, _MARGIN + 22 * line), text, _INK, font)
            page.paste(overlay(frames[i], relevance[i], scale, picture), (0, top))
            _draw_legend(page, (_MARGIN, top + picture[1] + 8), scale, font)
            clock = _clock(timestamps[i])
            right = size[0] - _MARGIN - math.ceil(draw.textlength(clock, font))
            draw.text((right, top + picture[1] + 8), clock, _INK, font)
            frame = av.VideoFrame.from_ndarray(np.asarray(page), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, _VIDEO_FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(float(seconds) * 100), 6000)
    return f"{minutes}:{rest / 100:05.2f}"


def _font(size: int) -> Font:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _wrapped(text: str, font: Font, width: int, most: int = 3) -> list[str]:
    """The text in at most `most` lines of `width` pixels; what is too long ends in an ellipsis."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > most:
        lines = [*lines[: most - 1], f"{lines[most - 1]} …"]
    return lines


@contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place when the block ends well, and goes when not."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".partial")
    except OSError as error:
        raise StorageError(f"heatmap {path}: cannot write there ({error.strerror})") from error
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o666 & ~_umask())
        partial.replace(path)
    except OSError as error:
        raise StorageError(f"heatmap {path}: cannot write it ({error})") from error
    finally:
        partial.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
