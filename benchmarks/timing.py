"""Shared by the benchmarks: taking turns, medians, and the file of results.

Contestants take turns, forwards and backwards, so that whatever else the machine does hits all of them; a ratio is the
median over the rounds of the ratios within each round. ``results/bench-DATE-MACHINE.json`` has one section per
benchmark: conditions, machine, versions, and rows with every raw measurement.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "torchvision", "timm", "deepspeed", "nvidia-dali-cuda130", "webdataset", "pillow", "numpy")
T = TypeVar("T")


def turns(contestants: Sequence[T], rounds: int, warmup: int = 1) -> Iterator[tuple[T, bool]]:
    """Yield each contestant once per round, every other round backwards, and whether the round counts.

    One that always followed the same other one would inherit its caches and heap.
    """
    for number in range(warmup + rounds):
        for contestant in contestants[:: -1 if number % 2 else 1]:
            yield contestant, number >= warmup


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Median of the ratios within the rounds."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def output_of(*command: str) -> str | None:
    """Standard output of a command; None where it fails or is not installed."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return None


def environment() -> dict[str, Any]:
    """Machine, versions, and the revision of the source."""
    count, cpu = torch.cuda.device_count(), re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    machine = {
        "device": "cuda" if count else "cpu", "gpus": count, "cores": cores(), "system": platform.release(),
        "name": torch.cuda.get_device_name() if count else cpu[1] if cpu else platform.processor(),
        "driver": output_of(*query) if count else None, "cuda": torch.version.cuda,
    }  # fmt: skip
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    revision = output_of("git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty", "--abbrev=12")
    return {"machine": machine, "versions": versions, "revision": revision}


def parse(
    kind: str, description: str, arguments: list[str] | None, *, defaults: dict[str, Any], quick: dict[str, Any]
) -> argparse.Namespace:
    """Parse a benchmark's options: one per default, of its type; ``quick`` has other defaults for ``--quick``."""
    typed = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{kind}", description=description)
    for name, value in (defaults | (quick if "--quick" in typed else {})).items():
        how: dict[str, Any] = {"type": type(value)}
        if isinstance(value, bool):
            how = {"action": argparse.BooleanOptionalAction}
        elif isinstance(value, list):
            how = {"nargs": "+", "type": type((value or [0])[0])}
        parser.add_argument(f"--{name.replace('_', '-')}", default=value, help=f"default here: {value}", **how)
    parser.add_argument("--quick", action="store_true", help="seconds in place of minutes: shows that it works")
    parser.add_argument("--note", default="", help="part of the result's file name")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    options = parser.parse_args(typed)
    options.kind, options.command = kind, shlex.join(["python", "-m", f"benchmarks.{kind}", *typed])
    options.began, options.load = time.monotonic(), os.getloadavg()[0]
    return options


def write(options: argparse.Namespace, conditions: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """Print the rows and put them into the day's file, in place of an earlier section of the same kind.

    Rows are one per contestant; lists in them are raw measurements in the order of the rounds. Returns the file.
    """
    described = environment()
    section = {
        "command": options.command, "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - options.began), "load_before": round(options.load, 2),
        "quick": options.quick, **described, "conditions": conditions, "rows": rows,
    }  # fmt: skip
    machine, today = described["machine"], datetime.datetime.now(datetime.UTC).date().isoformat()
    size = f"{machine['gpus']}-gpus" if machine["gpus"] else f"{machine['cores']}-cores"
    words = f"bench {today} {machine['name']} {size} {options.note} {'quick' * options.quick}"
    file: Path = options.results / f"{re.sub(r'[^a-z0-9.]+', '-', words.lower()).strip('-')}.json"
    content = json.loads(file.read_text()) if file.exists() else {"date": today, "sections": {}}
    content["sections"][options.kind] = section
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n")
    table = Table(*rows[0], title=f"{options.kind}, medians")
    for row in rows:
        values = [statistics.median(value) if isinstance(value, list) else value for value in row.values()]
        table.add_row(*(f"{value:.5g}" if isinstance(value, float) else str(value) for value in values))
    Console(width=180).print(table, f"{conditions} in {file}", highlight=False, soft_wrap=True)
    return file
