"""Settings of the whole test suite."""

import functools
import importlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import RANK_VARIABLES

# Ranks that tests start share two cores at worst.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fail-on-skip",
        action="store_true",
        help="a skipped test fails the session, unless it is marked gpu, timm or trackers and lacks what that needs",
    )


NEEDS = {
    "timm": (("timm",), "timm and a torchvision that fits torch"),  # it imports torchvision
    "trackers": (("wandb",), "wandb"),
}


@functools.cache
def _missing(marker: str) -> str | None:
    """Why tests with this marker cannot run here; None: they can."""
    if marker == "gpu":
        import torch

        return None if torch.cuda.is_available() else "needs an NVIDIA GPU"
    if marker == "slurm":
        found = all(shutil.which(program) for program in ("slurmctld", "slurmd", "sbatch", "munged"))
        return None if found else "needs Slurm: apt-get install slurmctld slurmd slurm-client munge"
    modules, what = NEEDS[marker]
    try:
        for module in modules:
            importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # a torchvision for another torch raises the latter
        return f"needs {what}: {error}"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest files first, so that no worker is left alone with one of them at the end.
    items.sort(key=lambda item: item.path.stem not in {"test_soak", "test_planned_memory", "test_short_run"})
    for item in items:
        for marker in ("gpu", "slurm", *NEEDS):
            if item.get_closest_marker(marker) and (reason := _missing(marker)):
                item.add_marker(pytest.mark.skip(reason=reason))


_SKIPPED: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # Also called where the reports of several worker processes come together.
    allowed = "gpu" in report.keywords or any(name in report.keywords and _missing(name) for name in NEEDS)
    if report.skipped and not allowed:
        _SKIPPED.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if session.config.getoption("--fail-on-skip") and _SKIPPED and exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("--fail-on-skip") and _SKIPPED:
        terminalreporter.section("skipped, though they should run here", red=True)
        for name in _SKIPPED:
            terminalreporter.write_line(name)


@pytest.fixture(autouse=True)
def no_rank_variables() -> Iterator[None]:
    """What a test that ran as a rank leaves in the environment would reach the runs that later tests start."""
    yield
    for name in RANK_VARIABLES:
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The handwritten digits as shards, built by the command that users run; treat as read-only."""
    from data_pipeline.build import main

    folder = tmp_path_factory.mktemp("data") / "digits"
    assert main(["digits", str(folder)]) in (None, 0)
    return folder
