"""What ``slurm`` keeps in a run's folder. Imports nothing heavy: it is read on batch hosts while the seconds count.

::

    runs/NAME/slurm/launch.json       how the run was launched: what every attempt needs to know
    runs/NAME/slurm/recipe.yaml, ds_config.json      as launched; later edits of the originals do not reach the run
    runs/NAME/slurm/history.jsonl     the attempts: where each ran and why it ended
    runs/NAME/slurm/stop              a user asked to stop: nothing restarts this run while it exists
    runs/NAME/slurm/release.lock      held by the one ``slurm.release`` that submits it again
    runs/NAME/slurm/submitit/         submitit's batch scripts, pickles and outputs
    runs/NAME/logs/JOB-RESTART/       of an attempt: one log and one exit.json per rank, and what srun reported
"""

import contextlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pretrain.files import json_lines, json_object, write_atomically, write_json
from pretrain.outcome import UserError
from pretrain.run_state import RunState, read_state
from slurm.restart import Attempt, AttemptRecord, Policy, RankExit


@dataclass(frozen=True)
class Launch:
    """``launch.json``: what attempts need to know about how the run was launched."""

    gpus_per_node: int
    min_nodes: int
    global_batch: int
    usable_nodes: Sequence[int]
    """Numbers of nodes whose ranks divide the global batch, ascending."""
    policy: Policy
    device: str = "auto"
    """As ``pretrain/main.py --device``."""
    environment: dict[str, str] = field(default_factory=dict)
    """Of the launch, without secrets and what is Slurm's; empty for runs of older versions."""


