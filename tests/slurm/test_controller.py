"""A slurmctld that does not answer, or that was heard too late: nothing is lost, and nothing is done twice."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

from pretrain.outcome import ExitCode
from slurm import attempt, job_state, scheduler
from slurm.folder import SlurmFolder
from slurm.scheduler import SlurmError
from tests.slurm.cluster import Cluster
from tests.slurm.runs import SAVED_EVERY, ClusterRun, assert_equals, assert_resumed

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture
def small(one_node: Cluster) -> Iterator[Cluster]:
    """A cluster of one node, which the commands of this process speak with."""
    with mock.patch.dict(os.environ, one_node.environment):
        yield one_node


def silence(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> tuple[Callable[[], None], list[str]]:
    """Of the controller, until whoever waits for it has said so once: what begins it, and what is said."""
    silent, told = cluster.silent_controller(), []

    def say(text: str) -> None:
        if not told:
            silent.__exit__(None, None, None)
        told.append(text)

    monkeypatch.setattr(scheduler, "say", say)
    return silent.__enter__, told


def test_what_a_busy_controller_heard_but_did_not_answer_is_not_done_twice(
    small: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "script.sh"
    script.write_text("#!/bin/sh\n#SBATCH --output=/dev/null\n#SBATCH --requeue\nsleep 600\n")
    first = scheduler.submit(script, {})
    small.wait_for(lambda: small.job(first)["JobState"] == "RUNNING", "the job")
    begin, told = silence(small, monkeypatch)
    begin()
    scheduler.requeue(first)
    assert "trying again" in "".join(told)
    small.wait_for(lambda: small.job(first)["JobState"] == "RUNNING", "the job once more")
    assert small.job(first)["Restarts"] == "1"
    begin, told = silence(small, monkeypatch)
    asked, original = [], scheduler._jobs_of

    def then_silent(script: Path, retry_s: float) -> set[str]:
        found = original(script, retry_s)
        if not asked:
            begin()
        asked.append(found)
        return found

    monkeypatch.setattr(scheduler, "_jobs_of", then_silent)
    second = scheduler.submit(script, {})
    assert "looking whether it was heard" in "".join(told)
    assert asked[0] == {first}
    assert {*scheduler.queue()} == {first, second}


def test_a_command_that_was_refused_is_not_repeated(small: Cluster) -> None:
    began = time.monotonic()
    with pytest.raises(SlurmError, match="Invalid job id"):
        scheduler.requeue("1")
    with pytest.raises(SlurmError, match="nvalid partition"):
        scheduler.run("sbatch", "-p", "none", "--wrap", "true", retry_s=600)
    assert scheduler.show_job("1") == {}
    assert job_state.job_state("1", 0, save_within_s=1, node_down=False) == "forgotten"
    assert job_state.job_state("1", 0, save_within_s=1, node_down=True) == "cancelled"
    assert time.monotonic() - began < 100


def test_a_run_that_ends_while_the_controller_does_not_answer_waits_for_it_and_goes_on(
    on_cluster: Callable[[int], ClusterRun], digits: Path, reference: Path
) -> None:
    run = on_cluster(2)
    run.launch(digits)
    run.wait_for_checkpoint(SAVED_EVERY)
    with run.cluster.silent_controller():
        run.rank(1).kill()
        run.wait_for(
            lambda: any("trying again" in said.read_text() for said in run.folder.glob("slurm/submitit/*.out")),
            "the batch script waits",
        )
    crashed, begun = run.wait_for_attempts(2)
    assert (crashed.cause, crashed.action, begun.job) == ("crashed", "requeue", run.job)
    assert_resumed(run, begun, at_least=SAVED_EVERY)
    run.finish()
    assert_equals(run.folder, reference)


def lost_run(on_cluster: Callable[[int], ClusterRun], digits: Path) -> ClusterRun:
    """One with a checkpoint, whose batch script was killed."""
    run = on_cluster(2)
    run.launch(digits)
    run.wait_for_checkpoint(SAVED_EVERY)
    run.batch_script().kill()
    run.wait_for_state("lost")
    return run


def test_a_job_that_was_submitted_but_never_written_down_is_taken_for_the_runs_own(
    on_cluster: Callable[[int], ClusterRun], digits: Path, reference: Path
) -> None:
    run = lost_run(on_cluster, digits)
    script = SlurmFolder(run.folder).submitit / f"{run.job}_submission.sh"
    other = run.cluster.ask("sbatch", "--parsable", "--hold", str(script))
    assert (run.status()["job"], run.release()) == (other, "")
    assert f"is job {other} already" in run.launch(digits, code=2)
    run.cluster.ask("scontrol", "release", other)
    begun = run.wait_for_attempts(2)[1]
    assert begun.job == other
    run.finish()
    assert_equals(run.folder, reference)


def test_the_batch_script_of_a_job_that_slurm_has_forgotten_submits_another_once(
    on_cluster: Callable[[int], ClusterRun], digits: Path, reference: Path
) -> None:
    run = lost_run(on_cluster, digits)
    run.cluster.kill_controller()
    for state in (run.cluster.folder / "state").glob("job_state*"):
        state.unlink()
    configuration = run.cluster.folder / "slurm.conf"  # else the next job may get the number that was forgotten
    configuration.write_text(configuration.read_text().replace(f"={run.job}\n", f"={int(run.job) + 1}\n"))
    run.cluster.start_controller()
    assert not run.cluster.ask("squeue", "-h", "-t", "all")
    itself = {"SLURM_JOB_ID": run.job, "SLURM_JOB_NODELIST": ",".join(run.cluster.names)}
    with mock.patch.dict(os.environ, run.cluster.environment | itself):
        for _ in range(2):
            assert attempt.main(["end", str(run.folder), "--status", "1"]) == ExitCode.RETRY
    lost, begun = run.wait_for_attempts(2)
    assert (lost.action, lost.next_job) == ("requeue", begun.job)
    assert len(run.cluster.ask("squeue", "-h", "-t", "all").splitlines()) == 1
    assert_resumed(run, begun, at_least=SAVED_EVERY)
    run.finish()
    assert_equals(run.folder, reference)
