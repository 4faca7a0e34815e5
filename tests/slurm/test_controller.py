"""A slurmctld that does not answer, or that was heard too late: nothing is lost, and nothing is done twice."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

from slurm import scheduler
from slurm.scheduler import SlurmError
from tests.slurm.cluster import Cluster, cluster
from tests.slurm.runs import SAVED_EVERY, ClusterRun, assert_equals, assert_resumed

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
LONGER_THAN_A_COMMAND_WAITS_S = 6.0
"""MessageTimeout is 4 s here."""


@pytest.fixture
def small() -> Iterator[Cluster]:
    """A cluster of one node, which the commands of this process speak with."""
    with cluster(1) as made, mock.patch.dict(os.environ, made.environment):
        yield made


def silence_once_after(asked: Callable[..., object], small: Cluster) -> Callable[..., object]:
    """``asked``, after whose first answer the controller gives none until a command that waits for it has given up."""
    silences = [small.silent_controller()]

    def ask(*arguments: object, **options: object) -> object:
        answer = asked(*arguments, **options)
        if silences:
            silent = silences.pop()
            silent.__enter__()
            threading.Timer(LONGER_THAN_A_COMMAND_WAITS_S, silent.__exit__, (None, None, None)).start()
        return answer

    return ask


def test_what_a_busy_controller_heard_but_did_not_answer_is_not_done_twice(
    small: Cluster, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.sh"
    script.write_text("#!/bin/sh\n#SBATCH --output=/dev/null\n#SBATCH --requeue\nsleep 600\n")
    first = scheduler.submit(script)
    small.wait_for(lambda: small.job(first)["JobState"] == "RUNNING", "the job")
    silence_once_after(lambda: None, small)()
    scheduler.requeue(first)
    assert "trying again" in capfd.readouterr().err
    small.wait_for(lambda: small.job(first)["JobState"] == "RUNNING", "the job once more")
    assert small.job(first)["Restarts"] == "1"
    with mock.patch.object(scheduler, "_jobs_of", silence_once_after(scheduler._jobs_of, small)):
        second = scheduler.submit(script)
    assert "looking whether it was heard" in capfd.readouterr().err
    assert {*scheduler.queue()} == {first, second}


def test_a_command_that_was_refused_is_not_repeated(small: Cluster) -> None:
    began = time.monotonic()
    with pytest.raises(SlurmError, match="Invalid job id"):
        scheduler.requeue("1")
    with pytest.raises(SlurmError, match="nvalid partition"):
        scheduler.run("sbatch", "-p", "none", "--wrap", "true", retry_s=600)
    assert scheduler.show_job("1") == {}
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
    crashed, begun = run.wait_for_chapters(2)
    assert (crashed.cause, crashed.action, begun.job) == ("crashed", "requeue", run.job)
    assert_resumed(run, begun, at_least=SAVED_EVERY)
    run.finish()
    assert_equals(run.folder, reference)
