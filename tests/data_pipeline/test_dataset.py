import json
import shutil

import numpy as np
import pytest

from data_pipeline.dataset import Dataset
from data_pipeline.errors import DataError
from data_pipeline.manifest import Manifest, file_of


@pytest.fixture
def copy(digits, tmp_path):
    return shutil.copytree(digits, tmp_path / "digits")


def test_a_dataset_says_what_it_holds(train, val):
    assert (len(train), len(val), train.num_classes) == (1437, 360, 10)
    assert train.class_names == tuple("0123456789")
    assert train.shard_sizes.sum() == 1437
    assert (train.width == 64).all()
    assert train.fingerprint != val.fingerprint


def test_a_missing_dataset_is_an_error_with_the_command_that_builds_it(tmp_path):
    with pytest.raises(DataError, match=r"no dataset in .*nowhere.*python -m data_pipeline.build SOURCE .*nowhere"):
        Dataset.open(tmp_path / "nowhere", "train")


def test_a_missing_split_is_an_error_that_names_those_there_are(digits):
    with pytest.raises(DataError, match=r"no split 'test' .*'train', 'val'"):
        Dataset.open(digits, "test")


def test_a_shard_of_another_size_than_the_index_says_is_an_error_before_the_first_batch(copy):
    with (copy / "digits-train-000003.tar").open("ab") as shard:
        shard.write(b"x")
    with pytest.raises(DataError, match=r"digits-train-000003.tar has 522241 bytes, but dataset.json says 522240"):
        Dataset.open(copy, "train")


def test_a_missing_shard_is_an_error_that_names_it(copy):
    (copy / "digits-train-000004.tar").unlink()
    with pytest.raises(DataError, match=r"digits-train-000004.tar: No such file"):
        Dataset.open(copy, "train")


def test_a_label_outside_the_classes_is_an_error_that_names_the_sample(copy):
    table = copy / "digits-train.samples.npz"
    with np.load(table) as stored:
        columns = dict(stored)
    columns["label"][700] = 10
    np.savez(table, **columns)
    manifest = Manifest.read(copy)
    split = manifest.splits["train"].model_copy(update={"table": file_of(table)})
    manifest.model_copy(update={"splits": manifest.splits | {"train": split}}).write(copy)
    with pytest.raises(DataError, match=r"sample 00000700-scan\d+\.jpg in .*000004.tar has label 10.*0\.\.9"):
        Dataset.open(copy, "train")


def test_a_changed_dataset_json_is_an_error(copy):
    content = json.loads((copy / "dataset.json").read_text())
    content["class_names"][3] = "drei"
    (copy / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="checksum"):
        Dataset.open(copy, "train")


def test_the_fingerprint_is_of_the_content_not_of_the_place(digits, copy):
    assert Dataset.open(digits, "val").fingerprint == Dataset.open(copy, "val").fingerprint
