"""The first minutes on a GPU: what is worth most is measured first, and a page of verdicts is printed.

Each step runs in a process of its own with a time limit, at which it is killed with all that it has started. Time that
one leaves is for those after it. What was measured until then stays, and after each step is written to
``results/first-gpu-DATE.json``; ``--only`` repeats some steps and keeps the results of the others. On a CPU everything
is tiny: that shows that the steps work, and nothing else.
"""

import argparse
import contextlib
import ctypes
import datetime
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from data_pipeline.files import write_atomically
from pretrain.devices import use_gpu
from pretrain.outcome import UserError

ROOT = Path(__file__).parent.parent
SPEED = "{name}: {images_per_s:,.0f} images/s, {bound}-bound (busy {busy:.0%})"
WAITS = "waits for data {data_wait:.1%}, device busy {busy:.0%}"
STEPS = {
    "environment": (30, "{name}, driver {driver}, CUDA {cuda}; torch {torch}, DALI {dali}, NCCL {nccl}: {computes}"),
    "pixels": (60, "{name}: {repeats}; from a CPU's pixels {mean:.2f} of 255 on average, {max:.0f} at most"),
    "loader": (90, "{name}: {images_per_s:,.0f} images/s on {cores:.1f} cores"),
    "network": (180, SPEED + ", {peak_gib:.1f} GiB"),
    "others": (60, SPEED),
    "trainer": (150, SPEED + ", {step_ms:.2f} ms a step, optimizer {optimizer_ms:.2f}, host waits {waits}"),
    "end_to_end": (120, "{name}: {images_per_s:,.0f} images/s, {ratio:.1%} of a fixed batch's; " + WAITS),
    "tests": (60, "{name}: {outcomes}"),
}  # fmt: skip
"""Steps in their order: seconds of twelve minutes, and how the summary shows each row that a step has measured. What
they do is in ``benchmarks/first_gpu_steps.py``."""
Found = dict[str, dict[str, dict[str, Any]]]
"""What was measured, by step and row."""


def command_of(step: str) -> list[str]:
    """How a step is started; three paths are added: of its rows, of all rows before, and of a folder for all steps."""
    return [sys.executable, "-m", "benchmarks.first_gpu_steps", step]


def run(command: list[str], limit_s: float, log: Path) -> str:
    """Run a step until it ends or its time is over, and kill what is left of it; "ok", or one line on how it ended."""
    status = None
    with log.open("wb") as out, contextlib.suppress(subprocess.TimeoutExpired):
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        status = process.wait(limit_s)
    for _ in range(3):
        # Orphans, also those with a session of their own, have become children of this process.
        left = psutil.Process().children(recursive=True)
        for child in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(left, timeout=5)
    if status is None:
        return f"killed at its limit of {limit_s:.0f} s"
    last = "".join(log.read_text(errors="replace").strip().splitlines()[-1:])
    how = f"exit status {status}" if status > 0 else f"killed by {signal.Signals(-status).name}" if status else "ok"
    return how if status == 0 else f"{how}: {last[:300]}"


def measure(steps: list[str], minutes: float, file: Path) -> dict[str, Any]:
    """Take the steps and write ``file`` after each; what it then holds: status, seconds, rows and output by step."""
    ctypes.CDLL("libc.so.6").prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: orphans become children of this process
    content: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    end = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as scratch:
        rows, known, log = (Path(scratch) / name for name in ("rows", "known", "log"))
        for index, step in enumerate(steps):
            began, ahead = time.monotonic(), sum(STEPS[other][0] for other in steps[index:])
            limit_s = max(1.0, (end - began) * STEPS[step][0] / ahead)
            print(f"{step}: at most {limit_s:.0f} s", flush=True)  # noqa: T201
            rows.write_text("")
            known.write_text(json.dumps(found_in(content)))
            status = run([*command_of(step), str(rows), str(known), scratch], limit_s, log)
            found: dict[str, Any] = {}
            for line in rows.read_text().splitlines():
                with contextlib.suppress(ValueError):  # the last one may have been cut
                    found |= json.loads(line)
            printed = [] if status == "ok" else log.read_text(errors="replace").splitlines()[-40:]
            took = round(time.monotonic() - began, 1)
            content[step] = {"status": status, "seconds": took, "rows": found, "printed": printed}
            write_atomically(file, (json.dumps(content, indent=1) + "\n").encode())
    return content


def found_in(content: dict[str, Any]) -> Found:
    """What was measured so far."""
    return {step: content.get(step, {}).get("rows", {}) for step in STEPS}


def fastest(rows: dict[str, dict[str, Any]], among: Sequence[str]) -> str | None:
    """The one with most images per second; None where none was measured."""
    rates = {name: row["images_per_s"] for name, row in rows.items() if name in among and "images_per_s" in row}
    return max(rates, key=rates.__getitem__, default=None)


def summary(content: dict[str, Any]) -> list[str]:
    """A page: how each step ended, and its rows; "not measured" where there are none."""
    lines = []
    for step, rows in found_in(content).items():
        taken = content.get(step, {"status": "not run", "seconds": 0})
        lines.append(f"{step}: {taken['status']} ({taken['seconds']:.0f} s)")
        best = fastest(rows, [*rows])
        for name, row in rows.items():
            said = row.get("note") or STEPS[step][1].format_map({"name": name} | row)
            lines.append(f"    {said}{'  <- fastest' if name == best and len(rows) > 1 else ''}")
        lines += [] if rows else ["    not measured"]
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Measure, write and print; 1 if a step failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=12, help="for all steps together (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=[*STEPS], help="these steps")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder of the result")
    options = parser.parse_args(arguments)
    try:
        kind = "" if use_gpu() else "-cpu-quick"
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return error.code
    options.results.mkdir(parents=True, exist_ok=True)
    file = options.results / f"first-gpu-{datetime.datetime.now(datetime.UTC).date()}{kind}.json"
    content = measure([step for step in STEPS if step in options.only], options.minutes, file)
    tiny = ["On a CPU: that the steps work is all that this says."] if kind else []
    print("", *summary(content), *tiny, f"all values: {file}", sep="\n")  # noqa: T201
    return int(any(content[step]["status"] != "ok" for step in options.only))


if __name__ == "__main__":
    sys.exit(main())