class SlurmFolder:
    """``runs/NAME`` as ``slurm`` sees it.

    The running batch script extends ``history.jsonl``; while none runs, ``slurm.release``. ``pretrain.report`` reads
    the ``time``, ``cause`` and ``reason`` of its ends.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.own = run / "slurm"
        self.recipe = self.own / "recipe.yaml"
        self.deepspeed_config = self.own / "ds_config.json"
        self.submitit = self.own / "submitit"
        self.launch = self.own / "launch.json"
        self.stop = self.own / "stop"
        self.history = self.own / "history.jsonl"

    def read_launch(self) -> Launch:
        """How the run was launched; a UserError where it was not, or the file is damaged."""
        try:
            content = json.loads(self.launch.read_text())
            content["policy"] = Policy(**content["policy"])
            return Launch(**content)
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(
                f"{self.launch} cannot be read ({error}): launch the run again with `python -m slurm.launch`"
            ) from None

    def write_launch(self, launch: Launch) -> None:
        """Replace ``launch.json``."""
        self.own.mkdir(parents=True, exist_ok=True)
        write_json(self.launch, asdict(launch))

    def request_stop(self, reason: str) -> None:
        """Let nothing restart this run until it is launched again, which removes the file ``stop``."""
        write_atomically(self.stop, f"{reason}\n".encode())

    def stop_request(self) -> str:
        """Who requested the stop, and when; "" without a request."""
        try:
            return self.stop.read_text().strip() or "asked to stop"
        except FileNotFoundError:
            return ""

    def attempts(self) -> list[AttemptRecord]:
        """All attempts in ``history.jsonl``, the earliest first; lines that a crash cut are passed over."""
        records: list[AttemptRecord] = []
        found: dict[Attempt, AttemptRecord] = {}  # the newest of each name: see new_logs
        for line in filter(None, json_lines(self.history) if self.history.exists() else ()):
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

    def begin(self, attempt: Attempt, *, nodes: list[str], ranks: int, step: int, code: str = "") -> None:
        """Record that an attempt begins; ``step`` is that of the newest checkpoint."""
        self._record("begin", attempt, {"nodes": nodes, "ranks": ranks, "step": step, "code": code})

    def end(self, record: AttemptRecord) -> None:
        """Record that an attempt has ended."""
        facts = {key: getattr(record, key) for key in ("cause", "reason", "action", "node", "slow")}
        self._record("end", record.attempt, facts | {"step": record.end_step})

    def note(self, attempt: Attempt, text: str, *, next_job: str = "", again: bool = False) -> None:
        """Record what else was done about an attempt; ``again``: ``slurm.release`` submitted ``next_job``."""
        self._record("note", attempt, {"text": text, "next_job": next_job, "again": again})

    def _record(self, event: str, attempt: Attempt, facts: dict[str, Any]) -> None:
        self.own.mkdir(parents=True, exist_ok=True)
        line = {"event": event, "job": attempt.job, "restart": attempt.restart, "time": time.time(), **facts}
        with self.history.open("a") as handle:
            handle.write(json.dumps(line) + "\n")
            handle.flush()
            os.fsync(handle.fileno())

    def script(self, job: str) -> Path:
        """Batch script of a job."""
        return self.submitit / f"{job}_submission.sh"

    def submitted(self) -> list[str]:
        """Jobs that submitit has submitted for this run, the earliest first."""
        names = [path.name.split("_")[0] for path in self.submitit.glob("*_submission.sh")]
        return sorted((name for name in names if name.isdigit()), key=int)

    def adopt(self, job: str) -> None:
        """Give submitit its files under the id of another job that runs the newest script."""
        known = self.submitted()
        if known and job not in known:
            for path in self.submitit.glob(f"{known[-1]}_subm*"):
                shutil.copy2(path, path.with_name(path.name.replace(known[-1], job, 1)))

    def state(self) -> RunState | None:
        """``run.json``; None before the first start, or where it cannot be read."""
        try:
            return read_state(self.run)
        except UserError:
            return None

    def saved_step(self) -> int:
        """Step of the newest checkpoint; 0 when there is none."""
        steps = [path.name.removeprefix("step-") for path in (self.run / "checkpoints").glob("step-*")]
        return max((int(step) for step in steps if step.isdigit()), default=0)

    def logs(self, attempt: Attempt) -> Path:
        """Folder of the logs of one attempt."""
        return self.run / "logs" / str(attempt)

    def log(self, attempt: Attempt, rank: int) -> Path:
        """Log of a rank."""
        return self.logs(attempt) / f"rank-{rank:05d}.log"

    def exit_record(self, attempt: Attempt, rank: int) -> Path:
        """``exit.json`` of a rank."""
        return self.logs(attempt) / f"rank-{rank:05d}.exit.json"

    def srun_errors(self, attempt: Attempt, since: float) -> tuple[str, ...]:
        """Errors that srun reported, and those with which slurmstepd has ended the output of a task since a time."""
        lines = []
        for path in (self.logs(attempt) / "srun.txt", *sorted(self.submitit.glob(f"{attempt.job}_*_log.out"))):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime >= since:
                    text = path.read_text(errors="replace").splitlines()
                    lines += text if path.name == "srun.txt" else text[-1:]
        return tuple(dict.fromkeys(line for line in lines if re.match(r"(srun|slurmstepd\S*): error: ", line)))

    def new_logs(self, attempt: Attempt) -> Path:
        """Make the folder of its logs, without records of another one: Slurm may give a number that it forgot again."""
        logs = self.logs(attempt)
        logs.mkdir(parents=True, exist_ok=True)
        for path in (logs / "srun.txt", *logs.glob("rank-*.exit.json")):
            path.unlink(missing_ok=True)
        return logs

    def read_exits(self, attempt: Attempt) -> list[RankExit]:
        """How the ranks of an attempt ended, as far as they recorded it, the earliest first."""
        found, known = [], {one.name for one in fields(RankExit)}
        for path in self.logs(attempt).glob("rank-*.exit.json"):
            facts = read_json_object(path)
            if "code" in facts:  # else its node died before slurm.job could complete it
                found.append(RankExit(**{key: facts[key] for key in known & facts.keys()}))
        return sorted(found, key=lambda ended: ended.time)

    def slow_nodes(self, attempt: Attempt) -> tuple[str, ...]:
        """Nodes that the preflight of an attempt found slow."""
        return tuple(read_json_object(self.exit_record(attempt, 0)).get("slow", ()))


def read_json_object(path: Path) -> dict[str, Any]:
    """Content of a JSON file; empty where it is not there or cut."""
    try:
        return json_object(path.read_bytes()) or {}
    except OSError:
        return {}


def stamp(seconds: float | None = None) -> str:
    """Local time as text."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def say(text: str) -> None:
    """Print a line with the time to standard error, which is the batch script's log."""
    print(f"{stamp()} {text}", file=sys.stderr, flush=True)  # noqa: T201
