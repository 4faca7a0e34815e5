"""``history.jsonl``: every attempt of a run, from its first line to the reason of its end.

``pretrain.report`` reads the ``time``, ``cause`` and ``reason`` of its ends.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from pretrain.files import json_lines
from slurm.restart import Attempt, AttemptRecord, Decision


class History:
    """Reads and extends the file. The running batch script writes to it; while none runs, ``slurm.release``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def records(self) -> list[AttemptRecord]:
        """All attempts, the earliest first; lines that a crash cut are passed over."""
        records: list[AttemptRecord] = []
        found: dict[Attempt, AttemptRecord] = {}  # the newest of each name: see SlurmFolder.forget_exits
        for line in filter(None, json_lines(self.path) if self.path.exists() else ()):
            attempt = Attempt(line["job"], line["restart"])
            if line["event"] == "begin":
                facts = {key: line[key] for key in ("step", "job", "restart", "nodes", "ranks")}
                found[attempt] = AttemptRecord(**facts, begun=line["time"], code=line.get("code", ""))
                records.append(found[attempt])
            elif attempt in found and line["event"] == "end":
                record = found[attempt]
                record.ended, record.end_step = line["time"], line["step"]
                record.cause, record.reason = line["cause"], line["reason"]
                record.action, record.node = line["action"], line["node"]
                record.slow = line.get("slow", [])  # older runs lack it
            elif attempt in found:
                record = found[attempt]
                record.notes.append(line["text"])
                record.next_job = line["next_job"] or record.next_job
                record.submitted_again += line.get("again", False)
        return records

    def before(self, attempt: Attempt) -> list[AttemptRecord]:
        """All attempts but this one."""
        return [record for record in self.records() if record.attempt != attempt]

    def begin(self, attempt: Attempt, *, nodes: list[str], ranks: int, step: int, code: str = "") -> None:
        """An attempt begins; ``step`` is that of the newest checkpoint."""
        self._write("begin", attempt, {"nodes": nodes, "ranks": ranks, "step": step, "code": code})

    def end(self, attempt: Attempt, decision: Decision, *, step: int) -> None:
        """An attempt has ended."""
        facts = {"cause": decision.cause, "reason": decision.reason, "action": decision.action}
        self._write("end", attempt, facts | {"node": decision.node, "slow": decision.slow, "step": step})

    def note(self, attempt: Attempt, text: str, *, next_job: str = "", again: bool = False) -> None:
        """Something else was done about it; ``again``: ``slurm.release`` submitted ``next_job``."""
        self._write("note", attempt, {"text": text, "next_job": next_job, "again": again})

    def _write(self, event: str, attempt: Attempt, facts: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = {"event": event, "job": attempt.job, "restart": attempt.restart, "time": time.time(), **facts}
        with self.path.open("a") as handle:
            handle.write(json.dumps(line) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
