"""The structure of a JPEG or PNG file, apart from its pixels.

Decoders differ in what they tolerate. A file is used as it is only where its structure leaves no room for that: DALI's
decoders and Pillow give the same pixels then.
"""

import re
import struct
import zlib
from dataclasses import dataclass, field

PNG = b"\x89PNG\r\n\x1a\n"
_SOI, _EOI, _SOS, _DRI, _APP1, _APP14 = 0xD8, 0xD9, 0xDA, 0xDD, 0xE1, 0xEE
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = 0xC2
HUFFMAN = frozenset({0xC0, 0xC1, _PROGRESSIVE})
"""Markers of the codings that every decoder knows."""
_COEFFICIENTS = 64
_ORIENTATION, _SHORT = 0x0112, 3
_TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}
# In entropy-coded data 0xFF is followed by 0, by a restart marker, or by the marker that ends the data.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)
_RESTART = re.compile(rb"(\xff[\xd0-\xd7])")
_ORDER, _PALETTE_ORDER = re.compile(rb"IHDR( PLTE)?( IDAT)+ IEND"), re.compile(rb"IHDR PLTE( IDAT)+ IEND")
_PALETTE = 3
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


@dataclass
class Structure:
    """What is found in a file."""

    obstacle: str = ""
    """Why decoders may differ about it; '' when they do not."""
    incomplete: str = ""
    """Which part of the image it lacks; '' when none is known to be missing."""
    exif: list[bytes] = field(default_factory=list)
    """EXIF data, from the TIFF header on."""
    frame: int = 0
    """A JPEG's marker that states the kind of coding."""
    interval: int = 0
    """Blocks between a JPEG's restart markers, 0 without such markers."""
    scans: list[tuple[int, int]] = field(default_factory=list)
    """Begin and end of each of a JPEG's scans of entropy-coded data."""

    def add_obstacle(self, why: str) -> None:
        """Note an obstacle; the first one stays."""
        self.obstacle = self.obstacle or why

    def orientation(self) -> int | None:
        """Return the orientation where it is stored as the standard has it, 1 where none is; None when it is not."""
        if len(self.exif) > 1:
            return None
        return _orientation(self.exif[0]) if self.exif else 1


def parse_jpeg(data: bytes) -> Structure:
    """Walk over the segments of a JPEG file, up to its end-of-image marker."""
    found = Structure()
    left: dict[int, list[int]] = {}  # component -> bits that each coefficient still lacks
    frame = adobe = b""
    at = 2
    try:
        while True:
            begin = at
            while data[at] == 0xFF:
                at += 1
            marker = data[at] if at > begin else None
            if marker == _EOI:
                break
            if marker is None or marker <= 0x01 or 0xD0 <= marker <= _SOI:
                found.add_obstacle(f"bytes that belong to no segment, at byte {begin}")
                at = _next_marker(data, begin + 1)
                continue
            end = at + 1 + struct.unpack_from(">H", data, at + 1)[0]
            segment = data[at + 3 : end]
            if marker in _FRAMES:
                found.frame, frame = marker, segment
                left = {segment[6 + 3 * i]: [1] * _COEFFICIENTS for i in range(segment[5])}
                _note_frame(found, segment, adobe)
            elif marker == _DRI:
                (found.interval,) = struct.unpack_from(">H", segment)
            elif marker == _APP1 and segment[:6] == b"Exif\0\0":
                found.exif.append(segment[6:])
            elif marker == _APP14 and segment[:5] == b"Adobe":
                adobe = segment
            elif marker == _SOS:
                _note_scan(segment, left, progressive=found.frame == _PROGRESSIVE)
                begin, end = end, _next_marker(data, end)
                found.scans.append((begin, end))
                if found.interval and len(_RESTART.findall(data, begin, end)) != _restarts(
                    frame, segment, found.interval
                ):
                    found.incomplete = "restart intervals are missing"
                    break
            at = end
    except (IndexError, struct.error, KeyError, ValueError, ZeroDivisionError):
        found.incomplete = "no end-of-image marker follows"
    if any(any(bits) for bits in left.values()):
        found.incomplete = "its last scans are missing"
    return found


def with_scans_twice(data: bytes, scans: list[tuple[int, int]]) -> bytes:
    """Return a JPEG in which each interval of entropy-coded data follows once more behind itself.

    A decoder that had all it needs skips the second ones; one that lacked data takes them, and its pixels change.
    """
    parts, done = [], 0
    for begin, end in scans:
        pieces = _RESTART.split(data[begin:end])
        parts += [data[done:begin], *(piece * (1 + (i % 2 == 0)) for i, piece in enumerate(pieces))]
        done = end
    return b"".join([*parts, data[done:]])


def _next_marker(data: bytes, start: int) -> int:
    match = _MARKER.search(data, start)
    if match is None:
        raise IndexError
    return match.start()


