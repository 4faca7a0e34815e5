"""What failures cost a run, and how far apart checkpoints should be: in closed form, and by simulation.

Failures come as a Poisson process (exponential times between them), each takes the run back to its newest complete
checkpoint and costs a restart. Young (1974) and Daly (2006), "A higher order estimate of the optimum checkpoint
interval for restart dumps".
"""

import math
from dataclasses import dataclass

import numpy as np

RUNS = 2000
"""Runs that are simulated."""


@dataclass(frozen=True)
class Conditions:
    """Seconds, all of them."""

    work: float
    """Training alone, without failures and checkpoints."""
    save: float
    """What one checkpoint takes from training: the loop's wait and how much slower the steps beside it are."""
    restart: float
    """From a failure to the first step behind the checkpoint: noticing, queueing, starting, loading."""
    mtbf: float
    """Mean time between failures of the whole job; infinite where nothing fails."""

    def __post_init__(self) -> None:
        """Check the signs."""
        if self.work < 0 or self.save < 0 or self.restart < 0 or not self.mtbf > 0:
            raise ValueError(f"times must not be negative, and the time between failures positive: {self}")


@dataclass(frozen=True)
class Finish:
    """When a run is done, in seconds after its start, over simulated runs."""

    mean: float
    low: float
    """One of ten is done earlier."""
    high: float
    """One of ten is done later."""
    failures: float
    """Mean number."""


def job_mtbf(gpus: int, mtbf_per_gpu: float) -> float:
    """Mean time between failures of a job that any of its GPUs' failures stops."""
    return mtbf_per_gpu / gpus


def best_interval(save: float, mtbf: float) -> float:
    """Seconds of work between checkpoints by Daly's estimate; infinite where nothing fails or saving is free.

    ``sqrt(2 d M) [1 + 1/3 sqrt(d / 2M) + d / 18M] - d`` for a checkpoint of d seconds below 2 M, M the mean time
    between failures; M otherwise (Daly 2006, equation 37). The first factor alone is Young's.
    """
    if math.isinf(mtbf) or save == 0:
        return math.inf if math.isinf(mtbf) else 0.0
    if save >= 2 * mtbf:
        return mtbf
    ratio = save / (2 * mtbf)
    return math.sqrt(2 * save * mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save


def expected_finish(conditions: Conditions, interval: float) -> float:
    """Mean seconds until a run is done that saves after every ``interval`` seconds of work.

    ``M e^(R/M) (e^((t + d)/M) - 1)`` for each stretch of work t with its checkpoint d (Daly 2006, equation 20), the
    rest of the work at the end likewise. R counts as a time in which the job may fail again.

    Raises:
        ValueError: an interval that is not positive.
        OverflowError: the run would practically never end.
    """
    if not interval > 0:
        raise ValueError(f"the interval between checkpoints must be positive, got {interval}")
    stretches, rest = divmod(conditions.work, interval) if math.isfinite(interval) else (0.0, conditions.work)
    if math.isinf(conditions.mtbf):
        return conditions.work + conditions.save * (stretches + (rest > 0))
    scale = conditions.mtbf * math.exp(conditions.restart / conditions.mtbf)
    whole = scale * math.expm1((interval + conditions.save) / conditions.mtbf) if stretches else 0.0
    last = scale * math.expm1((rest + conditions.save) / conditions.mtbf) if rest > 0 else 0.0
    return stretches * whole + last


def simulate(conditions: Conditions, interval: float, *, seed: int = 0, runs: int = RUNS) -> Finish:
    """Play runs through, failure by failure.

    Independent of the closed form: a run is a walk over its checkpoints, and between two failures as many stretches are
    completed as fit into an exponentially distributed time.

    Raises:
        ValueError: an interval that is not positive.
    """
    if not interval > 0:
        raise ValueError(f"the interval between checkpoints must be positive, got {interval}")
    if math.isinf(conditions.mtbf):
        done = expected_finish(conditions, interval)
        return Finish(done, done, done, 0.0)
    generator = np.random.default_rng(seed)
    interval = min(interval, max(conditions.work, 1e-9))
    full = math.floor(conditions.work / interval + 1e-9)
    rest = max(conditions.work - full * interval, 0.0)
    rest = rest if rest > 1e-9 * interval else 0.0
    last = rest + conditions.save if rest else 0.0
    step = interval + conditions.save
    clock, left, failures = np.zeros(runs), np.full(runs, full), np.zeros(runs)
    ahead = np.full(runs, bool(full or rest))
    starting = np.zeros(runs, bool)
    while ahead.any():
        alive = generator.exponential(conditions.mtbf, runs)
        able = np.where(starting, alive - conditions.restart, alive)
        needs = np.where(starting, conditions.restart, 0.0) + left * step + last
        finished = ahead & (alive >= needs)
        failed = ahead & ~finished
        clock += np.where(finished, needs, 0.0) + np.where(failed, alive, 0.0)
        left -= np.where(failed, np.minimum(left, np.floor(np.maximum(able, 0.0) / step)), 0).astype(left.dtype)
        failures += failed
        starting |= failed
        ahead = failed
    low, high = np.quantile(clock, [0.1, 0.9])
    return Finish(float(clock.mean()), float(low), float(high), float(failures.mean()))
