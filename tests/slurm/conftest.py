"""What the tests on a cluster share."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pretrain.outcome import ExitCode
from tests.slurm.cluster import Cluster, cluster
from tests.slurm.runs import STEPS, ClusterRun, settings
from tests.system.launching import launched


def run_alone(folder: Path, data: Path, steps: int = STEPS) -> Path:
    """A run without Slurm that nobody touches; its folder."""
    with launched(folder, "--device", "cpu", *settings(data, steps)) as run:
        assert run.end(600) == ExitCode.FINISHED, run.output()
    return folder / "demo"


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """The run that nobody touches, with which the others are compared."""
    return run_alone(tmp_path_factory.mktemp("reference"), digits)


@pytest.fixture(scope="module")
def one_node() -> Iterator[Cluster]:
    """A cluster on which the tests of a file leave no run."""
    with cluster(1) as made:
        yield made


@pytest.fixture
def on_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[int], ClusterRun]]:
    """Makes a cluster with so many nodes, and a run that is not launched yet."""
    with contextlib.ExitStack() as stack:

        def make(nodes: int) -> ClusterRun:
            return ClusterRun(stack.enter_context(cluster(nodes)), tmp_path / "runs", capsys)

        yield make
