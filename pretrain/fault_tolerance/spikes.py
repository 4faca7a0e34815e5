"""Losses far above the running level: which step, how far, which images."""

import json
import math
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from numpy.typing import NDArray

WINDOW = 100
"""Steps that make the running level."""
NEEDED = 20
"""Steps that must be known before anything is called a spike."""
DEVIATIONS = 8.0
"""How far above the level a spike is, in robust standard deviations of single losses."""
SMALLEST_DEVIATION = 0.02
"""Of the level: a curve without noise is not called one of spikes."""


@dataclass(frozen=True)
class Spike:
    """A step whose loss was far above the level of those before it."""

    step: int
    loss: float
    level: float
    """Median of the losses before it."""
    limit: float
    """Above this it is a spike."""
    first_position: int
    """Where its global batch begins in the order of training."""
    last_position: int


class LossLevel:
    """The running level of the loss: median and scaled median absolute deviation of the last ``WINDOW`` steps.

    Both ignore up to half of the values, so a spike does not raise the limit for the next one; a level that stays high
    becomes the level. It starts over after a restart.
    """

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=WINDOW)

    def spikes(self, losses: list[float], *, step: int, samples_seen: int, global_batch: int) -> list[Spike]:
        """Take in the losses of the last steps, oldest first, of which the last is ``step``; give the spikes.

        Args:
            losses: means over the global batch; non-finite ones are passed over (reported as skipped).
            step: number of the last step.
            samples_seen: images trained on after it.
            global_batch: images of a step.
        """
        found = []
        for before, loss in zip(range(len(losses) - 1, -1, -1), losses, strict=True):
            if not math.isfinite(loss):
                continue
            if len(self._recent) >= NEEDED:
                level = statistics.median(self._recent)
                deviation = 1.4826 * statistics.median(abs(value - level) for value in self._recent)
                limit = level + DEVIATIONS * max(deviation, SMALLEST_DEVIATION * abs(level))
                if loss > limit:
                    end = samples_seen - before * global_batch
                    found.append(Spike(step - before, loss, level, limit, end - global_batch, end - 1))
            self._recent.append(loss)
        return found


def write_spikes(
    file: Path, spikes: list[Spike], samples: Callable[[int, int], tuple[NDArray, NDArray]], say: Callable[[str], None]
) -> None:
    """Add a line to ``loss_spikes.jsonl`` for each, with the images of its batch, and print a line.

    Args:
        file: where to.
        spikes: what was found.
        samples: gives (epochs, sample ids) of the positions from its first argument up to its second, as `Order` does.
        say: prints a line.
    """
    for spike in spikes:
        epochs, ids = samples(spike.first_position, spike.last_position + 1)
        line = asdict(spike) | {"epochs": sorted(set(epochs.tolist())), "sample_ids": ids.tolist()}
        try:
            with file.open("a") as handle:
                handle.write(json.dumps(line) + "\n")
            where = f"its images are listed in {file}"
        except OSError as error:
            where = f"its images could not be listed: {error}"
        say(
            f"WARNING step {spike.step}: loss {spike.loss:.4g} is far above the level of {spike.level:.4g} "
            f"(limit {spike.limit:.4g}); {where}"
        )
