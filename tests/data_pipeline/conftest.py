"""Datasets that several tests read."""

import shutil
from pathlib import Path

import pytest

from data_pipeline.dataset import Dataset
from tests.data_pipeline.images import photographs


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return photographs(tmp_path_factory.mktemp("photos"))


@pytest.fixture
def train(digits: Path) -> Dataset:
    return Dataset.open(digits, "train")


@pytest.fixture
def val(digits: Path) -> Dataset:
    return Dataset.open(digits, "val")


@pytest.fixture
def copy(digits: Path, tmp_path: Path) -> Path:
    """The digits, to be damaged."""
    return Path(shutil.copytree(digits, tmp_path / "digits"))
