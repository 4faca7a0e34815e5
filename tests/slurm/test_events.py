"""Every event that can befall a job, on a real cluster: the run goes on where it was, and status tells the truth."""

import contextlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from slurm.folder import SlurmFolder
from tests.slurm.runs import GLOBAL_BATCH, SAVED_EVERY, STEPS, ClusterRun, assert_equals, assert_resumed
from tests.system.launching import changes

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(600)]
Maker = Callable[[int], ClusterRun]


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
    run.cluster.kill_controller()  # jobs go on without it
    told = run.told()
    assert "running" in told
    run.cluster.start_controller()
    ended = run.finish()
    assert (ended["state"], ended["step"], ended["restarts"]) == ("finished", STEPS, 0)
    assert_equals(run.folder, reference)
    (attempt,) = run.attempts()
    logs = run.folder / "logs" / str(attempt.attempt)
    assert {path.name for path in logs.glob("*.log")} == {"rank-00000.log", "rank-00001.log"}
    output = (run.folder / f"slurm/submitit/{run.job}_0_log.out").read_text()
    assert f"step {STEPS}/{STEPS}" in output
    run.cluster.wait_for(lambda: run.cluster.job(run.job)["JobState"] == "COMPLETED", "the end of the job")
    assert "is finished" in run.launch(digits, code=2)


def test_preempted_in_every_way_it_saves_and_goes_on(on_cluster: Maker, digits: Path, reference: Path) -> None:
    run = on_cluster(2)
    run.launch(digits)
    ways = [("leave", 0, False), ("requeue", 20, False), ("requeue", 20, True), ("leave", 0, True)]
    for number, (action, grace, user_signal) in enumerate(ways):
        run.cluster.set_preemption(grace=grace, user_signal=user_signal)
        aim = (run.attempts()[-1].step if number else 0) + 6
        run.wait_for_step(aim)
        run.cluster.preempt()
        ended = run.wait_for_end(number)
        assert (ended.cause, ended.action) == ("preempted", action), (grace, user_signal)
        waiting = run.wait_for_state("waiting")
        assert "preempted" in waiting["why"]
        assert waiting["restarts"] == number
        begun = run.wait_for_attempts(number + 2)[number + 1]
        assert begun.step == ended.end_step >= aim, "what was trained before the preemption was not saved"
        assert_resumed(run, begun, at_least=aim)
    assert run.finish()["restarts"] == len(ways)
    assert_equals(run.folder, reference)


def test_at_the_time_limit_it_goes_on_whether_or_not_there_was_time_to_save(
    on_cluster: Maker, digits: Path, reference: Path
) -> None:
    run = on_cluster(2)
    run.launch(digits, "--save-within", "20")
    run.wait_for_step(7)
    let_time_run_out(run)
    for rank in run.ranks():  # Slurm looks at time limits twice a minute, and wakes whom it sends a signal
        rank.suspend()
    saved = run.wait_for_end(0)
    assert (saved.cause, saved.action) == ("time limit", "requeue")
    assert "time limit" in run.wait_for_state("waiting")["why"]
    run.cluster.ask("scontrol", "update", f"JobId={run.job}", "TimeLimit=60")
    begun = run.wait_for_attempts(2)[1]
    assert begun.step == saved.end_step >= 7
    assert_resumed(run, begun, at_least=7)
    run.wait_for_checkpoint(begun.step + SAVED_EVERY)
    let_time_run_out(run)
    while not run.attempts()[1].ended:  # these get no time to save
        for rank in run.ranks():
            with contextlib.suppress(psutil.Error):
                rank.suspend()
        time.sleep(0.02)
    killed = run.attempts()[1]
    assert (killed.cause, killed.action) == ("time limit", "requeue"), killed.reason
    assert "had not saved within 15 s" in killed.reason
    run.cluster.ask("scontrol", "update", f"JobId={run.job}", "TimeLimit=60")
    assert_resumed(run, run.wait_for_attempts(3)[2], at_least=begun.step + SAVED_EVERY)
    assert run.finish()["restarts"] == 2
    assert_equals(run.folder, reference)


def let_time_run_out(run: ClusterRun) -> None:
    """Give the run a limit of whole minutes, of which 35 to 95 s are left.

    Less than the 30 s from one look of Slurm's to the next, and it would find the time over before it had told the run.
    """
    hours, minutes, seconds = map(int, run.cluster.job(run.job)["RunTime"].split(":"))
    limit = (hours * 3600 + minutes * 60 + seconds + 35) // 60 + 1
    run.cluster.ask("scontrol", "update", f"JobId={run.job}", f"TimeLimit={limit}")


