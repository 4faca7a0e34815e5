import io
import re
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


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def photos(tmp_path):
    """A folder of class folders with small real JPEGs of many sizes, a PNG and a file that is no picture."""
    rng = np.random.default_rng(0)
    root = tmp_path / "photos"
    for label in ("ant", "bee", "cat"):
        (root / label).mkdir(parents=True)
        for i in range(20):
            size = tuple(rng.integers(20, 90, 2).tolist())
            pixels = rng.integers(0, 256, (4, 4, 3), np.uint8)
            Image.fromarray(pixels).resize(size).save(root / label / f"{i}.jpg", quality=80)
    Image.new("RGB", (30, 40), "red").save(root / "ant" / "red.png")
    (root / "bee" / "notes.txt").write_text("no picture")
    return root


def test_digits_have_a_fixed_split_and_all_classes_in_both(train, val):
    assert np.bincount(train.labels).tolist() == [142, 146, 141, 147, 144, 146, 145, 143, 139, 144]
    assert np.bincount(val.labels).tolist() == [36, 36, 36, 36, 37, 36, 36, 36, 35, 36]


def test_samples_are_shuffled_over_the_shards(train):
    assert (np.diff(train.labels[:100]) < 0).sum() > 30
    assert all(len(np.unique(train.labels[train.shard == shard])) == 10 for shard in range(len(train.shards)))


def test_building_twice_gives_the_same_bytes_with_any_number_of_workers(digits, tmp_path):
    assert build(["digits", str(tmp_path / "digits"), "--workers", "2"]) == 0
    assert contents(tmp_path / "digits") == contents(digits)


def test_a_complete_dataset_is_left_alone(digits, capsys):
    before = {path: path.stat().st_mtime_ns for path in digits.iterdir()}
    assert build(["digits", str(digits)]) == 0
    assert "split 'train' is complete" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in digits.iterdir()} == before


def test_a_folder_of_class_folders_becomes_a_dataset(photos, tmp_path):
    dest = tmp_path / "out"
    assert build([str(photos), str(dest), "--workers", "1"]) == 0
    dataset = Dataset.open(dest, "train")
    assert dataset.class_names == ("ant", "bee", "cat")
    assert np.bincount(dataset.labels).tolist() == [21, 20, 20]
    names = {}
    for sample in range(len(dataset)):
        with dataset.shard_path(int(dataset.shard[sample])).open("rb") as shard:
            shard.seek(int(dataset.offset[sample]))
            jpeg = shard.read(int(dataset.length[sample]))
        label = dataset.class_names[dataset.labels[sample]]
        name = dataset.sample_name(sample).split("-", 1)[1].removesuffix(".jpg")
        names[label, name] = jpeg
        with Image.open(io.BytesIO(jpeg)) as image:
            assert image.size == (dataset.width[sample], dataset.height[sample])
    for label in ("ant", "bee", "cat"):
        for i in range(20):
            assert names[label, str(i)] == (photos / label / f"{i}.jpg").read_bytes()


def test_what_cannot_be_used_is_listed_with_its_reason(photos, tmp_path):
    assert build([str(photos), str(tmp_path / "out"), "--workers", "1"]) == 0
    (reject,) = Manifest.read(tmp_path / "out").splits["train"].rejected
    assert reject.name == "bee/notes.txt"
    assert "does not decode" in reject.reason


def test_without_a_terminal_lines_tell_how_far_it_is_and_how_long_it_will_take(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build_module, "TELL", 0.0)
    monkeypatch.setattr(units, "UNIT_PICTURES", 10)
    assert build([str(photos), str(tmp_path / "out"), "--workers", "1"]) == 0
    err = capsys.readouterr().err
    assert re.search(r"^train: decode: 50 of 62, \d:\d\d:\d\d left$", err, re.MULTILINE)
    assert re.search(r"^train: write shards: 61 of 61, 0:00:00 left$", err, re.MULTILINE)


def test_a_second_split_joins_the_first_with_the_same_classes(photos, tmp_path):
    dest = tmp_path / "out"
    assert build([str(photos), str(dest), "--workers", "1"]) == 0
    (photos / "ant" / "red.png").unlink()
    assert build([str(photos), str(dest), "--split", "val", "--workers", "1"]) == 0
    assert len(Dataset.open(dest, "train")) == 61
    assert len(Dataset.open(dest, "val")) == 60


