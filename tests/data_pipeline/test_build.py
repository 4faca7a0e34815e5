import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline import build as build_module
from data_pipeline import units
from data_pipeline.build import main as build
from data_pipeline.dataset import Dataset
from data_pipeline.manifest import Manifest
from data_pipeline.verify import main as verify
from tests.data_pipeline.datasets import build_into, stored
from tests.data_pipeline.images import class_folders


@pytest.fixture
def photos(tmp_path):
    """Class folders with JPEGs of many sizes, a PNG and a file that is not an image."""
    root = class_folders(tmp_path / "photos", 20)
    Image.new("RGB", (30, 40), "red").save(root / "ant" / "red.png")
    (root / "bee" / "notes.txt").write_text("no image")
    return root


def test_digits_have_a_fixed_split_with_all_classes_in_both_and_in_every_shard(train, val):
    assert np.bincount(train.labels).tolist() == [142, 146, 141, 147, 144, 146, 145, 143, 139, 144]
    assert np.bincount(val.labels).tolist() == [36, 36, 36, 36, 37, 36, 36, 36, 35, 36]
    assert train.class_names == tuple("0123456789")
    assert (np.diff(train.labels[:100]) < 0).sum() > 30
    assert all(len(np.unique(train.labels[train.shard == shard])) == 10 for shard in range(len(train.shards)))


def test_building_twice_gives_the_same_bytes_with_any_number_of_workers(digits, tmp_path):
    workers = len(os.sched_getaffinity(0)) + 1  # others than the default, with which `digits` was built
    dest = tmp_path / "digits"
    assert build(["digits", str(dest), "--workers", str(workers)]) == 0
    first, second = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in (digits, dest))
    assert first == second


def test_a_complete_dataset_is_left_alone(digits, capsys):
    before = {path: path.stat().st_mtime_ns for path in digits.iterdir()}
    assert build(["digits", str(digits)]) == 0
    assert "split 'train' is complete" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in digits.iterdir()} == before


def test_class_folders_become_a_dataset_and_what_cannot_be_used_is_listed_with_its_reason(photos, tmp_path):
    dest = build_into(photos, tmp_path / "out")
    dataset = Dataset.open(dest, "train")
    assert dataset.class_names == ("ant", "bee", "cat")
    assert np.bincount(dataset.labels).tolist() == [21, 20, 20]
    found = {}
    for sample in range(len(dataset)):
        jpeg, label = stored(dataset, sample), dataset.class_names[dataset.labels[sample]]
        found[label, dataset.sample_name(sample).split("-", 1)[1]] = jpeg
        assert Image.open(io.BytesIO(jpeg)).size == (dataset.width[sample], dataset.height[sample])
    for path in photos.rglob("*.jpg"):
        assert found[path.parent.name, path.name] == path.read_bytes()
    (reject,) = Manifest.read(dest).splits["train"].rejected
    assert reject.name == "bee/notes.txt"
    assert "does not decode" in reject.reason


def test_without_a_terminal_progress_and_remaining_time_are_logged(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build_module, "LOG_EVERY_S", 0.0)
    monkeypatch.setattr(units, "UNIT_IMAGES", 10)
    build_into(photos, tmp_path / "out")
    err = capsys.readouterr().err
    assert re.search(r"^train: decode: 50 of 62, \d:\d\d:\d\d left$", err, re.MULTILINE)
    assert re.search(r"^train: write shards: 61 of 61, 0:00:00 left$", err, re.MULTILINE)


def test_further_splits_join_the_first_with_the_same_classes_also_where_their_names_begin_alike(
    photos, tmp_path, capsys
):
    dest = tmp_path / "out"
    for split in ("train-more", "train"):
        build_into(photos, dest, "--split", split)
    (photos / "ant" / "red.png").unlink()
    build_into(photos, dest, "--split", "val")
    assert [len(Dataset.open(dest, split)) for split in ("train-more", "train", "val")] == [61, 61, 60]
    (photos / "ant").rename(photos / "auk")
    build_into(photos, dest, "--split", "test", status=2)
    assert "class 'auk' is not among the classes of the dataset" in capsys.readouterr().err


def test_the_tar_program_lists_and_unpacks_a_shard_whose_members_are_owned_by_nobody(digits, train, tmp_path):
    shard = digits / "digits-train-000000.tar"
    listed = subprocess.run(["tar", "tf", shard], check=True, capture_output=True, text=True)
    count = int(train.shard_sizes[0])
    names = [train.sample_name(sample) for sample in range(count)]
    assert listed.stdout.splitlines() == [f"{n.removesuffix('.jpg')}{end}" for n in names for end in (".cls", ".jpg")]
    assert listed.stdout.splitlines() == sorted(listed.stdout.splitlines())
    assert listed.stderr == ""
    subprocess.run(["tar", "xf", shard, "-C", tmp_path], check=True)
    assert [int((tmp_path / n).with_suffix(".cls").read_text()) for n in names] == train.labels[:count].tolist()
    assert [(tmp_path / n).stat().st_size for n in names] == train.length[:count].tolist()
    with tarfile.open(shard) as archive:
        assert {(i.uid, i.gid, i.mtime, len(i.pax_headers)) for i in archive} == {(0, 0, 0, 0)}


def test_the_index_is_the_one_wds2idx_writes(digits, tmp_path):
    tool = Path(sys.executable).with_name("wds2idx")
    for shard in sorted(digits.glob("*.tar")):
        subprocess.run([tool, shard, tmp_path / "idx"], check=True, capture_output=True)
        assert (tmp_path / "idx").read_bytes() == shard.with_suffix(".idx").read_bytes()


def test_webdataset_and_dalis_own_reader_read_the_shards(digits, train):
    import webdataset
    from nvidia.dali import Pipeline, fn, types

    shards = sorted(digits.glob("*-train-*.tar"))
    read = webdataset.WebDataset([str(path) for path in shards], shardshuffle=False).decode("pil")
    labels = [(image.size, label) for image, label in read.to_tuple("jpg", "cls")]
    assert labels == [((64, 64), label) for label in train.labels.tolist()]
    pipe = Pipeline(batch_size=1437, num_threads=1, device_id=None)
    with pipe:
        _, label = fn.readers.webdataset(
            paths=[str(path) for path in shards], index_paths=[str(path.with_suffix(".idx")) for path in shards],
            ext=["jpg", "cls"], dtypes=[types.UINT8, types.UINT8], missing_component_behavior="error",
        )  # fmt: skip
        pipe.set_outputs(label)
    (labels,) = pipe.run()
    assert [int(bytes(labels.at(i))) for i in range(1437)] == train.labels.tolist()


def test_a_dataset_that_an_older_version_built_opens_with_the_same_fingerprint(tmp_path):
    shutil.unpack_archive(Path(__file__).with_name("dataset_built_before.tar.gz"), tmp_path)
    dataset = Dataset.open(tmp_path / "old", "train")
    assert (len(dataset), dataset.class_names, dataset.fingerprint) == (6, ("ant", "bee"), "4445ea51e4d1c218")
    assert verify([str(tmp_path / "old"), "--decode", "--workers", "1"]) == 0
