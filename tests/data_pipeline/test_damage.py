"""What happens to damaged input: a stated outcome for each kind, and never a hang, a crash or a silent wrong label."""

import itertools
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.dataset import Dataset
from data_pipeline.errors import DataError
from data_pipeline.graph import undecodable
from data_pipeline.transforms import AugmentConfig, InputConfig, RandomResizedCropConfig
from tests.data_pipeline.datasets import (
    change_table,
    evaluation,
    overwrite,
    retable,
    settings,
    spoil_scan,
    training,
)
from tests.data_pipeline.images import jpeg

GOOD = jpeg(1, (60, 40))
SCAN = GOOD.index(b"\xff\xda")


def read_epoch(folder: Path, **changes) -> tuple[set[int], list]:
    """Read an epoch and return the ids that were seen and the reports; every label must be the image's own."""
    dataset = Dataset.open(folder, "train")
    reports: list = []
    seen: set[int] = set()
    with training(dataset, settings(dataset, **changes), on_bad_sample=reports.append) as loader:
        for batch in itertools.islice(loader, 24):
            assert (dataset.labels[batch.sample_ids] == batch.labels.numpy()).all()
            assert torch.isfinite(batch.images).all()
            seen |= set(batch.sample_ids.tolist())
    return seen, reports


# What is done to image 70, and what its report says.
REPLACED = {
    "a flipped bit in the scan": (lambda f: overwrite(f, 70, b"\x55", 400), "checksum"),
    "a scan that DALI cannot decode, checksum right": (spoil_scan, "(?i)decod|Invalid SOS"),
}


@pytest.mark.parametrize("name", REPLACED)
def test_a_damaged_sample_is_replaced_reported_and_nothing_else_changes(copy, name):
    damage, reason = REPLACED[name]
    damage(copy)
    seen, reports = read_epoch(copy)
    assert seen == set(range(1437)) - {70}
    assert {(report.id, report.replaced_by) for report in reports} == {(70, 71)}
    assert re.search(reason, reports[0].reason)
    assert reports[0].name.startswith("00000070-scan")
    assert reports[0].shard == "digits-train-000000.tar"


def test_damaged_neighbors_are_replaced_by_the_next_good_sample_and_too_many_are_an_error(copy):
    for sample in (5, 6, 900):
        overwrite(copy, sample, b"\xff\xd9bad!", 300)
    seen, reports = read_epoch(copy)
    assert seen == set(range(1437)) - {5, 6, 900}
    assert {(report.id, report.replaced_by) for report in reports} == {(5, 7), (6, 7), (900, 901)}
    with pytest.raises(DataError, match=r"3 samples .* damaged, more than max_bad_fraction \(0.001\) allows"):
        read_epoch(copy, max_bad_fraction=0.001)


def test_damaged_samples_are_left_out_of_evaluation_and_reported_once_by_the_rank_whose_share_they_are_in(copy):
    damaged = {0: 0, 5: 0, 6: 0, 359: 0, 900: 2, 1436: 3}  # shares of 360, the last of 357, each padded to 400
    for sample in damaged:
        overwrite(copy, sample, b"\xff\xd9bad!", 300)
    dataset, reports, valid = Dataset.open(copy, "train"), [], []
    for rank in range(4):
        note = lambda report, rank=rank: reports.append((report.id, rank))  # noqa: E731
        with evaluation(dataset, rank=rank, world_size=4, on_bad_sample=note) as loader:
            valid += [sample for batch in loader for sample in batch.sample_ids[batch.valid].tolist()]
    assert sorted(valid) == sorted({*range(1437)} - {*damaged})
    assert sorted(reports) == sorted(damaged.items())


def test_after_an_image_that_cannot_be_decoded_others_are_still_decoded(digits):
    box = np.zeros(2, np.int32), np.array([40, 60], np.int32)
    good, bad = (np.frombuffer(data, np.uint8) for data in (GOOD, GOOD[:SCAN] + b"no scan at all"))
    images = {number: (data, *box) for number, data in enumerate((good, good, bad, good, bad, good))}
    reasons = undecodable(images, InputConfig(path=digits), None)
    assert reasons.keys() == {2, 4}
    assert all(reasons.values())


