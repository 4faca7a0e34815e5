"""Every event that can befall a job, on a real cluster: the run goes on where it was, and status tells the truth."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.runs import GLOBAL_BATCH, STEPS, ClusterRun, assert_equals, assert_resumed

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(600)]
Maker = Callable[..., ClusterRun]


def test_from_launch_to_handoff_on_two_nodes(on_cluster: Maker, digits: Path, reference: Path) -> None:
    run = on_cluster(2)
    plan = run.launch(digits)
    assert "2 nodes x 1 = 2" in plan
    assert f"{GLOBAL_BATCH} = 2 ranks x 12 x 1" in plan
    assert "is job" in run.launch(digits, code=2)
    run.wait_for_step(2)
    now = run.status()
    assert (now["state"], now["job"], now["restarts"], now["ranks"]) == ("running", run.job, 0, 2)
    assert now["nodes"] == run.cluster.names
    assert now["images_per_second"] > 0
    assert 0 <= now["heartbeat_s"] < 60
    ended = run.finish()
    assert (ended["state"], ended["step"], ended["restarts"]) == ("finished", STEPS, 0)
    assert_equals(run.folder, reference)
    (chapter,) = run.chapters()
    logs = run.folder / "logs" / str(chapter.incarnation)
    assert {path.name for path in logs.glob("*.log")} == {"rank-00000.log", "rank-00001.log"}
    output = (run.folder / f"slurm/submitit/{run.job}_0_log.out").read_text()
    assert f"step {STEPS}/{STEPS}" in output
    assert run.cluster.job(run.job)["JobState"] == "COMPLETED"
    assert "is finished" in run.launch(digits, code=2)


def test_preempted_without_warning_it_goes_on(on_cluster: Maker, digits: Path, reference: Path) -> None:
    run = on_cluster(2)
    run.launch(digits)
    run.wait_for_step(8)
    run.cluster.preempt()
    first = run.wait_for_end(0)
    assert (first.cause, first.action) == ("preempted", "leave")
    waiting = run.wait_for_state("waiting")
    assert "preempted" in waiting["why"]
    second = run.wait_for_chapters(2)[1]
    assert_resumed(run, second, at_least=8)
    assert second.step == first.end_step
    assert run.finish()["restarts"] == 1
    assert_equals(run.folder, reference)
