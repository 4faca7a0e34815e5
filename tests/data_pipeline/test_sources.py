import gzip
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.dataset import Dataset
from data_pipeline.manifest import Manifest
from data_pipeline.reader import Reader
from data_pipeline.sources import imagenet
from tests.data_pipeline.datasets import classes_by_bytes, listed, run_build
from tests.data_pipeline.images import imagenet_1k, imagenet_21k, jpeg, tar

CLASSES = {"n01440764": 7, "n01443537": 5, "n01484850": 9}


def test_imagenet_1k_archives_become_both_splits_with_the_labels_of_the_development_kit(tmp_path):
    images = imagenet_1k(tmp_path / "in", CLASSES, val=10)
    assert run_build(tmp_path / "in", tmp_path / "out") == 0
    val = images.pop("val")
    expected = {data: wnid for wnid, members in images.items() for data in members.values()}
    assert classes_by_bytes(tmp_path / "out", "train") == expected
    numbered = sorted(CLASSES, reverse=True)  # as the look-alike numbers them
    expected = {data: numbered[i % 3] for i, data in enumerate(val.values())}
    assert classes_by_bytes(tmp_path / "out", "val") == expected
    dataset = Dataset.open(tmp_path / "out", "train")
    assert dataset.class_ids == tuple(sorted(CLASSES))
    assert dataset.class_names[0] == "words of n01440764"
    assert not list((tmp_path / "out").glob(".building*"))


@pytest.mark.parametrize("name", ["ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"])
def test_a_missing_imagenet_1k_archive_is_named(tmp_path, capsys, name):
    imagenet_1k(tmp_path / "in", CLASSES, val=3)
    (tmp_path / "in" / name).unlink()
    assert run_build(tmp_path / "in", tmp_path / "out") == 2
    assert f"{name} does not exist; download it" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"])
def test_an_imagenet_1k_archive_that_ends_early_is_an_error_and_leaves_nothing_that_looks_whole(tmp_path, capsys, name):
    imagenet_1k(tmp_path / "in", CLASSES, val=6)
    path = tmp_path / "in" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    assert run_build(tmp_path / "in", tmp_path / "out") == 2
    assert name in capsys.readouterr().err
    assert name.endswith("val.tar") or not (tmp_path / "out" / "dataset.json").exists()


@pytest.mark.parametrize("mode", ["w", "w:gz", "folder"])
def test_imagenet_21k_is_read_from_its_archives_with_a_class_filter(tmp_path, monkeypatch, mode):
    monkeypatch.setattr(imagenet, "ENOUGH", 8)
    monkeypatch.setattr(imagenet, "HELD_OUT", 3)
    archive = tmp_path / "winter21.tar"
    images = imagenet_21k(archive, {**CLASSES, "n09999999": 4}, "w" if mode == "folder" else mode)
    if mode == "folder":
        with tarfile.open(archive) as unpacked:
            unpacked.extractall(tmp_path / "classes")
        archive = next((tmp_path / "classes").rglob("n*.tar")).parent
    (tmp_path / "p.txt").write_text("\n".join(CLASSES))
    assert run_build(archive, tmp_path / "out", "--classes", tmp_path / "p.txt") == 0
    expected = {data: wnid for wnid in CLASSES for data in images[wnid].values()}
    train, val = classes_by_bytes(tmp_path / "out", "train"), classes_by_bytes(tmp_path / "out", "val")
    assert train | val == expected
    assert not train.keys() & val.keys()
    assert list(val.values()) == ["n01484850"] * 3  # the only class with enough


def test_a_class_that_the_archive_does_not_have_is_named_before_the_work_begins(tmp_path, capsys):
    imagenet_21k(tmp_path / "winter21.tar", CLASSES)
    (tmp_path / "p.txt").write_text("n01440764\nn00000001\n")
    assert run_build(tmp_path / "winter21.tar", tmp_path / "out", "--classes", tmp_path / "p.txt") == 2
    assert "no images of 1 of the chosen classes, for example n00000001" in capsys.readouterr().err


