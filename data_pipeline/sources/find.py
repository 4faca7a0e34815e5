"""What SOURCE names: a folder, an archive, shards, or the digits."""

import glob
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from data_pipeline.archive import entries
from data_pipeline.errors import DataError
from data_pipeline.manifest import INFO_NAME
from data_pipeline.shards import IMAGE_EXTENSIONS, Labels, is_image, samples_of
from data_pipeline.sources import SPLIT_WORDS, Source, split_in
from data_pipeline.sources.digits import Digits
from data_pipeline.sources.folder import Archived, Folder
from data_pipeline.sources.idx import Idx, image_files
from data_pipeline.sources.imagenet import TRAIN, ImageNet1k, ImageNet21k
from data_pipeline.sources.shards import LABEL_MEMBERS, Shards

_TAR = re.compile(r"\.(tar|tgz|tbz2?|txz|tar\.(gz|bz2|xz))$", re.IGNORECASE)
_NOT_READ = re.compile(r"\.(zip|7z|rar|zst|lz4|parquet|tfrecord|jpe?g|png)$", re.IGNORECASE)
_OTHER_TAR = re.compile(r"\.(tar\.[a-z0-9]+|tzst)$", re.IGNORECASE)
_SPLIT_AND_PATTERN = re.compile(r"([A-Za-z0-9_-]+)=(.+)")
_WORDNET_TAR = re.compile(r"n\d{8}\.tar")
_MAX_CLASSES = 100_000
_PEEKED = 64
_ENOUGH = 10_000


@dataclass(frozen=True)
class Wanted:
    """Options of the command line about SOURCE."""

    names: Sequence[str]
    split: str | None = None
    classes: Path | None = None
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
        return _shards(_matching(wanted), wanted)
    if path.is_file():
        return _in_file(path, wanted)
    if path.is_dir():
        return _in_folder(path, wanted)
    if _exists(path):
        raise DataError(f"{name} is neither a file nor a folder; name one that holds images")
    return _with_own_splits(Digits(), wanted, "classes", "val_fraction")


def _in_file(path: Path, wanted: Wanted) -> Source:
    """Return the source of one archive, by its first members."""
    if _NOT_READ.search(path.name):
        raise DataError(f"{path} is not read as it is; unpack it, and name the folder")
    first = list(islice(entries(path), _PEEKED))
    if first and all(entry.name.endswith(".tar") for entry in first):
        return _imagenet21k(path, wanted)
    samples = [sample for sample in samples_of(first, []) if any(map(is_image, sample.members))]
    folders = any("/" in entry.name.removeprefix("./") for entry in first)
    # A text next to an image in a folder may be its caption.
    labels = LABEL_MEMBERS[:2] if folders else LABEL_MEMBERS
    if any(sample.member(label) is not None for sample in samples for label in labels):
        return _shards({wanted.split or split_in(path.name) or "train": [path]}, wanted)
    if not folders:
        raise DataError(
            f"{path} is neither a shard (images with cls, json or txt members) nor an archive of class folders or of "
            "class archives; check the file"
        )
    _refuse(wanted, str(path), "classes", "label_key", "val_fraction")
    return Archived(path, wanted.split)


def _in_folder(path: Path, wanted: Wanted) -> Source:
    if (path / TRAIN).exists():
        return _with_own_splits(ImageNet1k(path), wanted, "classes", "val_fraction")
    if image_files(path, "train"):
        return _with_own_splits(Idx(path, wanted.val_fraction), wanted, "classes")
    archives = [entry.name for entry in os.scandir(path) if entry.name.endswith(".tar")]
    if archives and all(_WORDNET_TAR.fullmatch(name) for name in archives):
        return _imagenet21k(path, wanted)
    shards = _shards_in(path, wanted.split)
    if shards:
        return _shards(shards, wanted)
    _refuse(wanted, "a folder of images", "classes", "label_key")
    return Folder(path, wanted.split, wanted.val_fraction)


def _imagenet21k(path: Path, wanted: Wanted) -> Source:
    classes = None if wanted.classes is None else _lines(wanted.classes)
    return _with_own_splits(ImageNet21k(path, classes), wanted, "val_fraction")


def _with_own_splits(source: Source, wanted: Wanted, *refused: str) -> Source:
    """Return a source whose splits are fixed; DataError where the command line asks for others."""
    _refuse(wanted, wanted.names[0], *refused, "label_key")
    if wanted.split is not None:
        raise DataError(f"{wanted.names[0]} comes with its own splits ({', '.join(source.splits)}); leave --split out")
    return source


