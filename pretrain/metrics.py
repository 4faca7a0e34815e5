"""Writes measurements: ``metrics.jsonl`` is the source of truth, sinks such as TensorBoard show the same values.

The x axis is samples seen. A kind of measurement ("train", "eval") is a line's ``kind`` and TensorBoard's prefix.
"""

import json
import os
import textwrap
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.files import cut_lines, is_measurement, json_lines, read_sealed, write_sealed
from pretrain.monitoring.sinks import Sink, TensorBoard
from pretrain.outcome import UserError, storage_code
from pretrain.state import TrainState


class MetricsWriter:
    """Writes measurements of one run; on rank 0 only.

    What the previous attempt wrote beyond the checkpoint is cut from ``metrics.jsonl``, purged from TensorBoard's view,
    and not sent again to trackers, which cannot delete.

    Args:
        run: folder of the run, for ``metrics.jsonl`` and the event files of TensorBoard.
        state: from which training resumes; what lies beyond ``measured_until`` of it is measured again.
        trackers: further sinks, by name.
        say: prints a line.

    Raises:
        UserError: ``metrics.jsonl`` cannot be read or replaced.
    """

    def __init__(
        self,
        run: Path,
        state: TrainState,
        *,
        trackers: Mapping[str, Sink] | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._run, self._say, jsonl = run, say, run / "metrics.jsonl"
        self._sent: dict[str, int] = {}
        """Samples seen by the newest line of each kind that the previous attempt wrote."""
        samples_seen, done = state.samples_seen, state.measured_until()
        purge_from = samples_seen + 1

        def keep(row: dict[str, Any]) -> bool:
            nonlocal purge_from
            kind, seen = row["kind"], row["samples_seen"]
            self._sent[kind] = max(seen, self._sent.get(kind, -1))
            if seen <= done.get(kind, samples_seen):
                return True
            purge_from = min(purge_from, seen)
            return False

        try:
            cut_lines(jsonl, is_measurement, keep, say)
            self._lines = jsonl.open("a")
        except OSError as error:
            raise UserError(f"{jsonl} cannot be read or written: {error}", storage_code(error)) from None
        if trackers:
            try:
                self._sent = _sent_to_trackers(run / "trackers.json", self._sent)
            except OSError as error:
                say(f"WARNING {', '.join(trackers)} takes no measurements until the next start ({error})")
                trackers = None
        board = TensorBoard(run / "tensorboard", purge_from=purge_from)
        self._sinks: dict[str, Sink] = {"TensorBoard": board, **(trackers or {})}
        # TensorBoard purges all kinds alike: those that are not measured again are sent again.
        for row in json_lines(jsonl) if purge_from <= samples_seen else ():
            if row is not None and row["samples_seen"] >= purge_from:
                kind, seen, _ = (row.pop(name, None) for name in ("kind", "samples_seen", "time"))
                self._send(lambda sink: sink.scalars(kind, seen, row), again=True)  # noqa: B023 - called at once

    def write(self, kind: str, samples_seen: int, values: Mapping[str, float]) -> None:
        """Write one line, with the time (Unix), and send it to the sinks.

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
        again = samples_seen <= self._sent.get(kind, -1)
        self._send(lambda sink: sink.scalars(kind, samples_seen, values), again=again)

    def image(self, name: str, samples_seen: int, pixels: NDArray[np.uint8]) -> None:
        """Send an image, (height, width, 3), to the sinks."""
        again = samples_seen <= max(self._sent.values(), default=-1)
        self._send(lambda sink: sink.image(name, samples_seen, pixels), again=again)

    def describe_run(self, samples_seen: int) -> None:
        """Send recipe, environment and state of the source, as the run's folder has them, to the sinks."""
        try:
            environment = read_sealed(self._run / "environment.json")
            recipe = (self._run / "recipe.yaml").read_text(errors="replace")
        except (OSError, UserError):
            return  # the next start refuses what is damaged; this one does without
        facts = {key: value for key, value in environment.items() if key not in ("git", "dataset")}
        texts = {
            "recipe": recipe,
            "environment": json.dumps(facts, indent=2),
            "git": json.dumps(environment.get("git"), indent=2),
        }
        for name, text in texts.items():
            markdown = textwrap.indent(text, "    ")
            self._send(lambda sink: sink.text(f"run/{name}", samples_seen, markdown))  # noqa: B023 - called at once

    def flush(self) -> None:
        """Bring all to disk."""
        os.fsync(self._lines.fileno())
        self._send(lambda sink: sink.flush())

    def close(self) -> None:
        """Flush everything to disk."""
        self._send(lambda sink: sink.close())
        os.fsync(self._lines.fileno())
        self._lines.close()

    def _send(self, call: Callable[[Sink], None], *, again: bool = False) -> None:
        """Let each sink take something; trackers nothing ``again``. One that fails is abandoned, with a warning."""
        for name, sink in [*self._sinks.items()]:
            if again and name != "TensorBoard":
                continue
            try:
                call(sink)
            except Exception as error:  # noqa: BLE001 - a service's library may raise anything
                del self._sinks[name]
                self._say(
                    f"WARNING {name} takes no more measurements until the next start, metrics.jsonl does "
                    f"({type(error).__name__}: {error})"
                )


def _sent_to_trackers(marks: Path, newest: Mapping[str, int]) -> dict[str, int]:
    """Up to how many samples seen each kind was sent to trackers, which cannot delete; kept in a file over attempts.

    ``newest``: the same as far as ``metrics.jsonl`` has it.
    """
    try:
        known = {kind: int(seen) for kind, seen in read_sealed(marks).items()}
    except (OSError, UserError, ValueError, TypeError, OverflowError):
        known = {}  # then what metrics.jsonl holds is all that is known to have been sent
    sent = {kind: max(known.get(kind, -1), newest.get(kind, -1)) for kind in {*known, *newest}}
    write_sealed(marks, sent)
    return sent


def read_metrics(jsonl: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """All intact lines of ``metrics.jsonl``, or those of one kind, in memory: for tests and short runs."""
    return [row for row in json_lines(jsonl) if is_measurement(row) and kind in (None, row["kind"])]
