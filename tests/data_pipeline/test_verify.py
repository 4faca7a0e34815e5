import re
from contextlib import suppress

import pytest
from rich.console import Console

from data_pipeline.dataset import Dataset
from data_pipeline.errors import DataError
from data_pipeline.verify import main as verify
from data_pipeline.verify import verify as problems_of
from tests.data_pipeline.datasets import retable, run_build
from tests.data_pipeline.images import class_folders


def test_a_whole_dataset_passes(digits, capsys):
    assert verify([str(digits), "--decode", "--workers", "1"]) == 0
    assert "train: 1437 samples in 10 shards, val: 360 samples in 3 shards, all decoded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "digits-val-000000.idx").unlink(), "digits-val-000000.idx: No such file"),
        (
            lambda folder: retable(folder, label=(70, 3)),
            r"000000.tar, 00000070-scan\d+: its label is .*, in the table 3;",
        ),
        (lambda folder: retable(folder, crc32=(70, 7)), "its crc32 is .*, in the table 7;"),
        (lambda folder: retable(folder, width=(70, 63)), "its width is 64, in the table 63;"),
        (
            lambda folder: retable(folder, offset=(70, 512)),
            "000000.tar, 00000000-scan.*: its offset is 1536, in the table 512",
        ),
    ],
)
def test_a_missing_file_and_a_table_that_disagrees_with_its_shard_are_found(copy, damage, message, capsys):
    damage(copy)
    assert verify([str(copy), "--decode", "--workers", "1"]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_a_flipped_byte_in_any_file_is_found(tmp_path):
    dest = tmp_path / "tiny"
    assert run_build(class_folders(tmp_path / "in", 1, "a", "b"), dest) == 0

    def found() -> str:
        try:
            return "\n".join(problems_of(dest, console, workers=1, decode=False))
        except DataError as error:
            return str(error)

    console = Console(quiet=True)
    files = sorted(dest.iterdir())
    assert {path.suffix for path in files} == {".tar", ".idx", ".npz", ".json"}
    missed = []
    for path in files:
        whole = path.read_bytes()
        for place in {*range(0, len(whole), 29 if path.suffix == ".tar" else 7), len(whole) - 1}:
            damaged = bytearray(whole)
            damaged[place] ^= 1 << place % 8
            path.write_bytes(damaged)
            if path.name not in found():
                missed.append((path.name, place))
            if path.suffix == ".npz":  # who opens it without verifying gets an error of one line or what was written
                with suppress(DataError):
                    assert len(Dataset.open(dest, "train")) == 2
        path.write_bytes(whole)
        assert not found()
    assert missed == []
