"""What the tests on a cluster share."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pretrain.outcome import ExitCode
from tests.slurm.cluster import cluster
from tests.slurm.runs import ClusterRun, arguments
from tests.system.launching import ROOT


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """The run that nobody touches, on two ranks of this machine; made by ``slurm.launch --local``."""
    runs = tmp_path_factory.mktemp("reference")
    command = [sys.executable, "-m", "slurm.launch", "--local", "--gpus-per-node", "2", *arguments(runs, digits)]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=hidden, capture_output=True, text=True, check=False)
    assert done.returncode == ExitCode.FINISHED, done.stdout + done.stderr
    return runs / "demo"


@pytest.fixture
def on_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[int], ClusterRun]]:
    """Makes a cluster with so many nodes, and a run that is not launched yet."""
    with contextlib.ExitStack() as stack:

        def make(nodes: int) -> ClusterRun:
            return ClusterRun(stack.enter_context(cluster(nodes)), tmp_path / "runs", capsys)

        yield make
