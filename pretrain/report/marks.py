"""What happened to a run, from all the files that tell of it, as marks on its time line."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.files import json_lines
from pretrain.report.curves import Metrics, as_finite
from pretrain.run_state import RunState

KINDS = (
    "restart", "stopped or preempted", "failed or killed", "hang", "went back", "checkpoint failed", "steps skipped",
    "loss spike", "bad sample",
)  # fmt: skip
"""Rows of the time line, from the top."""
INTERRUPTIONS = ("restart", "went back")
"""Kinds that are also drawn through every curve."""
_TOLD_TO_STOP = ("preempted", "time limit", "stopped", "cancelled")
"""Causes, as ``slurm/restart.py`` has them, that are no failure of the run."""
_MOST = 200_000
"""Lines of one file that are read; a run with more has said enough."""


@dataclass(frozen=True)
class Mark:
    """Something that happened."""

    kind: str
    text: str
    samples: float | None = None
    """Samples seen when it happened; None where nothing says so."""
    time: float | None = None
    """Unix time; None where nothing says so."""
    step: int | None = None


@dataclass
class Log:
    """The marks of a run, and what could not be read."""

    marks: list[Mark] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    began: float | None = None
    """Unix time of the first start."""


def read_marks(run: Path, metrics: Metrics, state: RunState | None) -> Log:
    """All that happened to a run, in the order of time where it is known, else of samples seen."""
    log = Log()
    events = _rows(run / "events.jsonl", log.notes)
    log.marks += [*_starts_and_ends(events, _rows(run / "slurm/history.jsonl", log.notes), state)]
    log.began = min((row["time"] for row in events if as_finite(row.get("time")) is not None), default=None)
    for row in events:
        if row.get("event") == "went back":
            log.marks.append(_mark("went back", row))
        elif str(row.get("event")).startswith("checkpoint"):
            log.marks.append(_mark("checkpoint failed", row))
    log.marks += _skipped(metrics)
    log.marks += _spikes(_rows(run / "loss_spikes.jsonl", log.notes))
    for row in _rows(run / "bad_samples.jsonl", log.notes):
        text = f"{row.get('name')} of {row.get('shard')}: {row.get('reason')}"
        log.marks.append(Mark("bad sample", text, time=as_finite(row.get("time"))))
    log.marks += _hangs(run / "hangs")
    clock = _Clock(metrics, events)
    log.marks = sorted(map(clock.place, log.marks), key=lambda mark: (mark.time or 0, mark.samples or 0))
    return log


def _rows(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Lines of a file; what is damaged, or too much, is noted."""
    rows: list[dict[str, Any]] = []
    damaged = 0
    try:
        for row in json_lines(path):
            if row is None:
                damaged += 1
            elif len(rows) == _MOST:
                notes.append(f"{path.name}: only the first {_MOST:,} lines are taken in")
                break
            else:
                row.pop("sample_ids", None)  # of a spike: thousands
                rows.append(row)
    except FileNotFoundError:
        return []
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error}")
    if damaged:
        notes.append(f"{path.name}: {damaged:,} damaged lines are left out")
    return rows


def _mark(kind: str, row: dict[str, Any], text: str | None = None) -> Mark:
    step = as_finite(row.get("step"))
    return Mark(
        kind,
        str(row.get("text", "")) if text is None else text,
        samples=as_finite(row.get("samples_seen")),
        time=as_finite(row.get("time")),
        step=None if step is None else int(step),
    )


def _starts_and_ends(
    events: list[dict[str, Any]], history: list[dict[str, Any]], state: RunState | None
) -> Iterator[Mark]:
    """Starts after the first one, and what ended the one before: as Slurm's batch script knows it, or ``run.json``."""
    starts = [row for row in events if row.get("event") == "start" and as_finite(row.get("time")) is not None]
    ends = [
        row
        for row in history
        if row.get("event") == "end" and as_finite(row.get("time")) is not None and row.get("cause") != "finished"
    ]
    told: list[int] = []
    for number, row in enumerate(starts[1:], start=1):
        after = row["after"] if isinstance(row.get("after"), dict) else {}
        mine = [end for end in ends if starts[number - 1]["time"] <= end["time"] <= row["time"]]
        told += map(id, mine)
        for end in mine:
            yield _ended_by_slurm(end, after.get("samples_seen") if end is mine[-1] else None)
        why = f"{mine[-1].get('cause')}: {mine[-1].get('reason')}" if mine else _reason(after)
        if not mine and after:
            yield _mark("stopped or preempted" if after.get("state") == "preempted" else "failed or killed", after, why)
        yield _mark("restart", row, f"restart {number} at step {row.get('step')}, {row.get('text')}; before: {why}")
    left = [end for end in ends if id(end) not in told]
    yield from (_ended_by_slurm(end, None) for end in left)
    newest = max((row["time"] for row in starts), default=0.0)
    if state and state.state in ("preempted", "failed") and not any(end["time"] >= newest for end in left):
        kind = "stopped or preempted" if state.state == "preempted" else "failed or killed"
        yield Mark(kind, state.reason or state.state, state.samples_seen, state.updated or None, state.step)


