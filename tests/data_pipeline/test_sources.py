import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.build import main as build
from data_pipeline.dataset import Dataset
from data_pipeline.manifest import Manifest
from data_pipeline.reader import Reader
from data_pipeline.sources import imagenet21k as source_21k
from data_pipeline.verify import main as verify
from tests.data_pipeline.images import imagenet_1k, imagenet_21k, jpeg, tar


def stored(folder: Path, split: str) -> dict[bytes, str]:
    """Return class id of every image, by its bytes."""
    dataset = Dataset.open(folder, split)
    reader = Reader(dataset)
    found = {reader.read(i)[0].tobytes(): dataset.class_ids[dataset.labels[i]] for i in range(len(dataset))}
    reader.close()
    assert len(found) == len(dataset)
    return found


CLASSES = {"n01440764": 7, "n01443537": 5, "n01484850": 9}


def test_imagenet_1k_archives_become_both_splits_with_the_labels_of_the_development_kit(tmp_path):
    images = imagenet_1k(tmp_path / "in", CLASSES, val=10)
    assert build([str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "1"]) == 0
    val = images.pop("val")
    expected = {data: wnid for wnid, members in images.items() for data in members.values()}
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
    images = imagenet_21k(tmp_path / "winter21.tar", {**CLASSES, "n09999999": 4}, mode)
    (tmp_path / "p.txt").write_text("\n".join(CLASSES))
    command = [str(tmp_path / "winter21.tar"), str(tmp_path / "out"), "--classes", str(tmp_path / "p.txt")]
    assert build([*command, "--workers", "1"]) == 0
    expected = {data: wnid for wnid in CLASSES for data in images[wnid].values()}
    train, val = stored(tmp_path / "out", "train"), stored(tmp_path / "out", "val")
    assert train | val == expected
    assert not train.keys() & val.keys()
    assert list(val.values()) == ["n01484850"] * 3  # the only class with enough


def test_a_class_that_the_archive_does_not_have_is_named_before_the_work_begins(tmp_path, capsys):
    imagenet_21k(tmp_path / "winter21.tar", CLASSES)
    (tmp_path / "p.txt").write_text("n01440764\nn00000001\n")
    command = [str(tmp_path / "winter21.tar"), str(tmp_path / "out"), "--classes", str(tmp_path / "p.txt")]
    assert build(command) == 2
    assert "no images of 1 of the chosen classes, for example n00000001" in capsys.readouterr().err


def test_an_archive_of_another_kind_is_refused(tmp_path, capsys):
    (tmp_path / "flat.tar").write_bytes(tar({"a.jpg": jpeg(1)}))
    assert build([str(tmp_path / "flat.tar"), str(tmp_path / "out"), "--workers", "1"]) == 2
    assert "neither a shard" in capsys.readouterr().err


