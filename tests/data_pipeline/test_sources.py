import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.build import main as build
from data_pipeline.dataset import Dataset
from data_pipeline.manifest import Manifest
from data_pipeline.reader import Reader
from data_pipeline.sources import imagenet21k as source_21k
from data_pipeline.verify import main as verify
from tests.data_pipeline.images import imagenet_1k, imagenet_21k, jpeg, tar


def stored(folder: Path, split: str) -> dict[bytes, str]:
    """Return class id of every picture, by its bytes."""
    dataset = Dataset.open(folder, split)
    reader = Reader(dataset)
    found = {reader.read(i)[0].tobytes(): dataset.class_ids[dataset.labels[i]] for i in range(len(dataset))}
    reader.close()
    assert len(found) == len(dataset)
    return found


CLASSES = {"n01440764": 7, "n01443537": 5, "n01484850": 9}


def test_imagenet_1k_archives_become_both_splits_with_the_labels_of_the_development_kit(tmp_path):
    pictures = imagenet_1k(tmp_path / "in", CLASSES, val=10)
    assert build([str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "1"]) == 0
    val = pictures.pop("val")
    expected = {data: wnid for wnid, members in pictures.items() for data in members.values()}
    assert stored(tmp_path / "out", "train") == expected
    numbered = sorted(CLASSES, reverse=True)  # as the look-alike numbers them
    expected = {data: numbered[i % 3] for i, data in enumerate(val.values())}
    assert stored(tmp_path / "out", "val") == expected
    dataset = Dataset.open(tmp_path / "out", "train")
    assert dataset.class_ids == tuple(sorted(CLASSES))
    assert dataset.class_names[0] == "words of n01440764"
    assert not list((tmp_path / "out").glob(".building*"))


@pytest.mark.parametrize("name", ["ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"])
def test_a_missing_imagenet_1k_archive_is_named(tmp_path, capsys, name):
    imagenet_1k(tmp_path / "in", CLASSES, val=3)
    (tmp_path / "in" / name).unlink()
    assert build([str(tmp_path / "in"), str(tmp_path / "out")]) == 2
    assert f"{name} does not exist; download it" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"])
def test_an_imagenet_1k_archive_that_ends_early_is_an_error_and_leaves_nothing_that_looks_whole(tmp_path, capsys, name):
    imagenet_1k(tmp_path / "in", CLASSES, val=6)
    path = tmp_path / "in" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    assert build([str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "1"]) == 2
    assert name in capsys.readouterr().err
    assert name.endswith("val.tar") or not (tmp_path / "out" / "dataset.json").exists()


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_imagenet_21k_is_read_from_its_archive_with_a_class_filter(tmp_path, monkeypatch, mode):
    monkeypatch.setattr(source_21k, "ENOUGH", 8)
    monkeypatch.setattr(source_21k, "HELD_OUT", 3)
    pictures = imagenet_21k(tmp_path / "winter21.tar", {**CLASSES, "n09999999": 4}, mode)
    (tmp_path / "p.txt").write_text("\n".join(CLASSES))
    command = [str(tmp_path / "winter21.tar"), str(tmp_path / "out"), "--classes", str(tmp_path / "p.txt")]
    assert build([*command, "--workers", "1"]) == 0
    expected = {data: wnid for wnid in CLASSES for data in pictures[wnid].values()}
    train, val = stored(tmp_path / "out", "train"), stored(tmp_path / "out", "val")
    assert train | val == expected
    assert not train.keys() & val.keys()
    assert list(val.values()) == ["n01484850"] * 3  # the only class with enough


def test_a_class_that_the_archive_does_not_have_is_named_before_the_work_begins(tmp_path, capsys):
    imagenet_21k(tmp_path / "winter21.tar", CLASSES)
    (tmp_path / "p.txt").write_text("n01440764\nn00000001\n")
    command = [str(tmp_path / "winter21.tar"), str(tmp_path / "out"), "--classes", str(tmp_path / "p.txt")]
    assert build(command) == 2
    assert "no pictures of 1 of the chosen classes, for example n00000001" in capsys.readouterr().err


