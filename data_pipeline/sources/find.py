"""What SOURCE names: a folder, an archive, shards, or the digits."""

import glob
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from data_pipeline.archive import entries
from data_pipeline.errors import DataError
from data_pipeline.index import Labels, samples_of
from data_pipeline.manifest import INFO_NAME
from data_pipeline.sources import Source, imagenet1k, split_in
from data_pipeline.sources.archived import Archived
from data_pipeline.sources.digits import Digits
from data_pipeline.sources.folder import Folder
from data_pipeline.sources.idx import Idx, image_files
from data_pipeline.sources.imagenet1k import ImageNet1k
from data_pipeline.sources.imagenet21k import ImageNet21k
from data_pipeline.sources.shards import LABEL_MEMBERS, Shards

_TAR = re.compile(r"\.(tar|tgz|tbz2?|txz|tar\.(gz|bz2|xz))$")
_PEEKED = 64


@dataclass(frozen=True)
class Wanted:
    """What the command line says about SOURCE."""

    names: Sequence[str]
    split: str | None = None
    classes: Path | None = None
    label_key: str | None = None
    val_fraction: float = 0.0


def find_source(wanted: Wanted) -> tuple[Source, dict[str, list[Path]]]:
    """Return the source, and the files of each split where it is shards.

    Raises:
        DataError: it is nothing we know, or an option does not go with it.
    """
    name = wanted.names[0]
    path = Path(name)
    shards: dict[str, list[Path]] = {}
    source: Source
    if len(wanted.names) > 1 or not (path.exists() or name == "digits"):
        shards = _matching(wanted)
    elif path.is_dir():
        shards = _shards_in(path, wanted.split)
    elif path.is_file() and _kind_of(path) == "shard":
        shards = {wanted.split or split_in(path.name) or "train": [path]}
    if shards:
        _refuse(wanted, "shards", "val_fraction")
        return _shards(shards, wanted), shards
    if path.is_dir() and not (path / imagenet1k.TRAIN).exists() and not image_files(path, "train"):
        _refuse(wanted, "a folder of images", "classes", "label_key")
        return Folder(path, wanted.split, wanted.val_fraction), {}
    if path.is_file() and _kind_of(path) == "archive of archives":
        _refuse(wanted, "ImageNet-21k", "label_key", "val_fraction")
        source = ImageNet21k(path, None if wanted.classes is None else _lines(wanted.classes))
    else:
        _refuse(wanted, name, "classes", "label_key", "val_fraction")
        if path.is_dir():
            source = ImageNet1k(path) if (path / imagenet1k.TRAIN).exists() else Idx(path)
        else:
            source = Archived(path) if path.is_file() else Digits()
    if wanted.split is not None:
        raise DataError(f"{name} comes with its own splits ({', '.join(source.splits)}); leave --split out")
    return source, {}


def _refuse(wanted: Wanted, what: str, *options: str) -> None:
    for option in options:
        if getattr(wanted, option):
            raise DataError(f"--{option.replace('_', '-')} does not go with {what}; leave it out")


def _kind_of(path: Path) -> str:
    """Say what an archive holds, by its first members."""
    first = list(islice(entries(path), _PEEKED))
    if any(entry.name.endswith(".tar") for entry in first):
        return "archive of archives"
    samples = list(samples_of(first, []))
    if any(sample.member(label) is not None for sample in samples for label in LABEL_MEMBERS):
        return "shard"
    if any("/" in entry.name.removeprefix("./") for entry in first):
        return "archive of class folders"
    raise DataError(
        f"{path} is neither a shard (images with cls, json or txt members) nor an archive of class folders or of class "
        "archives; check the file"
    )


def _matching(wanted: Wanted) -> dict[str, list[Path]]:
    """Return the shards that patterns match, by split; a pattern may be given as SPLIT=PATTERN."""
    found: dict[str, list[Path]] = {}
    for name in wanted.names:
        split, _, pattern = name.rpartition("=") if re.match(r"[A-Za-z0-9_-]+=", name) else ("", "", name)
        paths = [path for part in _expanded(pattern) for path in _globbed(part)]
        if not paths and not any(character in pattern for character in "*?[{"):
            raise DataError(f"{name} is not 'digits', a folder, an archive or a pattern of shards; check the path")
        if not paths:
            raise DataError(f"no file matches {pattern}; quote the pattern and check the path")
        for key, group in _by_split(paths, split or wanted.split).items():
            found.setdefault(key, []).extend(group)
    return found


def _expanded(pattern: str) -> list[str]:
    from braceexpand import braceexpand  # noqa: PLC0415  (webdataset's)

    if Path(pattern).exists():
        return [pattern]
    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise DataError(f"{pattern} is no pattern ({error}); check its braces") from None


def _globbed(part: str) -> list[Path]:
    return [Path(part)] if Path(part).exists() else sorted(Path(path) for path in glob.glob(part))  # noqa: PTH207


def _shards_in(folder: Path, split: str | None) -> dict[str, list[Path]]:
    """Return the shards of a folder by split; none when it is a folder of another kind."""
    if (folder / imagenet1k.TRAIN).exists():
        return {}
    named = _info(folder).get("splits", {})
    if named and split is None:
        return {split_in(name) or name: [folder / file for file in part["filenames"]] for name, part in named.items()}
    paths = [path for path in _tars(folder) if path.is_file()]
    return _by_split(paths, split) if paths else {}


def _tars(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            yield from (inner for inner in sorted(path.iterdir()) if _TAR.search(inner.name))
        elif _TAR.search(path.name):
            yield path


def _by_split(paths: Sequence[Path], split: str | None) -> dict[str, list[Path]]:
    """Group shards by the split that their names, or their folders' names, speak of."""
    found: dict[str, list[Path]] = {}
    unnamed = None
    for path in paths:
        named = split or split_in(path.name) or split_in(path.parent.name)
        unnamed = unnamed or (path if named is None else None)
        found.setdefault(named or "train", []).append(path)
    if unnamed is not None and len(found) > 1:
        raise DataError(f"{unnamed} does not say which split it belongs to, others do; name them as SPLIT=PATTERN")
    return found


def _shards(paths: dict[str, list[Path]], wanted: Wanted) -> Shards:
    """Return the source that converts shards."""
    stated = None
    if wanted.classes is not None:
        stated = {str(number): name for number, name in enumerate(_lines(wanted.classes))}
    count = _info(next(iter(paths.values()))[0].parent).get("num_classes")
    if stated is None and isinstance(count, int):
        stated = {str(number): str(number) for number in range(count)}
    by_name = None if wanted.classes is None or stated is None else {name: number for number, name in stated.items()}
    return Shards(paths, Labels(wanted.label_key, by_name), stated)


def _info(folder: Path) -> dict[str, Any]:
    path = folder / INFO_NAME
    if not path.exists():
        return {}
    try:
        info = json.loads(path.read_bytes())
        missing = [name for part in info.get("splits", {}).values() for name in part["filenames"]]
        missing = [name for name in missing if not (folder / name).is_file()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a description of shards ({error}); fix it or take it away") from None
    if missing:
        raise DataError(f"{folder / missing[0]} does not exist, but {path} names it; copy it here")
    return dict(info)


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); name a list of classes, one a line") from None
    names = [line for line in lines if line]
    if not names or len(set(names)) != len(names):
        raise DataError(f"{path} must list each class once, one a line; fix it")
    return names
