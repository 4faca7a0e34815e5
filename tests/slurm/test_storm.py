"""Twenty random events over one run: it finishes, and its numbers are those of a run that nobody touched."""

import contextlib
import random
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.slurm.conftest import run_locally
from tests.slurm.runs import ClusterRun, assert_equals

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1800)]
EVENTS = (["preempt"] * 4 + ["kill a node"] * 4 + ["kill a rank"] * 5 + ["kill a rank while it saves"] * 4
          + ["restart slurmctld"] * 3)  # fmt: skip
LONG = 240
"""Steps: so many that the run is not over before the storm."""


def test_a_storm_of_twenty_events_changes_nothing(
    on_cluster: Callable[[int], ClusterRun], digits: Path, tmp_path: Path
) -> None:
    chance = random.Random(6)
    events = chance.sample(EVENTS, len(EVENTS))
    untouched = run_locally(tmp_path / "untouched", digits, steps=LONG)
    run = on_cluster(3)
    run.launch(digits, "--max-restarts", "50", "--retry-wait", "0", steps=LONG)
    for event in events:
        wait_for_a_moment(run, chance, event)
        assert run.status()["state"] != "finished", f"over before {event}"
        strike(run, event, chance)
    told = run.finish()
    assert told["step"] == LONG
    ends = [chapter.cause for chapter in run.chapters()]
    assert ends[-1] == "finished"
    assert len(ends) >= 10, ends
    assert None not in ends
    assert {"preempted", "crashed", "lost"} <= {*ends}
    assert_equals(run.folder, untouched, steps=LONG)
    assert not list((run.folder / "checkpoints").glob(".*")), "something half-written was left"


def wait_for_a_moment(run: ClusterRun, chance: random.Random, event: str) -> None:
    """Either while the ranks start, or some steps after they have resumed."""
    drafts, starting = run.folder / "checkpoints", chance.random() < 0.4
    aim = chance.randint(1, 4)
    came_to: list[int] = []

    def reached() -> bool:
        if event == "kill a rank while it saves":
            return any(drafts.glob(".*")) and any(run.ranks())
        if starting:
            return any(run.ranks())
        if not came_to and run.status()["state"] == "running":
            came_to.append(run.step())
        return bool(came_to) and run.step() >= came_to[0] + aim

    run.cluster.wait_for(reached, f"a moment to {event}", run.output)


def strike(run: ClusterRun, event: str, chance: random.Random) -> None:
    if event == "preempt":
        run.cluster.preempt()
    elif event == "restart slurmctld":
        run.cluster.kill_controller()
        run.cluster.start_controller()
    elif event == "kill a node":
        name = chance.choice(run.cluster.names)
        run.cluster.kill_node(name)
        run.cluster.start_node(name)
    else:
        with contextlib.suppress(psutil.NoSuchProcess):
            ranks = list(run.ranks())
            if ranks:
                chance.choice(ranks).kill()
