import gzip
import io
import os
import re
import shutil
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
from tests.data_pipeline.images import class_folders, imagenet_1k, imagenet_21k, jpeg, tar

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


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("name", ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"])
def test_an_imagenet_1k_archive_that_is_missing_or_ends_early_is_named_and_nothing_is_left(tmp_path, capsys, name, cut):
    imagenet_1k(tmp_path / "in", CLASSES, val=6)
    path = tmp_path / "in" / name
    if cut:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    else:
        path.unlink()
    assert run_build(tmp_path / "in", tmp_path / "out") == 2
    if cut or not name.endswith("train.tar"):  # without which the folder is no ImageNet-1k
        assert name in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


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


def test_what_lies_beside_the_images_of_a_folder_is_listed_and_is_no_class(tmp_path, capsys):
    root = class_folders(tmp_path / "in[1]", 2, "ant", "bee[2]", ".git", "__MACOSX", "lost+found")
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
        class_folders(root, count, name)
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
        (["IN", "OUT", "--classes", "NAMES"], "--classes does not go with"),
        (["IN", "OUT", "--classes", "IN/ant/0.jpg"], "name a list of classes"),
        (["FLAT.TAR", "OUT"], "neither a shard"),
        (["IN", "OUT", "--label-key", "y"], "--label-key does not go with"),
        (["digits", "OUT", "--val-fraction", "0.1"], "--val-fraction does not go with digits"),
        (["IN", "OUT", "--val-fraction", "1.5"], "share of each class"),
        (["IN", "--index", "OUT"], "--index goes with plain WebDataset shards"),
        (["IN/ant/0.jpg", "OUT"], "is not read as it is"),
        (["IN/*.tar", "OUT"], "no file matches"),
        (["OUT"], "name SOURCE and DEST"),
        *((["IN", "OUT", "--split", split], "becomes a part of file names") for split in ("../train", "a b", "*", "")),
        (["/nowhere", "OUT"], "no file matches /nowhere"),
        (["dogits", "OUT"], "is not 'digits'"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line_and_writes_nothing(arguments, message, tmp_path, capsys):
    class_folders(tmp_path / "in", 2, "ant", "bee")
    (tmp_path / "names").write_text("ant\nbee\n")
    (tmp_path / "flat.tar").write_bytes(tar({"a.jpg": jpeg(1)}))
    before = sorted(tmp_path.rglob("*"))
    places = {word: str(tmp_path / word.lower()) for word in ("IN", "OUT", "NAMES", "FLAT.TAR")}
    assert run_build(*(re.sub("|".join(places), lambda match: places[match[0]], a) for a in arguments)) == 2
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
    named = {split: {part.sample_name(i)[9:] for i in range(len(part))} for split, part in held.items()}
    assert named["train"] | named["val"] == {f"train{number:06d}.jpg" for number in range(12)}
    assert named["test"] == {f"val{number:06d}.jpg" for number in range(5)}
    data = (root / names[0]).read_bytes()
    for damaged in (data[:-3], data[:-3] + b"xyz" + data[-3:], b"\1" + data[1:]):
        (root / names[0]).write_bytes(damaged)
        assert run_build(root, tmp_path / "bad") == 2
        assert names[0] in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()


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


def test_written_shards_can_be_indexed_again_by_others(digits, tmp_path):
    for path in digits.glob("*-train-*.tar"):
        shutil.copy(path, tmp_path)
    assert run_build(tmp_path / "*.tar", tmp_path) == 0
    ours, theirs = Dataset.open(digits, "train"), Dataset.open(tmp_path, "train")
    for column in ("labels", "offset", "length", "width", "height", "crc32", "shard"):
        assert np.array_equal(getattr(ours, column), getattr(theirs, column))


ANT = {"ant": 1}
BOTH = {"ant": 1, "bee": 1}
LAYOUTS = [  # files; outcome on disk; in an archive, where that differs
    ("train/ant/0.jpg train/bee/1.jpg test/2.jpg", {"train": BOTH}),
    ("val/ant/0.jpg val/bee/1.jpg", {"val": BOTH}),
    ("train/ant/0.jpg train/bee/1.jpg val/ant/2.jpg annotations/3.xml", {"train": BOTH, "val": {"ant": 1, "bee": 0}}),
    ("Training/ant/0.jpg validation/ant/1.jpg test/ant/2.jpg", {"train": ANT, "val": ANT, "test": ANT}),
    ("train/ant/0.jpg val/ant/1.jpg small_classes/cow/2.jpg", {"train": ANT, "val": ANT}),
    ("train/loose.jpg train/ant/0.jpg val/loose.jpg val/ant/1.jpg", {"train": ANT, "val": ANT}),
    ("train/ant/0.jpg val/ant/1.jpg val/bee/2.jpg", {"train": {"ant": 1, "bee": 0}, "val": BOTH}),
    ("training_set/ant/0.jpg test_set/ant/1.jpg", {"train": ANT, "test": ANT}),
    ("train_station/0.jpg test-tube/1.jpg cup/2.jpg", {"train": {"cup": 1, "test-tube": 1, "train_station": 1}}),
    ("ant/2019/0.jpg ant/2020/1.jpg bee/2019/2.jpg", {"train": {"ant": 2, "bee": 1}}),
    ("2016/0.jpg ant/1.jpg ant/1.txt none/bad.jpg README.txt", {"train": {"2016": 1, "ant": 1, "none": 0}}),
    ("train/ant/0.jpg Train/ant/1.jpg", "both"),
    ("train/ant/0.jpg cow/1.jpg dog/2.jpg", "images as in a class"),
    ("test/0.jpg train/1.jpg", "are in no class folder"),
    ("train/ant/images/0.jpg val/images/1.jpg", "no class folder of the training split"),
    ("d/e/train/ant/0.jpg d/e/val/ant/1.jpg", "name", {"train": ANT, "val": ANT}),
    ("d/ant/0.jpg d/bee/1.jpg d/README.txt d/._ant d/ant/._0.jpg", "name", {"train": BOTH}),
    ("d/loose.jpg d/ant/0.jpg d/bee/1.jpg", {"train": {"d": 3}}, {"train": BOTH}),
    ("d/meta/classes.txt d/images/ant/0.jpg d/images/bee/1.jpg", "name", {"train": BOTH}),
    ("p/train_station/0.jpg p/cup/1.jpg", "name", {"train": {"cup": 1, "train_station": 1}}),
]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[0])
def test_splits_and_classes_are_those_of_the_folders_and_nothing_is_lost(layout, packed, tmp_path, capsys):
    names, expected = layout[0].split(), layout[-1 if packed else 1]
    members = {name: jpeg(i) if name.endswith("jpg") else b"x" for i, name in enumerate(names)}
    members |= {name: b"no image" for name in names if "bad" in name}
    source = tmp_path / ("in.tar" if packed else "in")
    for name, data in {} if packed else members.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    if packed:
        source.write_bytes(tar(members))
    status = run_build(source, tmp_path / "out")
    if isinstance(expected, str):
        assert status == 2
        assert expected in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
        return
    manifest = Manifest.read(tmp_path / "out")
    found = {k: dict(zip(manifest.class_names, v.class_counts, strict=True)) for k, v in manifest.splits.items()}
    assert found == expected
    assert sum(split.samples + len(split.rejected) for split in manifest.splits.values()) == len(members)
    assert run_build(source, tmp_path / "forced", "--split", "val") == 0
    assert set(Manifest.read(tmp_path / "forced").splits) == {"val"}


def test_a_fraction_is_of_the_images_of_the_training_split(tmp_path):
    for split in ("train", "test"):
        class_folders(tmp_path / "in" / split, 2, "bee")
        class_folders(tmp_path / "in" / split, 10, "ant")
        for i in range(2, 10):
            (tmp_path / "in" / split / "ant" / f"{i}.txt").write_text("a caption")
    assert run_build(tmp_path / "in", tmp_path / "out", "--val-fraction", "0.2") == 0
    splits = Manifest.read(tmp_path / "out").splits
    assert {name: split.class_counts for name, split in splits.items()} == {
        "train": [8, 2], "test": [10, 2], "val": [2, 0]
    }  # fmt: skip