def foreign(folder: Path) -> None:
    folder.mkdir()
    exif = jpeg(3, (40, 20), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0")
    first = {
        f"a/{i:03d}.{ext}": data for i in range(5) for ext, data in (("cls", b"%d" % i), ("jpg", jpeg(i, (30, 20))))
    }
    second = {
        "b0.jpg": exif, "b0.cls": b" 2\n", "b0.json": b"{}",
        "b1.jpg": jpeg(4), "b2.cls": b"1", "b2.jpg": b"no image", "b3.jpg": jpeg(5), "b3.cls": b"cat",
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
    # DALI and the table agree on the frame of an image with an EXIF rotation.
    assert (dataset.width[5], dataset.height[5]) == (20, 40)
    assert all((tmp_path / "shards" / name).read_bytes() == data for name, data in before.items())
    rejected = Manifest.read(tmp_path / "shards").splits["train"].rejected
    assert [reject.name for reject in rejected] == [
        f"x-001.tar:{name}" for name in ("b1", "b2", "b3", "b5", "README", ".hidden")
    ]
    reasons = ["needs one image and one label", "does not decode", *["its label is"] * 2, *["belongs to no sample"] * 2]
    assert all(reason in reject.reason for reason, reject in zip(reasons, rejected, strict=True))
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


def folders(root: Path, *names: str) -> Path:
    """Two images in each of these folders."""
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(2):
            (root / name / f"{i}.jpg").write_bytes(jpeg(10 * number + i, (24, 24)))
    return root


def listed(folder: Path, split: str = "train") -> dict[str, str]:
    return {reject.name: reject.reason for reject in Manifest.read(folder).splits[split].rejected}


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
    assert build([str(root), str(tmp_path / "out"), "--workers", "1"]) == 0
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


@pytest.mark.parametrize("names", [("train", "val"), ("Training", "validation", "test"), ("train",)])
def test_a_folder_with_folders_of_splits_becomes_these_splits(names, tmp_path):
    root = tmp_path / "in"
    for number, split in enumerate(names):
        folders(root / split, "ant", "bee", *(("cat",) if number == 0 else ()))
    if len(names) > 1:
        (root / "annotations").mkdir()
    assert build([str(root), str(tmp_path / "out"), "--workers", "1"]) == 0
    manifest = Manifest.read(tmp_path / "out")
    assert set(manifest.splits) == {{"Training": "train", "validation": "val"}.get(name, name) for name in names}
    assert manifest.class_names == ["ant", "bee", "cat"]
    assert [split.class_counts for split in manifest.splits.values()] == [[2, 2, 2], [2, 2, 0], [2, 2, 0]][: len(names)]
    assert list(listed(tmp_path / "out")) == (["annotations"] if len(names) > 1 else [])


def test_a_fraction_of_each_class_is_held_out_always_the_same(tmp_path):
    root = tmp_path / "in"
    for name, count in (("ant", 10), ("bee", 21), ("cat", 3)):
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i}.jpg").write_bytes(jpeg(100 * count + i, (16, 16)))
    vals = []
    for dest in ("a", "b"):
        assert build([str(root), str(tmp_path / dest), "--val-fraction", "0.2", "--workers", "1"]) == 0
        manifest = Manifest.read(tmp_path / dest)
        assert [manifest.splits[split].class_counts for split in ("train", "val")] == [[8, 17, 2], [2, 4, 1]]
        train, val = stored(tmp_path / dest, "train"), stored(tmp_path / dest, "val")
        assert not train.keys() & val.keys()
        assert len(train | val) == 34
        vals.append(set(val))
        if dest == "a":
            (root / "ant" / "0.jpg").rename(root / "ant" / "10.jpg")
    assert len(vals[0] - vals[1]) <= 1  # one name that changes moves at most one image


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["IN", "IN/out"], "lies in"),
        (["IN", "IN"], "lies in"),
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
    assert build([*filled, "--workers", "1"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


IMAGE = jpeg(1, (20, 20))


def png() -> bytes:
    out = io.BytesIO()
    Image.open(io.BytesIO(IMAGE)).save(out, "PNG")
    return out.getvalue()


LAYOUTS = {
    "cls": {"0.jpg": IMAGE, "0.cls": b"2\n"},
    "upper case and a prefix": {"0.image.JPEG": IMAGE, "0.cls": b"00002"},
    "png": {"a/b/0.png": png(), "a/b/0.cls": b"2"},
    "json": {"0.jpg": IMAGE, "0.json": b'{"label": 2, "width": 20}'},
    "json, another field": {"0.jpg": IMAGE, "0.json": b'{"y": {"id": 2}}'},
    "txt": {"0.jpg": IMAGE, "0.txt": b"2"},
    "names": {"0.jpg": IMAGE, "0.txt": b"cat\n"},
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_shards_of_each_layout_are_converted(name, packed, tmp_path):
    (tmp_path / "in").mkdir()
    stray = {
        "1.jpg": IMAGE,
        "2.cls": b"1",
        "3.cls": b"-1",
        "3.jpg": IMAGE,
        "4.jpg": IMAGE,
        "4.png": IMAGE,
        "README": b"",
    }
    shard = tar({**{key.replace("0", "00", 1): value for key, value in LAYOUTS[name].items()}, **stray})
    path = tmp_path / "in" / ("x-000.tar.gz" if packed else "x-000.tar")
    path.write_bytes(gzip.compress(shard) if packed else shard)
    (tmp_path / "names").write_text("ant\nbee\ncat\n")
    more = {"json, another field": ["--label-key", "y.id"], "names": ["--classes", str(tmp_path / "names")]}
    source = str(tmp_path / "in") if packed else str(tmp_path / "in" / "x-{000..000}.tar")
    assert build([source, str(tmp_path / "out"), "--workers", "1", *more.get(name, [])]) == 0
    dataset = Dataset.open(tmp_path / "out", "train")
    assert dataset.labels.tolist() == [2]
    assert dataset.class_names == (("ant", "bee", "cat") if name == "names" else ("0", "1", "2"))
    assert sorted(listed(tmp_path / "out")) == [f"{path.name}/{key}" for key in ("1.jpg", "2", "3.jpg", "4", "README")]
    assert verify([str(tmp_path / "out"), "--decode", "--workers", "1"]) == 0


def test_class_names_in_shards_become_classes_in_their_order(tmp_path):
    members = {f"{i}.{ext}": data for i in range(4) for ext, data in (("jpg", jpeg(i)), ("cls", b"n%d" % (9 - i)))}
    (tmp_path / "x.tar").write_bytes(tar(members))
    assert build([str(tmp_path / "x.tar"), str(tmp_path / "out"), "--workers", "1"]) == 0
    assert Dataset.open(tmp_path / "out", "train").class_names == ("n6", "n7", "n8", "n9")


def two_splits(root: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        members = {f"{i}.{e}": d for i in range(3) for e, d in (("jpg", jpeg(10 * number + i)), ("cls", b"%d" % i))}
        (root / name).write_bytes(tar(members))


@pytest.mark.parametrize(
    ("names", "source"),
    [
        (("train/000.tar", "val/000.tar"), ["IN"]),
        (("x-train-000.tar", "x-validation-000.tar"), ["IN/*.tar"]),
        (("a/0.tar", "b/0.tar"), ["train=IN/a/*.tar", "val=IN/b/*.tar"]),
    ],
)
@pytest.mark.parametrize("way", ["converted", "in place", "index elsewhere"])
def test_shards_of_several_splits_are_converted_or_used_where_they_lie(names, source, way, tmp_path):
    root = tmp_path / "in"
    two_splits(root, *names)
    before = {path: path.read_bytes() for path in root.rglob("*.tar")}
    dest = root if way == "in place" else tmp_path / "out"
    sources = [part.replace("IN", str(root)) for part in source]
    assert build([*sources, *(["--index"] if way == "index elsewhere" else []), str(dest), "--workers", "1"]) == 0
    for split in ("train", "val"):
        assert sorted(Dataset.open(dest, split).labels.tolist()) == [0, 1, 2]
        assert set(stored(dest, split).values()) == {"0", "1", "2"}
    assert verify([str(dest), "--decode", "--workers", "1"]) == 0
    assert {path: path.read_bytes() for path in root.rglob("*.tar")} == before
    if way == "index elsewhere":
        assert {path.suffix for path in root.rglob("*") if path.is_file()} == {".tar"}


def test_shards_that_cannot_all_be_indexed_leave_no_index(tmp_path, capsys):
    two_splits(tmp_path, "x-0.tar", "x-1.tar")
    data = (tmp_path / "x-1.tar").read_bytes()
    (tmp_path / "x-1.tar").write_bytes(data[:4000])
    assert build([str(tmp_path / "*.tar"), str(tmp_path), "--workers", "1"]) == 2
    assert "x-1.tar" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-0.tar", "x-1.tar"]


def test_info_of_others_says_splits_and_classes_and_ours_is_as_timm_reads_it(tmp_path):
    two_splits(tmp_path / "in", "a.tar", "b.tar")
    splits = {name: {"name": name, "filenames": [file], "shard_lengths": [3], "num_samples": 3}
              for name, file in (("train", "a.tar"), ("validation", "b.tar"))}  # fmt: skip
    info = json.dumps({"splits": splits, "num_classes": 7})
    (tmp_path / "in" / "_info.json").write_text(info)
    assert build([str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "1"]) == 0
    assert Dataset.open(tmp_path / "out", "val").num_classes == 7
    assert (tmp_path / "in" / "_info.json").read_text() == info
    written = json.loads((tmp_path / "out" / "_info.json").read_text())
    for split in ("train", "val"):
        part = written["splits"][split]
        assert (part["name"], part["num_samples"], sum(part["shard_lengths"])) == (split, 3, 3)
        assert [(tmp_path / "out" / name).is_file() for name in part["filenames"]] == [True]


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
    assert build([str(root), str(tmp_path / "out"), "--workers", "1"]) == 0
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
    data = (root / names[0]).read_bytes()
    for damaged in (data[:-3], data[:-3] + b"xyz" + data[-3:], b"\1" + data[1:]):
        (root / names[0]).write_bytes(damaged)
        assert build([str(root), str(tmp_path / "bad"), "--workers", "1"]) == 2
        assert names[0] in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()


def shard(path: Path, labels: list[bytes], first: int = 0) -> Path:
    """A shard of samples with these labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    members = {f"{i}.{e}": d for i, label in enumerate(labels) for e, d in (("jpg", jpeg(first + i)), ("cls", label))}
    path.write_bytes(tar(members))
    return path


def run(*arguments: object) -> int:
    return build([*map(str, arguments), "--workers", "1"])


@pytest.mark.parametrize(
    ("folder_names", "loose", "expected"),
    [
        (("train/ant", "train/bee"), "test/1.jpg", {"train"}),
        (("val/ant", "val/bee"), None, {"val"}),
        (("train/ant", "train/bee", "val/ant"), "annotations/1.xml", {"train", "val"}),
        (("train/ant", "Train/ant"), None, "both"),
        (("train/ant", "cow", "dog"), None, "images as in a class"),
        (("test", "train"), None, "lie in no class folder"),
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
    status = run(root, tmp_path / "out")
    if isinstance(expected, str):
        assert status == 2
        assert expected in capsys.readouterr().err
        return
    manifest = Manifest.read(tmp_path / "out")
    assert (status, set(manifest.splits)) == (0, expected)
    assert manifest.class_names == sorted({name.split("/")[-1] for name in folder_names})
    assert run(root, tmp_path / "forced", "--split", "train") == 0


def test_a_shard_that_braces_name_must_exist_and_none_is_used_twice(tmp_path, capsys):
    for number in (0, 1, 3):
        shard(tmp_path / "in" / f"x-{number:03d}.tar", [b"0", b"1"], 10 * number)
    assert run(tmp_path / "in" / "x-{000..003}.tar", tmp_path / "out") == 2
    assert "x-002.tar" in capsys.readouterr().err
    (tmp_path / "in" / "again.tar").symlink_to("x-000.tar")
    assert run(tmp_path / "in" / "*.tar", tmp_path / "in" / "x-000.tar", tmp_path / "out") == 0
    assert len(Dataset.open(tmp_path / "out", "train")) == 6
    assert run(f"train={tmp_path}/in/x-000.tar", f"val={tmp_path}/in/*.tar", tmp_path / "two") == 2
    assert "is in two splits" in capsys.readouterr().err


def test_labels_mean_the_same_in_all_splits_or_the_build_is_refused(tmp_path, capsys):
    shard(tmp_path / "train.tar", [b"ant", b"bee"])
    shard(tmp_path / "val.tar", [b"ant", b"bee"], 5)
    (tmp_path / "one").write_text("\ufeffant\nbee\n", encoding="utf-8")
    (tmp_path / "other").write_text("bee\nant\n")
    assert run(tmp_path / "train.tar", tmp_path / "out", "--classes", tmp_path / "one") == 0
    assert Dataset.open(tmp_path / "out", "train").class_names == ("ant", "bee")
    assert not listed(tmp_path / "out")
    assert run(tmp_path / "val.tar", tmp_path / "out", "--classes", tmp_path / "other") == 2
    assert "has another label" in capsys.readouterr().err
    assert run(tmp_path / "train.tar", tmp_path / "out", "--classes", tmp_path / "other") == 2
    shard(tmp_path / "b" / "train.tar", [b"bee", b"ant"])  # of the same name and size
    assert run(tmp_path / "b" / "train.tar", tmp_path / "out", "--classes", tmp_path / "one") == 2
    shard(tmp_path / "mixed.tar", [b"0", b"11", b"unknown"])
    assert run(tmp_path / "mixed.tar", tmp_path / "mixed") == 2
    assert "'unknown'" in capsys.readouterr().err


def test_splits_in_place_are_added_together_and_again_is_nothing_to_do(tmp_path, capsys):
    root = tmp_path / "in"
    shard(root / "blobs" / "1", [b"0", "\u00a01".encode()])
    shard(root / "blobs" / "2", [b"2"], 7)
    for split, blob in (("train", "1"), ("val", "2")):
        (root / f"x-{split}.tar").symlink_to(f"blobs/{blob}")
    data = (root / "blobs" / "2").read_bytes()
    (root / "blobs" / "2").write_bytes(data[:1000])
    assert run(root / "*.tar", root) == 2
    assert sorted(path.name for path in root.iterdir()) == ["blobs", "x-train.tar", "x-val.tar"]
    (root / "blobs" / "2").write_bytes(data)
    for expected in ("1 samples in 1 shards", "split 'val' is complete; nothing to do"):
        capsys.readouterr()
        assert run(root / "*.tar", root) == 0
        assert expected in capsys.readouterr().err
    assert Dataset.open(root, "val").num_classes == 3
    assert list(listed(root)) == ["x-train.tar:1"]  # Unicode's spaces are no digits
    assert verify([str(root), "--decode", "--workers", "1"]) == 0


def test_folders_below_shards_are_searched_and_what_is_ambiguous_is_refused(tmp_path, capsys):
    shard(tmp_path / "in" / "x.tar", [b"0"])
    shard(tmp_path / "in" / "a" / "b" / "y.TAR", [b"1"], 5)
    assert run(tmp_path / "in", tmp_path / "out") == 0
    assert len(Dataset.open(tmp_path / "out", "train")) == 2
    (tmp_path / "in" / "a" / "0.jpg").write_bytes(jpeg(1))
    assert run(tmp_path / "in", tmp_path / "more") == 2
    assert "holds shards such as" in capsys.readouterr().err
    (tmp_path / "zst" / "a").mkdir(parents=True)
    (tmp_path / "zst" / "a" / "x.tar.zst").write_bytes(b"x")
    assert run(tmp_path / "zst", tmp_path / "more") == 2
    assert "compressed in a way that is not read" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["y=1/x.tar", "train=y=1/x.tar", "y[1]/*.tar", "y[1]/x.tar"])
def test_names_with_signs_of_patterns_are_names(name, tmp_path, monkeypatch):
    shard(tmp_path / "y=1" / "x.tar", [b"0"])
    shard(tmp_path / "y[1]" / "x.tar", [b"0"])
    monkeypatch.chdir(tmp_path)
    assert run(name, "out") == 0


def test_class_folders_in_an_archive_may_be_numbers_and_have_other_files_beside(tmp_path):
    members = {"README.txt": b"x", "labels.json": b"{}"}
    for i, folder in enumerate(("00000", "00000", "20160001", "20160001")):
        members |= {f"d/{folder}/{i}.jpg": jpeg(i), f"d/{folder}/{i}.txt": b"a caption"}
    members["d/none/0.jpg"] = b"no image"
    (tmp_path / "x.tar").write_bytes(tar(members))
    assert run(tmp_path / "x.tar", tmp_path / "out") == 0
    manifest = Manifest.read(tmp_path / "out")
    assert manifest.class_names == ["00000", "20160001", "none"]
    assert manifest.splits["train"].class_counts == [2, 2, 0]


def test_what_is_no_regular_file_is_refused_and_never_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "x.tar")
    for source in (tmp_path / "x.tar", tmp_path / "*.tar", "/dev/null"):
        assert run(source, tmp_path / "out") == 2
    header = tarfile.TarInfo("a/1.jpg").tobuf(tarfile.GNU_FORMAT)
    negative = header[:124] + b"\xff" * 10 + b"\xfe\x00" + header[136:148] + b"        " + header[156:]
    total = sum(negative)
    (tmp_path / "n.tar").write_bytes(negative[:148] + b"%06o\0 " % total + negative[156:] + bytes(1024))
    assert run(tmp_path / "n.tar", tmp_path / "out") == 2
    assert "negative size" in capsys.readouterr().err
    (tmp_path / "file").write_text("x")
    for dest in (tmp_path / "file", tmp_path / "file" / "out", ""):
        assert run("digits", dest) == 2
    assert run("digits", tmp_path / "out", "--max-side", "0") == 2
    assert run("digits", tmp_path / ("x" * 200)) == 2
    assert run("x" * 5000, tmp_path / "out") == 2
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
        (["train/ant/0.jpg", "train/bee/1.jpg", "val/ant/2.jpg", "val/cow/3.jpg"], [],
         {"train": {"ant": 1, "bee": 1, "cow": 0}, "val": {"ant": 1, "bee": 0, "cow": 1}}),
        (["train/ant/images/0.jpg", "val/images/1.jpg"], [], None),
    ],
)  # fmt: skip
def test_splits_and_classes_of_an_archive_are_those_of_the_folders_in_it(names, options, expected, tmp_path):
    assert run(archive(tmp_path / "x.tar", *names), tmp_path / "out", *options) == (2 if expected is None else 0)
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
    assert run(tmp_path / "in", tmp_path / "out", "--val-fraction", "0.2") == 0
    splits = Manifest.read(tmp_path / "out").splits
    assert {name: split.class_counts for name, split in splits.items()} == {
        "train": [8, 2], "test": [10, 2], "val": [2, 0]
    }  # fmt: skip


def test_shards_below_folders_of_splits_and_other_ways_to_name_the_same_folder(tmp_path, monkeypatch):
    shard(tmp_path / "in" / "train" / "p0" / "0.tar", [b"0"])
    shard(tmp_path / "in" / "val" / "p0" / "1.tar", [b"0"], 5)
    shard(tmp_path / "in" / "val" / "p1" / "2.tar", [b"2"], 6)  # a class that train does not have
    assert run(tmp_path / "in", tmp_path / "out") == 0
    splits = Manifest.read(tmp_path / "out").splits
    assert {name: split.class_counts for name, split in splits.items()} == {"train": [1, 0, 0], "val": [1, 0, 1]}
    shard(tmp_path / "a" / "x.tar", [b"0"])
    monkeypatch.chdir(tmp_path / "a")
    assert run("*.tar", "../a") == 0
    written = ["_info.json", "a-train.samples.npz", "dataset.json", "x.idx", "x.tar"]
    assert sorted(path.name for path in Path().iterdir()) == written
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "b")
    assert run("../in/train/p0/*.tar", ".") == 0
    assert not list((tmp_path / "in").rglob("*.idx"))