def test_an_archive_of_another_kind_is_refused(tmp_path, capsys):
    (tmp_path / "flat.tar").write_bytes(tar({"a.jpg": jpeg(1)}))
    assert run_build(tmp_path / "flat.tar", tmp_path / "out") == 2
    assert "neither a shard" in capsys.readouterr().err


def test_written_shards_can_be_indexed_again_by_others(digits, tmp_path):
    import shutil

    for path in digits.glob("*-train-*.tar"):
        shutil.copy(path, tmp_path)
    assert run_build(tmp_path / "*.tar", tmp_path) == 0
    ours, theirs = Dataset.open(digits, "train"), Dataset.open(tmp_path, "train")
    for column in ("labels", "offset", "length", "width", "height", "crc32", "shard"):
        assert np.array_equal(getattr(ours, column), getattr(theirs, column))


def folders(root: Path, *names: str) -> Path:
    """Two images in each of these folders."""
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(2):
            (root / name / f"{i}.jpg").write_bytes(jpeg(10 * number + i, (24, 24)))
    return root


def test_what_lies_beside_the_images_of_a_folder_is_listed_and_is_no_class(tmp_path, capsys):
    root = folders(tmp_path / "in[1]", "ant", "bee[2]", ".git", "__MACOSX", "lost+found")
    (root / "empty").mkdir()
    (root / "only hidden").mkdir()
    (root / "only hidden" / ".DS_Store").write_bytes(b"x")
    (root / "loose.jpg").write_bytes(jpeg(1))
    (root / "ant" / "._0.jpg").write_bytes(b"fork")
    (root / "ant" / ".cache").mkdir()
    (root / "ant" / "broken.jpg").symlink_to(tmp_path / "nowhere")
    (root / "ant" / "itself.jpg").symlink_to(root / "ant" / "itself.jpg")
    (root / "ant" / "up").symlink_to(root / "ant")
    (root / "ant" / "linked.jpg").symlink_to(root / "bee[2]" / "0.jpg")
    (tmp_path / "far" / "deep").mkdir(parents=True)
    (tmp_path / "far" / "deep" / "1.jpg").write_bytes(jpeg(77))
    (root / "cat").symlink_to(tmp_path / "far")
    os.mkfifo(root / "ant" / "pipe.jpg")
    (Path(os.fsdecode(os.fsencode(root / "ant") + b"/caf\xe9.jpg"))).write_bytes(jpeg(78))
    (root / "ant" / "\x1b[2J\n.jpg").write_bytes(b"a terminal would be cleared")
    assert run_build(root, tmp_path / "out") == 0
    manifest = Manifest.read(tmp_path / "out")
    assert manifest.class_names == ["ant", "bee[2]", "cat"]
    assert manifest.splits["train"].class_counts == [4, 2, 1]
    assert set(listed(tmp_path / "out")) == {
        ".git", "__MACOSX", "lost+found", "empty", "only hidden", "loose.jpg", "ant/._0.jpg", "ant/.cache",
        "ant/broken.jpg", "ant/itself.jpg", "ant/up", "ant/pipe.jpg", "ant/\\x1b[2J\\x0a.jpg",
    }  # fmt: skip
    err = capsys.readouterr().err
    assert "7 samples in 1 shards; 3 classes with 1 to 4 images (median 2)" in err
    assert "13 left out" in err
    assert "\x1b" not in err


