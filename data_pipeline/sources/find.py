"""What SOURCE names: a folder, an archive, shards, or the digits."""

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from data_pipeline.archive import headers_only, members
from data_pipeline.errors import DataError, reading
from data_pipeline.manifest import INFO_NAME
from data_pipeline.shards import IMAGE_EXTENSIONS, LABEL_MEMBERS, Labels, is_image, samples_of
from data_pipeline.sources import SPLIT_WORDS, HeldOut, Source, split_in
from data_pipeline.sources.digits import Digits
from data_pipeline.sources.folder import ClassFolders
from data_pipeline.sources.idx import Idx, image_files
from data_pipeline.sources.imagenet import TRAIN, ImageNet1k, ImageNet21k
from data_pipeline.sources.shards import Shards

_TAR = re.compile(r"\.(tar|tgz|tbz2?|txz|tar\.(gz|bz2|xz))$", re.IGNORECASE)
_NOT_READ = re.compile(r"\.(zip|7z|rar|zst|lz4|parquet|tfrecord|jpe?g|png)$", re.IGNORECASE)
_OTHER_TAR = re.compile(r"\.(tar\.[a-z0-9]+|tzst)$", re.IGNORECASE)
_SPLIT_AND_PATTERN = re.compile(r"([A-Za-z0-9_-]+)=(.+)")
_WORDNET_TAR = re.compile(r"n\d{8}\.tar")
_PEEKED = 64


class _Part(BaseModel):
    filenames: list[str] = Field(min_length=1)


class _Info(BaseModel):
    """What other people's _info.json says."""

    num_classes: Any = None
    splits: dict[str, _Part] = {}


@dataclass(frozen=True)
class Wanted:
    """Options of the command line about SOURCE."""

    names: Sequence[str]
    split: str | None = None
    classes: Sequence[str] = ()
    label_key: str | None = None
    val_fraction: float = 0.0


def find_source(wanted: Wanted) -> Source:
    """Return the source that SOURCE names.

    Raises:
        DataError: it is nothing we know, or an option does not go with it.
    """
    name = wanted.names[0]
    path = Path(name)
    if len(wanted.names) > 1 or not (_exists(path) or name == "digits"):
        source: Source = _shards(_matching(wanted), wanted)
    elif path.is_file():
        source = _in_file(path, wanted)
    elif path.is_dir():
        source = _in_folder(path, wanted)
    elif _exists(path):
        raise DataError(f"{name} is neither a file nor a folder; name one that holds images")
    else:
        source = Digits()
    for option in ("split", "classes", "label_key", "val_fraction"):
        if getattr(wanted, option) and option not in source.options:
            raise DataError(
                f"--{option.replace('_', '-')} does not go with {name}, which comes with what it sets; leave it out"
            )
    return HeldOut(source, name, wanted.val_fraction) if wanted.val_fraction else source


def _in_file(path: Path, wanted: Wanted) -> Source:
    """Return the source of one archive, by its first members."""
    if _NOT_READ.search(path.name):
        raise DataError(f"{path} is not read as it is; unpack it, and name the folder")
    first = list(islice(members(path, inline=headers_only), _PEEKED))
    if first and all(member.name.endswith(".tar") for member in first):
        return ImageNet21k(path, wanted.classes)
    samples = [sample for sample in samples_of(first) if any(map(is_image, sample.members))]
    folders = any("/" in member.name.removeprefix("./") for member in first)
    # A text next to an image in a folder may be its caption.
    labels = LABEL_MEMBERS[:2] if folders else LABEL_MEMBERS
    if any(sample.member(label) is not None for sample in samples for label in labels):
        return _shards([(None, path)], wanted, path.parent)
    if not folders:
        raise DataError(
            f"{path} is neither a shard (images with cls, json or txt members) nor an archive of class folders or of "
            "class archives; check the file"
        )
    return ClassFolders(path, wanted.split)


def _in_folder(path: Path, wanted: Wanted) -> Source:
    if (path / TRAIN).exists():
        return ImageNet1k(path)
    if image_files(path, "train"):
        return Idx(path, "test" if wanted.val_fraction else "val")
    archives = [entry.name for entry in os.scandir(path) if entry.name.endswith(".tar")]
    if archives and all(_WORDNET_TAR.fullmatch(name) for name in archives):
        return ImageNet21k(path, wanted.classes)
    shards = _shards_in(path, wanted.split)
    return _shards(shards, wanted, path) if shards else ClassFolders(path, wanted.split)


def _matching(wanted: Wanted) -> Iterator[tuple[str | None, Path]]:
    """Yield the shards that patterns match; a pattern may be given as SPLIT=PATTERN."""
    for name in wanted.names:
        split, paths = None, _expanded(name)
        named = _SPLIT_AND_PATTERN.fullmatch(name)
        if not paths and named is not None:
            split, paths = named[1], _expanded(named[2])
        if not paths:
            raise DataError(f"no file matches {name}, which is not 'digits' either; quote patterns and check the path")
        yield from ((split, path) for path in paths)


