"""What the structure of a JPEG or PNG file says about it, apart from its pixels.

Decoders differ in what they forgive. A file is used as it is only where its structure leaves no room for that: DALI's
decoders and Pillow give the same pixels then.
"""

import re
import struct
import zlib
from dataclasses import dataclass, field

PNG = b"\x89PNG\r\n\x1a\n"
_SOI, _EOI, _SOS, _EXIF_SEGMENT, _ADOBE_SEGMENT = 0xD8, 0xD9, 0xDA, 0xE1, 0xEE
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = 0xC2
_COEFFICIENTS = 64
# In entropy-coded data 0xFF is followed by 0, by a restart marker, or by the marker that ends the data.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)


@dataclass
class Jpeg:
    """The structure of a JPEG file up to its end-of-image marker."""

    obstacle: str = ""
    """Why decoders may differ about it; '' when they do not."""
    incomplete: str = ""
    """Which part of the image it lacks; '' when none is known to be missing."""
    exif_segments: int = 0
    frame: int = 0
    """The marker that states the kind of coding."""
    scans: list[tuple[int, int]] = field(default_factory=list)
    """Begin and end of each scan's entropy-coded data."""


def parse_jpeg(data: bytes) -> Jpeg:
    """Walk over the segments of a JPEG file."""
    found = Jpeg()
    left: dict[int, list[int]] = {}  # component -> bits that each coefficient still lacks
    at = 2
    try:
        while True:
            begin = at
            while data[at] == 0xFF:
                at += 1
            marker = data[at] if at > begin else None
            if marker == _EOI:
                break
            if marker is None or marker <= 0x01 or _is_restart(marker) or marker == _SOI:
                found.obstacle = f"bytes that belong to no segment, at byte {begin}"
                at = _next_marker(data, begin + 1)
                continue
            at += 1
            end = at + struct.unpack_from(">H", data, at)[0]
            segment = data[at + 2 : end]
            if marker in _FRAMES:
                found.frame = marker
                left = {segment[6 + 3 * i]: [1] * _COEFFICIENTS for i in range(segment[5])}
                found.obstacle = found.obstacle or _frame_obstacle(marker, segment)
            elif marker == _EXIF_SEGMENT and segment[:6] == b"Exif\0\0":
                found.exif_segments += 1
            elif marker == _ADOBE_SEGMENT and segment[:5] == b"Adobe" and segment[11] != 1 and len(left or "yes") > 1:
                found.obstacle = found.obstacle or "an Adobe segment that says that its colors are not YCbCr"
            elif marker == _SOS:
                _note_scan(segment, left, progressive=found.frame == _PROGRESSIVE)
                begin, end = end, _next_marker(data, end)
                found.scans.append((begin, end))
            at = end
    except (IndexError, struct.error, KeyError):
        found.obstacle = found.obstacle or "segments that do not fit together"
    if any(any(bits) for bits in left.values()):
        found.incomplete = "its last scans are missing"
    return found


def _is_restart(marker: int) -> bool:
    return 0xD0 <= marker <= 0xD7


def _next_marker(data: bytes, start: int) -> int:
    match = _MARKER.search(data, start)
    if match is None:
        raise IndexError
    return match.start()


def _frame_obstacle(marker: int, segment: bytes) -> str:
    if marker not in {0xC0, 0xC1, _PROGRESSIVE}:
        return "a coding that is neither baseline nor progressive Huffman"
    if segment[0] != 8:
        return f"{segment[0]} bits per channel"
    return "colors that are stored as RGB" if segment[6:13:3] == b"RGB" else ""


def _note_scan(segment: bytes, left: dict[int, list[int]], *, progressive: bool) -> None:
    """Take from `left` the coefficients that a scan brings to their last bit."""
    count = segment[0]
    low, high, bits = segment[1 + 2 * count : 4 + 2 * count] if progressive else (0, _COEFFICIENTS - 1, 0)
    for i in range(count):
        for k in range(low, high + 1):
            left[segment[1 + 2 * i]][k] = bits & 15


def png_obstacle(data: bytes) -> str:
    """Return why decoders may differ about a PNG file, or ''."""
    at = len(PNG)
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end > len(data):
            break
        if zlib.crc32(data[at + 4 : end - 4]) != struct.unpack_from(">I", data, end - 4)[0]:
            return f"a wrong checksum of its chunk {kind.decode('ascii', 'backslashreplace')}"
        if kind == b"IHDR" and data[at + 16] == 16:
            return "16 bits per channel"
        if kind == b"IEND":
            return ""
        at = end
    return "no IEND chunk: it ends early"