def test_a_fraction_of_each_class_is_held_out_always_the_same(tmp_path):
    root = tmp_path / "in"
    for name, count in (("ant", 10), ("bee", 21), ("cat", 3)):
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i}.jpg").write_bytes(jpeg(100 * count + i, (16, 16)))
    vals = []
    for dest in ("a", "b"):
        assert run_build(root, tmp_path / dest, "--val-fraction", "0.2") == 0
        manifest = Manifest.read(tmp_path / dest)
        assert [manifest.splits[split].class_counts for split in ("train", "val")] == [[8, 17, 2], [2, 4, 1]]
        train, val = classes_by_bytes(tmp_path / dest, "train"), classes_by_bytes(tmp_path / dest, "val")
        assert not train.keys() & val.keys()
        assert len(train | val) == 34
        vals.append(set(val))
        if dest == "a":
            (root / "ant" / "0.jpg").rename(root / "ant" / "10.jpg")
    assert len(vals[0] - vals[1]) <= 1  # one name that changes moves at most one image


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["IN", "IN/out"], "is inside"),
        (["IN", "IN"], "is inside"),
        (["IN/ant", "OUT"], "has no class folders"),
        (["IN", "OUT", "--classes", "IN/ant/0.jpg"], "--classes does not go with a folder of images"),
        (["IN", "OUT", "--label-key", "y"], "--label-key does not go with"),
        (["digits", "OUT", "--val-fraction", "0.1"], "--val-fraction does not go with digits"),
        (["IN", "OUT", "--val-fraction", "1.5"], "share of each class"),
        (["IN", "--index", "OUT"], "--index goes with plain WebDataset shards"),
        (["IN/ant/0.jpg", "OUT"], "is not read as it is"),
        (["IN/*.tar", "OUT"], "no file matches"),
        (["OUT"], "name SOURCE and DEST"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line_and_writes_nothing(arguments, message, tmp_path, capsys):
    folders(tmp_path / "in", "ant", "bee")
    before = sorted(tmp_path.rglob("*"))
    filled = [a.replace("IN", str(tmp_path / "in")).replace("OUT", str(tmp_path / "out")) for a in arguments]
    assert run_build(*filled) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "names",
    [
        ("train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz"),
        ("emnist-x-train-images-idx3-ubyte", "emnist-x-test-images-idx3-ubyte"),
    ],
)
def test_idx_files_become_a_dataset_and_damaged_ones_are_refused(names, tmp_path, capsys):
    rng = np.random.default_rng(0)
    root, wanted = tmp_path / "in", {}
    root.mkdir()
    for name, count in zip(names, (12, 5), strict=True):
        pixels, labels = rng.integers(0, 256, (count, 8, 6), np.uint8), np.arange(count, dtype=np.uint8) % 3
        wanted[count] = (pixels.transpose(0, 2, 1) if name.startswith("emnist") else pixels, labels)
        for file, shape, data in ((name, pixels.shape, pixels), (name.replace("images-idx3", "labels-idx1"),
                                                                 labels.shape, labels)):  # fmt: skip
            content = bytes((0, 0, 8, len(shape))) + np.array(shape, ">u4").tobytes() + data.tobytes()
            (root / file).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert run_build(root, tmp_path / "out") == 0
    for split, count in (("train", 12), ("val", 5)):
        dataset = Dataset.open(tmp_path / "out", split)
        pixels, labels = wanted[count]
        reader = Reader(dataset)
        for sample in range(count):
            number = int(dataset.sample_name(sample).removesuffix(".jpg")[-6:])
            image = np.asarray(Image.open(io.BytesIO(reader.read(sample)[0].tobytes())).convert("L"), int)
            assert dataset.labels[sample] == labels[number]
            assert np.abs(image - pixels[number]).mean() < 6  # noise, encoded at quality 95
        reader.close()
    # A part of the training images becomes the val split, the test images the test split; nothing is lost or doubled.
    assert run_build(root, tmp_path / "held", "--val-fraction", "0.25") == 0
    held = {split: Dataset.open(tmp_path / "held", split) for split in ("train", "val", "test")}
    assert {split: np.bincount(part.labels).tolist() for split, part in held.items()} == {
        "train": [3, 3, 3], "val": [1, 1, 1], "test": [2, 2, 1]
    }  # fmt: skip
    named = {split: {part.sample_name(i)[-15:] for i in range(len(part))} for split, part in held.items()}
    before = {split: Dataset.open(tmp_path / "out", split) for split in ("train", "val")}
    assert named["train"] | named["val"] == {before["train"].sample_name(i)[-15:] for i in range(12)}
    assert named["test"] == {before["val"].sample_name(i)[-15:] for i in range(5)}
    data = (root / names[0]).read_bytes()
    for damaged in (data[:-3], data[:-3] + b"xyz" + data[-3:], b"\1" + data[1:]):
        (root / names[0]).write_bytes(damaged)
        assert run_build(root, tmp_path / "bad") == 2
        assert names[0] in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    ("folder_names", "loose", "expected"),
    [
        (("train/ant", "train/bee"), "test/1.jpg", {"train"}),
        (("val/ant", "val/bee"), None, {"val"}),
        (("train/ant", "train/bee", "val/ant"), "annotations/1.xml", {"train", "val"}),
        (("Training/ant", "Training/bee", "validation/ant", "test/bee"), None, {"train", "val", "test"}),
        (("train/ant", "Train/ant"), None, "both"),
        (("train/ant", "cow", "dog"), None, "images as in a class"),
        (("test", "train"), None, "are in no class folder"),
        (("training_set/ant", "test_set/ant"), None, {"train", "test"}),
        (("train_station", "test-tube", "cup"), None, {"train"}),
        (("ds/train/ant", "ds/val/ant"), None, "name"),
        (("train/ant/images", "val/images"), None, "no class folder of the training split"),
    ],
)
def test_folders_of_splits_are_told_from_classes_or_refused(folder_names, loose, expected, tmp_path, capsys):
    root = folders(tmp_path / "in", *folder_names)
    if loose is not None:
        (root / loose).parent.mkdir(exist_ok=True)
        (root / loose).write_bytes(jpeg(5))
    status = run_build(root, tmp_path / "out")
    if isinstance(expected, str):
        assert status == 2
        assert expected in capsys.readouterr().err
        return
    manifest = Manifest.read(tmp_path / "out")
    assert (status, set(manifest.splits)) == (0, expected)
    assert manifest.class_names == sorted({name.split("/")[-1] for name in folder_names})
    assert sum(split.samples for split in manifest.splits.values()) == 2 * len(folder_names)
    beside = listed(tmp_path / "out", next(iter(manifest.splits)))
    assert list(beside) == ([] if loose is None else [loose.split("/")[0]])
    assert run_build(root, tmp_path / "forced", "--split", "train") == 0


