"""The one rule of which images are used: the same on every path, with the pixels that Pillow gives."""

import io
import re
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from data_pipeline.acceptance import Rejected, decode
from data_pipeline.dataset import Dataset
from data_pipeline.manifest import Manifest
from data_pipeline.transforms import InputConfig
from data_pipeline.verify import main as verify
from tests.data_pipeline.datasets import build_into, stored, training
from tests.data_pipeline.images import PLAIN, jpeg, saved, tar

WIDTH, HEIGHT = 48, 48  # square, so that turned images have this size as well
GOOD = jpeg(1, (WIDTH, HEIGHT), quality=92)
SCAN = GOOD.index(b"\xff\xda")


def encoded(format_: str, mode: str = "RGB", **save) -> bytes:
    """GOOD in another format or mode."""
    image = Image.open(io.BytesIO(GOOD))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    elif mode != "RGB":
        image = image.convert(mode)
    return saved(image, format_, **save)


def segment(marker: int, payload: bytes, data: bytes = GOOD) -> bytes:
    """Put a segment behind the JFIF header."""
    at = 4 + struct.unpack(">H", data[4:6])[0]
    return data[:at] + bytes((0xFF, marker)) + struct.pack(">H", len(payload) + 2) + payload + data[at:]


def exif(orientation: int, kind: int = 3, order: str = ">") -> bytes:
    """EXIF data with an orientation stored as a BYTE (1), SHORT (3) or LONG (4)."""
    value = {1: "Bxxx", 3: "Hxx", 4: "I"}[kind]
    head = {"<": b"II*\0", ">": b"MM\0*"}[order]
    return b"Exif\0\0" + head + struct.pack(f"{order}IHHHI{value}I", 8, 1, 0x0112, kind, 1, orientation, 0)


