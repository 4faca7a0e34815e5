"""What sbatch is asked for and what it refuses; and what tests leave behind."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from pretrain.outcome import ExitCode
from slurm.attempt import rendezvous_port
from slurm.folder import SlurmFolder
from slurm.restart import Attempt
from tests.slurm.cluster import Cluster, cluster
from tests.slurm.runs import SAVED_EVERY, ClusterRun, assert_equals, assert_resumed
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
        "--sbatch", "mem-per-gpu=9G", "--sbatch", "cpus-per-gpu=", "--sbatch", "gres=gpu:h100:1",
        "--sbatch", "exclusive", "--sbatch", "reservation=a day", "--sbatch", "gpus-per-node=",
        "--setup", "module load cuda", "--container", "apptainer exec --nv lavit.sif", "--save-within", "300", nodes=4,
    )  # fmt: skip
    for line in ("nodes=2-4", "gres=gpu:h100:1", "partition=big", "account=lab", "qos=high",
                 "constraint=h100", "time=12:00:00", "mem-per-gpu=9G", "exclusive", "reservation='a day'", "mem=500G",
                 "exclude=bad1,bad2",
                 "signal=USR2@300", "requeue", "job-name=demo"):  # fmt: skip
        assert text.count(f"#SBATCH --{line}\n") == 1
    for absent in ("wckey", "gpus-per-node", "cpus-per-gpu", "submitit\n"):
        assert f"--{absent}" not in text
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
        (["--sbatch", "comment=a\nb"], "comment has a line break"),
        (["--sbatch", "output=x"], "slurm.launch sets it itself"),
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
    assert not run.folder.exists()
    run.launch(digits, "--partition", "batch", nodes=1)
    assert run.status()["job"] == run.job


def test_a_node_that_cannot_launch_ranks_is_blamed_and_srun_says_why(
    on_cluster: Maker, digits: Path, tmp_path: Path
) -> None:
    run = on_cluster(3)
    first, second, third = run.cluster.names
    broken, python = tmp_path / "broken", tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\n[ -e {broken}-$SLURMD_NODENAME ] && exec /nowhere/python\nexec {sys.executable} "$@"'
    )
    python.chmod(0o755)
    with run.cluster.slow_prolog(second):
        run.launch(digits, "--container", "env", "--container-python", str(python))
        ended = run.wait_for_end(0)
    assert (ended.cause, ended.action, ended.node) == ("crashed", "requeue", second), ended.reason
    assert f"failed on node {second}" in run.status()["why"]
    Path(f"{broken}-{second}").touch()
    ended = run.wait_for_end(1)
    assert (ended.cause, ended.action, ended.node) == ("crashed", "requeue", second)
    assert f"srun: error: {second}: task 1: Exited with exit code 127" in ended.reason
    assert "srun: error" in (run.folder / f"slurm/submitit/{run.job}_0_log.out").read_text()
    assert run.wait_for_attempts(3)[2].nodes == [first, third]
    run.wait_for_step(1)
    run.stop()
    run.wait_for_state("stopped")


def test_a_node_that_is_avoided_is_used_again_where_the_others_are_too_few(
    on_cluster: Maker, digits: Path, reference: Path
) -> None:
    run = on_cluster(4)
    first, second, third, left_out = run.cluster.names
    run.launch(digits, "--exclude", left_out)

    def excluded() -> set[str]:
        return {*run.cluster.ask("scontrol", "show", "hostnames", run.cluster.job(run.job)["ExcNodeList"]).split()}

    for attempt in range(2):
        run.wait_for_attempts(attempt + 1)
        run.wait_for(lambda: len(list(run.ranks())) == 2, "both ranks")
        run.rank(1).kill()
        run.wait_for_end(attempt)
    run.wait_for(lambda: excluded() == {second, left_out}, f"{second} to be avoided, too")
    run.cluster.ask("scontrol", "update", f"NodeName={third}", "State=DRAIN", "Reason=a disk")
    run.wait_for(lambda: "ReqNodeNotAvail" in run.status()["why"], "a job that lacks nodes")
    again = f"{second} may be used again: the other nodes are too few"
    assert run.release() == f"{run.folder}: job {run.job} waits for nodes; {again}\n"
    assert run.release() == "", "there is nothing left to do"
    assert excluded() == {left_out}
    assert run.wait_for_attempts(3)[2].nodes == [first, second]
    assert again in run.told(str(run.folder))
    run.wait_for(lambda: len(list(run.ranks())) == 2, "both ranks")
    run.rank(0).kill()
    assert run.wait_for_attempts(4)[3].nodes == [first, second], "it has to go on without slurm.release"
    assert f"{second} failed more than once, but none is avoided" in run.output()
    run.finish()
    assert_equals(run.folder, reference)


def test_neither_a_taken_port_nor_a_second_job_of_the_run_nor_other_code_does_harm(
    on_cluster: Maker, digits: Path
) -> None:
    run = on_cluster(4)
    for state in ("DRAIN", "RESUME"):
        if state == "RESUME":
            run.launch(digits)
            taken = socket.create_server((run.cluster.names[0], rendezvous_port(Attempt(run.job, 0))))
        run.cluster.ask(
            "scontrol", "update", f"NodeName={','.join(run.cluster.names)}", f"State={state}", "Reason=test"
        )
    with taken:
        ended = run.wait_for_end(0)
    assert (ended.cause, ended.action, ended.node) == ("crashed", "requeue", "")
    assert "is taken" in ended.reason
    run.wait_for(lambda: run.attempts()[0].notes, "what follows")  # the last line before the next attempt
    assert run.attempts()[0].notes == ["starts again after 6 s, which Slurm imposes"]
    history = run.folder / "slurm/history.jsonl"
    history.write_text(history.read_text().replace(ended.code, "0" * 32))
    begun = run.wait_for_attempts(2)[1]
    run.wait_for_step(2)
    event = json.loads((run.folder / "events.jsonl").read_text().splitlines()[0])
    assert (event["event"], "0" * 32 in event["text"]) == ("other code", True)
    script = str(SlurmFolder(run.folder).script(run.job))
    for options in ([], ["--hold"]):
        other = run.cluster.ask("sbatch", "--parsable", *options, script)
        if not options:
            run.cluster.wait_for(lambda other=other: run.cluster.job(other)["JobState"] == "COMPLETED", "its end")
        now = run.status()
        assert (now["state"], now["job"], now["restarts"]) == ("running", begun.job, 1)
    run.cluster.ask("scancel", other)
    run.stop()
    run.wait_for_state("stopped")


@pytest.fixture(scope="module")
def site(digits: Path) -> Iterator[Cluster]:
    """A cluster like a site's, with the data in the home of its user."""
    if missing := [name for name in ("slurmdbd", "mariadbd") if shutil.which(name) is None]:
        pytest.skip(f"needs {' and '.join(missing)}: apt-get install slurmdbd mariadb-server")
    with cluster(2, site=True) as made:
        shutil.copytree(digits, made.home / "digits")
        yield made


