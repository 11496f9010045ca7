"""Still pictures: what is in a file decides, not its name."""

from __future__ import annotations

import warnings
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ppllava_engines.errors import DataError, MediaError, NotFoundError, StorageError

if TYPE_CHECKING:
    from PIL.Image import Image

    from ppllava_runtime.guard import Guard

# FFmpeg reads most of them as well, but its pictures have rates and repeat themselves.
_BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM", b"II*\0", b"MM\0*")
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "DIB", "TIFF", "WEBP", "AVIF")  # of strangers
_MARKS = (b"WEBP", b"avif", b"avis")  # at the ninth byte
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif")
_MOVING_SUFFIXES = (".mjpeg", ".mjpg")  # one JPEG after the other


def read_picture(
    path: Path, guard: Guard | None = None
) -> tuple[NDArray[np.uint8], str | None] | None:
    """The picture (H,W,3) uint8 RGB in a file, upright, and a sentence about what it leaves out.

    None says that it is no picture, or a GIF or PNG that moves: a matter for FFmpeg. Of another
    file with several pictures the first is taken, and the sentence says so. Of 16 bits the upper 8
    are taken; greys that are floats go from 0, black, to 1, white.

    Args:
        path: The file.
        guard: How it is read where it comes from a stranger; then `path` is but a name.

    Raises:
        DataError: A damaged picture, one of too many pixels, one whose numbers do not say what is
            white, or a picture's name and something else in it.
        MediaError: More than the guard lets pass.
        MemoryError: There is too little for it.
        NotFoundError: There is no such file.
        StorageError: The file cannot be read.
    """
    from PIL import Image, ImageOps

    named, moving = (path.suffix.lower() in s for s in (_SUFFIXES, _MOVING_SUFFIXES))
    try:
        file = BufferedReader(guard.file(path)) if guard else path.open("rb")
        with file as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of many pixels, or of metadata that nobody reads
            head = stream.read(12)
            looks_like_one = head.startswith(_BEGINNINGS) or head[8:] in _MARKS
            if moving or not (looks_like_one or named):
                return None
            image = Image.open(stream, formats=_FORMATS if guard else None)
            if guard:
                guard.check_picture("image", path, *image.size)
            count = getattr(image, "n_frames", 1)
            if image.format in ("GIF", "PNG") and count > 1:
                return None
            picture = _rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError as error:
        raise NotFoundError(f"image {path}: no such file") from error
    except PermissionError as error:
        raise StorageError(f"image {path}: no permission to read it") from error
    except Image.DecompressionBombError as error:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise DataError(
            f"image {path}: it has more than the {most} pixels that are read: make it smaller"
        ) from error
    except (MediaError, MemoryError):
        raise
    except Exception as error:  # what Pillow raises for damaged files has no common base
        raise DataError(f"image {path}: not an image that can be read ({error})") from error
    if count == 1 or image.format == "MPO":  # whose other pictures are for depth
        return picture, None
    return picture, f"image {path}: only the first of its {count} pictures is looked at"


def _rgb(image: Image) -> NDArray[np.uint8]:
    """(H,W,3) uint8. Pillow's own conversion cuts greys of more than 8 bits off at 255.

    Raises:
        ValueError: Numbers of which nobody knows what is white.
    """
    if image.mode.startswith("I;16"):
        return _grey(np.asarray(image) >> 8)
    if image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):  # nor with NaN
            raise ValueError("its greys are floats, expected from 0 to 1: save it with 8 bits")
        return _grey(np.rint(values * 255))
    if image.mode == "I":
        raise ValueError("its greys are integers of 32 bits: save it with 8 or 16")
    return np.asarray(image.convert("RGB"))


def _grey(values: NDArray[Any]) -> NDArray[np.uint8]:
    return np.repeat(values.astype(np.uint8)[..., None], 3, axis=2)
