"""Counts the images of a run that could not be used so far."""

from contextlib import suppress
from pathlib import Path

from pretrain.files import json_object


class BadSampleCount:
    """Counts the samples that ``bad_samples.jsonl`` names, each once; reads only what was added since the last call."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0
        self._ids: set[int] = set()

    def __call__(self) -> int:
        """The number so far; where the file cannot be read, that of the last time."""
        with suppress(OSError), self._path.open("rb") as file:
            file.seek(self._offset)
            added = file.read()
            whole = added[: added.rfind(b"\n") + 1]  # another rank may be writing the last line
            self._offset += len(whole)
            rows = map(json_object, whole.splitlines())  # None: cut by a crash, and the next line with it
            self._ids |= {row["id"] for row in rows if row is not None and isinstance(row.get("id"), int)}
        return len(self._ids)
