"""Class folders, (SPLIT/)CLASS/**/IMAGE, on disk or in an archive."""

import os
import stat
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipeline.acceptance import Rejected
from data_pipeline.archive import Content, Extent, headers_only, members
from data_pipeline.errors import DataError, printable, reading
from data_pipeline.sources import SPLIT_WORDS, Source, SourceImage, is_hidden, may_be_image, split_in, splits_among

Parts = tuple[str, ...]
"""The names of a path below the root."""


class ClassFolders(Source):
    """A folder of class folders, or of such folders for each split; or a tar of them, which is never unpacked to disk.

    On disk the classes or splits are in the root, in an archive below the folders that all images share. Links are
    followed. Whatever is no image of a class, such as a hidden file or one next to the class folders, is listed.

    Args:
        root: the folder, or the archive.
        split: what the images become, each folder being a class; None finds `train`, `val` and `test`.

    Raises:
        DataError: there are no class folders, or they may not be the classes.
        StorageError: the folder cannot be read.
    """

    options = ("split", "val_fraction")

    def __init__(self, root: Path, split: str | None = None) -> None:
        self.root = root
        files: Counter[Parts] = Counter()
        with_images: set[Parts] = set()
        for parts, content in self._files(headers_only):
            files[parts[:-1]] += 1
            if not isinstance(content, Rejected) and may_be_image(parts[-1]):
                with_images.add(parts[:-1])
        self._above = () if root.is_dir() else _shared(with_images)
        depth = len(self._above)
        inside: dict[str, set[str]] = {}
        """The folders below each folder at that depth; '' stands for images directly in it."""
        for parts in with_images:
            if len(parts) > depth:
                inside.setdefault(parts[depth], set()).add("".join(parts[depth + 1 : depth + 2]))
        if not inside:
            raise DataError(f"{root} has no class folders with images; images must be in {root}/CLASS/")
        self._split_of = {} if split is not None else _splits(root, inside)
        if split is None and not self._split_of:
            _refuse_odd(root, inside)
        named = (SPLIT_WORDS.get(part.lower()) for part in reversed((*self._above, "")))
        self._split = split or next(filter(None, named), None) or (not root.is_dir() and split_in(root.name)) or "train"
        self._classes = {name: inside[folder] - {""} for folder, name in self._split_of.items()}
        self._classes = self._classes or {self._split: set(inside)}
        splits = sorted(self._classes, key=("train", "val", "test", split).index)
        for name in splits:
            if not self._classes[name] & self._classes[splits[0]]:
                raise DataError(
                    f"split '{name}' of {root} has no class folder of the training split, so its labels must be "
                    "elsewhere; sort its images into class folders, or name the training split's folder as SOURCE"
                )
        counts: Counter[str] = Counter()
        for parts, count in files.items():
            counts[self._place((*parts, ""))[0]] += count
        described: dict[str, Any] = {"source": "folder", "root": printable(str(root))}
        if not root.is_dir():
            described = {"source": "archive of class folders", "path": printable(str(root.resolve()))}
            described |= {"bytes": root.stat().st_size}
        names = sorted(set().union(*self._classes.values()))
        super().__init__(tuple(splits), described, {name: name for name in names}, counts)

    def images(self, split: str) -> Iterator[SourceImage]:
        """Yield the images of a split, in the order of the archive or of the folders' names."""
        beside: dict[str, Rejected] = {}
        counts: Counter[str] = Counter()
        for parts, content in self._files():
            found, class_id, name = self._place(parts)
            if found == split:
                yield SourceImage(name, class_id, _located(content) if isinstance(content, str) else content)
            elif not found:
                reason = content if isinstance(content, Rejected) else Rejected("is in no class folder")
                beside[name] = reason
                counts[name] += name != "/".join(parts)
        if split == self.splits[0]:
            for name, reason in beside.items():
                inside = Rejected(f"a folder that is no class (files: {counts[name]:,})")
                yield SourceImage(name, "", inside if counts[name] else reason)

    def _files(self, inline: Callable[[str], bool] | None = None) -> Iterator[tuple[Parts, Content | str]]:
        """Yield all files, and folders that are left out, with their content, or their path on disk."""
        if self.root.is_dir():
            yield from _walk(self.root, ())
            return
        for member in members(self.root, inline=inline):
            parts = PurePosixPath(member.name).parts or (member.name,)
            yield parts, Rejected("hidden") if any(map(is_hidden, parts)) else member.content

    def _place(self, parts: Parts) -> tuple[str, str, str]:
        """Return split, class and name of a file; else '', '' and which folder or file next to the classes it is."""
        level = len(_common([self._above, parts]))
        split = "" if self._split_of or level < len(self._above) else self._split
        if level == len(self._above) and parts[level] in self._split_of:
            split = self._split_of[parts[level]]
            level += 1
        if split and len(parts) > level + 1 and parts[level] in self._classes[split]:
            return split, parts[level], "/".join(parts[level:])
        return "", "", "/".join(parts[: level + 1])


