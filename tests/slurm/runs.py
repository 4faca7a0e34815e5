"""A run on a cluster of the tests: launched and watched as a person does it, compared at its end."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import psutil
import pytest

from pretrain.metrics import read_metrics
from slurm import launch, release, status, stop
from slurm.folder import SlurmFolder
from slurm.restart import AttemptRecord
from tests.slurm.cluster import Cluster
from tests.system.launching import RECIPE, ROOT, changes, reached

T = TypeVar("T")
STEPS = 90
GLOBAL_BATCH = 24
SAVED_EVERY = 5


def settings(data: Path, steps: int = STEPS) -> list[str]:
    """``--set`` arguments of a run of quick steps whose state matters: a moving average, drop path, every step logged.

    At stage 1, so that what is saved and read again is cut among the ranks.
    """
    return changes(
        data__path=data, deepspeed__train_batch_size=GLOBAL_BATCH, deepspeed__zero_optimization__stage=1,
        schedule__epochs=(steps + 0.5) * GLOBAL_BATCH / 1437, schedule__warmup_epochs=0.5, log_every_steps=1,
        checkpoint__every_steps=SAVED_EVERY, ema__decay=0.9,
        optimizer__lr=2e-4, evaluation__every_epochs=5,
    )  # fmt: skip


class ClusterRun:
    """A launched run."""

    def __init__(self, cluster: Cluster, runs: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.cluster, self.runs, self.folder, self.job = cluster, runs, runs / "demo", ""
        self.released_every_s = float("inf")
        """Seconds between two ``slurm.release`` while something is waited for, as cron would call it."""
        self.released: list[str] = []
        """What that had to do."""
        self.variables: dict[str, str] = {}
        """What the user's environment has besides."""
        self._looked = time.monotonic()
        self._capture = capture

    def launch(self, data: Path, *more: str, code: int = 0, nodes: int = 2, steps: int = STEPS,
               inside: Sequence[str] = ()) -> str:  # fmt: skip
        """What ``slurm.launch`` printed, ``inside`` another command."""
        words = ["--nodes", str(nodes), "--gpus-per-node", "1", "--cpus-per-gpu", "4", "--retry-wait", "1",
                 "--device", "cpu", "--recipe", str(RECIPE), "--runs", str(self.runs),
                 *settings(data, steps), *more]  # fmt: skip
        text = "".join(self._call(launch.main, words, code, inside))
        for line in text.splitlines():
            if line.startswith("job  "):
                self.job = line.split()[1]
        return text

    def stop(self) -> str:
        return "".join(self._call(stop.main, [str(self.folder)]))

    def release(self) -> str:
        """For all runs, as cron does it; what it says that it did."""
        return self._call(release.main, ["--runs", str(self.runs)])[0]

    def status(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self._call(status.main, [str(self.folder), "--json"])[0])
        return content

    def told(self, *more: str) -> str:
        return self._call(status.main, ["--runs", str(self.runs), *more])[0]

    def _call(self, command: Any, words: list[str], code: int = 0, inside: Sequence[str] = ()) -> tuple[str, str]:
        if self.cluster.site:
            words = [*inside, self.cluster.python, "-m", command.__module__, *words]
            done = self.cluster.as_user(*words, **self.variables)
            assert done.returncode == code, done.stdout + done.stderr
            return done.stdout, done.stderr
        self._capture.readouterr()
        with mock.patch.dict(os.environ, self.cluster.environment), contextlib.chdir(ROOT):
            ended = command(words)
        out, err = self._capture.readouterr()
        assert ended == code, out + err
        return out, err

    def wait_for(self, condition: Callable[[], T | None], what: str) -> T:
        """Poll until ``condition`` holds; what it then says."""

        def looked() -> T | None:
            if time.monotonic() > self._looked + self.released_every_s:
                self.released += self.release().splitlines()
                self._looked = time.monotonic()
            return condition()

        return self.cluster.wait_for(looked, what, self.output)

    def step(self) -> int:
        return reached(self.folder)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: self.step() >= step, f"step {step}")

    def wait_for_checkpoint(self, step: int) -> None:
        """Wait until one of this step or later is on disk, which is some steps after it was due."""
        saved = SlurmFolder(self.folder).saved_step
        self.wait_for(lambda: saved() >= step, f"a checkpoint of step {step}")

    def wait_for_state(self, *states: str) -> dict[str, Any]:
        return self.wait_for(lambda: now if (now := self.status())["state"] in states else None, f"{states}")

    def attempts(self) -> list[AttemptRecord]:
        return SlurmFolder(self.folder).attempts()

    def wait_for_attempts(self, number: int) -> list[AttemptRecord]:
        self.wait_for(lambda: len(self.attempts()) >= number, f"{number} attempts")
        return self.attempts()

    def wait_for_end(self, attempt: int) -> AttemptRecord:
        one = slice(attempt, attempt + 1)
        (ended,) = self.wait_for(lambda: [a for a in self.attempts()[one] if a.ended], f"end of attempt {attempt}")
        return ended

    def batch_script(self) -> psutil.Process:
        return next(self._processes("slurm_script"))

    def rank(self, rank: int) -> psutil.Process:
        """The process of ``main.py`` of a rank that runs now."""
        for process in self.ranks():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("RANK") == str(rank):
                    return process
        raise AssertionError(f"rank {rank} does not run\n{self.output()}")

    def ranks(self) -> Iterator[psutil.Process]:
        return self._processes("/main.py")

    def _processes(self, ending: str) -> Iterator[psutil.Process]:
        for name in self.cluster.names:
            for process in self.cluster.processes_on(name):
                with contextlib.suppress(psutil.Error):
                    if any(word.endswith(ending) for word in process.cmdline()):
                        yield process

    def finish(self) -> dict[str, Any]:
        """Wait until the run is finished and its batch script has said so; what ``slurm.status`` says."""
        self.wait_for_state("finished")
        self.wait_for_end(len(self.attempts()) - 1)
        return self.status()

    def output(self) -> str:
        files = [*sorted(self.folder.glob("slurm/submitit/*.out")), *sorted(self.folder.glob("logs/*/*.log"))]
        parts = [f"--- {file}\n{file.read_text(errors='replace')[-1500:]}" for file in files]
        history = self.folder / "slurm/history.jsonl"
        return "\n".join([*parts, history.read_text() if history.exists() else "no history", str(self.status())])


