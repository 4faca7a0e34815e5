"""Losses far above the running level: which step, how far, which images."""

import json
import math
import shlex
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

WINDOW = 100
"""Steps that make the running level."""
NEEDED = 20
"""Steps that must be known before anything is called a spike."""
DEVIATIONS = 8.0
"""How far above the level a spike is, in robust standard deviations of single losses."""
SMALLEST_DEVIATION = 0.02
"""Of the level: a curve without noise is not called one of spikes."""
TAIL = 0.97
"""A spike is twice as far above the level as this quantile: what happens every few steps, such as one wrong image in
the small batches of a network that has learned all others, is no spike."""


@dataclass(frozen=True)
class Spike:
    """A step whose loss was far above the ``level`` of those before it, their median, and above a ``limit``.

    Positions are those of its global batch in the order of training.
    """

    step: int
    loss: float
    level: float
    limit: float
    first_position: int
    last_position: int


class LossLevel:
    """The running level of the loss: median, scaled median absolute deviation and tail of the last ``WINDOW`` steps.

    All ignore a few high values, so a spike does not raise the limit for the next one; a level that stays high becomes
    the level. It starts over after a restart.
    """

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=WINDOW)

    def spikes(self, rows: list[dict[str, Any]], global_batch: int) -> list[Spike]:
        """Take in the ledger's rows of the last steps, oldest first; give the spikes.

        Non-finite losses are passed over (reported as skipped).
        """
        found = []
        for row in rows:
            if not math.isfinite(loss := row["loss"]):
                continue
            if len(self._recent) >= NEEDED:
                level = statistics.median(self._recent)
                deviation = 1.4826 * statistics.median(abs(value - level) for value in self._recent)
                tail = sorted(self._recent)[int(TAIL * (len(self._recent) - 1))]
                limit = level + max(DEVIATIONS * max(deviation, SMALLEST_DEVIATION * abs(level)), 2 * (tail - level))
                if loss > limit:
                    end = row["samples_seen"]
                    found.append(Spike(row["step"], loss, level, limit, end - global_batch, end - 1))
            self._recent.append(loss)
        return found


def replay_command(run: Path, step: int) -> str:
    """The command that computes a step of a run again and draws its images."""
    words = ["python", "-m", "pretrain.replay", str(run), "--steps", f"{step - 1}:{step}"]
    return shlex.join([*words, "--images", f"{run.name}-step-{step}"])


def write_spikes(
    file: Path, spikes: list[Spike], samples: Callable[[int, int], tuple[NDArray, NDArray]], say: Callable[[str], None]
) -> None:
    """Add a line to ``loss_spikes.jsonl`` for each, with the images of its batch, and print a line.

    ``samples`` gives (epochs, sample ids) of the positions from its first argument up to its second, as `Order` does.
    """
    for spike in spikes:
        epochs, ids = samples(spike.first_position, spike.last_position + 1)
        replay = replay_command(file.parent, spike.step)
        line = asdict(spike) | {"epochs": sorted(set(epochs.tolist())), "sample_ids": ids.tolist(), "replay": replay}
        try:
            with file.open("a") as handle:
                handle.write(json.dumps(line) + "\n")
            where = f"its images are listed in {file}; {replay}"
        except OSError as error:
            where = f"its images could not be listed: {error}"
        say(
            f"WARNING step {spike.step}: loss {spike.loss:.4g} is far above the level of {spike.level:.4g} "
            f"(limit {spike.limit:.4g}); {where}"
        )
