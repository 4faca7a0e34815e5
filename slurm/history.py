"""``history.jsonl``: every incarnation of a run, from its first line to the reason of its end.

``pretrain.report`` reads the ``time``, ``cause`` and ``reason`` of its ends.
"""

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.files import json_lines
from slurm.folder import Incarnation, SlurmFolder
from slurm.restart import Cause, Decision, Past
from slurm.scheduler import Job


@dataclass
class Chapter:
    """One incarnation as the history tells it."""

    job: str
    restart: int
    begun: float
    nodes: list[str]
    ranks: int
    step: int
    """Of the newest checkpoint when it began."""
    ended: float = 0.0
    """0 while nobody has told of its end."""
    end_step: int = 0
    cause: Cause | None = None
    reason: str = ""
    action: str = ""
    node: str = ""
    slow: list[str] = field(default_factory=list)
    """Nodes that preflight found slow."""
    next_job: str = ""
    """The job that goes on in its place, where it could not be requeued."""
    notes: list[str] = field(default_factory=list)
    """What else was done: follow-up jobs, nodes excluded, waits."""

    @property
    def incarnation(self) -> Incarnation:
        """Its name."""
        return Incarnation(self.job, self.restart)


def current_job(folder: SlurmFolder, chapters: list[Chapter], queue: dict[str, Job]) -> Job | None:
    """The job of a run that runs or waits; None when there is none. ``queue`` is what Slurm knows.

    Whoever submitted it may not have lived to write that down, so jobs are known by their script, too.
    """
    mine = {*folder.submitted(), *(c.job for c in chapters), *(c.next_job for c in chapters)}
    alive = [job for job in queue.values() if not job.over and (job.id in mine or folder.is_script(job.command))]
    return max(alive, key=lambda job: int(job.id), default=None)


def ended_job(folder: SlurmFolder, last: Chapter | None, queue: dict[str, Job]) -> Job | None:
    """The newest job of a run that has ended and that Slurm has not forgotten yet. ``last`` is the newest chapter."""
    ids = [*folder.submitted(), *([last.job, last.next_job] if last else [])]
    return next((queue[job] for job in sorted(ids, key=_number, reverse=True) if job in queue), None)


def _number(job: str) -> int:
    return int(job) if job.isdigit() else 0


class History:
    """Reads and extends the file. The running batch script writes to it; while none runs, ``slurm.release``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def chapters(self) -> list[Chapter]:
        """All incarnations, the earliest first; lines that a crash cut are passed over."""
        chapters: list[Chapter] = []
        found: dict[Incarnation, Chapter] = {}  # the newest of each name: see SlurmFolder.forget_exits
        for line in self._lines():
            incarnation = Incarnation(line["job"], line["restart"])
            if line["event"] == "begin":
                values = {key: line[key] for key in ("nodes", "ranks", "step")}
                found[incarnation] = Chapter(incarnation.job, incarnation.restart, line["time"], **values)
                chapters.append(found[incarnation])
            elif incarnation in found and line["event"] == "end":
                chapter = found[incarnation]
                chapter.ended, chapter.end_step = line["time"], line["step"]
                chapter.cause, chapter.reason = line["cause"], line["reason"]
                chapter.action, chapter.node = line["action"], line["node"]
                chapter.slow = line.get("slow", [])  # runs that began before this was written down go on too
            elif incarnation in found:
                found[incarnation].notes.append(line["text"])
                found[incarnation].next_job = line["next_job"] or found[incarnation].next_job
        return chapters

    def past(self, before: Incarnation | None) -> list[Past]:
        """Incarnations but this one, as ``slurm.restart`` takes them."""
        return [
            Past(chapter.step, chapter.cause or "lost", chapter.node, tuple(chapter.slow))
            for chapter in self.chapters()
            if chapter.incarnation != before
        ]

    def begin(self, incarnation: Incarnation, *, nodes: list[str], ranks: int, step: int) -> None:
        """An incarnation begins; ``step`` is that of the newest checkpoint."""
        self._write("begin", incarnation, {"nodes": nodes, "ranks": ranks, "step": step})

    def end(self, incarnation: Incarnation, decision: Decision, *, step: int) -> None:
        """An incarnation has ended."""
        facts = {"cause": decision.cause, "reason": decision.reason, "action": decision.action}
        self._write("end", incarnation, facts | {"node": decision.node, "slow": decision.slow, "step": step})

    def note(self, incarnation: Incarnation, text: str, *, next_job: str = "") -> None:
        """Something else was done about it."""
        self._write("note", incarnation, {"text": text, "next_job": next_job})

    def _write(self, event: str, incarnation: Incarnation, facts: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = {"event": event, "job": incarnation.job, "restart": incarnation.restart, "time": time.time(), **facts}
        with self.path.open("a") as handle:
            handle.write(json.dumps(line) + "\n")
            handle.flush()
            os.fsync(handle.fileno())

    def _lines(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        return [line for line in json_lines(self.path) if line is not None]