def test_lost_nodes_are_replaced_by_others(on_cluster: Maker, digits: Path, reference: Path) -> None:
    run = on_cluster(4)
    second = run.cluster.names[1]
    run.launch(digits)
    run.wait_for_checkpoint(SAVED_EVERY)
    run.cluster.kill_node(second)  # not the batch host: its script lives to tell
    ended = run.wait_for_end(0)
    assert ended.cause == "node lost"
    begun = run.wait_for_attempts(2)[1]
    assert second not in begun.nodes
    assert_resumed(run, begun, at_least=SAVED_EVERY)
    run.wait_for_checkpoint(begun.step + SAVED_EVERY)
    batch_host = begun.nodes[0]
    run.cluster.kill_node(batch_host)  # nobody lives to tell
    last = run.wait_for_attempts(3)[2]
    left = [name for name in run.cluster.names if name not in (second, batch_host)]
    assert last.nodes == left
    assert run.attempts()[1].cause == "lost"
    assert_resumed(run, last, at_least=begun.step + SAVED_EVERY)
    told = run.finish()
    assert told["restarts"] == 2
    assert told["nodes"] == left
    assert_equals(run.folder, reference)


def test_nodes_that_reboot_at_once_are_used_again(on_cluster: Maker, digits: Path, reference: Path) -> None:
    run = on_cluster(2)
    first, second = run.cluster.names
    run.launch(digits)
    for number, name in enumerate((second, first)):
        before = run.attempts()[-1].step if number else 0
        run.wait_for_checkpoint(before + SAVED_EVERY)
        run.cluster.kill_node(name)
        run.cluster.start_node(name)
        begun = run.wait_for_attempts(number + 2)[number + 1]
        assert begun.nodes == [first, second]
        assert_resumed(run, begun, at_least=before + SAVED_EVERY)
    assert run.finish()["restarts"] == 2
    assert_equals(run.folder, reference)


def test_a_node_whose_rank_was_killed_and_that_then_did_not_arrive_is_avoided(
    on_cluster: Maker, digits: Path, reference: Path
) -> None:
    run = on_cluster(3)
    first, second, third = run.cluster.names
    run.launch(digits, "--set", "watchdog.start_minutes=1")  # a third of it for all nodes to arrive
    run.wait_for_checkpoint(SAVED_EVERY)
    run.rank(1).kill()
    ended = run.wait_for_end(0)
    assert (ended.cause, ended.action, ended.node) == ("crashed", "requeue", second)
    assert f"rank 1 on {second}: killed by SIGKILL" in run.status()["why"]
    assert run.wait_for_attempts(2)[1].nodes == [first, second]
    run.wait_for(lambda: len(list(run.ranks())) == 2, "both ranks")
    run.rank(1).suspend()  # long before it has imported what it needs
    ended = run.wait_for_end(1)
    assert (ended.cause, ended.action, ended.node) == ("crashed", "requeue", second)
    assert f"{second} (rank 1) did not arrive within 20 s" in run.status()["why"]
    begun = run.wait_for_attempts(3)[2]
    assert begun.nodes == [first, third]
    assert_resumed(run, begun, at_least=SAVED_EVERY)
    assert f"avoiding {second}" in run.told(str(run.folder))
    run.finish()
    assert_equals(run.folder, reference)


def test_restarts_without_a_new_checkpoint_have_an_end(on_cluster: Maker, digits: Path) -> None:
    run = on_cluster(1)
    run.launch(digits, "--max-restarts", "1", nodes=1)
    for number in range(2):
        run.wait_for_attempts(number + 1)
        run.wait_for(lambda: bool(list(run.ranks())), "a rank")
        run.rank(0).kill()
        ended = run.wait_for_end(number)
    assert (ended.cause, ended.action) == ("crashed", "none")
    told = run.wait_for_state("failed")
    assert "gave up: 1 restarts in a row brought no new checkpoint" in told["why"]
    run.cluster.wait_for(lambda: not run.cluster.ask("squeue", "-h"), "an empty queue")
    assert run.cluster.job(run.job)["JobState"] == "FAILED"