def _ended_by_slurm(end: dict[str, Any], samples: Any) -> Mark:
    cause = str(end.get("cause"))
    kind = "stopped or preempted" if cause in _TOLD_TO_STOP else "failed or killed"
    text = f"{cause}: {end.get('reason')} (job {end.get('job')}-{end.get('restart')})"
    return Mark(kind, text, samples=as_finite(samples), time=as_finite(end["time"]))


def _reason(after: dict[str, Any]) -> str:
    """Why the start before ended, from what it left in ``run.json``."""
    if after.get("state") == "running":
        return "it ended without a word: killed, or its node died"
    return str(after.get("reason") or after.get("state") or "unknown")


def _skipped(metrics: Metrics) -> list[Mark]:
    """Where the count of skipped steps rises; it is written once per interval."""
    curve = metrics.curves.get(("train", "skipped_steps"))
    if curve is None:
        return []
    rises = np.diff(curve.values, prepend=0.0)
    return [
        Mark(
            "steps skipped",
            f"{rises[row]:.0f} skipped in the interval that ends here: a gradient was not finite",
            samples=float(curve.samples[row]),
            time=as_finite(float(curve.time[row])),
        )
        for row in np.flatnonzero(rises > 0).tolist()
    ]


def _spikes(rows: list[dict[str, Any]]) -> list[Mark]:
    found: dict[Any, Mark] = {}  # a step that was computed again after a restart is told of once
    for row in rows:
        step, last = as_finite(row.get("step")), as_finite(row.get("last_position"))
        loss, level = as_finite(row.get("loss")), as_finite(row.get("level"))
        text = f"loss {loss:.4g} above a level of {level:.4g}" if loss is not None and level is not None else "loss"
        found[step] = _mark("loss spike", {"step": step, "samples_seen": None if last is None else last + 1}, text)
    return list(found.values())


def _hangs(folder: Path) -> list[Mark]:
    """The hangs by their files of stacks, ``20250131T120000Z-rank-00003.txt``, whose first line is the reason."""
    found = []
    for file in sorted(folder.glob("*-rank-*.txt"))[:_MOST]:
        try:
            stamp = datetime.strptime(file.name.split("-")[0], "%Y%m%dT%H%M%SZ")
            time: float | None = stamp.replace(tzinfo=UTC).timestamp()
        except ValueError:
            time = None
        try:
            with file.open(errors="replace") as handle:
                text = handle.readline(500).strip()
        except OSError as error:
            text = f"its stacks cannot be read: {error}"
        found.append(Mark("hang", f"{text or 'no reason written'}; stacks in hangs/{file.name}", time=time))
    return found


class _Clock:
    """What was seen when, from the lines of training and the starts."""

    def __init__(self, metrics: Metrics, events: list[dict[str, Any]]) -> None:
        starts = [
            (time, samples)
            for row in events
            if (time := as_finite(row.get("time"))) is not None
            and (samples := as_finite(row.get("samples_seen"))) is not None
        ]
        known = np.array(starts, np.float64).reshape(-1, 2)
        times = np.concatenate([metrics.times, known[:, 0]])
        order = np.argsort(times, kind="stable")
        self._metrics = metrics
        self._times = times[order]
        self._samples = np.concatenate([metrics.samples, known[:, 1]])[order]

    def place(self, mark: Mark) -> Mark:
        """The mark, with what is missing of samples and time filled in."""
        samples, time = mark.samples, mark.time
        if samples is None and time is not None and len(self._times):
            samples = float(np.interp(time, self._times, self._samples))
        if time is None and samples is not None and len(self._metrics.samples):
            time = float(np.interp(samples, self._metrics.samples, self._metrics.times))
        return Mark(mark.kind, mark.text, samples, time, mark.step)
