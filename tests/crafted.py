"""Files that ask for more than they are worth, made small."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from tiny_videos import numbered_frames

_NAL_START = b"\0\0\0\1"
_SPS, _TYPES = 7, 0x1F


def write_png(path: Path, width: int, height: int, num_bytes: int = 1 << 20) -> Path:
    """The file `path`, which says it is so large and holds `num_bytes` of zeros, compressed."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(num_bytes), 9)), (b"IEND", b""))
    content = b"\x89PNG\r\n\x1a\n"
    for name, body in chunks:
        content += struct.pack(">I", len(body)) + name + body
        content += struct.pack(">I", zlib.crc32(name + body))
    path.write_bytes(content)
    return path


def write_h264(path: Path, sizes: Sequence[tuple[int, int]], real: tuple[int, int]) -> Path:
    """The file `path`, an H.264 stream whose parts say that they have these sizes.

    Args:
        path: Its suffix says which container.
        sizes: Width and height that each part claims, multiples of 16.
        real: Those that each part has.
    """
    stream = b""
    for size in sizes:
        for nal in _encoded(*real):
            stream += _NAL_START + (_claim(*size) if nal[0] & _TYPES == _SPS else nal)
    raw = path.with_suffix(".h264")
    raw.write_bytes(stream)
    some = {"max_pixels": "1000000"}  # else FFmpeg decodes what is claimed here
    with (
        av.open(str(raw), format="h264", options=some) as source,
        av.open(str(path), "w") as container,
    ):
        theirs = source.streams.video[0]
        ours = container.add_stream_from_template(theirs)
        for number, packet in enumerate(source.demux(theirs)):
            if packet.size:
                packet.pts, packet.dts, packet.duration = number, number, 1
                packet.time_base = Fraction(1, 25)
                packet.stream = ours
                container.mux(packet)
    return path


def write_long(path: Path, num_frames: int, size: int = 16) -> Path:
    """The file `path`, a video of so many tiny frames at 60 a second; only the first is whole."""
    encoder: Any = av.CodecContext.create("mpeg4", "w")
    encoder.width = encoder.height = size
    encoder.pix_fmt, encoder.time_base, encoder.gop_size = "yuv420p", Fraction(1, 60), 100
    packets = []
    for number, picture in enumerate(numbered_frames(2, size, size)):
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts = number
        packets += encoder.encode(frame)
    first, other = (bytes(packet) for packet in [*packets, *encoder.encode(None)])
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=60)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        container.start_encoding()
        for number in range(num_frames):
            packet = av.Packet(other if number else first)
            packet.stream, packet.time_base = stream, Fraction(1, 60)
            packet.pts = packet.dts = number
            packet.is_keyframe = number == 0
            container.mux(packet)
    return path


def vp9_claiming(content: bytes, width: int, height: int) -> bytes:
    """A VP9 file whose keyframes say that they are so large."""
    mark = b"\x49\x83\x42"
    changed = bytearray(content)
    place = content.find(mark)
    while place >= 0:
        # Four bits of colour, and then two sizes of 16 bits, each less one.
        number = int.from_bytes(changed[place + 3 : place + 8], "big")
        number &= ~(0xFFFFFFFF << 4)
        number |= (width - 1) << 20 | (height - 1) << 4
        changed[place + 3 : place + 8] = number.to_bytes(5, "big")
        place = content.find(mark, place + 1)
    return bytes(changed)


def jpeg_claiming(content: bytes, width: int, height: int) -> bytes:
    """A file with JPEGs that say that they are so large."""
    mark = b"\xff\xc0\x00\x11\x08"
    parts = content.split(mark)
    claim = struct.pack(">HH", height, width)
    return mark.join([parts[0], *(claim + part[4:] for part in parts[1:])])


def _encoded(width: int, height: int) -> list[bytes]:
    """The NAL units of a few frames."""
    encoder: Any = av.CodecContext.create("libx264", "w")
    encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv420p"
    encoder.time_base = Fraction(1, 25)
    encoder.options = {"profile": "baseline", "tune": "zerolatency", "x264-params": "annexb=1"}
    stream = b""
    for number, picture in enumerate(numbered_frames(6, width, height)):
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts = number
        stream += b"".join(bytes(packet) for packet in encoder.encode(frame))
    stream += b"".join(bytes(packet) for packet in encoder.encode(None))
    units = stream.replace(_NAL_START, _NAL_START[1:]).split(_NAL_START[1:])
    return [unit for unit in units if unit]


def _claim(width: int, height: int) -> bytes:
    """A sequence parameter set of the baseline, with as many pictures to refer to as there may be.

    It has no two zero bytes in a row, so nothing in it need be escaped.
    """
    bits = "010000101100000000111110" + "1"  # baseline, its flags, level 6.2, number 0
    # log2_max_frame_num - 4, pic_order_cnt_type, max_num_ref_frames
    bits += "".join(_exponential(number) for number in (0, 2, 16))
    bits += "0" + _exponential(width // 16 - 1) + _exponential(height // 16 - 1)
    bits += "11001"  # whole frames, direct_8x8_inference, no cropping, no VUI, the end
    bits += "0" * (-len(bits) % 8)
    return b"\x67" + int(bits, 2).to_bytes(len(bits) // 8, "big")


def _exponential(number: int) -> str:
    """Exponential-Golomb."""
    bits = f"{number + 1:b}"
    return "0" * (len(bits) - 1) + bits