def test_an_archive_that_is_no_archive_of_archives_is_refused(tmp_path, capsys):
    (tmp_path / "flat.tar").write_bytes(tar({"a.jpg": jpeg(1)}))
    assert build([str(tmp_path / "flat.tar"), str(tmp_path / "out"), "--workers", "1"]) == 2
    assert "ImageNet-21k is an archive of archives" in capsys.readouterr().err


def foreign(folder: Path) -> None:
    folder.mkdir()
    exif = jpeg(3, (40, 20), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0")
    first = {
        f"a/{i:03d}.{ext}": data for i in range(5) for ext, data in (("cls", b"%d" % i), ("jpg", jpeg(i, (30, 20))))
    }
    second = {
        "b0.jpg": exif, "b0.cls": b" 2\n", "b0.json": b"{}",
        "b1.jpg": jpeg(4), "b2.cls": b"1", "b2.jpg": b"no picture", "b3.jpg": jpeg(5), "b3.cls": b"cat",
        "README": b"stray", ".hidden": b"", "b4.jpeg": jpeg(6), "b4.cls": b"0",
        "b5.jpg": jpeg(8), "b5.cls": b"999999999999",
    }  # fmt: skip
    (folder / "x-000.tar").write_bytes(tar(first))
    (folder / "x-001.tar").write_bytes(tar(second))


def test_shards_of_others_are_indexed_in_place(tmp_path):
    foreign(tmp_path / "shards")
    before = {path.name: path.read_bytes() for path in (tmp_path / "shards").iterdir()}
    assert build([str(tmp_path / "shards" / "*.tar"), str(tmp_path / "shards"), "--workers", "1"]) == 0
    dataset = Dataset.open(tmp_path / "shards", "train")
    assert dataset.labels.tolist() == [0, 1, 2, 3, 4, 2, 0]
    # DALI and the table agree on the frame of a picture with an EXIF rotation.
    assert (dataset.width[5], dataset.height[5]) == (20, 40)
    assert all((tmp_path / "shards" / name).read_bytes() == data for name, data in before.items())
    rejected = Manifest.read(tmp_path / "shards").splits["train"].rejected
    assert [reject.name for reject in rejected] == [f"x-001.tar:b{i}" for i in (1, 2, 3, 5)]
    assert "needs one jpg and one cls" in rejected[0].reason
    assert "does not decode" in rejected[1].reason
    assert all("its label is" in reject.reason for reject in rejected[2:])
    assert verify([str(tmp_path / "shards"), "--decode", "--workers", "1"]) == 0


def test_an_index_in_place_is_the_one_wds2idx_writes(tmp_path):
    foreign(tmp_path / "shards")
    (tmp_path / "shards" / "x-001.tar").unlink()  # wds2idx invents a key for a file without an extension
    assert build([str(tmp_path / "shards" / "*.tar"), str(tmp_path / "shards"), "--workers", "1"]) == 0
    tool = Path(sys.executable).with_name("wds2idx")
    subprocess.run([tool, tmp_path / "shards" / "x-000.tar", tmp_path / "idx"], check=True, capture_output=True)
    assert (tmp_path / "shards" / "x-000.idx").read_bytes() == (tmp_path / "idx").read_bytes()


def test_an_index_of_another_shard_is_refused(tmp_path, capsys):
    foreign(tmp_path / "shards")
    (tmp_path / "shards" / "x-000.idx").write_text("v1.2 1\njpg 512 100 a/000.jpg\n")
    assert build([str(tmp_path / "shards" / "*.tar"), str(tmp_path / "shards"), "--workers", "1"]) == 2
    assert "x-000.idx is not the index of x-000.tar" in capsys.readouterr().err


def test_written_shards_can_be_indexed_again_by_others(digits, tmp_path):
    import shutil

    for path in digits.glob("*-train-*.tar"):
        shutil.copy(path, tmp_path)
    assert build([str(tmp_path / "*.tar"), str(tmp_path), "--workers", "1"]) == 0
    ours, theirs = Dataset.open(digits, "train"), Dataset.open(tmp_path, "train")
    for column in ("labels", "offset", "length", "width", "height", "crc32", "shard"):
        assert np.array_equal(getattr(ours, column), getattr(theirs, column))
