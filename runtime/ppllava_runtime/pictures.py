"""Still pictures: what is in a file decides, not its name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ppllava_engines.errors import DataError, NotFoundError, StorageError

# FFmpeg reads most of them as well, but its pictures have rates and repeat themselves.
_BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM", b"II*\0", b"MM\0*")
_MARKS = (b"WEBP", b"avif", b"avis")  # at the ninth byte
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif")
_MOVING_SUFFIXES = (".mjpeg", ".mjpg")  # one JPEG after the other


def read_picture(path: Path) -> tuple[NDArray[np.uint8], str | None] | None:
    """The picture (H,W,3) uint8 RGB in a file, upright, and a sentence about what it leaves out.

    None says that it is no picture, or a GIF or PNG that moves: a matter for FFmpeg. Of another
    file with several pictures the first is taken, and the sentence says so.

    Raises:
        DataError: A damaged picture, or a picture's name and something else in it.
        NotFoundError: There is no such file.
        StorageError: The file cannot be read.
    """
    from PIL import Image, ImageOps

    named, moving = (path.suffix.lower() in s for s in (_SUFFIXES, _MOVING_SUFFIXES))
    try:
        with path.open("rb") as stream:
            head = stream.read(12)
            looks_like_one = head.startswith(_BEGINNINGS) or head[8:] in _MARKS
            if moving or not (looks_like_one or named):
                return None
            image = Image.open(stream)
            count = getattr(image, "n_frames", 1)
            if image.format in ("GIF", "PNG") and count > 1:
                return None
            upright = ImageOps.exif_transpose(image)
            picture = np.asarray(upright.convert("RGB"))
    except FileNotFoundError as error:
        raise NotFoundError(f"image {path}: no such file") from error
    except PermissionError as error:
        raise StorageError(f"image {path}: no permission to read it") from error
    except Exception as error:  # what Pillow raises for damaged files has no common base
        raise DataError(f"image {path}: not an image that can be read ({error})") from error
    if count == 1 or image.format == "MPO":  # whose other pictures are for depth
        return picture, None
    return picture, f"image {path}: only the first of its {count} pictures is looked at"