def test_pixels_of_the_others_are_the_same_when_one_image_cannot_be_decoded(copy, digits):
    def pixels(folder):
        dataset = Dataset.open(folder, "train")
        config = settings(dataset, augment=AugmentConfig(random_resized_crop=RandomResizedCropConfig()))
        with training(dataset, config, micro_batch=32) as loader:
            found = [(batch.sample_ids, batch.images) for batch in itertools.islice(loader, 46)]
        return np.concatenate([ids for ids, _ in found]), torch.cat([images for _, images in found])

    spoil_scan(copy)
    (ids, images), (good_ids, good_images) = pixels(copy), pixels(digits)
    same = good_ids != 70
    assert torch.equal(images[torch.from_numpy(same)], good_images[torch.from_numpy(same)])
    assert set(ids[~same].tolist()) == {71}


def rename_a_class(folder: Path) -> None:
    content = json.loads((folder / "dataset.json").read_text())
    content["class_names"][3] = "drei"
    (folder / "dataset.json").write_text(json.dumps(content))


BEFORE_THE_FIRST_BATCH = {
    "an empty shard": (lambda f: os.truncate(f / "digits-train-000002.tar", 0), "000002.tar has 0 bytes"),
    "a missing shard": (lambda f: (f / "digits-train-000002.tar").unlink(), "000002.tar: No such file"),
    "another shard of the same size in its place": (
        lambda f: shutil.copy(f / "digits-train-000003.tar", f / "digits-train-000002.tar"),
        "000002.tar does not hold its samples where the table says",
    ),
    "zeros at the start of a shard": (lambda f: overwrite(f, 0, bytes(512), -512), "000000.tar does not hold"),
    "zeros at the end of a shard": (lambda f: overwrite(f, 1436, bytes(512), -512), "000009.tar does not hold"),
    "a byte too many": (
        lambda f: os.truncate(f / "digits-train-000003.tar", 522241),
        "000003.tar has 522241 bytes, but dataset.json says 522240",
    ),
    "a missing index": (lambda f: (f / "digits-train-000002.idx").unlink(), "000002.idx: No such file"),
    "a table cut short": (lambda f: os.truncate(f / "digits-train.samples.npz", 999), "samples.npz is not the file"),
    "a table with another width of an image": (
        lambda f: change_table(f, width=(70, 640)),
        "samples.npz is not the file .* checksum differs",
    ),
    "a missing table": (lambda f: (f / "digits-train.samples.npz").unlink(), "samples.npz cannot be read"),
    "another class name in dataset.json": (rename_a_class, "checksum"),
    "dataset.json cut short": (lambda f: os.truncate(f / "dataset.json", 300), "dataset.json cannot be read"),
    "a label outside the classes": (
        lambda f: retable(f, label=(700, 10)),
        r"sample 00000700-scan\d+\.jpg in .*000004.tar has label 10, but the classes are 0\.\.9",
    ),
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


def test_a_missing_dataset_or_split_is_an_error_with_what_can_be_done(tmp_path, digits):
    with pytest.raises(DataError, match=r"no dataset in .*nowhere.*python -m data_pipeline.build SOURCE .*nowhere"):
        Dataset.open(tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match=r"no split 'test' .*'train', 'val'"):
        Dataset.open(digits, "test")


def test_the_fingerprint_is_of_the_content_not_of_the_place(train, val, copy):
    assert Dataset.open(copy, "train").fingerprint == train.fingerprint != val.fingerprint


def test_a_shard_in_which_every_image_is_damaged_is_an_error_of_one_line_and_never_a_wrong_label(copy):
    dataset = Dataset.open(copy, "train")
    for sample in np.flatnonzero(dataset.shard == 2).tolist():
        overwrite(copy, sample, bytes(100), 300)
    with pytest.raises(DataError, match=r"000002.tar: sample .* and all after it are damaged; copy the shard again"):
        read_epoch(copy)


def test_a_batch_is_not_lost_when_the_next_one_cannot_be_scheduled(train, monkeypatch):
    with training(train) as loader:
        expected = [batch.sample_ids.tolist() for batch in itertools.islice(loader, 6)]
    with training(train) as loader:
        engine, batches = loader._engine, iter(loader)
        found = [next(batches).sample_ids.tolist()]
        real, errors = engine._pipe.schedule_run, [RuntimeError("failed")]

        def schedule_run() -> None:
            if errors:
                raise errors.pop()
            real()

        monkeypatch.setattr(engine._pipe, "schedule_run", schedule_run)
        monkeypatch.setattr(engine, "_recover", lambda error: schedule_run())
        found += [next(batches).sample_ids.tolist() for _ in range(5)]
    assert not errors
    assert found == expected
