"""What the tests on a cluster share."""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pretrain.outcome import ExitCode
from tests.slurm.cluster import Cluster, cluster
from tests.slurm.runs import STEPS, ClusterRun, arguments
from tests.system.launching import ROOT


def local_command(runs: Path, data: Path, steps: int = STEPS) -> list[str]:
    """``slurm.launch --local`` on two ranks of this machine, without GPUs."""
    words = ["-m", "slurm.launch", "--local", "--device", "cpu", "--gpus-per-node", "2", *arguments(runs, data, steps)]
    return [sys.executable, *words]


def run_locally(runs: Path, data: Path, steps: int = STEPS) -> Path:
    """A run that nobody touches; its folder."""
    done = subprocess.run(local_command(runs, data, steps), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == ExitCode.FINISHED, done.stdout + done.stderr
    return runs / "demo"


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """The run that nobody touches, with which the others are compared."""
    return run_locally(tmp_path_factory.mktemp("reference"), digits)


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
