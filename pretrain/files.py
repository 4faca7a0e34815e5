"""Files that are whole or absent."""

import json
import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically and durably: written aside, synced, renamed."""
    draft = path.with_name(f".{path.name}.unfinished")
    with draft.open("w") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    draft.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Replace a file atomically with ``content`` as indented JSON."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def fsync_directory(path: Path) -> None:
    """Make renames within a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
