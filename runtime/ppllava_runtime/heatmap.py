"""Relevance over frames, as a picture or a video: where a question made the model look."""

from __future__ import annotations

import io
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ppllava_engines.errors import StorageError, UnavailableError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont, ImageFont

    Font = FreeTypeFont | ImageFont

SUFFIXES = (".png", ".mp4")

_Page = tuple[NDArray[np.uint8], str, NDArray[np.float32]]  # picture, caption, relevance

# Of all relevance together: below the first is cold, above the second as warm as can be.
_COLD_PERCENTILE, _WARM_PERCENTILE = 50.0, 99.5
_RAMP = ((24, 20, 68), (106, 23, 110), (187, 55, 84), (246, 125, 21), (252, 255, 164))
_STRENGTH = 0.75  # of the warmest spot's colour over the frame
_SWIFTNESS = 0.8  # below 1, by which what is lukewarm is seen sooner
_OVERLAY_SCALE = 8  # pixels a patch: what a browser makes of fewer is not smooth
_BACKGROUND, _INK, _FAINT_INK = (18, 18, 22), (240, 240, 240), (160, 160, 168)

_SHEET_WIDTH = 1280
_TILE_WIDTHS = (160, 420)
_MARGIN = 12
_VIDEO_FPS = 2  # frames that were sampled far apart want to be looked at one by one
_VIDEO_HEIGHTS = (240, 720)
_VIDEO_WIDTH = 360  # at least, for title, legend and caption
_ENCODER = "libx264"
_LEAST_PROPORTION, _MOST_PROPORTION = 1 / 4, 4.0  # of a box: a line would make it a mile long


