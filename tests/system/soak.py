"""Kills a run at random moments until it is done: ``python -m tests.system.soak --rounds 100 --folder /tmp/soak``.

Each round starts the same run with a random number of ranks and a random ZeRO stage, and kills a rank, the launcher, or
everything, at a random moment: while it starts, trains, evaluates or saves. Then the run is left alone to its end and
compared with one that nobody touched.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from pretrain.checkpoints.checkpoint import list_checkpoints, verify
from pretrain.metrics import read_metrics
from pretrain.outcome import ExitCode
from tests.system.launching import PATIENCE_S, Launched, changes, launched, reached

INTERVAL = 4
"""Steps between checkpoints. A kill costs at most twice as many: when one is due, the one before may not be on disk."""
STEPS_A_ROUND = 5


@dataclass
class Soak:
    """What happened."""

    rounds: list[str] = field(default_factory=list)
    lost_steps: int = 0
    """Most steps that one kill cost."""
    weight_difference: float = 0.0
    """Largest difference of a weight from the untouched run's."""


def soak(folder: Path, data: Path, *, rounds: int, seed: int) -> Soak:
    """Do so many rounds; asserts what must hold after each.

    Args:
        folder: empty; both runs and the logs are written here.
        data: the digits.
        rounds: kills.
        seed: decides when and whom.
    """
    chance, result = random.Random(seed), Soak()
    epochs = (STEPS_A_ROUND * rounds + 2) * 64 / 1437
    whole_run_s = PATIENCE_S + 4 * STEPS_A_ROUND * rounds
    fields = changes(data__path=data, schedule__epochs=epochs, schedule__warmup_epochs=epochs / 4, log_every_steps=1,
                     checkpoint__every_steps=INTERVAL, checkpoint__keep=3, ema__decay=0.9, optimizer__lr=2e-4,
                     evaluation__every_epochs=epochs / (rounds + 1))  # fmt: skip
    with launched(folder / "untouched", *fields) as run:
        assert run.end(whole_run_s) == ExitCode.FINISHED, run.output()
    run_folder = folder / "killed" / "demo"
    for number in range(rounds):
        ranks, stage = chance.choice([1, 2, 4]), chance.choice([0, 1, 2, 3])
        victim = chance.choice(["a rank", "the launcher", "everything"])
        before, saved = reached(run_folder), saved_step(run_folder)
        with launched(folder / "killed", *fields, *at_stage(stage), ranks=ranks, anew=True) as run:
            aim = before + chance.randint(0, STEPS_A_ROUND + 2)
            wait_for_step(run, run_folder, aim)
            time.sleep(chance.random())
            ended = run.process.poll()
            assert ended in (None, ExitCode.FINISHED), f"ended by itself with {ended}:\n{run.output()}"
            kill(run, victim, chance)
            run.end()
            run.assert_no_rank_stays()
            assert resumed_at(run.output()) in (None, saved), run.output()
        result.lost_steps = max(result.lost_steps, reached(run_folder) - saved_step(run_folder))
        result.rounds.append(f"{number}: {ranks} ranks, stage {stage}, killed {victim} at step {reached(run_folder)}")
        print(result.rounds[-1], flush=True)
        for checkpoint in list_checkpoints(run_folder / "checkpoints"):
            verify(checkpoint)
    saved = saved_step(run_folder)
    with launched(folder / "killed", *fields) as run:
        assert run.end(whole_run_s) == ExitCode.FINISHED, run.output()
        run.assert_no_rank_stays()
        assert resumed_at(run.output()) == (saved or None) or "is finished" in run.output(), run.output()
    assert result.lost_steps <= 2 * INTERVAL, f"a kill cost {result.lost_steps} steps"
    steps = [row["step"] for row in read_metrics(run_folder / "metrics.jsonl", "train")]
    assert steps == list(range(1, len(steps) + 1)), "a step is missing or stands twice"
    assert not [path for path in run_folder.rglob("*") if "unfinished" in path.name or path.suffix == ".part"], (
        "a temporary file stayed"
    )
    ours, theirs = (load_file(f / "handoff/model.safetensors") for f in (run_folder, folder / "untouched" / "demo"))
    result.weight_difference = max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)
    assert json.loads((run_folder / "run.json").read_text())["state"] == "finished"
    return result


def at_stage(stage: int) -> list[str]:
    return ["--set", f"deepspeed.zero_optimization.stage={stage}"]


def saved_step(run: Path) -> int:
    """The step of the newest checkpoint; 0 when there is none."""
    newest = next(iter(list_checkpoints(run / "checkpoints")), None)
    return int(newest.name.removeprefix("step-")) if newest else 0


def resumed_at(output: str) -> int | None:
    """The step that a start says it resumes at; None where it began anew, or was killed before it could say so."""
    _, told, rest = output.partition("resuming ")
    return int(rest.split("at step ")[1].split()[0]) if told else None


def wait_for_step(run: Launched, folder: Path, step: int) -> None:
    deadline = time.monotonic() + 180
    while reached(folder) < step and run.process.poll() is None and time.monotonic() < deadline:
        run.ranks()
        time.sleep(0.05)


def kill(run: Launched, victim: str, chance: random.Random) -> None:
    ranks = run.ranks()
    if victim == "everything":
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.process.pid, signal.SIGKILL)
    elif victim == "the launcher" or not ranks:
        run.process.kill()
    else:
        chance.choice(ranks).kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("data/digits"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = soak(options.folder, options.data.resolve(), rounds=options.rounds, seed=options.seed)
    print(
        f"{options.rounds} kills; the costliest lost {result.lost_steps} steps; largest difference of a weight from "
        f"the untouched run {result.weight_difference:.2e}"
    )


if __name__ == "__main__":
    main()