def assert_equals(run: Path, reference: Path, *, same_ranks: bool = True, steps: int = STEPS) -> None:
    """No step is missing or stands twice, and losses and weights are those of the run that nobody touched."""
    rows, expected = (read_metrics(folder / "metrics.jsonl", "train") for folder in (run, reference))
    assert [row["step"] for row in rows] == list(range(1, steps + 1)), "a step is missing or stands twice"
    assert [row["samples_seen"] for row in rows] == [row["samples_seen"] for row in expected]
    losses, untouched = ([row["loss"] for row in found] for found in (rows, expected))
    weights, unchanged = (folder / "handoff/model.safetensors" for folder in (run, reference))
    if same_ranks:
        assert losses == untouched, "the losses are not bit-identical"
        assert weights.read_bytes() == unchanged.read_bytes(), "the averaged weights are not bit-identical"
    else:  # another number of ranks adds the same gradients in another order
        assert losses == pytest.approx(untouched, abs=1e-4)
    states = json.loads((run / "run.json").read_text())
    assert (states["state"], states["step"]) == ("finished", steps)


def assert_resumed(run: ClusterRun, attempt: AttemptRecord, at_least: int, at_most: int | None = None) -> None:
    """An attempt began at the step between these, and says that it goes on there."""
    log = run.folder / "logs" / str(attempt.attempt) / "rank-00000.log"
    said = f"resuming {run.folder} at step {attempt.step} of {STEPS}, {attempt.step * GLOBAL_BATCH:,} images seen"
    run.wait_for(lambda: log.exists() and said in log.read_text(), said)
    assert at_least <= attempt.step <= (STEPS if at_most is None else at_most)