def test_an_error_that_will_repeat_is_not_repeated(on_cluster: Maker, digits: Path, tmp_path: Path) -> None:
    run = on_cluster(1)
    data = tmp_path / "digits"
    shutil.copytree(digits, data)
    run.cluster.ask("scontrol", "update", f"NodeName={run.cluster.names[0]}", "State=DRAIN", "Reason=test")
    run.launch(data, nodes=1)
    assert run.status()["state"] == "waiting"
    shutil.rmtree(data)
    run.cluster.ask("scontrol", "update", f"NodeName={run.cluster.names[0]}", "State=RESUME")
    told = run.wait_for_state("failed")
    assert f"there is no dataset in {data}" in told["why"]
    assert "python -m data_pipeline.build" in told["why"]
    (attempt,) = run.attempts()
    assert (attempt.cause, attempt.action) == ("will fail again", "none")
    assert not run.cluster.ask("squeue", "-h", "-t", "PENDING")


def test_a_rank_that_stands_still_is_noticed_and_the_run_goes_on(
    on_cluster: Maker, digits: Path, reference: Path
) -> None:
    run = on_cluster(2)
    run.launch(digits, "--set", "watchdog.step_minutes=0.1")
    run.wait_for_checkpoint(SAVED_EVERY)
    run.rank(1).suspend()
    ended = run.wait_for_end(0)
    assert (ended.cause, ended.action, ended.node) == ("hang", "requeue", "")
    assert "rank 0 hangs: computing, or waiting for the other ranks" in run.status()["why"]
    assert list((run.folder / "hangs").glob("*-rank-00000.txt"))
    assert_resumed(run, run.wait_for_attempts(2)[1], at_least=SAVED_EVERY)
    run.finish()
    assert_equals(run.folder, reference)


def test_stopped_or_cancelled_it_stays_so_until_it_is_launched_again(
    on_cluster: Maker, digits: Path, reference: Path
) -> None:
    run = on_cluster(2)
    run.launch(digits)
    run.wait_for_step(6)
    assert "save and end" in run.stop()
    ended = run.wait_for_end(0)
    assert (ended.cause, ended.action) == ("stopped", "none")
    assert "slurm.stop by root" in run.wait_for_state("stopped")["why"]
    run.launch(digits)
    begun = run.wait_for_attempts(2)[1]
    assert begun.step == ended.end_step >= 6
    run.wait_for_step(begun.step + 6)
    run.cluster.ask("scancel", run.job)
    ended = run.wait_for_end(1)
    assert (ended.cause, ended.action) == ("cancelled", "none")
    assert run.wait_for_state("cancelled")["saved_step"] == ended.end_step >= begun.step + 6
    assert run.release() == ""
    name = run.cluster.names[0]
    run.cluster.ask("scontrol", "update", f"NodeName={name}", "State=DRAIN", "Reason=test")
    run.launch(digits)
    assert run.status()["state"] == "waiting"
    assert "is cancelled" in run.stop()
    assert run.wait_for_state("stopped")["step"] == ended.end_step
    run.cluster.ask("scontrol", "update", f"NodeName={name}", "State=RESUME")
    assert not run.cluster.ask("squeue", "-h", "-t", "PENDING")
    run.launch(digits)
    assert_resumed(run, run.wait_for_attempts(3)[2], at_least=ended.end_step)
    assert run.finish()["restarts"] == 2
    assert_equals(run.folder, reference)


def test_where_jobs_may_not_be_requeued_another_job_goes_on(on_cluster: Maker, digits: Path, reference: Path) -> None:
    run = on_cluster(2)
    run.launch(digits)
    run.cluster.ask("scontrol", "update", f"JobId={run.job}", "Requeue=0")
    run.wait_for_step(SAVED_EVERY + 1)
    run.cluster.preempt()  # test_sites.py has what happens after a crash
    begun = run.wait_for_attempts(2)[1]
    ended = run.attempts()[0]
    assert ended.cause == "preempted"
    assert ended.next_job == begun.job != run.job
    assert_resumed(run, begun, at_least=SAVED_EVERY)
    assert run.status()["job"] == begun.job
    assert run.finish()["restarts"] == 1
    assert_equals(run.folder, reference)


def test_held_by_slurm_after_a_launch_that_failed_it_is_told_and_goes_on_when_released(
    on_cluster: Maker, digits: Path, reference: Path
) -> None:
    run = on_cluster(3)
    run.launch(digits)
    run.wait_for_checkpoint(SAVED_EVERY)
    with run.cluster.failing_launches():
        run.rank(0).kill()
        told = run.wait_for_state("held")
    assert f"`python -m slurm.release {run.folder}` lets it go on; before: rank 0" in told["why"]
    assert run.cluster.job(run.job)["Reason"] == "launch_failed_requeued_held"
    folder = SlurmFolder(run.folder)
    launched = folder.read_launch()
    folder.write_launch(replace(launched, policy=replace(launched.policy, max_restarts=0)))
    assert "stays held: 1 launches in a row failed" in run.release()
    folder.write_launch(launched)
    assert f"job {run.job} was held since a launch failed, and is released" in run.release()
    begun = run.wait_for_attempts(2)[1]
    assert begun.restart == 2
    assert "released" in run.told(str(run.folder))
    assert_resumed(run, begun, at_least=SAVED_EVERY)
    assert run.release() == ""
    run.finish()
    assert_equals(run.folder, reference)


