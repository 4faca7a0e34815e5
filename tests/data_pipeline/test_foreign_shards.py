"""WebDataset shards that others made: converted, or used where they lie."""

import gzip
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.dataset import Dataset
from data_pipeline.manifest import Manifest
from data_pipeline.verify import main as verify
from tests.data_pipeline.datasets import classes_by_bytes, listed, run_build
from tests.data_pipeline.images import jpeg, saved, tar


def shard(path: Path, labels: list[bytes], first: int = 0) -> Path:
    """A shard of samples with these labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    members = {f"{i}.{e}": d for i, label in enumerate(labels) for e, d in (("jpg", jpeg(first + i)), ("cls", label))}
    path.write_bytes(tar(members))
    return path


def test_shards_of_others_are_indexed_in_place_as_wds2idx_does(tmp_path):
    exif = jpeg(3, (40, 20), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0")
    second = {
        "b0.jpg": exif, "b0.cls": b" 2\n", "b0.json": b"{}",
        "b1.jpg": jpeg(4), "b2.cls": b"1", "b2.jpg": b"no image", "b3.jpg": jpeg(5), "b3.cls": b"cat",
        "README": b"stray", ".hidden": b"", "b4.jpeg": jpeg(6), "b4.cls": b"0",
        "b5.jpg": jpeg(8), "b5.cls": b"999999999999",
    }  # fmt: skip
    shard(tmp_path / "shards" / "x-000.tar", [b"0", b"1", b"2", b"3", b"4"])
    (tmp_path / "shards" / "x-001.tar").write_bytes(tar(second))
    before = {path.name: path.read_bytes() for path in (tmp_path / "shards").iterdir()}
    assert run_build(tmp_path / "shards" / "*.tar", tmp_path / "shards") == 0
    dataset = Dataset.open(tmp_path / "shards", "train")
    assert dataset.labels.tolist() == [0, 1, 2, 3, 4, 2, 0]
    # DALI and the table agree on the frame of an image with an EXIF rotation.
    assert (dataset.width[5], dataset.height[5]) == (20, 40)
    assert all((tmp_path / "shards" / name).read_bytes() == data for name, data in before.items())
    reasons = {
        "b1": "needs one image and one label", "b2": "does not decode", "b3": "its label is", "b5": "its label is",
        "README": "belongs to no sample", ".hidden": "belongs to no sample",
    }  # fmt: skip
    left_out = listed(tmp_path / "shards")
    assert left_out.keys() == {f"x-001.tar:{name}" for name in reasons}
    assert all(reason in left_out[f"x-001.tar:{name}"] for name, reason in reasons.items())
    assert verify([str(tmp_path / "shards"), "--decode", "--workers", "1"]) == 0
    # Not of the second shard: wds2idx invents a key for a file without an extension.
    tool = Path(sys.executable).with_name("wds2idx")
    subprocess.run([tool, tmp_path / "shards" / "x-000.tar", tmp_path / "idx"], check=True, capture_output=True)
    assert (tmp_path / "shards" / "x-000.idx").read_bytes() == (tmp_path / "idx").read_bytes()


def test_an_index_of_another_shard_is_refused(tmp_path, capsys):
    path = shard(tmp_path / "x.tar", [b"0"])
    path.with_suffix(".idx").write_text("v1.2 1\njpg 512 100 a/000.jpg\n")
    assert run_build(tmp_path / "*.tar", tmp_path) == 2
    assert "x.idx is not the index of x.tar" in capsys.readouterr().err


IMAGE = jpeg(1, (20, 20))


LAYOUTS = {
    "cls": {"0.jpg": IMAGE, "0.cls": b"2\n"},
    "upper case and a prefix": {"0.image.JPEG": IMAGE, "0.cls": b"00002"},
    "png": {"a/b/0.png": saved(Image.open(io.BytesIO(IMAGE)), "PNG"), "a/b/0.cls": b"2"},
    "json": {"0.jpg": IMAGE, "0.json": b'{"label": 2, "width": 20}'},
    "json, another field": {"0.jpg": IMAGE, "0.json": b'{"y": {"id": 2}}'},
    "txt": {"0.jpg": IMAGE, "0.txt": b"2"},
    "names": {"0.jpg": IMAGE, "0.txt": b"cat\n"},
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_shards_of_each_layout_are_converted(name, packed, tmp_path):
    (tmp_path / "in").mkdir()
    stray = {"1.jpg": IMAGE, "2.cls": b"1", "3.cls": b"-1", "3.jpg": IMAGE, "4.jpg": IMAGE, "4.png": IMAGE}
    stray |= {"README": b""}
    shard = tar({**{key.replace("0", "00", 1): value for key, value in LAYOUTS[name].items()}, **stray})
    path = tmp_path / "in" / ("x-000.tar.gz" if packed else "x-000.tar")
    path.write_bytes(gzip.compress(shard) if packed else shard)
    (tmp_path / "names").write_text("ant\nbee\ncat\n")
    more = {"json, another field": ["--label-key", "y.id"], "names": ["--classes", str(tmp_path / "names")]}
    source = str(tmp_path / "in") if packed else str(tmp_path / "in" / "x-{000..000}.tar")
    assert run_build(source, tmp_path / "out", *more.get(name, [])) == 0
    dataset = Dataset.open(tmp_path / "out", "train")
    assert dataset.labels.tolist() == [2]
    assert dataset.class_names == (("ant", "bee", "cat") if name == "names" else ("0", "1", "2"))
    assert sorted(listed(tmp_path / "out")) == [f"{path.name}/{key}" for key in ("1.jpg", "2", "3.jpg", "4", "README")]
    assert verify([str(tmp_path / "out"), "--decode", "--workers", "1"]) == 0


def two_shards(root: Path, *names: str) -> None:
    for number, name in enumerate(names):
        shard(root / name, [b"0", b"1", b"2"], 10 * number)


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
    two_shards(root, *names)
    before = {path: path.read_bytes() for path in root.rglob("*.tar")}
    dest = root if way == "in place" else tmp_path / "out"
    sources = [part.replace("IN", str(root)) for part in source]
    assert run_build(*sources, *(["--index"] if way == "index elsewhere" else []), dest) == 0
    for split in ("train", "val"):
        assert sorted(Dataset.open(dest, split).labels.tolist()) == [0, 1, 2]
        assert set(classes_by_bytes(dest, split).values()) == {"0", "1", "2"}
    assert verify([str(dest), "--decode", "--workers", "1"]) == 0
    assert {path: path.read_bytes() for path in root.rglob("*.tar")} == before
    if way == "index elsewhere":
        assert {path.suffix for path in root.rglob("*") if path.is_file()} == {".tar"}


def test_info_of_others_says_splits_and_classes_and_ours_is_as_timm_reads_it(tmp_path):
    two_shards(tmp_path / "in", "a.tar", "b.tar")
    splits = {name: {"name": name, "filenames": [file], "shard_lengths": [3], "num_samples": 3}
              for name, file in (("train", "a.tar"), ("validation", "b.tar"))}  # fmt: skip
    info = json.dumps({"splits": splits, "num_classes": 7})
    (tmp_path / "in" / "_info.json").write_text(info)
    assert run_build(tmp_path / "in", tmp_path / "out") == 0
    assert Dataset.open(tmp_path / "out", "val").num_classes == 7
    assert (tmp_path / "in" / "_info.json").read_text() == info
    written = json.loads((tmp_path / "out" / "_info.json").read_text())
    for split in ("train", "val"):
        part = written["splits"][split]
        assert (part["name"], part["num_samples"], sum(part["shard_lengths"])) == (split, 3, 3)
        assert [(tmp_path / "out" / name).is_file() for name in part["filenames"]] == [True]


def test_a_shard_that_braces_name_must_exist_and_none_is_used_twice(tmp_path, capsys):
    for number in (0, 1, 3):
        shard(tmp_path / "in" / f"x-{number:03d}.tar", [b"0", b"1"], 10 * number)
    assert run_build(tmp_path / "in" / "x-{000..003}.tar", tmp_path / "out") == 2
    assert "x-002.tar" in capsys.readouterr().err
    (tmp_path / "in" / "again.tar").symlink_to("x-000.tar")
    assert run_build(tmp_path / "in" / "*.tar", tmp_path / "in" / "x-000.tar", tmp_path / "out") == 0
    assert len(Dataset.open(tmp_path / "out", "train")) == 6
    assert run_build(f"train={tmp_path}/in/x-000.tar", f"val={tmp_path}/in/*.tar", tmp_path / "two") == 2
    assert "is in two splits" in capsys.readouterr().err


def test_labels_mean_the_same_in_all_splits_or_the_build_is_refused(tmp_path, capsys):
    shard(tmp_path / "train.tar", [b"bee", b"ant"])
    assert run_build(tmp_path / "train.tar", tmp_path / "sorted") == 0
    assert Dataset.open(tmp_path / "sorted", "train").class_names == ("ant", "bee")
    shard(tmp_path / "val.tar", [b"ant", b"bee"], 5)
    (tmp_path / "one").write_text("\ufeffant\nbee\n", encoding="utf-8")
    (tmp_path / "other").write_text("bee\nant\n")
    assert run_build(tmp_path / "train.tar", tmp_path / "out", "--classes", tmp_path / "one") == 0
    assert Dataset.open(tmp_path / "out", "train").class_names == ("ant", "bee")
    assert not listed(tmp_path / "out")
    assert run_build(tmp_path / "val.tar", tmp_path / "out", "--classes", tmp_path / "other") == 2
    assert "has another label" in capsys.readouterr().err
    assert run_build(tmp_path / "train.tar", tmp_path / "out", "--classes", tmp_path / "other") == 2
    shard(tmp_path / "b" / "train.tar", [b"ant", b"bee"])  # of the same name and size
    assert run_build(tmp_path / "b" / "train.tar", tmp_path / "out", "--classes", tmp_path / "one") == 2
    shard(tmp_path / "mixed.tar", [b"0", b"11", b"unknown"])
    assert run_build(tmp_path / "mixed.tar", tmp_path / "mixed") == 2
    assert "'unknown'" in capsys.readouterr().err


def test_splits_in_place_are_added_together_and_again_is_nothing_to_do(tmp_path, capsys):
    root = tmp_path / "in"
    shard(root / "blobs" / "1", [b"0", "\u00a01".encode()])
    shard(root / "blobs" / "2", [b"2"], 7)
    for split, blob in (("train", "1"), ("val", "2")):
        (root / f"x-{split}.tar").symlink_to(f"blobs/{blob}")
    data = (root / "blobs" / "2").read_bytes()
    (root / "blobs" / "2").write_bytes(data[:1000])
    assert run_build(root / "*.tar", root) == 2
    assert sorted(path.name for path in root.iterdir()) == ["blobs", "x-train.tar", "x-val.tar"]
    (root / "blobs" / "2").write_bytes(data)
    for expected in ("1 samples in 1 shards", "split 'val' is complete; nothing to do"):
        capsys.readouterr()
        assert run_build(root / "*.tar", root) == 0
        assert expected in capsys.readouterr().err
    assert Dataset.open(root, "val").num_classes == 3
    assert list(listed(root)) == ["x-train.tar:1"]  # Unicode's spaces are no digits
    assert verify([str(root), "--decode", "--workers", "1"]) == 0


def test_folders_below_shards_are_searched_and_what_is_ambiguous_is_refused(tmp_path, capsys):
    shard(tmp_path / "in" / "x.tar", [b"0"])
    shard(tmp_path / "in" / "a" / "b" / "y.TAR", [b"1"], 5)
    assert run_build(tmp_path / "in", tmp_path / "out") == 0
    assert len(Dataset.open(tmp_path / "out", "train")) == 2
    (tmp_path / "in" / "a" / "0.jpg").write_bytes(jpeg(1))
    assert run_build(tmp_path / "in", tmp_path / "more") == 2
    assert "holds shards such as" in capsys.readouterr().err
    (tmp_path / "zst" / "a").mkdir(parents=True)
    (tmp_path / "zst" / "a" / "x.tar.zst").write_bytes(b"x")
    assert run_build(tmp_path / "zst", tmp_path / "more") == 2
    assert "compressed in a way that is not read" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["y=1/x.tar", "train=y=1/x.tar", "y[1]/*.tar", "y[1]/x.tar"])
def test_names_with_signs_of_patterns_are_names(name, tmp_path, monkeypatch):
    shard(tmp_path / "y=1" / "x.tar", [b"0"])
    shard(tmp_path / "y[1]" / "x.tar", [b"0"])
    monkeypatch.chdir(tmp_path)
    assert run_build(name, "out") == 0


def test_shards_below_folders_of_splits_and_other_ways_to_name_the_same_folder(tmp_path, monkeypatch):
    shard(tmp_path / "in" / "train" / "p0" / "0.tar", [b"0"])
    shard(tmp_path / "in" / "val" / "p0" / "1.tar", [b"0"], 5)
    shard(tmp_path / "in" / "val" / "p1" / "2.tar", [b"2"], 6)  # a class that train does not have
    assert run_build(tmp_path / "in", tmp_path / "out") == 0
    splits = Manifest.read(tmp_path / "out").splits
    assert {name: split.class_counts for name, split in splits.items()} == {"train": [1, 0, 0], "val": [1, 0, 1]}
    shard(tmp_path / "a" / "x.tar", [b"0"])
    monkeypatch.chdir(tmp_path / "a")
    assert run_build("*.tar", "../a") == 0
    written = ["_info.json", "a-train.samples.npz", "dataset.json", "x.idx", "x.tar"]
    assert sorted(path.name for path in Path().iterdir()) == written
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "b")
    assert run_build("../in/train/p0/*.tar", ".") == 0
    assert not list((tmp_path / "in").rglob("*.idx"))
