"""What the benchmarks share: the machine they run on, and the files that their results go to.

``model``, ``data``, ``trainer`` and ``end_to_end`` write sections of one file a day and machine,
``results/bench-DATE-MACHINE.json``: every raw measurement beside what it was measured with. ``benchmarks.tables`` makes
tables of them, ``benchmarks.page`` puts those into docs/performance.md, and ``pretrain.plan --benchmark`` reads them.
The other benchmarks add a table of their own to ``results/KIND-DATE-MACHINE.md``.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch", "torchvision", "timm", "deepspeed", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "webdataset", "pillow",
    "numpy",
)  # fmt: skip
NOT_SOURCE = (":(top,exclude)docs", ":(top,exclude)benchmarks/results")
"""What may have changed since the last commit without another measurement coming of it; for git."""
DIGITS = 5
"""Of every measured number; none is known better."""


def processor() -> str:
    """Name of the GPU where there is one, else of the CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else cpu()


def cpu() -> str:
    """Name of the CPU."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    return found[1] if found else platform.processor()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def today() -> str:
    """The day, as results name it."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def driver() -> str | None:
    """Version of NVIDIA's driver; None without one."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return None


def environment() -> dict[str, Any]:
    """The machine, the versions, and the source as git knows it."""
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "machine": {
            "device": "cuda" if torch.cuda.is_available() else "cpu", "name": processor(), "gpus": gpus,
            "driver": driver() if gpus else None, "cuda": torch.version.cuda if gpus else None,
            "cpu": cpu(), "cores": cores(), "system": platform.release(),
        },
        "versions": versions,
        "revision": _git("rev-parse", "--short=12", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no", "--", ":/", *NOT_SOURCE)),
    }  # fmt: skip


def _git(*arguments: str) -> str | None:
    """What git says of this source; None where it is no repository, or has no git."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(RESULTS.parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return None


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the options that the four benchmarks of ``python -m benchmarks`` share."""
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes: shows that it works, no more")
    parser.add_argument("--note", default="", help="added to the result's file name: another file on the same day")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")


def fill_in(options: argparse.Namespace, defaults: Mapping[str, Any]) -> argparse.Namespace:
    """Give options that were left out, and are None therefore, the values that suit the device; the same object."""
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


class Section:
    """One benchmark's part of a day's file. Make it before measuring: it notes time, load, versions and source."""

    def __init__(self, kind: str, options: argparse.Namespace, arguments: list[str] | None) -> None:
        self._kind, self._options, self._began = kind, options, time.monotonic()
        self._typed = sys.argv[1:] if arguments is None else arguments
        self._load, self._environment = os.getloadavg()[0], environment()

    def write(self, conditions: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Put the section into the file of the day, in place of an earlier one of the same kind.

        Args:
            conditions: what was measured, by name; as the tables print it.
            rows: one for each contestant; lists in it are raw measurements in the order of the rounds.

        Returns:
            the section, as it is written.
        """
        section = {
            "command": shlex.join(["python", "-m", f"benchmarks.{self._kind}", *_without_results(self._typed)]),
            "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self._began),
            "load_before": round(self._load, 2),
            "quick": self._options.quick,
            **self._environment,
            "conditions": conditions,
            "rows": [{name: _rounded(value) for name, value in row.items()} for row in rows],
        }
        file = file_of_today(section["machine"], self._options)
        content = json.loads(file.read_text()) if file.exists() else {"date": today(), "sections": {}}
        content["sections"][self._kind] = section
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_suffix(".writing")
        beside.write_text(_json(content))
        beside.replace(file)
        return section


def _without_results(arguments: list[str]) -> list[str]:
    """A command line without where its result goes, which says nothing of it."""
    kept = [one for one in arguments if not one.startswith("--results=")]
    while "--results" in kept:
        where = kept.index("--results")
        del kept[where : where + 2]
    return kept


def file_of_today(machine: dict[str, Any], options: argparse.Namespace) -> Path:
    """Where the results of a machine go today; those of a quick look lie apart, and git ignores them."""
    many = f"{len(machine['gpus'])}-x-" if len(machine["gpus"]) > 1 else ""
    name = f"{many}{machine['name']}" if machine["gpus"] else f"{machine['name']}-{machine['cores']}-cores"
    parts = ["bench", today(), name, options.note, "quick" if options.quick else ""]
    folder: Path = options.results
    return folder / f"{slug('-'.join(filter(None, parts)))}.json"


def slug(text: str) -> str:
    """A text as part of a file's name."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile; of fewer than two values, thrice the first."""
    if len(values) < 2:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.{DIGITS}g}")
    return value


def _json(content: dict[str, Any]) -> str:
    """Indented, but for lists of numbers, which take one line."""
    text = json.dumps(content, indent=1)
    return re.sub(r"\[[-+\d.e,\s]*\]", lambda found: re.sub(r"\s+", " ", found[0]), text) + "\n"


def add_to_results(kind: str, machine: str, lines: list[str], results: Path = RESULTS) -> None:
    """Append to results/KIND-DATE-MACHINE.md."""
    results.mkdir(exist_ok=True)
    with (results / f"{kind}-{today()}-{slug(machine)}.md").open("a") as file:
        file.write("\n".join([*lines, "", ""]))


def tell(what: str, lines: list[str], results: Path = RESULTS) -> None:
    """Print a result and add it, with date, machine and version above it, to ``results/WHAT-DATE-MACHINE.md``."""
    lines = [f"## {processor()}, {os.cpu_count()} cores, torch {torch.__version__}, {today()}", "", *lines]
    say(lines)
    add_to_results(what, processor(), lines, results)


def say(lines: list[str] | Iterator[str]) -> None:
    """Print: a table is what a benchmark is for."""
    print("\n".join(lines), flush=True)  # noqa: T201
