"""The one rule of which images can be used; build, in-place indexing, `verify --decode` and training follow it.

Every image is fully decoded once, by Pillow. Training sees the pixels that Pillow gives for the upright image
(as `ImageOps.exif_transpose` turns it, wherever the orientation is stored).

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
from PIL import Image, UnidentifiedImageError

from data_pipeline.formats import HUFFMAN, Structure, parse_jpeg, parse_png, with_scans_twice

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
"""What Pillow may open: none of these runs another program."""
MAX_PIXELS = 100_000_000
MAX_SIDE = 65_500
"""Of libjpeg; the table would hold 65,535."""
QUALITY = 95
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""What makes an image upright, by its orientation; as `ImageOps.exif_transpose`, which also writes the EXIF data again
and fails where they are odd."""


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
    """Not yet turned."""
    turn: Image.Transpose | None
    """What makes it upright."""
    obstacle: str
    """Why it cannot be used as it is; '' when it can."""

    def upright(self) -> Image.Image:
        """Return the image upright."""
        return self.image if self.turn is None else self.image.transpose(self.turn)


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
    if image.format != "PNG" and decoded.turn is None and small and not decoded.obstacle:
        return Accepted(data, image.width, image.height)
    image = _to_rgb(decoded.upright())
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
    return decoded.upright().size


def encode(image: Image.Image) -> bytes:
    """Encode an RGB image as the JPEG that shards hold."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=QUALITY, subsampling=0)
    return out.getvalue()


def _examined(data: bytes, image: Image.Image) -> Decoded | Rejected:
    if image.mode == "F" or (image.mode == "I" and image.format not in {"PNG", "PPM"}):
        return Rejected("floating-point or 32-bit pixels, whose range is not known; store 8 or 16 bits")
    if image.format in {"JPEG", "MPO"}:
        found = parse_jpeg(data)
        if image.mode not in {"L", "RGB"}:
            found.add_obstacle(f"{image.mode} colors")
        if not found.incomplete and _ends_early(data, image, found):
            found.incomplete = "a part of its data is missing, and gray takes its place"
    elif image.format == "PNG":
        found = parse_png(data)
    else:
        found = Structure(f"{image.format}, which is neither JPEG nor PNG")
    if found.incomplete:
        return Rejected(f"does not decode: {found.incomplete}")
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))  # of any type, such as a rational number
    except Exception:  # noqa: BLE001  (as above)
        found.add_obstacle("damaged EXIF data")
        turn = None
    stored = found.orientation()
    if stored is None:
        found.add_obstacle("EXIF data or an orientation that are not as the standard has them")
    elif _TURNS.get(stored) != turn:
        found.add_obstacle("an orientation that is not in its EXIF data")
    return Decoded(image, turn, found.obstacle)


def _ends_early(data: bytes, image: Image.Image, found: Structure) -> bool:
    """Whether a JPEG that decodes lacks a part of its data.

    libjpeg fills what is missing with gray and only warns. Where that may have happened, the scans' data are put behind
    themselves once more: a complete image does not change. Not noticed is a cut inside the last block of a baseline
    JPEG, at most 16 x 16 pixels, and data that were replaced by others.
    """
    last = image.getpixel((image.width - 1, image.height - 1))
    gray = all(value in {127, 128} for value in (last if isinstance(last, tuple) else (last,)))
    if found.frame not in HUFFMAN or (not gray and len(found.scans) == 1 and not found.interval):
        return False
    with Image.open(io.BytesIO(with_scans_twice(data, found.scans)), formats=("JPEG",)) as again:
        return not np.array_equal(np.asarray(again), np.asarray(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit gray; Pillow's own conversion clips at 255 instead of scaling
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
