"""One schema, several places: ``metrics.jsonl`` for programs and as the truth, sinks such as TensorBoard for eyes.

The x axis is samples seen. A kind of measurement ("train", "eval") is a line's ``kind`` and TensorBoard's prefix.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.files import json_lines, write_atomically
from pretrain.monitoring.sinks import ForwardOnly, Guarded, Sink, TensorBoard


class MetricsWriter:
    """Writes measurements of one run, of rank 0 only.

    After a resume nothing stands twice: what the dead incarnation wrote beyond the checkpoint is cut from
    ``metrics.jsonl``, purged from TensorBoard's view, and not told again to trackers, which cannot forget.

    Args:
        jsonl: where the lines are.
        tensorboard: folder of the event files.
        samples_seen: where the run goes on.
        done: up to where kinds were done before it; lines of theirs beyond that are measured again.
        trackers: further sinks, by name.
        say: prints a line.
    """

    def __init__(
        self,
        jsonl: Path,
        tensorboard: Path,
        *,
        samples_seen: int,
        done: Mapping[str, int] | None = None,
        trackers: Mapping[str, Sink] | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        rows = read_metrics(jsonl) if jsonl.exists() else []
        told: dict[str, int] = {}
        for row in rows:
            told[row["kind"]] = max(row["samples_seen"], told.get(row["kind"], -1))
        ends = done or {}
        kept = [row for row in rows if row["samples_seen"] <= ends.get(row["kind"], samples_seen)]
        if jsonl.exists():
            write_atomically(jsonl, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self._lines = jsonl.open("a")
        # TensorBoard purges all kinds alike: where one is measured again, the others of that place are told again.
        again = [row["samples_seen"] for row in rows if row["samples_seen"] > ends.get(row["kind"], samples_seen)]
        purge_from = min([samples_seen + 1, *again])
        board = TensorBoard(tensorboard, purge_from=purge_from)
        marks = jsonl.parent / "trackers.json"
        self._sinks = Guarded(
            {"TensorBoard": board, **{n: ForwardOnly(s, marks, told) for n, s in (trackers or {}).items()}}, say
        )
        for row in kept:
            if row["samples_seen"] >= purge_from:
                values = {name: value for name, value in row.items() if name not in ("kind", "samples_seen", "time")}
                board.scalars(row["kind"], row["samples_seen"], values)

    def write(self, kind: str, samples_seen: int, values: Mapping[str, float]) -> None:
        """Write one line, with the time (Unix), and give it to the sinks.

        Args:
            kind: "train", "norms", "time", "eval", "eval_average", "probe", "attention".
            samples_seen: the x axis.
            values: finite or not, they are written as they are.

        Raises:
            OSError: the line could not be written.
        """
        line = {"kind": kind, "samples_seen": samples_seen, "time": round(time.time(), 3)}
        self._lines.write(json.dumps(line | dict(values)) + "\n")
        self._lines.flush()
        self._sinks.each(lambda sink: sink.scalars(kind, samples_seen, values))

    def picture(self, name: str, samples_seen: int, pixels: NDArray[np.uint8]) -> None:
        """Give a picture, (height, width, 3), to the sinks."""
        self._sinks.each(lambda sink: sink.picture(name, samples_seen, pixels))

    def text(self, name: str, samples_seen: int, markdown: str) -> None:
        """Give a text to the sinks."""
        self._sinks.each(lambda sink: sink.text(name, samples_seen, markdown))

    def flush(self) -> None:
        """Bring the sinks up to date with ``metrics.jsonl``."""
        self._sinks.each(lambda sink: sink.flush())

    def close(self) -> None:
        """Flush all to disk."""
        os.fsync(self._lines.fileno())
        self._lines.close()
        self._sinks.each(lambda sink: sink.close())


def read_metrics(jsonl: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Lines of ``metrics.jsonl``, all or of one kind. A last line that was cut by a crash is left out."""
    return [row for row in json_lines(jsonl) if row is not None and kind in (None, row["kind"])]
