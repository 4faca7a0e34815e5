"""Random events over one run, where cron calls slurm.release: it finishes, and its numbers are those of a run
that nobody touched."""

import contextlib
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.slurm.cluster import cluster
from tests.slurm.conftest import run_alone
from tests.slurm.runs import ClusterRun, assert_equals

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1800)]
WHILE_SAVING = "kill a rank while it saves"
EVENTS = (
    ["restart slurmctld"] * 3 + [WHILE_SAVING] * 4 + ["kill a rank"] * 5 + ["kill a node"] * 4 + ["preempt"] * 4
)  # fmt: skip
"""What strikes together does so in this order: what kills most comes last, so that nothing strikes into the void."""
LONG = 160
"""Steps: so many that the run is not over before the storm."""


def test_a_storm_of_twenty_events_changes_nothing(
    on_cluster: Callable[[int], ClusterRun], digits: Path, tmp_path: Path
) -> None:
    untouched = run_alone(tmp_path / "untouched", digits, steps=LONG)
    survives(on_cluster(3), EVENTS, 6, digits, untouched=untouched, steps=LONG)


@pytest.mark.evening
@pytest.mark.timeout(4 * 3600)
def test_a_storm_of_forty_events_on_a_cluster_like_a_sites_changes_nothing(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    untouched = run_alone(tmp_path / "untouched", digits, steps=8 * LONG)
    with cluster(3, site=True) as made:
        data = shutil.copytree(digits, made.home / "digits")
        survives(ClusterRun(made, made.home / "runs", capsys), 2 * EVENTS, 7, data, untouched=untouched, steps=8 * LONG)


def survives(run: ClusterRun, kinds: list[str], seed: int, data: Path, *, untouched: Path, steps: int) -> None:
    """Launch a run, let events of these kinds strike in random order, and compare it with the untouched one."""
    chance = random.Random(seed)
    events = chance.sample(kinds, len(kinds))
    run.released_every_s = 5.0  # a slurmctld that is killed may lose a job, see docs/cluster.md; nothing else may
    run.launch(data, "--max-restarts", "50", "--retry-wait", "0", steps=steps)
    begun = killing = 0
    while events:
        together = [events.pop() for _ in range(min(chance.randint(1, 2), len(events)))]
        # A slurmctld that dies before it has saved that it started a job forgets that, and then holds the job.
        settled = "restart slurmctld" in together
        run.wait_for_attempts(begun + 1)  # who was struck before may take a while to die
        wait_for_a_moment(run, chance, saving=WHILE_SAVING in together, settled=settled)
        assert run.status()["state"] != "finished", f"over before {together}"
        if {*together} != {"restart slurmctld"}:
            begun, killing = len(run.attempts()), killing + 1
        for event in sorted(together, key=EVENTS.index):
            strike(run, event, chance)
    told = run.finish()
    assert told["step"] == steps
    ends = [attempt.cause for attempt in run.attempts()]
    assert ends[-1] == "finished"
    assert len(ends) > killing, ends
    assert None not in ends
    assert {"preempted", "crashed", "lost"} <= {*ends}
    assert len(run.released) <= kinds.count("restart slurmctld"), run.released
    assert_equals(run.folder, untouched, steps=steps)
    assert not list((run.folder / "checkpoints").glob(".*")), "something half-written was left"


def wait_for_a_moment(run: ClusterRun, chance: random.Random, *, saving: bool, settled: bool) -> None:
    """While a checkpoint is written, or while the ranks start (unless ``settled``), or some steps after that.

    ``settled``: once slurmctld has saved its state after the attempt began, which it does every few seconds.
    """
    began, starting, aim = time.time(), chance.random() < 0.4 and not settled, chance.randint(1, 4)
    came_to: list[int] = []

    def reached() -> bool:
        if settled and not is_newer(run.cluster.folder / "state/job_state", run.attempts()[-1].begun):
            return False
        if saving:
            return any(run.ranks()) and any(is_newer(path, began) for path in (run.folder / "checkpoints").glob(".*"))
        if starting:
            return any(run.ranks())
        if not came_to and run.status()["state"] == "running":
            came_to.append(run.step())
        return bool(came_to) and run.step() >= came_to[0] + aim

    run.wait_for(reached, "a moment to strike")


def is_newer(path: Path, than: float) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime > than
    return False


def strike(run: ClusterRun, event: str, chance: random.Random) -> None:
    if event == "preempt":
        run.cluster.preempt()
    elif event == "restart slurmctld":
        run.cluster.kill_controller()
        run.cluster.start_controller()
    elif event == "kill a node":
        name = chance.choice(run.attempts()[-1].nodes)
        run.cluster.kill_node(name)
        run.cluster.start_node(name)
    else:
        drawn = chance.random()  # once, so that what is drawn later does not depend on how many ranks still live
        run.wait_for(lambda: killed_a_rank(run, drawn), "a rank to kill")


def killed_a_rank(run: ClusterRun, drawn: float) -> bool:
    ranks = list(run.ranks())
    with contextlib.suppress(psutil.NoSuchProcess):
        if ranks:
            ranks[int(drawn * len(ranks))].kill()
            return True
    return False
