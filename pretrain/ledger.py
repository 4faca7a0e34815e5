"""``ledger.jsonl``: what every optimizer step computed, exactly; ``pretrain.replay`` compares with it.

One row per step: ``step`` and ``samples_seen`` after it; ``loss``, the mean over micro-batches and ranks, and
``grad_norm``, before clipping, as decimals that read back to the same 64 bits; ``skipped``; ``batch``, the digest of
the global batch; and the fields of ``describe_setup``. ``grad_norm`` is null after a skipped step, and at ZeRO stage 0
without clipping, where nobody computes it.
"""

import json
import re
from importlib import metadata
from pathlib import Path
from typing import Any, TypeGuard

import torch

from pretrain.engine.deepspeed_config import ResolvedDeepSpeed
from pretrain.files import json_lines

Row = dict[str, Any]
TYPES: dict[str, tuple[type, ...]] = {
    "step": (int,), "samples_seen": (int,), "loss": (float,), "grad_norm": (float, type(None)), "skipped": (bool,),
    "batch": (str,), "world_size": (int,), "micro_batch": (int,), "stage": (int,), "precision": (str,), "on": (str,),
}  # fmt: skip
"""Fields of a row."""
SETUP = ("world_size", "micro_batch", "stage", "precision", "on")
"""Fields that decide how a step is rounded: where they agree, its bits do."""


def describe_setup(resolved: ResolvedDeepSpeed, device: torch.device, *, compiled: bool) -> Row:
    """The fields ``SETUP``; ``on`` names the device and the versions of what computes.

    On a CPU its kind, its instruction set and the number of threads decide how sums are split.
    """
    kind = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    on = f"cpu {kind[1] if kind else ''} {torch.backends.cpu.get_cpu_capability()} x {torch.get_num_threads()}"
    if device.type == "cuda":
        on = torch.cuda.get_device_name(device)
    packages = {"torch": "torch", "deepspeed": "deepspeed", "dali": "nvidia-dali-cuda130"}
    versions = [f"{name} {metadata.version(package)}" for name, package in packages.items()]
    notes = ["compiled"] * compiled + ["deterministic"] * torch.are_deterministic_algorithms_enabled()
    return {
        "world_size": resolved.batch.world_size,
        "micro_batch": resolved.batch.micro_batch,
        "stage": resolved.stage,
        "precision": resolved.precision,
        "on": ", ".join([on, *versions, *notes]),
    }


def is_row(row: Row | None) -> TypeGuard[Row]:
    """Whether a line of ``ledger.jsonl`` is intact, as far as can be seen."""
    return row is not None and all(type(row.get(name)) in types for name, types in TYPES.items())


def write_rows(file: Path, rows: list[Row], setup: Row) -> None:
    """Add rows.

    Raises:
        OSError: they could not be written.
    """
    with file.open("a") as handle:
        handle.writelines(json.dumps(row | setup, separators=(",", ":")) + "\n" for row in rows)


def read_rows(file: Path, first: int, last: int) -> dict[int, Row]:
    """Rows of the steps ``first`` to ``last``, by step; damaged lines are left out.

    Raises:
        OSError: it cannot be read.
    """
    return {row["step"]: row for row in json_lines(file) if is_row(row) and first <= row["step"] <= last}
