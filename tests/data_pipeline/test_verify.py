import shutil

import pytest

from data_pipeline.verify import main as verify


@pytest.fixture
def copy(digits, tmp_path):
    return shutil.copytree(digits, tmp_path / "digits")


def test_a_whole_dataset_passes(digits, capsys):
    assert verify([str(digits), "--decode", "--workers", "1"]) == 0
    assert "train: 1437 samples in 10 shards, val: 360 samples in 3 shards, all decoded" in capsys.readouterr().err


@pytest.mark.parametrize("where", [0.0, 0.01, 0.37, 0.73, 0.999])
@pytest.mark.parametrize(
    "name",
    [
        "dataset.json",
        "digits-train-000002.tar",
        "digits-train-000002.idx",
        "digits-train.samples.npz",
        "digits-val-000001.tar",
    ],
)
def test_a_single_flipped_byte_in_any_file_is_found(copy, name, where, capsys):
    data = bytearray((copy / name).read_bytes())
    data[int(where * len(data))] ^= 1
    (copy / name).write_bytes(data)
    assert verify([str(copy), "--workers", "1"]) == 1
    assert name in capsys.readouterr().err


def test_a_missing_file_is_found(copy, capsys):
    (copy / "digits-val-000000.idx").unlink()
    assert verify([str(copy), "--workers", "1"]) == 1
    assert "digits-val-000000.idx" in capsys.readouterr().err
