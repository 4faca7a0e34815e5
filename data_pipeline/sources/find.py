"""What SOURCE names: a folder, an archive, shards, or the digits."""

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

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

    num_classes: int | None = Field(None, gt=0, le=100_000)
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
    if wanted.val_fraction:
        return HeldOut(source, wanted.val_fraction, test="val" if isinstance(source, Idx) else None)
    return source


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
        return _shards({wanted.split or split_in(path.name) or "train": [path]}, wanted)
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
        return Idx(path)
    archives = [entry.name for entry in os.scandir(path) if entry.name.endswith(".tar")]
    if archives and all(_WORDNET_TAR.fullmatch(name) for name in archives):
        return ImageNet21k(path, wanted.classes)
    shards = _shards_in(path, wanted.split)
    return _shards(shards, wanted) if shards else ClassFolders(path, wanted.split)


def _matching(wanted: Wanted) -> dict[str, list[Path]]:
    """Return the shards that patterns match, by split; a pattern may be given as SPLIT=PATTERN."""
    found: dict[str, list[Path]] = {}
    for name in wanted.names:
        split, paths = wanted.split, _expanded(name)
        named = _SPLIT_AND_PATTERN.fullmatch(name)
        if not paths and named is not None:
            split, paths = named[1], _expanded(named[2])
        if not paths:
            raise DataError(f"no file matches {name}, which is not 'digits' either; quote patterns and check the path")
        for key, group in _by_split(paths, split).items():
            found.setdefault(key, []).extend(group)
    return found


def _expanded(pattern: str) -> list[Path]:
    """Return the files that a pattern matches; DataError where one that it names by braces is missing."""
    from braceexpand import braceexpand  # noqa: PLC0415  (webdataset's)

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
    for name, part in _info(folder).splits.items() if split is None else ():
        key = SPLIT_WORDS.get(name.lower(), name)
        if key in found or not re.fullmatch(r"[A-Za-z0-9_-]+", key):
            raise DataError(f"{folder / INFO_NAME} has a split {name!r}, which is there twice or no name; correct it")
        found[key] = [folder / file for file in part.filenames]
    if found:
        return found
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
    seen: dict[Path, tuple[str, Path]] = {}
    for split, group in paths.items():
        for path in group:
            other, _ = seen.setdefault(path.resolve(), (split, path))
            if other != split:
                raise DataError(f"{path} is in two splits, {other} and {split}; name it once")
    unique = {split: [path for own, path in seen.values() if own == split] for split in paths}
    count = _info(next(iter(paths.values()))[0].parent).num_classes
    names = wanted.classes or [str(number) for number in range(count or 0)]
    by_name = {name: str(number) for number, name in enumerate(wanted.classes)}
    stated = {str(number): name for number, name in enumerate(names)}
    return Shards(unique, Labels(wanted.label_key, by_name or None), stated or None)


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
