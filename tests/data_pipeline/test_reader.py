"""A batch is announced to storage sample by sample before it is read."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.dataset import Dataset
from data_pipeline.errors import DataError
from data_pipeline.reader import Reader

DESCRIPTORS = Path("/proc/self/fd")


def test_exactly_the_bytes_of_the_announced_samples_are_asked_for(
    train: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = np.random.default_rng(0).permutation(len(train))[:200]
    asked = []

    def note(descriptor: int, offset: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        shard = (DESCRIPTORS / str(descriptor)).readlink().name
        asked.append((shard, offset, length))

    monkeypatch.setattr(os, "posix_fadvise", note)
    reader, descriptors = Reader(train), len(list(DESCRIPTORS.iterdir()))
    reader.announce(samples)
    names = [train.shards[shard].tar.name for shard in train.shard[samples]]
    assert len(set(names)) > 1
    assert sorted(asked) == sorted(zip(names, train.offset[samples], train.length[samples], strict=True))
    reader.close()
    assert len(list(DESCRIPTORS.iterdir())) == descriptors


def test_what_cannot_be_announced_is_told_by_who_reads_it(train: Dataset, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(train.path, copy)
    dataset = Dataset.open(copy, "train")
    (copy / dataset.shards[-1].tar.name).unlink()
    reader = Reader(dataset)
    reader.announce(np.arange(len(dataset)))
    assert reader.read(0)[1] == ""
    with pytest.raises(DataError, match="No such file"):
        reader.read(len(dataset) - 1)
    reader.close()