def _refuse(wanted: Wanted, what: str, *options: str) -> None:
    for option in options:
        if getattr(wanted, option):
            raise DataError(f"--{option.replace('_', '-')} does not go with {what}; leave it out")


def _matching(wanted: Wanted) -> dict[str, list[Path]]:
    """Return the shards that patterns match, by split; a pattern may be given as SPLIT=PATTERN."""
    found: dict[str, list[Path]] = {}
    for name in wanted.names:
        split, pattern, paths = wanted.split, name, _expanded(name)
        named = _SPLIT_AND_PATTERN.fullmatch(name)
        if not paths and named is not None:
            split, pattern = named[1], named[2]
            paths = _expanded(pattern)
        if not paths and not any(character in pattern for character in "*?[{"):
            raise DataError(f"{name} is not 'digits', a folder, an archive or a pattern of shards; check the path")
        if not paths:
            raise DataError(f"no file matches {pattern}; quote the pattern and check the path")
        for key, group in _by_split(paths, split).items():
            found.setdefault(key, []).extend(group)
    return found


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


def _shards_in(folder: Path, split: str | None) -> dict[str, list[Path]]:
    """Return the shards of a folder by split; none when it is a folder of another kind."""
    found: dict[str, list[Path]] = {}
    for name, part in _info(folder).get("splits", {}).items() if split is None else ():
        key = SPLIT_WORDS.get(name.lower(), name)
        if key in found or not re.fullmatch(r"[A-Za-z0-9_-]+", key):
            raise DataError(f"{folder / INFO_NAME} has a split {name!r}, which is there twice or no name; correct it")
        found[key] = [folder / file for file in part["filenames"]]
    if found:
        return found
    shards: list[Path] = []
    image = other = None
    seen = 0
    for parent, folders, files in os.walk(folder):
        seen += len(files)
        if seen > _ENOUGH and image is not None and not shards:
            break  # a folder of images, in which a shard is listed as any other file that is no image
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
    return _by_split(shards, split, folder) if shards else {}


def _by_split(paths: Sequence[Path], split: str | None, root: Path | None = None) -> dict[str, list[Path]]:
    """Group shards by the split that their names, or their folders' names below `root`, contain."""
    found: dict[str, list[Path]] = {}
    unnamed = None
    for path in dict.fromkeys(paths):
        if not path.is_file():
            raise DataError(f"{path} is not a file; name shards")
        above = reversed(path.parent.relative_to(root).parts) if root is not None else (path.parent.name,)
        named = split or next(filter(None, map(split_in, (path.name, *above))), None)
        unnamed = unnamed or (path if named is None else None)
        found.setdefault(named or "train", []).append(path)
    if unnamed is not None and len(found) > 1:
        raise DataError(f"{unnamed} has no split in its name, but others do; name them as SPLIT=PATTERN")
    return found


def _shards(paths: dict[str, list[Path]], wanted: Wanted) -> Shards:
    """Return the source that converts shards."""
    _refuse(wanted, "shards", "val_fraction")
    seen: dict[Path, str] = {}
    for split, group in paths.items():
        for path in group:
            if seen.setdefault(path.resolve(), split) != split:
                raise DataError(f"{path} is in two splits, {seen[path.resolve()]} and {split}; name it once")
    unique = {split: list({path.resolve(): path for path in group}.values()) for split, group in paths.items()}
    stated = None
    if wanted.classes is not None:
        stated = {str(number): name for number, name in enumerate(_lines(wanted.classes))}
    count = _info(next(iter(paths.values()))[0].parent).get("num_classes")
    if stated is None and isinstance(count, int) and 0 < count <= _MAX_CLASSES:
        stated = {str(number): str(number) for number in range(count)}
    by_name = None if wanted.classes is None or stated is None else {name: number for number, name in stated.items()}
    return Shards(unique, Labels(wanted.label_key, by_name), stated)


def _info(folder: Path) -> dict[str, Any]:
    path = folder / INFO_NAME
    if not path.exists():
        return {}
    try:
        info = json.loads(path.read_bytes())
        missing = [name for part in info.get("splits", {}).values() for name in part["filenames"]]
        missing = [name for name in missing if not (folder / name).is_file()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is not a description of shards ({error}); correct or remove it") from None
    if not all(part["filenames"] for part in info.get("splits", {}).values()):
        raise DataError(f"{path} has a split without files; correct or remove it")
    if missing:
        raise DataError(f"{folder / missing[0]} does not exist, but {path} names it; copy it here")
    return dict(info)


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); name a list of classes, one a line") from None
    names = [line for line in lines if line]
    if not names or len(set(names)) != len(names):
        raise DataError(f"{path} must list each class once, one a line; fix it")
    return names
