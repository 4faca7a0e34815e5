"""Writes measurements: ``metrics.jsonl`` is the source of truth, sinks such as TensorBoard show the same values.

The x axis is samples seen. A kind of measurement ("train", "eval") is a line's ``kind`` and TensorBoard's prefix.
"""

import json
import os
import shutil
import textwrap
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from operator import methodcaller
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pretrain.files import aside, is_measurement, json_lines, json_object, read_sealed, replacing, write_sealed
from pretrain.monitoring.sinks import Sink, TensorBoard
from pretrain.outcome import UserError, storage_code


class MetricsWriter:
    """Writes measurements of one run; on rank 0 only.

    After a resume nothing is written twice: what the previous attempt wrote beyond the checkpoint is cut from
    ``metrics.jsonl``, purged from TensorBoard's view, and not sent again to trackers, which cannot delete. Damaged
    lines are dropped with a warning; the file that had them is kept as ``metrics.jsonl.damaged-TIME``.

    Args:
        jsonl: path of ``metrics.jsonl``.
        tensorboard: folder of the event files.
        samples_seen: where training resumes.
        done: samples seen by the last measurement of a kind, as the checkpoint has it; lines of that kind beyond it
            are measured again. Other kinds: ``samples_seen``.
        trackers: further sinks, by name.
        say: prints a line.

    Raises:
        UserError: ``metrics.jsonl`` cannot be read or replaced.
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
        self._folder = jsonl.parent
        try:
            newest, purge_from, offset = _cut(jsonl, samples_seen, done or {}, say)
            self._lines = jsonl.open("a")
        except OSError as error:
            raise UserError(f"{jsonl} cannot be read or written: {error}", storage_code(error)) from None
        self._say, self._sinks, self._sent = say, dict[str, Sink](), dict[str, int]()
        try:
            board = TensorBoard(tensorboard, purge_from=purge_from)
            # TensorBoard purges all kinds alike: the kinds that are not measured again there are sent again.
            for row in json_lines(jsonl, offset) if purge_from <= samples_seen else ():
                if row is not None and row["samples_seen"] >= purge_from:
                    places = ("kind", "samples_seen", "time")
                    values = {name: value for name, value in row.items() if name not in places}
                    board.scalars(row["kind"], row["samples_seen"], values)
            if trackers:
                self._sent = _sent_to_trackers(jsonl.parent / "trackers.json", newest)
            self._sinks = {"TensorBoard": board, **(trackers or {})}
        except (OSError, OverflowError) as error:
            names = ", ".join(["TensorBoard", *(trackers or {})])
            say(f"WARNING no measurements until the next start, but in metrics.jsonl: {names} ({error})")

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
            environment = read_sealed(self._folder / "environment.json")
            recipe = (self._folder / "recipe.yaml").read_text(errors="replace")
        except (OSError, UserError):
            return  # the next start refuses what is damaged; this one does without
        facts = {key: value for key, value in environment.items() if key not in ("git", "dataset")}
        texts = {
            "recipe": recipe,
            "environment": json.dumps(facts, indent=2),
            "git": json.dumps(environment.get("git"), indent=2),
        }
        for name, text in texts.items():
            self._send(methodcaller("text", f"run/{name}", samples_seen, textwrap.indent(text, "    ")))

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


def _cut(
    jsonl: Path, samples_seen: int, done: Mapping[str, int], say: Callable[[str], None]
) -> tuple[dict[str, int], int, int]:
    """Remove the damaged lines and those that are measured again, in one pass and a line at a time.

    The file is replaced atomically, and only where a line has to go. A last line cut by a crash is not damage.

    Returns:
        the highest samples seen of each kind, removed lines included; the lowest samples seen of a removed line, at
        most ``samples_seen + 1``; a byte offset before which no line of the new file is at that place or beyond.
    """
    newest: dict[str, int] = {}
    purge_from, earliest = samples_seen + 1, min([samples_seen, *done.values()]) + 1
    size, offset, damaged = 0, None, 0
    if not jsonl.exists():
        return newest, purge_from, 0
    with jsonl.open("rb") as old, ExitStack() as stack:
        new: BinaryIO | None = None
        for line in old:
            kept = False
            if is_measurement(row := json_object(line)):
                kind, seen = row["kind"], row["samples_seen"]
                newest[kind] = max(seen, newest.get(kind, -1))
                kept = seen <= done.get(kind, samples_seen)
                if not kept:
                    purge_from = min(purge_from, seen)
                elif seen >= earliest and offset is None:
                    offset = size
            else:
                damaged += line.endswith(b"\n")
            if new is None and not (kept and line.endswith(b"\n")):
                new = stack.enter_context(replacing(jsonl))
                with jsonl.open("rb") as prefix:
                    shutil.copyfileobj(prefix, new)
                new.truncate(size)
                new.seek(size)
            if kept:
                complete = line.removesuffix(b"\n") + b"\n"
                size += len(complete)
                if new is not None:
                    new.write(complete)
        if damaged:
            shutil.copy2(jsonl, kept_as := aside(jsonl))
            say(f"WARNING {jsonl}: {damaged:,} damaged lines are dropped; the file that had them is {kept_as}")
    return newest, purge_from, size if offset is None else offset


def read_metrics(jsonl: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """All lines of ``metrics.jsonl``, or those of one kind; damaged ones are left out.

    Holds them in memory, for tests and short runs; ``json_lines`` reads a file of any length.
    """
    return [row for row in json_lines(jsonl) if is_measurement(row) and kind in (None, row["kind"])]