def test_class_folders_in_an_archive_may_be_numbers_and_have_other_files_beside(tmp_path):
    members = {"README.txt": b"x", "labels.json": b"{}"}
    for i, folder in enumerate(("00000", "00000", "20160001", "20160001")):
        members |= {f"d/{folder}/{i}.jpg": jpeg(i), f"d/{folder}/{i}.txt": b"a caption"}
    members["d/none/0.jpg"] = b"no image"
    (tmp_path / "x.tar").write_bytes(tar(members))
    assert run_build(tmp_path / "x.tar", tmp_path / "out") == 0
    manifest = Manifest.read(tmp_path / "out")
    assert manifest.class_names == ["00000", "20160001", "none"]
    assert manifest.splits["train"].class_counts == [2, 2, 0]


def test_what_is_no_regular_file_is_refused_and_never_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "x.tar")
    for source in (tmp_path / "x.tar", tmp_path / "*.tar", "/dev/null"):
        assert run_build(source, tmp_path / "out") == 2
    header = tarfile.TarInfo("a/1.jpg").tobuf(tarfile.GNU_FORMAT)
    negative = header[:124] + b"\xff" * 10 + b"\xfe\x00" + header[136:148] + b"        " + header[156:]
    total = sum(negative)
    (tmp_path / "n.tar").write_bytes(negative[:148] + b"%06o\0 " % total + negative[156:] + bytes(1024))
    assert run_build(tmp_path / "n.tar", tmp_path / "out") == 2
    assert "negative size" in capsys.readouterr().err
    (tmp_path / "file").write_text("x")
    for dest in (tmp_path / "file", tmp_path / "file" / "out", ""):
        assert run_build("digits", dest) == 2
    assert run_build("digits", tmp_path / "out", "--max-side", "0") == 2
    assert run_build("digits", tmp_path / ("x" * 200)) == 2
    assert run_build("x" * 5000, tmp_path / "out") == 2
    assert capsys.readouterr().err.count("\n") == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "n.tar", "x.tar"]