def test_a_job_whose_batch_script_is_killed_is_lost_and_submitted_again_by_release(
    on_cluster: Maker, digits: Path, reference: Path
) -> None:
    run = on_cluster(2)
    run.launch(digits)
    run.wait_for_checkpoint(SAVED_EVERY)
    run.batch_script().kill()
    told = run.wait_for_state("lost")
    assert f"job {run.job} ended as FAILED" in told["why"]
    assert f"`python -m slurm.release {run.folder}`" in told["why"]
    folder = SlurmFolder(run.folder)
    launched = folder.read_launch()
    folder.write_launch(replace(launched, policy=replace(launched.policy, max_restarts=0)))
    assert "stays lost: submitted again 0 times in a row without a start" in run.release()
    folder.write_launch(launched)
    assert f"job {run.job} ended as FAILED without a word and is submitted again as job" in run.release()
    assert run.release() == ""
    begun = run.wait_for_attempts(2)[1]
    assert begun.job == run.attempts()[0].next_job != run.job
    assert run.attempts()[0].cause == "lost"
    assert_resumed(run, begun, at_least=SAVED_EVERY)
    run.finish()
    assert_equals(run.folder, reference)


def test_what_a_person_or_an_administrator_holds_stays_held(on_cluster: Maker, digits: Path) -> None:
    run = on_cluster(1)
    run.cluster.ask("scontrol", "update", f"NodeName={run.cluster.names[0]}", "State=DRAIN", "Reason=test")
    run.launch(digits, nodes=1)
    for how, who in (("hold", "an administrator holds it"), ("uhold", "JobHeldUser")):
        run.cluster.ask("scontrol", how, run.job)
        told = run.status()
        assert told["state"] == "held"
        assert who in told["why"]
        assert f"scontrol release {run.job}" in told["why"]
        assert run.release() == ""
        assert run.status()["state"] == "held"
        run.cluster.ask("scontrol", "release", run.job)
        assert run.status()["state"] == "waiting"
    assert "is cancelled" in run.stop()


def test_with_a_node_less_than_asked_for_it_goes_on(on_cluster: Maker, digits: Path, reference: Path) -> None:
    run = on_cluster(3)
    assert "a restart also takes 2 nodes" in run.launch(digits, "--min-nodes", "2", nodes=3)
    run.wait_for_checkpoint(SAVED_EVERY)
    assert run.status()["ranks"] == 3
    assert run.attempts()[0].nodes == run.cluster.names
    run.cluster.kill_node(run.cluster.names[2])
    begun = run.wait_for_attempts(2)[1]
    assert (begun.nodes, begun.ranks) == (run.cluster.names[:2], 2)
    assert_resumed(run, begun, at_least=SAVED_EVERY)
    assert run.finish()["ranks"] == 2
    assert_equals(run.folder, reference, same_ranks=False)


def test_a_number_of_nodes_that_does_not_divide_the_batch_is_not_used_up(on_cluster: Maker, digits: Path) -> None:
    run = on_cluster(4)
    run.cluster.ask("scontrol", "update", f"NodeName={run.cluster.names[3]}", "State=DRAIN", "Reason=test")
    # The micro-batch is frozen as it was written, and chosen on the nodes by the ranks that there are.
    changed = changes(deepspeed__train_batch_size=16)
    plan = run.launch(digits, "--min-nodes", "1", *changed, nodes=4)
    assert json.loads((run.folder / "slurm/ds_config.json").read_text())["train_micro_batch_size_per_gpu"] == "auto"
    assert "a restart also takes 1 or 2 nodes" in plan
    run.wait_for_step(1)
    (attempt,) = run.attempts()
    assert (attempt.nodes, attempt.ranks) == (run.cluster.names[:2], 2)
    said = (run.folder / f"slurm/submitit/{run.job}_0_log.out").read_text()
    assert "using 2 of 3 nodes: the ranks must divide the global batch of 16" in said
    assert "global batch 16 = 2 ranks x 8 x 1; ZeRO stage 1" in said
    run.stop()
    run.wait_for_state("stopped")
