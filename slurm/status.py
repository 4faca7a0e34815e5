"""Show the state of runs, from their folders and from Slurm's queue.

states: waiting (for nodes), held (until it is released), starting, running, stopping, restarting, finished,
stopped (slurm.stop), cancelled (scancel), failed (will not be restarted; the reason says what to change), lost
(nothing runs or waits), preempted (started without Slurm and stopped), unknown (its folder cannot be read)
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from data_pipeline.errors import printable
from pretrain.files import is_measurement, json_object
from pretrain.outcome import ExitCode
from slurm import scheduler
from slurm.folder import SlurmFolder, stamp
from slurm.job_state import RunStatus, find_state
from slurm.scheduler import Job, SlurmError

TAIL_BYTES = 65_536
"""Enough of ``metrics.jsonl`` to hold its last line of training."""
UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError)
"""What a damaged file of a run folder may raise."""


def find_runs(runs: Path) -> list[Path]:
    """Run folders under ``runs``, by name."""
    return sorted({path.parent for pattern in ("*/run.json", "*/slurm") for path in runs.glob(pattern)})


def status_of(run: Path, queue: dict[str, Job] | None) -> RunStatus:
    """The status of a run; "unknown" where its folder holds what cannot be read. ``queue`` as for ``find_state``."""
    folder = SlurmFolder(run)
    try:
        status, state = find_state(folder, queue), folder.state()
        status.saved_step = folder.saved_step()
        if state is not None:
            status.step, status.total_steps = state.step, state.total_steps or None
            status.restarts, status.ranks = state.restarts, state.world_size or None
            status.nodes, status.heartbeat_s = [state.host], round(time.time() - state.updated, 1)
        if status.history:
            last = status.history[-1]
            status.restarts, status.ranks, status.nodes = len(status.history) - 1, last.ranks, last.nodes
            status.log = str(folder.log(last.attempt, 0))
        if row := _last_training_row(run / "metrics.jsonl"):
            status.loss, status.step = row.get("loss"), max(status.step, row["step"])
            status.images_per_second = row.get("images_per_second")
            if status.state == "running" and status.total_steps and status.images_per_second:
                left = (status.total_steps - status.step) * row["samples_seen"] / row["step"]
                status.eta_s = round(left / status.images_per_second, 1)
    except UNREADABLE as error:
        return RunStatus(run.name, "unknown", f"{run} cannot be read: {type(error).__name__}: {error}")
    return status


def _last_training_row(metrics: Path) -> dict[str, Any]:
    try:
        with metrics.open("rb") as handle:
            handle.seek(max(0, metrics.stat().st_size - TAIL_BYTES))
            lines = handle.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        row = json_object(line)  # None: cut at the front by us, or at the end by a crash
        if is_measurement(row) and row["kind"] == "train" and row.get("step", 0) > 0:
            return row
    return {}


def main(arguments: list[str] | None = None) -> int:
    """Print the table of all runs, or one run in detail."""
    parser = argparse.ArgumentParser(
        prog="python -m slurm.status", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN", help="runs/NAME: show this run in detail")
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="FOLDER", help="default: runs")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    if options.run is not None and not options.run.is_dir():
        parser.error(f"{options.run}: no such run; `python -m slurm.status` lists them")
    queue = _queue()
    folders = [options.run] if options.run else find_runs(options.runs)
    found = [status_of(folder.resolve(), queue) for folder in folders]
    if options.json:
        content = [asdict(status) for status in found]
        print(json.dumps(content[0] if options.run else content, indent=2))  # noqa: T201
    else:
        print("\n".join(map(printable, _lines_of_one(found[0]) if options.run else _table(found))))  # noqa: T201
    return ExitCode.FINISHED


def _queue() -> dict[str, Job] | None:
    """Slurm's jobs; None where it cannot be asked, which is not the same as an empty queue."""
    try:
        return {job.id: job for job in scheduler.queue().values() if "/slurm/" in job.command}
    except SlurmError as error:
        print(f"WARNING Slurm does not answer; states are from the run folders: {error}", file=sys.stderr)  # noqa: T201
        return None


def _table(found: list[RunStatus]) -> list[str]:
    if not found:
        return ["no runs here"]
    cells = [
        {
            "run": one.name,
            "state": one.state,
            "step": f"{one.step}/{one.total_steps or '?'}",
            "images/s": _number(one.images_per_second, ".0f"),
            "loss": _number(one.loss, ".4g"),
            "ETA": _duration(one.eta_s),
            "restarts": str(one.restarts),
            "nodes": _nodes(one.nodes),
            "heartbeat": _duration(one.heartbeat_s, " ago"),
            "why": one.why,
        }
        for one in found
    ]
    rows = [list(cells[0]), *(list(row.values()) for row in cells)]
    widths = [min(40, max(map(len, column))) for column in zip(*rows, strict=True)]  # one long name shifts its row only
    widths[-1] = 0
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _lines_of_one(one: RunStatus) -> list[str]:
    facts = {
        "run": one.name,
        "state": one.state + (f": {one.why}" if one.why else ""),
        "step": f"{one.step} of {one.total_steps or '?'}, saved at {one.saved_step}",
        "speed": f"{_number(one.images_per_second, '.0f')} images/s, ETA {_duration(one.eta_s)}" if one.eta_s else "",
        "loss": _number(one.loss, ".4g"),
        "heartbeat": _duration(one.heartbeat_s, " ago"),
        "job": one.job,
        "nodes": ", ".join(one.nodes),
        "log": one.log,
    }
    lines = [f"{name:<11}{value}" for name, value in facts.items() if value]
    if one.history:
        lines += ["", f"history ({one.restarts} restarts)"]
    for record in one.history:
        lasted = f", {_duration(record.ended - record.begun)}" if record.ended else ""
        lines.append(
            f"  {stamp(record.begun)}  {record.attempt}  {record.ranks} ranks on {_nodes(record.nodes)}  "
            f"from step {record.step}{lasted}"
        )
        if record.ended:
            lines.append(f"      {record.cause}: {record.reason}")
        lines += [f"      {note}" for note in record.notes]
    return lines


def _nodes(nodes: list[str]) -> str:
    return ",".join(nodes) if len(nodes) <= 3 else f"{nodes[0]},...,{nodes[-1]} ({len(nodes)})"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _duration(seconds: float | None, suffix: str = "") -> str:
    return "" if seconds is None else f"{timedelta(seconds=round(seconds))}{suffix}"


if __name__ == "__main__":
    sys.exit(main())