def archive(path: Path, *names: str) -> Path:
    path.write_bytes(tar({name: jpeg(i) if name.endswith("jpg") else b"x" for i, name in enumerate(names)}))
    return path


@pytest.mark.parametrize(
    ("names", "options", "expected"),
    [
        (["ant/2019/0.jpg", "ant/2020/1.jpg", "bee/2019/2.jpg"], [], {"train": {"ant": 2, "bee": 1}}),
        (["d/ant/0.jpg", "d/bee/1.jpg", "d/README.txt", "d/._ant", "d/ant/._0.jpg"], [],
         {"train": {"ant": 1, "bee": 1}}),
        (["d/meta/classes.txt", "d/images/ant/0.jpg", "d/images/bee/1.jpg"], [], {"train": {"ant": 1, "bee": 1}}),
        (["d/training_data/train/ant/0.jpg", "d/training_data/val/ant/1.jpg"], [],
         {"train": {"ant": 1}, "val": {"ant": 1}}),
        (["p/train_station/0.jpg", "p/cup/1.jpg"], [], {"train": {"cup": 1, "train_station": 1}}),
        (["ant/0.jpg"], ["--split", "val"], {"val": {"ant": 1}}),
        (["d/loose.jpg", "d/ant/0.jpg", "d/bee/1.jpg"], [], {"train": {"ant": 1, "bee": 1}}),
        (["train/loose.jpg", "train/ant/0.jpg", "val/loose.jpg", "val/ant/1.jpg"], [],
         {"train": {"ant": 1}, "val": {"ant": 1}}),
        (["train/ant/0.jpg", "train/bee/1.jpg", "val/ant/2.jpg", "val/cow/3.jpg"], [],
         {"train": {"ant": 1, "bee": 1, "cow": 0}, "val": {"ant": 1, "bee": 0, "cow": 1}}),
        (["train/ant/images/0.jpg", "val/images/1.jpg"], [], None),
    ],
)  # fmt: skip
def test_splits_and_classes_of_an_archive_are_those_of_the_folders_in_it(names, options, expected, tmp_path):
    assert run_build(archive(tmp_path / "x.tar", *names), tmp_path / "out", *options) == (2 if expected is None else 0)
    if expected is None:
        assert not (tmp_path / "out").exists()
        return
    manifest = Manifest.read(tmp_path / "out")
    found = {k: dict(zip(manifest.class_names, v.class_counts, strict=True)) for k, v in manifest.splits.items()}
    assert found == expected


def test_a_fraction_is_of_the_images_of_the_training_split(tmp_path):
    for split in ("train", "test"):
        folders(tmp_path / "in" / split, "ant", "bee")
        for i in range(2, 10):
            (tmp_path / "in" / split / "ant" / f"{i}.jpg").write_bytes(jpeg(i))
            (tmp_path / "in" / split / "ant" / f"{i}.txt").write_text("a caption")
    assert run_build(tmp_path / "in", tmp_path / "out", "--val-fraction", "0.2") == 0
    splits = Manifest.read(tmp_path / "out").splits
    assert {name: split.class_counts for name, split in splits.items()} == {
        "train": [8, 2], "test": [10, 2], "val": [2, 0]
    }  # fmt: skip