def _expanded(pattern: str) -> list[Path]:
    """Return the files that a pattern matches; DataError where one that it names by braces is missing."""
    from braceexpand import braceexpand  # noqa: PLC0415  (webdataset's)

    if _exists(Path(pattern)):
        return [Path(pattern)]
    try:
        parts = list(braceexpand(pattern))
    except ValueError as error:
        raise DataError(f"{pattern} is not a valid pattern ({error}); check its braces") from None
    found = [_globbed(part) for part in parts]
    missing = next((part for part, paths in zip(parts, found, strict=True) if not paths), None)
    if missing is not None and any(found):
        raise DataError(f"{missing}, which {pattern} names, does not exist; copy it here or correct the pattern")
    return [path for paths in found for path in paths]


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a pattern may be too long for a name
        return False


def _globbed(part: str) -> list[Path]:
    path = Path(part)
    if _exists(path):
        return [path]
    # A folder's name may have brackets.
    pattern = f"{glob.escape(str(path.parent))}/{path.name}" if path.parent.is_dir() else part
    return sorted(Path(found) for found in glob.glob(pattern))  # noqa: PTH207  (the pattern may be absolute)


def _shards_in(folder: Path, split: str | None) -> list[tuple[str | None, Path]]:
    """Return the shards of a folder, and their splits if a file in it states them; none in a folder of another kind."""
    parts = _info(folder).splits if split is None else {}
    stated = [(SPLIT_WORDS.get(name.lower(), name), part) for name, part in parts.items()]
    if len(dict(stated)) < len(stated) or not all(re.fullmatch(r"[A-Za-z0-9_-]+", name) for name, _ in stated):
        raise DataError(f"{folder / INFO_NAME} has a split twice or one whose name is no name; correct it")
    if stated:
        return [(name, folder / file) for name, part in stated for file in part.filenames]
    shards: list[Path] = []
    image = other = None
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in sorted(name for name in files if not name.startswith(".")):
            if _TAR.search(file):
                shards.append(Path(parent, file))
            elif _OTHER_TAR.search(file):
                other = Path(parent, file)
            elif image is None and file.lower().rpartition(".")[2] in IMAGE_EXTENSIONS:
                image = Path(parent, file)
    if shards and image is not None:
        raise DataError(
            f"{folder} holds shards such as {shards[0]} and images such as {image}; name the shards by a pattern, or "
            "remove them"
        )
    if other is not None and image is None:
        raise DataError(f"{other} is compressed in a way that is not read; use gzip, bzip2 or xz, or none")
    return [(None, path) for path in shards]


def _shards(found: Iterable[tuple[str | None, Path]], wanted: Wanted, root: Path | None = None) -> Shards:
    """Return the source that converts shards.

    Args:
        found: the shards; their splits where they are stated, else their names or their folders' names contain them.
        wanted: the options.
        root: the folder below which folders' names count; None takes that of the shard's own folder.
    """
    seen: dict[Path, tuple[str | None, Path]] = {}
    for stated, path in found:
        if not path.is_file():
            raise DataError(f"{path} is not a file; name shards")
        above = (path.parent.name,) if root is None else path.parent.relative_to(root).parts
        split = stated or wanted.split or next(filter(None, map(split_in, (path.name, *reversed(above)))), None)
        other, _ = seen.setdefault(path.resolve(), (split, path))
        if other != split:
            raise DataError(f"{path} is in two splits, {other} and {split}; name it once")
    paths: dict[str | None, list[Path]] = {}
    for split, path in seen.values():
        paths.setdefault(split, []).append(path)
    if None in paths and len(paths) > 1:
        raise DataError(f"{paths[None][0]} has no split in its name, but others do; name them as SPLIT=PATTERN")
    count = _info(next(iter(seen.values()))[1].parent).num_classes
    known = isinstance(count, int) and 0 < count <= 100_000
    names = wanted.classes or [str(number) for number in range(count if known else 0)]
    by_name = {name: str(number) for number, name in enumerate(wanted.classes)}
    stated_classes = {str(number): name for number, name in enumerate(names)}
    by_split = {split or "train": group for split, group in paths.items()}
    return Shards(by_split, Labels(wanted.label_key, by_name or None), stated_classes or None)


def _info(folder: Path) -> _Info:
    path = folder / INFO_NAME
    if not path.exists():
        return _Info()
    with reading(path):
        text = path.read_bytes()
    try:
        info = _Info.model_validate_json(text)
    except ValidationError as error:
        reason = str(error.errors()[0]["msg"])
        raise DataError(f"{path} is not a description of shards ({reason}); correct or remove it") from None
    for name in (name for part in info.splits.values() for name in part.filenames):
        if not (folder / name).is_file():
            raise DataError(f"{folder / name} does not exist, but {path} names it; copy it here")
    return info


def read_classes(path: Path) -> list[str]:
    """Return the classes that a file lists, one a line."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); name a list of classes, one a line") from None
    names = [line for line in lines if line]
    if not names or len(set(names)) != len(names):
        raise DataError(f"{path} must list each class once, one a line; fix it")
    return names
