"""``ledger.jsonl``: what every optimizer step computed, exactly; ``pretrain.replay`` compares with it.

One row per step: ``step`` and ``samples_seen`` after it; ``loss``, the mean over micro-batches and ranks, and
``grad_norm``, before clipping, as decimals that read back to the same 64 bits; ``skipped``; ``batch``, the digest of
the global batch; and the fields of ``describe_setup``. ``grad_norm`` is null after a skipped step, and at ZeRO stage 0
without clipping, where nobody computes it.
"""

import json
import math
import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch

from pretrain.engine.deepspeed_config import ResolvedDeepSpeed
from pretrain.engine.distributed import gather_rows
from pretrain.files import json_lines, json_object, replacing
from pretrain.state import TrainState

Row = dict[str, Any]
TYPES: dict[str, tuple[type, ...]] = {
    "step": (int,), "samples_seen": (int,), "loss": (float,), "grad_norm": (float, type(None)), "skipped": (bool,),
    "batch": (str,), "world_size": (int,), "micro_batch": (int,), "stage": (int,), "precision": (str,), "on": (str,),
}  # fmt: skip
"""Fields of a row."""
SETUP = ("world_size", "micro_batch", "stage", "precision", "on")
"""Fields that decide how a step is rounded: where they agree, its bits do."""


class StepRecorder:
    """Keeps what the rows of this rank's steps need; the host waits for the device only in ``take``.

    Args:
        engine: ``deepspeed.DeepSpeedEngine``.
        device: of this rank.
    """

    def __init__(self, engine: Any, device: torch.device) -> None:
        self._engine, self._device = engine, device
        self._digest = 0
        self._losses: list[torch.Tensor] = []
        self._ends: list[tuple[Any, torch.Tensor | bool, int]] = []

    def add_batch(self, digest: int) -> None:
        """Add the digest of a micro-batch."""
        self._digest += digest

    def add_loss(self, loss: torch.Tensor) -> None:
        """Add the loss of a micro-batch, a scalar on the device."""
        self._losses.append(loss)

    def end_step(self, skipped: torch.Tensor | bool) -> None:
        """End a step of the optimizer, with what ``NonFiniteSteps.note_step`` returned."""
        self._ends.append((self._engine.get_global_grad_norm(), skipped, self._digest % 2**64))
        self._digest = 0

    def take(self, state: TrainState) -> list[Row]:
        """Rows, without the setup, of the steps since the last call; the last one led to ``state``. Collective."""
        ends, losses, count = self._ends, self._losses, len(self._ends)
        self._ends, self._losses = [], []
        if not ends:
            return []
        norms = [math.nan if norm is None else norm for norm, _, _ in ends]
        numbers = [
            torch.as_tensor(value, dtype=torch.float64, device=self._device)
            for value in (*losses, *norms, *(skipped for _, skipped, _ in ends))
        ]
        digests = torch.from_numpy(np.array([digest for *_, digest in ends], np.uint64).view(np.int64))
        own = torch.cat([torch.stack(numbers).view(torch.int64), digests.to(self._device)])
        by_rank = gather_rows(own[None]).cpu().numpy()
        floats = by_rank[:, :-count].copy().view(np.float64)
        batch, rows = self._engine.train_batch_size(), []
        for index in range(count):
            size = len(losses) // count
            values = floats[:, index * size : (index + 1) * size].ravel()
            norm, skipped = floats[0, index - 2 * count], bool(floats[0, index - count])
            whole = int(by_rank[:, index - count].astype(np.uint64).sum(dtype=np.uint64))
            rows.append({
                "step": state.step - count + index + 1,
                "samples_seen": state.samples_seen - (count - index - 1) * batch,
                # fsum does not depend on the order; it takes no infinities of both signs
                "loss": math.fsum(values) / len(values) if np.isfinite(values).all() else float(values.sum()),
                "grad_norm": None if skipped or math.isnan(norm) else float(norm),
                "skipped": skipped,
                "batch": f"{whole:016x}",
            })  # fmt: skip
        return rows


def describe_setup(resolved: ResolvedDeepSpeed, device: torch.device, *, compiled: bool) -> Row:
    """The fields ``SETUP``; ``on`` names the device and the versions of what computes.

    On a CPU its kind, its instruction set and the number of threads decide how sums are split.
    """
    kind = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    cpu = f"cpu {kind[1] if kind else ''} {torch.backends.cpu.get_cpu_capability()} x {torch.get_num_threads()}"
    versions = [f"{name} {metadata.version(package)}" for name, package in (
        ("torch", "torch"), ("deepspeed", "deepspeed"), ("dali", "nvidia-dali-cuda130"),
    )]  # fmt: skip
    notes = ["compiled"] * compiled + ["deterministic"] * torch.are_deterministic_algorithms_enabled()
    return {
        "world_size": resolved.batch.world_size,
        "micro_batch": resolved.batch.micro_batch,
        "stage": resolved.stage,
        "precision": resolved.precision,
        "on": ", ".join([torch.cuda.get_device_name(device) if device.type == "cuda" else cpu, *versions, *notes]),
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


def cut_rows(file: Path, samples_seen: int, say: Callable[[str], None]) -> None:
    """Remove the steps after ``samples_seen``, which are taken again, and with a warning damaged lines.

    Raises:
        OSError: the file could not be replaced.
    """
    damaged = 0
    if file.exists():
        with file.open("rb") as old, replacing(file) as new:
            for line in old:
                if not is_row(row := json_object(line)):
                    damaged += line.endswith(b"\n")  # else a crash has cut it
                elif row["samples_seen"] <= samples_seen:
                    new.write(line.removesuffix(b"\n") + b"\n")
    if damaged:
        say(f"WARNING {file}: {damaged:,} damaged lines are dropped; replays cannot compare these steps")


def read_rows(file: Path, first: int, last: int) -> dict[int, Row]:
    """Rows of the steps ``first`` to ``last``, by step; damaged lines are left out.

    Raises:
        OSError: it cannot be read.
    """
    return {row["step"]: row for row in json_lines(file) if is_row(row) and first <= row["step"] <= last}
