"""Settings of the whole test suite."""

import os
from pathlib import Path

import pytest

# Ranks that tests start share two cores at worst.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fail-on-skip", action="store_true", help="a skipped test fails the session, unless it is marked gpu"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


_SKIPPED: list[str] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report = yield
    if report.skipped and not item.get_closest_marker("gpu"):
        _SKIPPED.append(item.nodeid)
    return report


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if session.config.getoption("--fail-on-skip") and _SKIPPED and exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("--fail-on-skip") and _SKIPPED:
        terminalreporter.section("skipped, though they should run here", red=True)
        for name in _SKIPPED:
            terminalreporter.write_line(name)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The handwritten digits as shards, built by the door that people use; treat as read-only."""
    from data_pipeline.build import main

    folder = tmp_path_factory.mktemp("data") / "digits"
    assert main(["digits", str(folder)]) in (None, 0)
    return folder