def _restarts(frame: bytes, scan: bytes, interval: int) -> int:
    """Return how many restart markers a scan has."""
    height, width = struct.unpack_from(">HH", frame, 1)
    factors = {frame[6 + 3 * i]: divmod(frame[7 + 3 * i], 16) for i in range(frame[5])}
    across, down = (max(values) for values in zip(*factors.values(), strict=True))
    if scan[0] == 1:  # blocks of one component, else of as many pixels as all components need together
        x, y = factors[scan[1]]
        width, height, across, down = -(-width * x // across), -(-height * y // down), 1, 1
    return -(-(-(-width // (8 * across)) * -(-height // (8 * down))) // interval) - 1


def _note_frame(found: Structure, segment: bytes, adobe: bytes) -> None:
    if found.frame not in HUFFMAN:
        found.add_obstacle("a coding that is neither baseline nor progressive Huffman")
    if segment[0] != 8:
        found.add_obstacle(f"{segment[0]} bits per channel")
    if segment[6:13:3] == b"RGB" or (adobe and segment[5] == 3 and adobe[11:12] != b"\x01"):
        found.add_obstacle("colors that are stored as RGB")


def _note_scan(segment: bytes, left: dict[int, list[int]], *, progressive: bool) -> None:
    """Take from `left` the coefficients that a scan brings to their last bit."""
    count = segment[0]
    low, high, bits = segment[1 + 2 * count : 4 + 2 * count] if progressive else (0, _COEFFICIENTS - 1, 0)
    for i in range(count):
        for k in range(low, high + 1):
            left[segment[1 + 2 * i]][k] = bits & 15


def _orientation(exif: bytes) -> int | None:
    """Return the orientation of a TIFF directory that is intact and has at most one, a SHORT; else None."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return None
    values = []
    try:
        (at,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, at)
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            tag, kind, number, value, rest = struct.unpack_from(f"{order}HHIHH", exif, entry)
            (where,) = struct.unpack_from(f"{order}I", exif, entry + 8)
            size = _TIFF_SIZES[kind] * number
            if (size > 4 and where + size > len(exif)) or (
                tag == _ORIENTATION and (kind, number, rest) != (_SHORT, 1, 0)
            ):
                return None
            values += [value] if tag == _ORIENTATION else []
    except (struct.error, KeyError):
        return None
    return None if len(values) > 1 else (*values, 1)[0]


def parse_png(data: bytes) -> Structure:
    """Walk over the chunks of a PNG file and count the bytes of its pixels."""
    found = Structure()
    kinds: list[bytes] = []
    pixels: list[bytes] = []
    at = len(PNG)
    while at + 12 <= len(data) and kinds[-1:] != [b"IEND"]:
        length, kind = struct.unpack_from(">I4s", data, at)
        begin, at = at + 8, at + 12 + length
        if at > len(data):
            break
        if zlib.crc32(data[begin - 4 : at - 4]) != struct.unpack_from(">I", data, at - 4)[0]:
            found.add_obstacle(f"a wrong checksum of its chunk {kind.decode('ascii', 'backslashreplace')}")
        kinds.append(kind)
        if kind == b"IDAT":
            pixels.append(data[begin : at - 4])
        elif kind == b"eXIf":
            found.exif.append(data[begin : at - 4])
    if kinds[-1:] != [b"IEND"]:
        found.add_obstacle("no IEND chunk: it ends early")
    if data[24] == 16:
        found.add_obstacle("16 bits per channel")
    critical = b" ".join(kind for kind in kinds if kind[:1].isupper())
    if not (_PALETTE_ORDER if data[25] == _PALETTE else _ORDER).fullmatch(critical):
        found.add_obstacle("critical chunks that are missing, repeated, unknown or out of order")
    if b"acTL" in kinds:
        found.add_obstacle("an animation")
    if b"eXIf" in kinds and kinds.index(b"eXIf") > kinds.index(b"IDAT"):
        found.add_obstacle("EXIF data behind its pixels")
    size = _pixel_bytes(data)
    if size and not _holds(pixels, size):
        found.incomplete = "its compressed pixels end early"
    if any(data[26:28]) or data[28] > 1:
        found.add_obstacle("a compression, filter or interlacing that the standard does not have")
    return found


def _pixel_bytes(data: bytes) -> int:
    """Return how many bytes the pixels have before compression, 0 when the header does not have it."""
    width, height, bits, color = struct.unpack_from(">IIBB", data, 16)
    if color not in _PNG_CHANNELS:
        return 0
    total = 0
    for x, y, dx, dy in _ADAM7 if data[28] == 1 else ((0, 0, 1, 1),):
        columns, rows = -(-(width - x) // dx), -(-(height - y) // dy)
        total += rows * (1 + -(-columns * bits * _PNG_CHANNELS[color] // 8)) if columns > 0 and rows > 0 else 0
    return total


def _holds(parts: list[bytes], size: int) -> bool:
    """Whether a zlib stream is complete, with its checksum, and gives at least `size` bytes."""
    stream, given = zlib.decompressobj(), 0
    try:
        for part in parts:
            given += len(stream.decompress(part, 2**20))
            while stream.unconsumed_tail and not stream.eof:
                given += len(stream.decompress(stream.unconsumed_tail, 2**20))
    except zlib.error:
        return False
    return stream.eof and given >= size
