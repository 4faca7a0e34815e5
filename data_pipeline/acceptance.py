"""The one rule of which images can be used; build, in-place indexing, `verify --decode` and training follow it.

Every image is fully decoded once, by Pillow. Training sees the pixels that Pillow gives for the upright image
(`ImageOps.exif_transpose`, wherever the orientation is stored).

- Used as it is: a JPEG (baseline or progressive) in gray or YCbCr with 8 bits, or a PNG with at most 8 bits per
  channel, whose structure is without fault and whose orientation, if any, is an EXIF tag of the standard's type.
- Encoded again by build, as RGB JPEG of quality 95 without chroma subsampling, and left out where shards are indexed
  in place: every other image in one of FORMATS that decodes (its first frame; an alpha channel is dropped, 16 bits are
  scaled to 8). Build also encodes PNGs again, images that are not upright, and with `max_side` longer ones.
- Left out: what does not decode to its last row, floating-point pixels, more than MAX_PIXELS, a side above MAX_SIDE.
"""

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from data_pipeline.formats import Jpeg, parse_jpeg, png_obstacle

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
"""What Pillow may open: none of these runs another program."""
MAX_PIXELS = 100_000_000
MAX_SIDE = 65_535
QUALITY = 95
_UPRIGHT = 1
_ORIENTATIONS = range(2, 9)
_ORIENTATION = 0x0112
_EXIF = b"Exif\0\0"
_SHORT = 3


@dataclass(frozen=True)
class Accepted:
    """An image as it enters a shard; width and height in pixels, in the frame that decoders give."""

    jpeg: bytes
    width: int
    height: int


@dataclass(frozen=True)
class Rejected:
    """Why an image is left out."""

    reason: str


@dataclass(frozen=True)
class Decoded:
    """An image as it was decoded."""

    image: Image.Image
    """Not yet turned upright."""
    orientation: int
    """EXIF's number: 1 is upright."""
    obstacle: str
    """Why it cannot be used as it is; '' when it can."""


def decode(data: bytes) -> Decoded | Rejected:
    """Decode an image to its last row; whatever is wrong with it becomes a reason."""
    if not data:
        return Rejected("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd but readable metadata
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_SIDE:
                    return Rejected(
                        f"{image.width} x {image.height} pixels; at most {MAX_PIXELS} and {MAX_SIDE} a side can be used"
                    )
                image.load()
            return _examined(data, image)
    except UnidentifiedImageError:
        return Rejected(f"does not decode: it is in none of the formats {', '.join(FORMATS)}")
    except Image.DecompressionBombError:
        return Rejected(f"more than {MAX_PIXELS} pixels")
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  (decoders raise anything on damaged input, and one image ends no build)
        return Rejected(f"does not decode: {' '.join(str(error).split()) or type(error).__name__}"[:200])


def normalize(data: bytes, max_side: int | None = None) -> Accepted | Rejected:
    """Return an image as build puts it into a shard, or why it does not."""
    decoded = decode(data)
    if isinstance(decoded, Rejected):
        return decoded
    image = decoded.image
    small = max_side is None or max(image.size) <= max_side
    if image.format != "PNG" and decoded.orientation == _UPRIGHT and small and not decoded.obstacle:
        return Accepted(data, image.width, image.height)
    image = _to_rgb(_upright(decoded))
    if not small and max_side is not None:
        scale = max_side / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC)
    return Accepted(encode(image), image.width, image.height)


def size_as_it_is(data: bytes) -> tuple[int, int] | Rejected:
    """Return the width and height of an image that is used as it is, in the frame that decoders give, or why not."""
    decoded = decode(data)
    if isinstance(decoded, Rejected):
        return decoded
    if decoded.obstacle:
        return Rejected(f"cannot be used as it is (build a dataset from the shards to keep it): {decoded.obstacle}")
    return _upright(decoded).size


def encode(image: Image.Image) -> bytes:
    """Encode an RGB image as the JPEG that shards hold."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=QUALITY, subsampling=0)
    return out.getvalue()


def _examined(data: bytes, image: Image.Image) -> Decoded | Rejected:
    if image.mode == "F" or (image.mode == "I" and image.getextrema()[1] > 65_535):  # type: ignore[operator]
        return Rejected("floating-point or 32-bit pixels, whose range is not known; store 8 or 16 bits")
    obstacle, exif_segments = f"{image.format}, which is neither JPEG nor PNG", 1
    if image.format in {"JPEG", "MPO"}:
        parsed = parse_jpeg(data)
        if _ends_early(data, image, parsed):
            return Rejected(f"does not decode: {parsed.incomplete or 'it ends early, and the rest of it is gray'}")
        obstacle, exif_segments = parsed.obstacle, parsed.exif_segments
        if image.mode not in {"L", "RGB"}:
            obstacle = f"{image.mode} colors"
    elif image.format == "PNG":
        obstacle = png_obstacle(data)
    try:
        orientation = image.getexif().get(_ORIENTATION, _UPRIGHT)
        stored = _type_of_orientation(image.info.get("exif", b""))
    except Exception:  # noqa: BLE001  (as above)
        return Decoded(image, _UPRIGHT, obstacle or "damaged EXIF data")
    if orientation not in _ORIENTATIONS:
        orientation = _UPRIGHT
    if exif_segments > 1:
        obstacle = obstacle or "more than one EXIF segment"
    if stored is not None and stored != _SHORT:
        obstacle = obstacle or "an EXIF orientation of another type than the standard has"
    elif stored is None and orientation != _UPRIGHT:
        obstacle = obstacle or "an orientation that is not in its EXIF data"
    return Decoded(image, orientation, obstacle)


def _type_of_orientation(exif: bytes) -> int | None:
    """Return TIFF's number for the type of the orientation in EXIF data, or None where there is none."""
    if not exif.startswith(_EXIF):
        return None
    stream = io.BytesIO(exif[len(_EXIF) :])
    directory = TiffImagePlugin.ImageFileDirectory_v2(stream.read(8))
    stream.seek(directory.next)
    directory.load(stream)
    return directory.tagtype[_ORIENTATION] if _ORIENTATION in directory else None


def _ends_early(data: bytes, image: Image.Image, parsed: Jpeg) -> bool:
    """Whether a JPEG that decodes lacks a part of its data before its end-of-image marker.

    libjpeg fills what is missing with gray and only warns. Where that may have happened, the last scan's data are put
    behind it once more: a complete image does not change, a decoder that lacks data takes them. A cut inside the last
    block of a baseline JPEG, at most 16 x 16 pixels, is not noticed.
    """
    if parsed.incomplete:
        return True
    if not parsed.scans:
        return False
    last = image.getpixel((image.width - 1, image.height - 1))
    gray = all(value in {127, 128} for value in (last if isinstance(last, tuple) else (last,)))
    if not gray and len(parsed.scans) == 1:
        return False
    begin, end = parsed.scans[-1]
    with Image.open(io.BytesIO(data[:end] + data[begin:end] + data[end:]), formats=("JPEG",)) as again:
        return not np.array_equal(np.asarray(again), np.asarray(image))


def _upright(decoded: Decoded) -> Image.Image:
    return ImageOps.exif_transpose(decoded.image) if decoded.orientation != _UPRIGHT else decoded.image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit gray; Pillow's own conversion clips at 255 instead of scaling
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