def write_heatmap(
    path: str | Path,
    pictures: Sequence[NDArray[np.uint8]],
    captions: Sequence[str],
    maps: Sequence[NDArray[np.float32]],
    question: str,
) -> None:
    """Writes the file `path`, whole or not at all.

    A .png shows all pictures at once, a .mp4 one after the other. Colours are spread over the
    values of all: from their median, cold, to their highest, warm.

    Args:
        path: Ends in .png or .mp4.
        pictures: (H,W,3) uint8 RGB each.
        captions: What is written under each.
        maps: The relevance (h,w) over each, in [-1,1].
        question: The title.

    Raises:
        UsageError: Another suffix.
        StorageError: The file cannot be written.
        UnavailableError: A video, and PyAV is missing or cannot write one.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"heatmap {path}: expected a name that ends in {' or '.join(SUFFIXES)}")
    writer = _write_sheet if path.suffix.lower() == ".png" else _write_film
    pages = [*zip(pictures, captions, maps, strict=True)]
    with _replaced(path) as partial:
        writer(partial, pages, _scale_of(maps), question)


def each_overlay(maps: Sequence[NDArray[np.float32]]) -> list[bytes]:
    """A PNG in RGBA for each map, to be stretched over its picture: nothing where it is cold.

    Colours are those of `write_heatmap`, spread over the values of all maps likewise.

    Args:
        maps: The relevance (h,w) over each picture, in [-1,1].
    """
    from PIL import Image

    scale = _scale_of(maps) if maps else (0.0, 1.0)
    found = []
    for relevance in maps:
        height, width = relevance.shape
        size = (width * _OVERLAY_SCALE, height * _OVERLAY_SCALE)
        warmth = _warmth(relevance, scale, size)
        share = 255 * _STRENGTH * warmth[..., None] ** _SWIFTNESS
        pixels = np.concatenate([_colours(warmth), share], -1).round().astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="PNG")
        found.append(file.getvalue())
    return found


def _scale_of(maps: Sequence[NDArray[np.float32]]) -> tuple[float, float]:
    """What is cold and what is warm among the values of all maps."""
    values = np.concatenate([relevance.ravel() for relevance in maps])
    low, high = np.percentile(values, (_COLD_PERCENTILE, _WARM_PERCENTILE))
    return float(low), float(high)


def _warmth(
    relevance: NDArray[np.float32], scale: tuple[float, float], size: tuple[int, int]
) -> NDArray[np.floating]:
    """(H,W) in [0,1], (W,H) being `size`: how warm relevance (h,w) is on a scale."""
    from PIL import Image

    low, high = scale
    smooth = Image.fromarray(relevance.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
    return ((np.asarray(smooth) - low) / max(high - low, 1e-9)).clip(0, 1)


def overlay(
    frame: NDArray[np.uint8],
    relevance: NDArray[np.float32],
    scale: tuple[float, float],
    size: tuple[int, int],
) -> Image:
    """One frame at `size` (width, height), warm where relevance (h,w) is high on `scale`."""
    from PIL import Image

    picture = Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)
    warmth = _warmth(relevance, scale, size)[..., None]
    pixels = np.asarray(picture, np.float32)
    # Cold parts lose some colour and light, so that warm ones stand out on any picture.
    grey = pixels @ np.array([0.299, 0.587, 0.114], np.float32)
    calm = 0.7 * (0.5 * pixels + 0.5 * grey[..., None])
    share = _STRENGTH * warmth**_SWIFTNESS
    base = calm + (pixels - calm) * warmth
    mixed = base * (1 - share) + _colours(warmth[..., 0]) * share
    return Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))


def _colours(warmth: NDArray[Any]) -> NDArray[np.float64]:
    """(…,3) RGB in [0,255] for warmth (…) in [0,1]."""
    steps = np.linspace(0, 1, len(_RAMP))
    return np.stack([np.interp(warmth, steps, channel) for channel in zip(*_RAMP, strict=True)], -1)


def _write_sheet(
    path: Path, pages: Sequence[_Page], scale: tuple[float, float], question: str
) -> None:
    from PIL import Image, ImageDraw

    count, proportion = len(pages), _proportion(pages)
    columns = min(count, max(2, math.ceil(math.sqrt(count * proportion * 1.6))))
    rows = -(-count // columns)
    narrow, wide = _TILE_WIDTHS
    tile_width = max(narrow, min(wide, (_SHEET_WIDTH - _MARGIN) // columns - _MARGIN))
    tile = (tile_width, max(1, round(tile_width * proportion)))
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
    for i, (picture, caption, relevance) in enumerate(pages):
        x = _MARGIN + i % columns * (tile[0] + _MARGIN)
        y = top + i // columns * row_height
        size, (left, above) = _fitted(picture, tile)
        sheet.paste(overlay(picture, relevance, scale, size), (x + left, y + above))
        draw.text((x + left, y + tile[1] + 3), caption, _FAINT_INK, font)
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
    path: Path, pages: Sequence[_Page], scale: tuple[float, float], question: str
) -> None:
    from PIL import Image, ImageDraw

    least, most = _VIDEO_HEIGHTS
    tall = min(max(max(len(picture) for picture, _, _ in pages), least), most)
    box = (2 * max(1, round(tall / _proportion(pages) / 2)), 2 * round(tall / 2))
    font = _font(16)
    box = (max(box[0], _VIDEO_WIDTH), box[1])
    title = _wrapped(question, font, box[0] - 2 * _MARGIN)
    top = 2 * ((2 * _MARGIN + 22 * len(title)) // 2)
    page_size = (box[0], top + box[1] + 36)

    def drawn(
        picture: NDArray[np.uint8], caption: str, relevance: NDArray[np.float32]
    ) -> NDArray[np.uint8]:
        page = Image.new("RGB", page_size, _BACKGROUND)
        draw = ImageDraw.Draw(page)
        for line, text in enumerate(title):
            draw.text((_MARGIN, _MARGIN + 22 * line), text, _INK, font)
        size, (left, above) = _fitted(picture, box)
        page.paste(overlay(picture, relevance, scale, size), (left, top + above))
        _draw_legend(page, (_MARGIN, top + box[1] + 8), scale, font)
        right = page_size[0] - _MARGIN - math.ceil(draw.textlength(caption, font))
        draw.text((right, top + box[1] + 8), caption, _INK, font)
        return np.asarray(page)

    _encode(path, page_size, (drawn(*page) for page in pages))


def _encode(path: Path, size: tuple[int, int], frames: Iterable[NDArray[np.uint8]]) -> None:
    """Writes the video `path` of frames (H,W,3) uint8 RGB, (W,H) being `size` and even."""
    try:
        import av
    except ImportError as error:
        raise UnavailableError(f"writing videos needs PyAV: pip install av ({error})") from error
    try:
        with av.open(str(path), "w", format="mp4") as container:
            stream: Any = container.add_stream(_ENCODER, rate=_VIDEO_FPS, options={"crf": "18"})
            stream.width, stream.height = size
            stream.pix_fmt = "yuv420p"
            for i, array in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(array, format="rgb24")
                frame.pts, frame.time_base = i, Fraction(1, _VIDEO_FPS)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    except av.codec.codec.UnknownCodecError as error:
        raise UnavailableError(
            f"heatmap: this PyAV has no encoder {_ENCODER}: give a name that ends in .png, or "
            "pip install --force-reinstall av"
        ) from error
    except av.FFmpegError as error:  # some, but not all, are OSError already
        raise OSError(f"FFmpeg: {error.strerror}") from error


def _proportion(pages: Sequence[_Page]) -> float:
    """Height by width of the boxes that pictures are fitted into: the middle one's, or nearly."""
    sizes = (picture.shape[:2] for picture, _, _ in pages)
    middle = sorted(height / width for height, width in sizes)[len(pages) // 2]
    return float(min(max(middle, _LEAST_PROPORTION), _MOST_PROPORTION))


def _fitted(
    picture: NDArray[np.uint8], box: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """(width,height) of a picture in a box of (width,height), and of what is free to its corner."""
    height, width, _ = picture.shape
    scale = min(box[0] / width, box[1] / height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return size, ((box[0] - size[0]) // 2, (box[1] - size[1]) // 2)


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
