"""Ways to damage a file. Random ones take a generator, so that a seed repeats them."""

import errno
import io
import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

Damage = Callable[[Path, random.Random], None]


def flip_byte(file: Path) -> None:
    """Change one bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


def cut(file: Path) -> None:
    """Take the last bytes away."""
    file.write_bytes(file.read_bytes()[:-7])


def flip_some(file: Path, draw: random.Random) -> None:
    content = bytearray(file.read_bytes())
    for _ in range(draw.choice((1, 1, 3))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def truncate(file: Path, draw: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: draw.randrange(1, len(content))])


def zero(file: Path, draw: random.Random) -> None:
    content = file.read_bytes()
    first, last = sorted(draw.sample(range(len(content) + 1), 2))
    file.write_bytes(content[:first] + bytes(last - first) + content[last:])


def empty(file: Path, _: random.Random) -> None:
    file.write_bytes(b"")


def delete(file: Path, _: random.Random) -> None:
    file.unlink()


def make_folder(file: Path, _: random.Random) -> None:
    file.unlink()
    file.mkdir()


def nest(file: Path, draw: random.Random) -> None:
    file.write_text(draw.choice(("[" * 200_000, '{"kind":' * 200_000, "[" * 200_000 + "]" * 200_000)))


def take_neighbor(file: Path, draw: random.Random) -> None:
    """Replace it with another file of the same kind, such as that of another rank or checkpoint."""
    near = [*file.parent.glob(f"*{file.suffix}"), *file.parents[1].glob(f"*/*{file.name}")]
    different = sorted(path for path in near if path.is_file() and path.read_bytes() != file.read_bytes())
    shutil.copy(draw.choice(different), file) if different else empty(file, draw)


def change_value(file: Path, draw: random.Random, *, digest: bool = True) -> None:
    """Valid JSON or YAML in which a value anywhere is removed, or of another type; in a file of lines, in one line."""
    head, text = "", file.read_text(errors="replace")
    if file.suffix == ".yaml":
        head, _, text = text.partition("\n")
    lines = text.splitlines() if file.suffix == ".jsonl" else [text]
    place = draw.randrange(len(lines))
    content = _parse(file, lines[place])
    parents = list(_containers(content))
    parent = draw.choice([one for one in parents if one])
    key = draw.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
    if draw.random() < 0.4:
        del parent[key]
    else:
        parent[key] = draw.choice([v for v in (None, "x", 7, -1.5, [], {}, [1], True, 10**400) if v != parent[key]])
    if not digest and isinstance(content, dict):
        head, content = "", {key: value for key, value in content.items() if key not in ("blake2", "config_blake2")}
    lines[place] = json.dumps(content)
    file.write_text((f"{head}\n" if head else "") + "\n".join(lines) + "\n")


def change_without_digest(file: Path, draw: random.Random) -> None:
    """The same in a file as older versions wrote it."""
    change_value(file, draw, digest=False)


def _parse(file: Path, text: str) -> Any:
    import yaml

    return yaml.safe_load(text) if file.suffix == ".yaml" else json.loads(text)


def _containers(content: Any) -> Iterator[Any]:
    if isinstance(content, dict | list):
        yield content
        for one in content.values() if isinstance(content, dict) else content:
            yield from _containers(one)


STRUCTURE = (change_value, change_without_digest)
KINDS: tuple[Damage, ...] = (flip_some, truncate, zero, empty, delete, make_folder, nest, take_neighbor)


@contextmanager
def unreadable(file: Path, number: int) -> Iterator[None]:
    """Opening it fails with this number of an error, within the block."""
    original = io.open

    def fail(path: Any, *arguments: Any, **options: Any) -> Any:
        if str(path) == str(file):
            raise OSError(number, errno.errorcode[number], str(path))
        return original(path, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io, "open", fail)
        yield