XMP = (
    b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
    b'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
    b'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)
PNG = encoded("PNG")


def chunk(kind: bytes, payload: bytes, data: bytes = PNG) -> bytes:
    """Put a chunk behind a PNG's header."""
    check = struct.pack(">I", zlib.crc32(kind + payload))
    return data[:33] + struct.pack(">I", len(payload)) + kind + payload + check + data[33:]


def tiff(*entries: bytes, count: int | None = None, magic: int = 42) -> bytes:
    """EXIF data of a directory with these entries."""
    head = struct.pack(">2sHIH", b"MM", magic, 8, len(entries) if count is None else count)
    return b"Exif\0\0" + head + b"".join(entries) + bytes(30)


def entry(tag: int, kind: int, count: int, value: int, rest: int = 0) -> bytes:
    return struct.pack(">HHIHH", tag, kind, count, value, rest)


def half_of_the_rows() -> bytes:
    """A PNG whose stream of pixels is complete and holds half of the rows."""
    at = PNG.index(b"IDAT")
    rows = zlib.decompress(PNG[at + 4 : at + 4 + struct.unpack_from(">I", PNG, at - 4)[0]])
    half = chunk(b"IDAT", zlib.compress(rows[: len(rows) // 2]))
    return half[: len(half) - len(PNG) + 33] + PNG[-12:]


def animated() -> bytes:
    frames = [Image.new("RGB", (WIDTH, HEIGHT), color) for color in ("red", "blue")]
    return saved(frames[0], "PNG", save_all=True, append_images=frames[1:], default_image=True)


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes((data[at] ^ 1,)) + data[at + 1 :]


def oversized() -> bytes:
    """A valid header that promises 65500 x 65500 pixels."""
    at = GOOD.index(b"\xff\xc0")
    return GOOD[: at + 5] + struct.pack(">HH", 65500, 65500) + GOOD[at + 9 :]


def wide_png(width: int) -> bytes:
    return saved(Image.new("RGB", (width, 1), "red"), "PNG")


def damaged_avif() -> bytes:
    """One flipped bit, at which Pillow raises what is no OSError."""
    data = encoded("AVIF")
    for at in range(len(data) - 1, 0, -1):
        try:
            Image.open(io.BytesIO(flipped(data, at))).load()
        except RuntimeError:
            return flipped(data, at)
        except (OSError, SyntaxError, ValueError):
            continue
    raise AssertionError("no flipped bit is noticed")


def holed(data: bytes, scan: int) -> bytes:
    """A JPEG without the second half of one of its scans."""
    starts = [match.start() for match in re.finditer(rb"\xff\xda", data)]
    begin = starts[scan] + 2 + struct.unpack_from(">H", data, starts[scan] + 2)[0]
    end = re.compile(rb"\xff[^\x00\xd0-\xd7]").search(data, begin).start()
    return data[: begin + (end - begin) // 2] + data[end:]


def without_intervals(data: bytes) -> bytes:
    """A JPEG without what lies between its first and its second restart marker."""
    first, second = (match.start() for match in list(re.finditer(rb"\xff[\xd0-\xd7]", data))[:2])
    return data[:first] + data[second:]


PROGRESSIVE = encoded("JPEG", progressive=True, quality=92)
RESTARTS = encoded("JPEG", restart_marker_blocks=3)
END = b"\xff\xd9"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 48 48\n%%EndComments\nshowpage\n"
# What build does (K: kept byte for byte, E: encoded again, R: left out) and what becomes of it in place (A: accepted,
# R: left out).
ODD: dict[str, tuple[bytes, str]] = {
    "plain": (GOOD, "KA"),
    "gray": (encoded("JPEG", "L"), "KA"),
    "progressive": (PROGRESSIVE, "KA"),
    "progressive gray": (encoded("JPEG", "L", progressive=True), "KA"),
    "restart markers": (RESTARTS, "KA"),
    "without subsampling": (encoded("JPEG", subsampling=0), "KA"),
    "junk after the end": (GOOD + b"junk" * 50, "KA"),
    "fill bytes between segments": (GOOD[:2] + b"\xff\xff\xff" + GOOD[2:], "KA"),
    # All pixels are what libjpeg puts where data are missing.
    "gray to the last pixel": (saved(Image.new("RGB", (WIDTH, HEIGHT), (128, 128, 128)), "JPEG"), "KA"),
    "truncated in the scan": (GOOD[: SCAN + 200], "RR"),
    "header only": (GOOD[:SCAN], "RR"),
    "cut in half, with an end": (GOOD[: SCAN + (len(GOOD) - SCAN) // 2] + END, "RR"),
    "progressive, nine tenths, with an end": (PROGRESSIVE[: len(PROGRESSIVE) * 9 // 10] + END, "RR"),
    "restart markers, half, with an end": (RESTARTS[: SCAN + (len(RESTARTS) - SCAN) // 2] + END, "RR"),
    "a hole in an early progressive scan": (holed(PROGRESSIVE, 2), "RR"),
    "a restart interval is missing": (without_intervals(RESTARTS), "RR"),
    "zeros from the middle on": (GOOD[: len(GOOD) // 2] + bytes(len(GOOD) // 2), "RR"),
    "cut in half, with a short Adobe segment": (
        segment(0xEE, b"Adobe\0d", GOOD[: SCAN + (len(GOOD) - SCAN) // 2] + END), "RR"),
    "empty": (b"", "RR"),
    "text": (b"404 not found", "RR"),
    "absurd size in the header": (oversized(), "RR"),
    "a tar": (tar({"a.jpg": GOOD}), "RR"),
    "eps": (EPS, "RR"),
    "damaged avif": (damaged_avif(), "RR"),
    "floating point": (encoded("TIFF", "F"), "RR"),
    "stray bytes between segments": (GOOD[:20] + b"\x00\x00\x12" + GOOD[20:], "ER"),
    "a stuffed byte between segments": (GOOD[:20] + b"\xff\x00" + GOOD[20:], "ER"),
    "cmyk": (encoded("JPEG", "CMYK"), "ER"),
    "cmyk without a marker": (encoded("JPEG", "CMYK").replace(b"Adobe", b"other", 1), "ER"),
    "rgb inside": (encoded("JPEG", keep_rgb=True), "ER"),
    **{f"exif {n}": (segment(0xE1, exif(n)), "KA" if n in {0, 1, 9} else "EA") for n in range(10)},
    "exif 6, little-endian": (segment(0xE1, exif(6, order="<")), "EA"),
    "exif as a byte": (segment(0xE1, exif(6, 1, "<")), "ER"),
    "exif as a long": (segment(0xE1, exif(6, 4)), "ER"),
    "two exif segments": (segment(0xE1, exif(1), segment(0xE1, exif(6))), "ER"),
    "orientation only in xmp": (segment(0xE1, XMP), "ER"),
    "xmp against exif": (segment(0xE1, XMP, segment(0xE1, exif(1))), "KA"),
    "damaged exif": (segment(0xE1, b"Exif\0\0II*\0\xff"), "ER"),
    "orientation of no value": (segment(0xE1, tiff(entry(0x0112, 3, 0, 3))), "ER"),
    "orientation of many values": (segment(0xE1, tiff(entry(0x0112, 3, 65536, 3))), "ER"),
    "orientation twice": (segment(0xE1, tiff(entry(0x0112, 3, 1, 1), entry(0x0112, 3, 1, 3))), "ER"),
    "orientation with a rest": (segment(0xE1, tiff(entry(0x0112, 3, 1, 6, 3))), "ER"),
    "exif with too large a count": (segment(0xE1, tiff(entry(0x0112, 3, 1, 3), count=9)), "ER"),
    "exif of another magic": (segment(0xE1, tiff(entry(0x0112, 3, 1, 3), magic=43)), "ER"),
    "orientation and a double": (segment(0xE1, tiff(entry(0x0112, 3, 1, 6), entry(0x9999, 12, 1, 0, 8))), "EA"),
    "png": (PNG, "EA"),
    "png with exif twice": (chunk(b"eXIf", exif(6)[6:], chunk(b"eXIf", exif(3)[6:])), "ER"),
    "png with exif behind its pixels": (PNG[:-12] + chunk(b"eXIf", exif(6)[6:])[33 : -len(PNG) + 33] + PNG[-12:], "ER"),
    "animated png": (animated(), "ER"),
    "png of half its rows": (half_of_the_rows(), "RR"),
    "as wide as libjpeg can": (wide_png(65_500), "EA"),
    "wider than libjpeg can": (wide_png(65_501), "RR"),
    "32-bit tiff": (encoded("TIFF", "I"), "RR"),
    **{f"png, {mode}": (encoded("PNG", mode), "EA") for mode in ("P", "1", "RGBA")},
    "png with a gamma": (chunk(b"gAMA", struct.pack(">I", 45455)), "EA"),
    "png with orientation": (encoded("PNG", exif=exif(6)[6:]), "EA"),
    "png with short exif": (chunk(b"eXIf", b"MM\0*\0"), "ER"),
    "png without an end": (PNG[:-12], "ER"),
    "png with a wrong checksum": (flipped(PNG, PNG.index(b"IDAT") + 4 + struct.unpack_from(
        ">I", PNG, PNG.index(b"IDAT") - 4)[0]), "ER"),
    "png cut in half": (PNG[: len(PNG) // 2], "RR"),
    "16-bit png": (encoded("PNG", "I;16"), "ER"),
    "gif": (encoded("GIF", "P"), "ER"),
    **{kind: (encoded(kind), "ER") for kind in ("WEBP", "AVIF", "BMP", "TIFF")},
    "tiff with orientation": (encoded("TIFF", tiffinfo={0x0112: 6}), "ER"),
}  # fmt: skip


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """All of them built from class folders, converted from a shard, and in place."""
    root = tmp_path_factory.mktemp("odd")
    members = {}
    for number, (name, (data, _)) in enumerate(ODD.items()):
        folder = root / "folder" / name
        folder.mkdir(parents=True)
        (folder / "it.jpg").write_bytes(data)
        (folder / "fine.jpg").write_bytes(GOOD)
        for key, content in (("it", data), ("fine", GOOD)):
            members |= {f"{key}{number:03d}.jpg": content, f"{key}{number:03d}.cls": b"%d" % number}
    (root / "place").mkdir()
    (root / "place" / "x.tar").write_bytes(tar(members))
    (root / "classes").write_text("\n".join(ODD))
    build_into(root / "folder", root / "built")
    build_into(root / "place" / "x.tar", root / "converted", "--classes", str(root / "classes"))
    build_into(root / "place" / "x.tar", root / "place")
    return {way: Dataset.open(root / way, "train") for way in ("built", "converted", "place")}


def found(dataset: Dataset, name: str) -> list[bytes]:
    """What a dataset holds of an odd image."""
    label = list(ODD).index(name) if "built" not in str(dataset.path) else dataset.class_names.index(name)
    rows = np.flatnonzero(dataset.labels == label).tolist()
    return [stored(dataset, row) for row in rows if "fine" not in dataset.sample_name(row)]


def upright(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    image.load()
    with suppress(struct.error):
        image = ImageOps.exif_transpose(image)
    if image.mode == "I;16":
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    return np.asarray(image.convert("RGB"), np.float32)


@pytest.mark.parametrize("name", ODD)
def test_each_kind_of_image_has_its_outcome_on_every_path(paths, name):
    data, outcome = ODD[name]
    for way, expected in (("built", outcome[0]), ("converted", outcome[0]), ("place", outcome[1])):
        listed = [r for r in Manifest.read(paths[way].path).splits["train"].rejected if r.reason]
        number = list(ODD).index(name)
        names = (f"{name}/it.jpg", f"x.tar/it{number:03d}.jpg", f"x.tar:it{number:03d}")
        assert any(reject.name in names for reject in listed) == (expected == "R"), way
        kept = found(paths[way], name)
        assert len(kept) == (expected != "R"), way
        if expected == "E":
            reference = saved(Image.fromarray(upright(data).astype(np.uint8)), "JPEG", quality=95, subsampling=0)
            assert np.array_equal(upright(kept[0]), upright(reference)), way
        elif expected != "R":
            assert kept == [data], way


@pytest.mark.parametrize("way", ["built", "converted", "place"])
def test_what_is_accepted_is_intact_for_verify_and_trains_with_the_pixels_of_pillow(paths, way):
    dataset = paths[way]
    assert verify([str(dataset.path), "--decode", "--workers", "1"]) == 0
    config = InputConfig(path=dataset.path, image_size=(HEIGHT, WIDTH), **PLAIN)
    batch = len(dataset)
    reports: list = []
    place = {"global_batch": batch, "micro_batch": batch, "on_bad_sample": reports.append}
    with training(dataset, config, **place) as loader:
        images = next(iter(loader))
    assert not reports
    assert set(images.sample_ids.tolist()) == set(range(batch))
    pixels = (images.images * 255).permute(0, 2, 3, 1)
    for row, sample in enumerate(images.sample_ids.tolist()):
        expected = torch.from_numpy(upright(stored(dataset, sample)))
        if dataset.width[sample] > WIDTH:  # one, which training shrinks
            continue
        assert (pixels[row] - expected).abs().max() <= 1, dataset.sample_name(sample)


def test_no_exception_of_a_decoder_and_no_length_of_an_image_ends_a_build():
    for data in (GOOD, PROGRESSIVE, PNG, encoded("GIF", "P"), encoded("WEBP"), encoded("AVIF"), encoded("TIFF")):
        for length in range(0, len(data), 97):
            result = decode(data[:length])
            assert isinstance(result, Rejected) or np.asarray(result.image).size
        for at in range(0, len(data), 131):
            decode(flipped(data, at))


def test_a_program_that_pillow_could_run_is_not_run(tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    fake = tmp_path / "bin" / "gs"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\ntouch {ran}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(fake.parent), prepend=":")
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "x.jpg").write_bytes(EPS)
    (tmp_path / "in" / "a" / "y.jpg").write_bytes(GOOD)
    build_into(tmp_path / "in", tmp_path / "out")
    assert not ran.exists()
