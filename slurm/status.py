"""How runs are: ``python -m slurm.status [RUN] [--json]``."""

import argparse
import json
import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pretrain.outcome import ExitCode, UserError
from slurm import scheduler
from slurm.folder import stamp
from slurm.scheduler import Job, SlurmError
from slurm.standing import Standing, find_runs, standing_of

COLOURS = {"running": "green", "finished": "bold green"} | dict.fromkeys(("held", "failed", "lost"), "bold red")
DESCRIPTION = """\
Tell how runs are, from their folders and from Slurm's queue.

states: waiting (for nodes), held (until someone releases it), starting, running, stopping, restarting, finished,
stopped (slurm.stop), cancelled (scancel), failed (will not be started again; the reason says what to change), lost
(nothing runs and nothing waits)
"""


def main(arguments: list[str] | None = None) -> int:
    """Print the table of all runs, or one run in detail."""
    parser = argparse.ArgumentParser(
        prog="python -m slurm.status", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN", help="runs/NAME: this one in detail")
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="FOLDER", help="default: runs")
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args(arguments)
    try:
        if options.run is not None and not options.run.is_dir():
            raise UserError(f"{options.run}: no such run; `python -m slurm.status` lists them")
        queue = _queue()
        folders = [options.run] if options.run else find_runs(options.runs)
        standings = [standing_of(folder.resolve(), queue) for folder in folders]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return ExitCode.WILL_FAIL_AGAIN
    if options.json:
        content = [asdict(standing) for standing in standings]
        print(json.dumps(content[0] if options.run else content, indent=2))  # noqa: T201
    elif options.run:
        _print_one(standings[0])
    else:
        _print_table(standings)
    return ExitCode.FINISHED


def _queue() -> dict[str, Job] | None:
    """Slurm's jobs; None where it cannot be asked, which is not the same as an empty queue."""
    try:
        return scheduler.queue()
    except SlurmError as error:
        print(f"WARNING Slurm cannot be asked, this is what the folders say: {error}", file=sys.stderr)  # noqa: T201
        return None


def _print_table(standings: list[Standing]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("run", "state", "step", "images/s", "loss", "ETA", "restarts", "nodes", "heartbeat", "why"):
        table.add_column(name, overflow="fold", justify="right" if name in ("step", "images/s", "loss") else "left")
    for one in standings:
        table.add_row(
            one.name,
            f"[{COLOURS[one.state]}]{one.state}[/]" if one.state in COLOURS else one.state,
            f"{one.step}/{one.total_steps or '?'}",
            _number(one.images_per_second, ".0f"),
            _number(one.loss, ".4g"),
            _duration(one.eta_s),
            str(one.restarts),
            _nodes(one.nodes),
            f"{_duration(one.heartbeat_s)} ago" if one.heartbeat_s is not None else "",
            one.why,
        )
    console = Console(soft_wrap=False)
    console.print(table if standings else "no runs here")


def _print_one(one: Standing) -> None:
    console = Console(highlight=False, soft_wrap=True)
    facts = {
        "run": one.name,
        "state": one.state + (f": {one.why}" if one.why else ""),
        "step": f"{one.step} of {one.total_steps or '?'}, saved at {one.saved_step}",
        "speed": f"{_number(one.images_per_second, '.0f')} images/s, ETA {_duration(one.eta_s)}" if one.eta_s else "",
        "loss": _number(one.loss, ".4g"),
        "heartbeat": f"{_duration(one.heartbeat_s)} ago" if one.heartbeat_s is not None else "",
        "job": one.job,
        "nodes": ", ".join(one.nodes),
        "log": one.log,
    }
    for name, value in facts.items():
        if value:
            console.print(f"{name:<11}{value}", markup=False)
    if not one.history:
        return
    console.print(f"\nhistory ({one.restarts} restarts)")
    for chapter in one.history:
        ended = "" if not chapter["ended"] else f", {_duration(chapter['ended'] - chapter['begun'])}"
        console.print(
            f"  {stamp(chapter['begun'])}  {chapter['job']}-{chapter['restart']}  {chapter['ranks']} ranks on "
            f"{_nodes(chapter['nodes'])}  from step {chapter['step']}{ended}",
            markup=False,
        )
        if chapter["ended"]:
            console.print(f"      {chapter['cause']}: {chapter['reason']}", markup=False)
        for note in chapter["notes"]:
            console.print(f"      {note}", markup=False)


def _nodes(nodes: list[str]) -> str:
    return ",".join(nodes) if len(nodes) <= 3 else f"{nodes[0]},...,{nodes[-1]} ({len(nodes)})"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _duration(seconds: float | None) -> str:
    return "" if seconds is None else str(timedelta(seconds=round(seconds)))


if __name__ == "__main__":
    sys.exit(main())
