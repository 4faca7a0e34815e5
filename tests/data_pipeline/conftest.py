"""Datasets that several tests read; each is built once."""

from pathlib import Path

import pytest

from data_pipeline.build import main as build
from data_pipeline.dataset import Dataset
from tests.data_pipeline.photographs import built


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dest = tmp_path_factory.mktemp("data") / "digits"
    assert build(["digits", str(dest), "--workers", "1"]) == 0
    return dest


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return built(tmp_path_factory.mktemp("photos"))


@pytest.fixture
def train(digits: Path) -> Dataset:
    return Dataset.open(digits, "train")


@pytest.fixture
def val(digits: Path) -> Dataset:
    return Dataset.open(digits, "val")
