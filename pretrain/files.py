"""File helpers for run folders: files with a digest of their own, JSON lines, durability, locks."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeGuard

import yaml

from data_pipeline.files import replacing
from data_pipeline.files import write_atomically as write_atomically  # noqa: PLC0414 - slurm/ takes it from here
from pretrain.outcome import UserError, storage_code

SEAL = "blake2"
"""Key of a file's digest of its own content."""


def write_json(path: Path, content: Any) -> None:
    """Replace a file atomically with ``content`` as indented JSON."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def write_sealed(path: Path, fields: dict[str, Any]) -> None:
    """Replace a file of JSON, or of YAML where it is called so, that carries the digest of its name and content."""
    if path.suffix == ".yaml":
        text = yaml.safe_dump(fields, sort_keys=False)
        write_atomically(path, f"# {SEAL} {digest((path.name + text).encode())}\n{text}".encode())
    else:
        write_json(path, fields | {SEAL: digest_of_fields(fields | {SEAL: path.name})})


def read_sealed(path: Path) -> dict[str, Any]:
    """Fields of a file of ``write_sealed``, without the digest; files of older versions have none.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it cannot be read, or has other content than when it was written.
    """
    try:
        text = path.read_bytes().decode()
        fields = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
        if not isinstance(fields, dict):
            raise ValueError(f"no mapping, but {fields!r:.60}")
        if path.suffix == ".yaml":
            head, _, rest = text.partition("\n")
            mark = f"# {SEAL} "
            stated = head.removeprefix(mark) if head.startswith(mark) else None
            found = digest((path.name + rest).encode())
            misnamed = stated is None and head.endswith(found)
        else:
            stated = fields.pop(SEAL, None)
            found = digest_of_fields(fields | {SEAL: path.name})
            *names, last = fields or [""]
            others = {name: fields[name] for name in names} | {SEAL: path.name}
            misnamed = stated is None and bool(names) and digest_of_fields(others) == fields[last]
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}", storage_code(error)) from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())[:300]}): put it back") from None
    if misnamed or stated not in (None, found):  # misnamed: the digest is there, but what names it is damaged
        raise UserError(
            f"{path} has other content than when it was written: put it back, or take {SEAL} out of it if it was "
            "changed on purpose"
        )
    return fields


def aside(path: Path) -> Path:
    """Where something damaged is kept, next to its replacement."""
    return path.with_name(f"{path.name}.damaged-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}")


def json_object(line: bytes) -> dict[str, Any] | None:
    """One line of a file of JSON objects; None where it is not one, such as a line that a crash cut."""
    try:
        row = json.loads(line.decode(errors="replace"))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def json_lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """Read a file of JSON objects line by line: ``json_object`` of each line."""
    with path.open("rb") as handle:
        yield from map(json_object, handle)


def cut_lines(
    path: Path,
    intact: Callable[[dict[str, Any] | None], bool],
    keep: Callable[[dict[str, Any]], bool],
    say: Callable[[str], None],
) -> None:
    """Remove damaged lines, and those that ``keep`` rejects, from a file of JSON objects; it need not exist.

    One line at a time is held in memory, and the file is replaced only if a line is removed. A last line that was cut
    by a crash does not count as damage; other damaged lines are reported through ``say``, and a copy of the file is
    kept.

    Raises:
        OSError: the file cannot be read or replaced.
    """
    if not path.exists():
        return
    size = damaged = 0
    with path.open("rb") as old, ExitStack() as stack:
        new: BinaryIO | None = None
        for line in old:
            row = json_object(line)
            whole = intact(row)
            kept = whole and row is not None and keep(row)
            damaged += not whole and line.endswith(b"\n")
            if new is None and not (kept and line.endswith(b"\n")):
                new = stack.enter_context(replacing(path))
                with path.open("rb") as prefix:
                    shutil.copyfileobj(prefix, new)
                new.truncate(size)
                new.seek(size)
            if new is None:
                size += len(line)
            elif kept:
                new.write(line.removesuffix(b"\n") + b"\n")
        if damaged:
            shutil.copy2(path, copy := aside(path))
            say(f"WARNING {path}: {damaged:,} damaged lines are dropped; the file that had them is {copy}")


def is_measurement(row: dict[str, Any] | None) -> TypeGuard[dict[str, Any]]:
    """Whether a line of ``metrics.jsonl`` is intact, as far as can be seen: a kind, samples seen, and numbers."""
    return (
        row is not None
        and isinstance(row.get("kind"), str)
        and type(row.get("samples_seen")) is int
        and 0 <= row["samples_seen"] < 2**63
        and all(type(value) in (int, float) for name, value in row.items() if name != "kind")
    )


def fsync(path: Path) -> None:
    """Make a file's content, or the renames within a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(path: Path) -> IO[str] | None:
    """Lock a file for as long as the result is open; it is made where there is none.

    Returns:
        None where another one has locked it. A lock goes with its process, however that ends.
    """
    handle = path.open("a")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        return None
    return handle


def digest(content: bytes) -> str:
    """BLAKE2 of 16 bytes, in hexadecimal."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def digest_of_fields(fields: dict[str, Any]) -> str:
    """``digest`` of the content of a JSON file, however it is indented."""
    return digest(json.dumps(fields, sort_keys=True).encode())


def digest_of_file(path: Path) -> str:
    """``digest`` of a file's content, without holding it in memory."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
