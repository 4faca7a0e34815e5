"""Settings of the whole test suite."""

import contextlib
import functools
import importlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

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


LONGEST = {
    "test_equality", "test_short_run", "test_readme", "test_compiled", "test_soak", "test_replay",
    "test_trouble", "test_factory", "test_on_stand_in", "test_resume",
}  # fmt: skip
"""Files whose slow tests take longest, which begin first."""


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
    # So that no worker is left alone with one of them at the end.
    items.sort(key=lambda item: item.path.stem not in LONGEST)
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


@contextlib.contextmanager
def shared(request: pytest.FixtureRequest, name: str) -> Iterator[Path]:
    """A folder of this session, which all workers share: the first one fills it while the others wait."""
    base = request.getfixturevalue("tmp_path_factory").getbasetemp()
    if hasattr(request.config, "workerinput"):  # a worker of pytest-xdist
        base = base.parent
    with FileLock(base / f"{name}.lock"):
        yield base / name


@pytest.fixture(scope="session")
def digits(request: pytest.FixtureRequest) -> Path:
    """The handwritten digits as shards, built by the command that users run; treat as read-only."""
    from data_pipeline.build import main

    with shared(request, "digits") as folder:
        if not (folder / "dataset.json").exists():
            assert main(["digits", str(folder)]) in (None, 0)
    return folder