def _common(paths: Collection[Parts]) -> Parts:
    """Return the folders with which all paths begin."""
    levels = takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
    return tuple(names[0] for names in levels)


def _shared(folders: Collection[Parts]) -> Parts:
    """Return the folders of an archive that all images share, without that of a single class."""
    shared = _common(folders)
    below = {parts[len(shared)] for parts in folders if len(parts) > len(shared)}
    return shared[:-1] if shared in folders and len(below) <= 1 else shared


def _splits(root: Path, inside: dict[str, set[str]]) -> dict[str, str]:
    """Return the split of each folder that is one, if there are any; DataError where they may as well be classes."""
    words = splits_among(inside)
    found: dict[str, str] = {}
    others = []
    for name in sorted(inside):
        split = words.get(name, SPLIT_WORDS.get(name.lower()))
        if split is None:
            others.append(name)
        elif inside[name] - {""}:
            if split in found.values():
                raise DataError(f"{root} has both {name} and another folder for {split}; name one of them as SOURCE")
            found[name] = split
    strange = next((name for name in others if "" in inside[name] or len(found) == 1), None)
    if found and strange is not None:
        raise DataError(
            f"{root} has {next(iter(found))} with folders as in a split, and {strange} with images as in a class; "
            "name one of them as SOURCE, or take every folder as a class with --split train"
        )
    return found


def _refuse_odd(root: Path, inside: dict[str, set[str]]) -> None:
    """Refuse folders that are not likely to be classes: all have names of splits, or one holds only folders."""
    first, *more = sorted(inside)
    if all(name.lower() in SPLIT_WORDS for name in inside):
        raise DataError(f"{root} has images in {first} that are in no class folder; sort them into class folders")
    if not more and "" not in inside[first]:
        raise DataError(
            f"{root} has one folder, {first}, with folders in it; name {root / first} as SOURCE, or take it as one "
            "class with --split train"
        )


def _walk(folder: Path, parts: Parts) -> Iterator[tuple[Parts, Content | str]]:
    """Yield the path of each file below a folder, or why it is left out; links are followed."""
    if parts and folder.is_symlink() and any(folder.samefile(parent) for parent in folder.absolute().parents):
        yield parts, Rejected("a link to a folder above it")
        return
    with reading(folder):
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    if not entries and parts:
        yield parts, Rejected("an empty folder")
    below = []
    for entry in entries:
        inside = (*parts, printable(entry.name))
        if is_hidden(entry.name):
            yield inside, Rejected("hidden")
        elif Path(entry.path).is_dir() if entry.is_symlink() else entry.is_dir():  # a link may lead to itself
            below.append((Path(entry.path), inside))
        else:
            yield inside, entry.path
    for path, inside in below:
        yield from _walk(path, inside)


def _located(path: str) -> Content:
    with reading(path):
        try:
            info = os.stat(path)  # noqa: PTH116  (as Extent's)
        except OSError:
            if Path(path).is_symlink():
                return Rejected("a link that leads nowhere")
            raise
    if not stat.S_ISREG(info.st_mode):
        return Rejected("a named pipe, socket or device")
    return Extent(path, 0, info.st_size)