@pytest.fixture
def on_site(site: Cluster, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> ClusterRun:
    """A run of an ordinary user that is not launched yet."""
    return ClusterRun(site, site.home / request.node.name, capsys)


MISLEADING = {
    "SQUEUE_FORMAT": "%u", "SQUEUE_STATES": "PD", "SINFO_FORMAT": "%n", "SLURM_TIME_FORMAT": "relative",
    "SLURM_MEM_PER_CPU": "7", "SLURM_MEM_PER_NODE": "8000", "SBATCH_MEM_PER_NODE": "7000", "SBATCH_NO_REQUEUE": "1",
}  # fmt: skip


def test_a_users_variables_do_not_mislead_and_slurms_own_wait_is_logged(on_site: ClusterRun) -> None:
    run, data = on_site, on_site.cluster.home / "digits"
    run.variables = MISLEADING | {"SBATCH_ACCOUNT": "lab"}
    said = run.launch(data, "--gpus-per-node", "h100:1", "--sbatch", "comment=a comment", "--sbatch", "exclusive")
    assert "SBATCH_MEM_PER_NODE, SBATCH_NO_REQUEUE, SLURM_MEM_PER_CPU, SLURM_MEM_PER_NODE" in said
    facts = run.cluster.job(run.job)
    assert (facts["JobName"], facts["Account"], facts["Comment"]) == ("demo", "lab", "a")
    assert facts["UserId"].startswith(f"{run.cluster.user}(")
    run.wait_for_step(2)
    assert run.status()["state"] == "running"
    run.rank(1).kill()
    ended = run.wait_for_end(0)
    assert (ended.cause, ended.action) == ("crashed", "requeue")
    told = run.wait_for_state("waiting")
    assert "BeginTime" in told["why"]
    assert run.attempts()[0].notes == ["starts again after 121 s, which Slurm imposes"]
    assert "is cancelled" in run.stop()


def test_what_a_site_refuses_leaves_no_run(on_site: ClusterRun) -> None:
    data = on_site.cluster.home / "digits"
    said = on_site.launch(data, "--sbatch", "wckey=none", code=ExitCode.WILL_FAIL_AGAIN)
    assert said.splitlines()[-1].startswith("error: sbatch: sbatch: error: ")
    assert "wckey" in said.splitlines()[-1]
    assert not on_site.folder.exists()


def test_where_only_one_job_is_accepted_release_goes_on_with_the_environment_of_the_launch(
    on_site: ClusterRun, reference: Path
) -> None:
    run, site = on_site, on_site.cluster
    run.variables = {"MARK": "kept", "MY_TOKEN": "hidden"}
    inside = ["salloc", "-N1", "-n1", "--mem-per-cpu=50"]  # whose variables would keep srun from starting
    run.launch(site.home / "digits", "--qos", "one", inside=inside)
    site.ask("scontrol", "update", f"JobId={run.job}", "Requeue=0")
    run.wait_for_checkpoint(SAVED_EVERY)
    run.rank(0).kill()
    told = run.wait_for_state("lost")
    assert (run.attempts()[0].cause, run.attempts()[0].action) == ("crashed", "release")
    assert "QOS" in told["why"]
    assert "python -m slurm.release" in told["why"]
    cron = [f"{name}={site.environment.get(name, '')}" for name in ("HOME", "SLURM_CONF", "PYTHONPATH")]
    done = site.as_user(
        "env", "-i", "PATH=/usr/bin", *cron, site.python, "-m", "slurm.release", "--runs", str(run.runs)
    )
    assert "could not be started again and is submitted again as job" in done.stdout, done.stderr
    begun = run.wait_for_attempts(2)[1]
    assert_resumed(run, begun, at_least=SAVED_EVERY)
    environment = run.rank(0).environ()
    assert (environment["MARK"], "MY_TOKEN" in environment) == ("kept", False)
    assert "hidden" not in (run.folder / "slurm/launch.json").read_text()
    run.finish()
    assert_equals(run.folder, reference)


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
