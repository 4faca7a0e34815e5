"""One schema, two places: ``metrics.jsonl`` for programs, TensorBoard for eyes. The x axis is samples seen."""

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.files import write_atomically


class MetricsWriter:
    """Writes measurements of one run, of rank 0 only.

    After a resume nothing stands twice: what the dead incarnation wrote beyond the checkpoint is cut from
    ``metrics.jsonl`` and purged from TensorBoard's view.
    """

    def __init__(
        self, jsonl: Path, tensorboard: Path, *, samples_seen: int, done: Mapping[str, int] | None = None
    ) -> None:
        """Open both for a run that goes on at ``samples_seen``; ``done`` says up to where kinds were done before it."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - seconds that only rank 0 pays
        _cut_after(jsonl, samples_seen, done or {})
        self._lines = jsonl.open("a")
        self._tensorboard = SummaryWriter(str(tensorboard), purge_step=samples_seen + 1)

    def write(self, kind: str, samples_seen: int, values: dict[str, float | int]) -> None:
        """Write one line and one TensorBoard point per value.

        Args:
            kind: "train", "eval", "eval_average", "probe"; the prefix in TensorBoard.
            samples_seen: the x axis.
            values: finite or not, they are written as they are.
        """
        self._lines.write(json.dumps({"kind": kind, "samples_seen": samples_seen, **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(f"{kind}/{name}", value, samples_seen)

    def flush(self) -> None:
        """Bring TensorBoard's file up to date with ``metrics.jsonl``."""
        self._tensorboard.flush()

    def close(self) -> None:
        """Flush all to disk."""
        os.fsync(self._lines.fileno())
        self._lines.close()
        self._tensorboard.close()


def read_metrics(jsonl: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Lines of ``metrics.jsonl``, all or of one kind. A last line that was cut by a crash is left out."""
    rows = []
    for line in jsonl.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in rows if kind in (None, row["kind"])]


def _cut_after(jsonl: Path, samples_seen: int, done: Mapping[str, int]) -> None:
    if jsonl.exists():
        rows = [row for row in read_metrics(jsonl) if row["samples_seen"] <= done.get(row["kind"], samples_seen)]
        kept = [json.dumps(row) + "\n" for row in rows]
        write_atomically(jsonl, "".join(kept).encode())
