"""Every picture is fully decoded once, before it enters a shard; what is kept as it is and what is not, is stated here.

Kept byte for byte: a JPEG (baseline or progressive) in gray or RGB with 8 bits, whose EXIF orientation is upright.
Encoded again as RGB JPEG, quality 95, without chroma subsampling: CMYK and YCCK; every other format (PNG, WebP, BMP,
GIF, TIFF; the first frame; an alpha channel is dropped, 16 bits are scaled to 8); a picture whose EXIF orientation is
not upright (it is turned first); and, with `max_side`, a picture whose longer side is longer (resized with
antialiasing). Rejected: what does not decode to its last row, and what has more than MAX_PIXELS.
"""

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

T = TypeVar("T")
MAX_PIXELS = 100_000_000
QUALITY = 95
_UPRIGHT = 1
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Normalised:
    """A picture as it enters a shard; width and height in pixels, in the frame that decoders give."""

    jpeg: bytes
    width: int
    height: int


@dataclass(frozen=True)
class Rejected:
    """Why a picture does not enter a shard."""

    reason: str


def normalise(data: bytes, max_side: int | None = None) -> Normalised | Rejected:
    """Decode a picture and return it as it enters a shard, or why it does not."""

    def keep_or_encode(image: Image.Image) -> Normalised:
        upright = image.getexif().get(_ORIENTATION, _UPRIGHT) in {0, _UPRIGHT}
        small = max_side is None or max(image.size) <= max_side
        if image.format == "JPEG" and image.mode in {"L", "RGB"} and upright and small:
            return Normalised(data, image.width, image.height)
        return _encoded(_to_rgb(ImageOps.exif_transpose(image)), max_side)

    return decoded(data, keep_or_encode)


def decoded_size(data: bytes) -> tuple[int, int] | Rejected:
    """Return width and height of a picture as DALI decodes it, with the EXIF rotation, or why it cannot be used."""

    def size(image: Image.Image) -> tuple[int, int] | Rejected:
        if image.format not in {"JPEG", "MPO", "PNG"}:
            return Rejected(f"{image.format}, which is neither JPEG nor PNG")
        if image.mode.startswith("I"):
            return Rejected("16 bits per channel, which decoders do not agree on")
        return ImageOps.exif_transpose(image).size

    return decoded(data, size)


def decoded(data: bytes, use: Callable[[Image.Image], T]) -> T | Rejected:
    """Decode a picture to its last row and hand it to `use`; whatever is wrong with it becomes a reason."""
    if not data:
        return Rejected("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd but readable metadata
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > MAX_PIXELS:
                    return Rejected(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS}")
                image.load()
                return use(image)
    except UnidentifiedImageError:
        return Rejected("does not decode: it is no picture that Pillow knows")
    except Image.DecompressionBombError:
        return Rejected(f"more than {MAX_PIXELS} pixels")
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError) as error:
        # Pillow's decoders raise all of these on damaged input; none is a fault of ours.
        return Rejected(f"does not decode: {' '.join(str(error).split()) or type(error).__name__}"[:200])


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        # 16-bit gray; Pillow's own conversion clips at 255 instead of scaling.
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _encoded(image: Image.Image, max_side: int | None) -> Normalised:
    if max_side is not None and max(image.size) > max_side:
        scale = max_side / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC)
    return Normalised(encode(image), image.width, image.height)


def encode(image: Image.Image) -> bytes:
    """Encode an RGB picture as the JPEG that shards hold."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=QUALITY, subsampling=0)
    return out.getvalue()
