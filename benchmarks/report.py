"""What the benchmarks share: the machine's name, and the file that a result is added to."""

import datetime
import platform
import re
import sys
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def processor() -> str:
    """Name of the GPU where there is one, else of the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    return found[1] if found else platform.processor()


def today() -> str:
    """The day, as results name it."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def add_to_results(kind: str, machine: str, lines: list[str], results: Path = RESULTS) -> None:
    """Append to results/KIND-DATE-MACHINE.md."""
    slug = re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")
    results.mkdir(exist_ok=True)
    with (results / f"{kind}-{today()}-{slug}.md").open("a") as file:
        file.write("\n".join([*lines, "", ""]))
