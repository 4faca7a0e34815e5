"""What happens to damaged input: a stated outcome for each kind, and never a hang, a crash or a silent wrong label."""

import io
import itertools
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.build import main as build
from data_pipeline.dataset import Dataset
from data_pipeline.errors import DataError
from data_pipeline.graph import SingleDecoder
from data_pipeline.loader import EvalLoader, TrainLoader
from data_pipeline.manifest import Manifest, file_of
from data_pipeline.shards import crc32
from data_pipeline.transforms import AugmentConfig, InputConfig, RandomResizedCropConfig
from tests.data_pipeline.pictures import jpeg, tar

CPU = torch.device("cpu")
GOOD = jpeg(1, (60, 40))
SCAN = GOOD.index(b"\xff\xda")


def picture(format_: str, mode: str = "RGB", **save) -> bytes:
    out = io.BytesIO()
    image = Image.open(io.BytesIO(GOOD))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    image.save(out, format_, **save)
    return out.getvalue()


def oversized() -> bytes:
    """A valid header that promises 65500 x 65500 pixels."""
    at = GOOD.index(b"\xff\xc0")
    return GOOD[: at + 5] + struct.pack(">HH", 65500, 65500) + GOOD[at + 9 :]


EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
REJECTED, KEPT, ENCODED = "rejected", "kept as it is", "encoded again"
AT_BUILD = {
    "truncated in the scan": (GOOD[: SCAN + 200], REJECTED),
    "truncated in the header": (GOOD[:30], REJECTED),
    "header only": (GOOD[:SCAN], REJECTED),
    "empty": (b"", REJECTED),
    "text": (b"404 not found", REJECTED),
    "html": (b"<html><body>Forbidden</body></html>", REJECTED),
    "zeros": (bytes(5000), REJECTED),
    "first byte gone": (GOOD[1:], REJECTED),
    "absurd size in the header": (oversized(), REJECTED),
    "a tar": (tar({"a.jpg": GOOD}), REJECTED),
    "junk after the end": (GOOD + b"junk" * 50, KEPT),
    "gray": (picture("JPEG", "L"), KEPT),
    "progressive": (picture("JPEG", progressive=True), KEPT),
    "one pixel": (jpeg(1, (1, 1)), KEPT),
    "very wide": (jpeg(1, (3000, 2)), KEPT),
    "cmyk": (picture("JPEG", "CMYK"), ENCODED),
    "exif orientation": (picture("JPEG", exif=EXIF), ENCODED),
    "png": (picture("PNG"), ENCODED),
    "palette png": (picture("PNG", "P"), ENCODED),
    "rgba png": (picture("PNG", "RGBA"), ENCODED),
    "16-bit png": (picture("PNG", "I;16"), ENCODED),
    "gif": (picture("GIF", "P"), ENCODED),
    "webp": (picture("WEBP"), ENCODED),
    "bmp": (picture("BMP"), ENCODED),
    "tiff": (picture("TIFF"), ENCODED),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("damage")
    for name, (data, _) in AT_BUILD.items():
        folder = root / "in" / name
        folder.mkdir(parents=True)
        (folder / "it.jpg").write_bytes(data)
        (folder / "fine.jpg").write_bytes(GOOD)
    assert build([str(root / "in"), str(root / "out"), "--workers", "1"]) == 0
    return root / "out"


@pytest.mark.parametrize("name", AT_BUILD)
def test_each_kind_of_picture_has_its_stated_outcome_when_shards_are_built(built, name):
    data, outcome = AT_BUILD[name]
    dataset = Dataset.open(built, "train")
    rejected = {reject.name: reject.reason for reject in Manifest.read(built).splits["train"].rejected}
    label = dataset.class_names.index(name)
    rows = [i for i in np.flatnonzero(dataset.labels == label) if dataset.sample_name(int(i)).endswith("-it.jpg")]
    if outcome == REJECTED:
        assert rejected[f"{name}/it.jpg"]
        assert not rows
        return
    assert f"{name}/it.jpg" not in rejected
    (row,) = rows
    with dataset.shard_path(int(dataset.shard[row])).open("rb") as shard:
        shard.seek(int(dataset.offset[row]))
        stored = shard.read(int(dataset.length[row]))
    assert (stored == data) == (outcome == KEPT)
    with Image.open(io.BytesIO(stored)) as image:
        assert image.format == "JPEG"
        assert image.size == (dataset.width[row], dataset.height[row])
    if outcome == ENCODED:
        from PIL import ImageOps

        with Image.open(io.BytesIO(data)) as image, Image.open(io.BytesIO(stored)) as again:
            upright = ImageOps.exif_transpose(image)
            if name == "16-bit png":
                upright = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
            reference = io.BytesIO()
            upright.convert("RGB").save(reference, "JPEG", quality=95, subsampling=0)
            assert np.array_equal(np.asarray(Image.open(reference)), np.asarray(again))


def test_everything_that_was_built_is_decoded_by_dali(built):
    dataset = Dataset.open(built, "train")
    config = InputConfig(path=built, image_size=16, threads=1)
    loader = EvalLoader(dataset, config, batch_size=8, rank=0, world_size=1, device=CPU)
    valid = sum(int(batch.valid.sum()) for batch in loader)
    loader.close()
    assert valid == len(dataset)


# --- while reading ---------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(digits, tmp_path):
    return shutil.copytree(digits, tmp_path / "digits")


def overwrite(folder: Path, sample: int, data: bytes, at: int = 0) -> None:
    dataset = Dataset.open(folder, "train")
    with dataset.shard_path(int(dataset.shard[sample])).open("r+b") as shard:
        shard.seek(int(dataset.offset[sample]) + at)
        shard.write(data)


def read_epoch(folder: Path, augment: AugmentConfig | None = None) -> tuple[set[int], list]:
    """Read an epoch and return the ids that were seen and the reports; every label must be the picture's own."""
    dataset = Dataset.open(folder, "train")
    reports: list = []
    config = InputConfig(
        path=folder, image_size=32, threads=1, max_bad_fraction=0.01, augment=augment or AugmentConfig()
    )
    loader = TrainLoader(
        dataset, config, seed=1, global_batch=64, micro_batch=64, rank=0, world_size=1, device=CPU,
        on_bad_sample=reports.append,
    )  # fmt: skip
    seen: set[int] = set()
    for batch in itertools.islice(loader, 24):
        assert (dataset.labels[batch.sample_ids] == batch.labels.numpy()).all()
        assert torch.isfinite(batch.images).all()
        seen |= set(batch.sample_ids.tolist())
    loader.close()
    return seen, reports


READING = {
    "a flipped bit in the scan": lambda f: overwrite(f, 70, b"\x55", 400),
    "zeros over the picture": lambda f: overwrite(f, 70, bytes(700)),
    "text over the picture": lambda f: overwrite(f, 70, b"disk error " * 20),
    "another picture in its place": lambda f: overwrite(f, 70, jpeg(5, (40, 40))[:600]),
    "the start marker gone": lambda f: overwrite(f, 70, b"\0\0"),
    "an early end marker": lambda f: overwrite(f, 70, b"\xff\xd9", 650),
}


@pytest.mark.parametrize("name", READING)
def test_a_damaged_sample_is_replaced_reported_and_nothing_else_changes(copy, name):
    READING[name](copy)
    seen, reports = read_epoch(copy)
    assert seen == set(range(1437)) - {70}
    assert {(report.id, report.replaced_by) for report in reports} == {(70, 71)}
    assert "checksum" in reports[0].reason
    assert reports[0].name.startswith("00000070-scan")


def retable(folder: Path, **changes) -> None:
    """Change the table and dataset.json as a builder with a fault would have written them."""
    path = folder / "digits-train.samples.npz"
    with np.load(path) as stored:
        table = dict(stored)
    for column, (sample, value) in changes.items():
        table[column][sample] = value
    np.savez(path, **table)
    manifest = Manifest.read(folder)
    split = manifest.splits["train"].model_copy(update={"table": file_of(path)})
    manifest.model_copy(update={"splits": manifest.splits | {"train": split}}).write(folder)


CROP = AugmentConfig(random_resized_crop=RandomResizedCropConfig())


def spoil_scan(folder: Path) -> None:
    """Make picture 70 one whose header is right and whose scan no decoder can begin."""
    dataset = Dataset.open(folder, "train")
    with dataset.shard_path(0).open("rb") as shard:
        shard.seek(int(dataset.offset[70]))
        data = shard.read(int(dataset.length[70]))
    scan = data.index(b"\xff\xda")
    spoiled = data[: scan + 12] + b"\xff\xd8" + bytes(len(data) - scan - 14)
    overwrite(folder, 70, spoiled)
    retable(folder, crc32=(70, crc32(spoiled)))


@pytest.mark.parametrize("augment", [None, CROP], ids=["whole", "crop"])
def test_a_picture_with_a_right_checksum_that_dali_cannot_decode_is_replaced(copy, augment):
    spoil_scan(copy)
    seen, reports = read_epoch(copy, augment)
    assert seen == set(range(1437)) - {70}
    assert {(report.id, report.replaced_by) for report in reports} == {(70, 71)}
    assert "decod" in reports[0].reason.lower() or "Invalid SOS" in reports[0].reason


def test_pictures_are_judged_one_by_one_with_one_decoder_for_those_that_decode(digits):
    config = InputConfig(path=digits)
    decoder, start, shape = SingleDecoder(config, None), np.zeros(2, np.int32), np.array([40, 60], np.int32)
    good, bad = (np.frombuffer(data, np.uint8) for data in (GOOD, GOOD[:SCAN] + b"no scan at all"))
    verdicts, pipes = [], []
    for data in (good, good, bad, good, bad, good, good):
        verdicts.append(decoder.why_not(data, start, shape))
        pipes.append(decoder._pipe)
    assert [bool(verdict) for verdict in verdicts] == [False, False, True, False, True, False, False]
    assert pipes[0] is pipes[1] is not pipes[3]
    assert pipes[5] is pipes[6] is not pipes[3]


def test_pixels_of_the_others_are_the_same_when_one_picture_cannot_be_decoded(copy, digits):
    def pixels(folder):
        dataset = Dataset.open(folder, "train")
        config = InputConfig(path=folder, image_size=32, threads=1, max_bad_fraction=0.01, augment=CROP)
        loader = TrainLoader(dataset, config, seed=1, global_batch=64, micro_batch=32, rank=0, world_size=1, device=CPU)
        found = [(b.sample_ids, b.images) for b in itertools.islice(loader, 46)]
        loader.close()
        return np.concatenate([ids for ids, _ in found]), torch.cat([images for _, images in found])

    spoil_scan(copy)
    (ids, images), (good_ids, good_images) = pixels(copy), pixels(digits)
    same = good_ids != 70
    assert torch.equal(images[torch.from_numpy(same)], good_images[torch.from_numpy(same)])
    assert set(ids[~same].tolist()) == {71}


WITH_A_RIGHT_CHECKSUM = {
    "text": lambda data: b"no picture".ljust(len(data), b"."),
    "zeros": lambda data: bytes(len(data)),
    "a jpeg without a frame": lambda data: data[:20] + bytes(len(data) - 20),
    "a gif": lambda data: picture("GIF", "P")[: len(data)].ljust(len(data), b"\0"),
    "another size": lambda data: data.replace(b"\0\x40\0\x40", b"\0\x41\0\x40", 1),
}


@pytest.mark.parametrize("name", WITH_A_RIGHT_CHECKSUM)
def test_a_header_that_is_not_of_the_picture_in_the_table_is_screened_out_before_the_decoder(copy, name):
    dataset = Dataset.open(copy, "train")
    with dataset.shard_path(0).open("rb") as shard:
        shard.seek(int(dataset.offset[70]))
        data = WITH_A_RIGHT_CHECKSUM[name](shard.read(int(dataset.length[70])))
    overwrite(copy, 70, data)
    retable(copy, crc32=(70, crc32(data)))
    seen, reports = read_epoch(copy)
    assert seen == set(range(1437)) - {70}
    assert {(report.id, report.replaced_by) for report in reports} == {(70, 71)}
    assert "header" in reports[0].reason


def test_a_wrong_size_in_the_table_is_screened_out(copy):
    retable(copy, width=(70, 640))
    seen, reports = read_epoch(copy)
    assert 70 not in seen
    assert {report.id for report in reports} == {70}


BEFORE_THE_FIRST_BATCH = {
    "a short shard": (lambda f: os.truncate(f / "digits-train-000002.tar", 9999), "000002.tar has 9999 bytes"),
    "an empty shard": (lambda f: os.truncate(f / "digits-train-000002.tar", 0), "000002.tar has 0 bytes"),
    "a missing shard": (lambda f: (f / "digits-train-000002.tar").unlink(), "000002.tar: No such file"),
    "another shard in its place": (
        lambda f: shutil.copy(f / "digits-val-000000.tar", f / "digits-train-000002.tar"),
        "it is not the file that was indexed",
    ),
    "another shard of the same size in its place": (
        lambda f: shutil.copy(f / "digits-train-000003.tar", f / "digits-train-000002.tar"),
        "000002.tar does not hold its samples where the table says",
    ),
    "zeros at the start of a shard": (lambda f: overwrite(f, 0, bytes(512), -512), "000000.tar does not hold"),
    "zeros at the end of a shard": (lambda f: overwrite(f, 1436, bytes(512), -512), "000009.tar does not hold"),
    "a missing index": (lambda f: (f / "digits-train-000002.idx").unlink(), "000002.idx: No such file"),
    "a table cut short": (lambda f: os.truncate(f / "digits-train.samples.npz", 999), "samples.npz is not the file"),
    "a missing table": (lambda f: (f / "digits-train.samples.npz").unlink(), "samples.npz cannot be read"),
    "dataset.json cut short": (lambda f: os.truncate(f / "dataset.json", 300), "dataset.json cannot be read"),
    "a label outside the classes": (lambda f: retable(f, label=(70, 99)), "has label 99, but the classes are 0..9"),
    "a negative label": (lambda f: retable(f, label=(70, -1)), "has label -1"),
    "a table of another order": (lambda f: retable(f, shard=(70, 9)), "does not count the samples"),
}


@pytest.mark.parametrize("name", BEFORE_THE_FIRST_BATCH)
def test_a_dataset_that_disagrees_with_itself_is_an_error_before_the_first_batch(copy, name):
    damage, message = BEFORE_THE_FIRST_BATCH[name]
    damage(copy)
    with pytest.raises(DataError, match=message) as caught:
        Dataset.open(copy, "train")
    assert "\n" not in str(caught.value)


def test_a_shard_in_which_every_picture_is_damaged_is_one_clear_line_and_never_a_wrong_label(copy):
    dataset = Dataset.open(copy, "train")
    for sample in np.flatnonzero(dataset.shard == 2).tolist():
        overwrite(copy, sample, bytes(100), 300)
    with pytest.raises(DataError, match=r"000002.tar: sample .* and all after it are damaged; copy the shard again"):
        read_epoch(copy)


def test_a_shard_that_vanishes_while_training_is_one_clear_line(copy):
    dataset = Dataset.open(copy, "train")
    config = InputConfig(path=copy, image_size=32, threads=1)
    (copy / "digits-train-000002.tar").unlink()
    loader = TrainLoader(dataset, config, seed=1, global_batch=64, micro_batch=64, rank=0, world_size=1, device=CPU)
    with pytest.raises(DataError, match=r"000002.tar cannot be read \(No such file"):
        list(itertools.islice(loader, 24))
    loader.close()