def test_splits_whose_names_begin_alike_do_not_disturb_each_other(photos, tmp_path):
    dest = tmp_path / "out"
    for split in ("train-more", "train"):
        assert build([str(photos), str(dest), "--split", split, "--workers", "1"]) == 0
    assert len(Dataset.open(dest, "train-more")) == len(Dataset.open(dest, "train")) == 61


@pytest.mark.parametrize("split", ["../train", "a b", "*", ""])
def test_a_split_that_cannot_be_a_part_of_file_names_is_refused(photos, tmp_path, split, capsys):
    assert build([str(photos), str(tmp_path / "out"), "--split", split]) == 1
    assert "becomes a part of file names" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_split_with_a_strange_class_is_refused(photos, tmp_path, capsys):
    dest = tmp_path / "out"
    assert build([str(photos), str(dest), "--workers", "1"]) == 0
    (photos / "ant").rename(photos / "auk")
    assert build([str(photos), str(dest), "--split", "val", "--workers", "1"]) == 1
    assert "class 'auk' is not among the classes of the dataset" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["/nowhere", "dogits"])
def test_an_unknown_source_is_one_clear_line(source, tmp_path, capsys):
    assert build([source, str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith(f"error: {source} is not 'digits'")


def test_members_are_sorted_plain_and_owned_by_nobody(digits):
    with tarfile.open(digits / "digits-train-000000.tar") as shard:
        infos = shard.getmembers()
    assert [info.name for info in infos] == sorted(info.name for info in infos)
    assert all((info.uid, info.gid, info.mtime, info.pax_headers) == (0, 0, 0, {}) for info in infos)


def test_the_tar_program_lists_and_unpacks_a_shard(digits, train, tmp_path):
    shard = digits / "digits-train-000000.tar"
    listed = subprocess.run(["tar", "tf", shard], check=True, capture_output=True, text=True)
    count = int(train.shard_sizes[0])
    names = [train.sample_name(sample) for sample in range(count)]
    assert listed.stdout.splitlines() == [f"{n.removesuffix('.jpg')}{end}" for n in names for end in (".cls", ".jpg")]
    assert listed.stderr == ""
    subprocess.run(["tar", "xf", shard, "-C", tmp_path], check=True)
    assert [int((tmp_path / n).with_suffix(".cls").read_text()) for n in names] == train.labels[:count].tolist()
    assert [(tmp_path / n).stat().st_size for n in names] == train.length[:count].tolist()


def test_the_index_is_the_one_wds2idx_writes(digits, tmp_path):
    for shard in sorted(digits.glob("*.tar")):
        subprocess.run(
            [Path(sys.executable).with_name("wds2idx"), shard, tmp_path / "idx"], check=True, capture_output=True
        )
        assert (tmp_path / "idx").read_bytes() == shard.with_suffix(".idx").read_bytes()


def test_plain_webdataset_reads_the_shards(digits, train):
    import webdataset

    shards = sorted(str(path) for path in digits.glob("*-train-*.tar"))
    read = webdataset.WebDataset(shards, shardshuffle=False).decode("pil").to_tuple("jpg", "cls")
    labels = [(image.size, label) for image, label in read]
    assert [label for _, label in labels] == train.labels.tolist()
    assert {size for size, _ in labels} == {(64, 64)}


def test_dalis_own_reader_reads_the_shards(digits, train):
    from nvidia.dali import Pipeline, fn, types

    shards = sorted(digits.glob("*-train-*.tar"))
    pipe = Pipeline(batch_size=1437, num_threads=1, device_id=None)
    with pipe:
        _, label = fn.readers.webdataset(
            paths=[str(path) for path in shards], index_paths=[str(path.with_suffix(".idx")) for path in shards],
            ext=["jpg", "cls"], dtypes=[types.UINT8, types.UINT8], missing_component_behavior="error",
        )  # fmt: skip
        pipe.set_outputs(label)
    (labels,) = pipe.run()
    assert [int(bytes(labels.at(i))) for i in range(1437)] == train.labels.tolist()
