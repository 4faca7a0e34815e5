"""What sbatch is asked for and what it refuses; and what tests leave behind."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pretrain.outcome import ExitCode
from tests.slurm.cluster import Cluster
from tests.slurm.runs import ClusterRun
from tests.system.launching import ROOT

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(600)]
Maker = Callable[[int], ClusterRun]


@pytest.fixture
def beside(one_node: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> ClusterRun:
    """A run beside a cluster that has nothing to do but to be asked."""
    return ClusterRun(one_node, tmp_path / "runs", capsys)


def test_a_dry_run_prints_the_script_and_starts_nothing(beside: ClusterRun, digits: Path) -> None:
    text = beside.launch(
        digits, "--dry-run", "--min-nodes", "2", "--partition", "big", "--account", "lab", "--qos", "high",
        "--constraint", "h100", "--time", "12:00:00", "--cpus-per-gpu", "12", "--mem", "500G", "--exclude", "bad1,bad2",
        "--setup", "module load cuda", "--container", "apptainer exec --nv lavit.sif", "--save-within", "300", nodes=4,
    )  # fmt: skip
    for line in ("nodes=2-4", "gpus-per-node=1", "partition=big", "account=lab", "qos=high",
                 "constraint=h100", "time=12:00:00", "cpus-per-gpu=12", "mem=500G", "exclude=bad1,bad2",
                 "signal=USR2@300", "requeue", "job-name=demo"):  # fmt: skip
        assert f"#SBATCH --{line}\n" in text
    assert "\nmodule load cuda\n" in text
    assert " apptainer exec --nv lavit.sif python3 -u -m submitit.core._submit " in text
    assert "a restart also takes 2 or 3 nodes" in text
    assert not beside.folder.exists()
    assert not beside.cluster.ask("squeue", "-h", "-t", "all")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (["--set", "optimizer.lrr=1"], "did you mean optimizer.lr?"),
        (["--set", "data.path=/nowhere"], "/nowhere"),
        (["--set", "model.name=lavit_mikro"], "lavit_micro"),
        (["--nodes", "5"], "cannot be divided by 5 ranks"),
    ],
)
def test_what_cannot_run_is_not_submitted(change: list[str], line: str, beside: ClusterRun, digits: Path) -> None:
    said = beside.launch(digits, *change, code=ExitCode.WILL_FAIL_AGAIN)
    assert line in said
    assert len([text for text in said.splitlines() if text.startswith("error: ")]) == 1
    assert not beside.folder.exists()
    assert not beside.cluster.ask("squeue", "-h", "-t", "all")


def test_what_slurm_refuses_is_told_in_one_line_and_may_be_launched_otherwise(on_cluster: Maker, digits: Path) -> None:
    run = on_cluster(1)
    said = run.launch(digits, "--partition", "nowhere", nodes=1, code=ExitCode.WILL_FAIL_AGAIN)
    assert said.splitlines()[-1].startswith("error: sbatch: sbatch: error: invalid partition specified: nowhere")
    assert "Traceback" not in said
    assert not run.cluster.ask("squeue", "-h")
    run.launch(digits, "--partition", "batch", nodes=1)
    assert run.status()["job"] == run.job


def test_a_killed_test_run_leaves_neither_daemons_nor_files() -> None:
    program = (
        "import json, time, psutil\nfrom tests.slurm.cluster import cluster\nwith cluster(2) as made:\n"
        "    made.ask('sbatch', '-N2', '-o', '/dev/null', '--wrap', 'srun sleep 600')\n"
        "    made.wait_for(lambda: all(len(made.processes_on(name)) > 1 for name in made.names), 'the job')\n"
        "    pids = [p.pid for p in psutil.Process().children(recursive=True)]\n"
        "    print(json.dumps([str(made.folder), pids]), flush=True)\n"
        "    time.sleep(600)"
    )
    started = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    folder, pids = json.loads(started.stdout.readline())
    processes = [psutil.Process(pid) for pid in pids]
    assert len(processes) >= 8
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive
    assert not Path(folder).exists()
