"""Class folders, (SPLIT/)CLASS/**/IMAGE, on disk or in an archive."""

import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipeline.acceptance import Rejected
from data_pipeline.archive import Extent, contents, entries
from data_pipeline.errors import DataError, StorageError, printable
from data_pipeline.sources import (
    SPLIT_WORDS,
    Source,
    SourceImage,
    held_out,
    is_hidden,
    may_be_image,
    split_in,
    splits_among,
)


class Folder(Source):
    """A folder of class folders, or of such folders for each split; what is no image is listed with its reason.

    Links are followed. Hidden files and folders, and files next to the class folders, are listed.

    Args:
        root: the folder.
        split: what the images become, each folder being a class; None finds `train`, `val` and `test` in the folder.
        val_fraction: share of each class's images that becomes the val split, chosen by a hash of their names.

    Raises:
        DataError: there are no class folders, or the folder comes with a val split and `val_fraction` asks for another.
        StorageError: the folder cannot be read.
    """

    def __init__(self, root: Path, split: str | None = None, val_fraction: float = 0.0) -> None:
        self.root, self._fraction = root, val_fraction
        splits = {} if split is not None else _splits_in(root)
        self._roots = splits or {split or "train": root}
        if val_fraction and "val" in self._roots:
            raise DataError(f"{root} comes with a val split; leave --val-fraction out")
        self._classes = {folder: _classes(folder) for folder in self._roots.values()}
        names = {folder: {path.name for path in classes} for folder, classes in self._classes.items()}
        for folder, found in names.items():
            if not found:
                raise DataError(f"{folder} has no class folders with images; images must be in {folder}/CLASS/")
            if not found & next(iter(names.values())):
                raise DataError(
                    f"{folder} has no class folder of the training split, so its labels must be elsewhere; sort its "
                    "images into class folders, or name the training split's folder as SOURCE"
                )
        if split is None and not splits:
            _refuse_odd(root, self._classes[root])
        described: dict[str, Any] = {"source": "folder", "root": printable(str(root))}
        super().__init__(
            (*self._roots, *(("val",) if val_fraction else ())),
            described | ({"val_fraction": val_fraction} if val_fraction else {}),
            {name: name for name in sorted({printable(name) for found in names.values() for name in found})},
        )

    def count(self, split: str) -> int | None:
        """Count the files; None where a part of them is held out."""
        if self._fraction:
            return None
        return sum(1 for folder in self._classes[self._roots[split]] for _ in _files(folder))

    def images(self, split: str) -> Iterator[SourceImage]:
        """Yield the files, class by class, sorted by name."""
        fraction = self._fraction if split in {self.splits[0], "val"} else 0.0
        root = self._roots[self.splits[0] if fraction else split]
        if split == self.splits[0]:
            yield from self._beside()
        for folder in self._classes[root]:
            found = [self._image(root, folder.name, path, reason) for path, reason in _files(folder)]
            if fraction:
                usable = [i.name for i in found if not isinstance(i.data, Rejected) and may_be_image(i.name)]
                chosen = held_out(usable, round(fraction * len(usable)))
                found = [image for image in found if (image.name in chosen) == (split == "val")]
            yield from found

    def _beside(self) -> Iterator[SourceImage]:
        """List the files next to the folders of the splits and of the classes."""
        used = {*self._roots.values(), *(path for classes in self._classes.values() for path in classes)}
        for folder in dict.fromkeys((self.root, *self._roots.values())):
            for entry in _scan(folder):
                if Path(entry.path) not in used:
                    reason = "a folder that is no class" if _is_folder(entry) else "is in no class folder"
                    name = printable(Path(entry.path).relative_to(self.root).as_posix())
                    yield SourceImage(name, "", Rejected("hidden" if is_hidden(entry.name) else reason))

    def _image(self, root: Path, class_name: str, path: str, reason: str) -> SourceImage:
        name, class_id = printable(Path(path).relative_to(root).as_posix()), printable(class_name)
        if reason:
            return SourceImage(name, class_id, Rejected(reason))
        try:
            info = os.stat(path)  # noqa: PTH116  (as Extent's)
        except OSError as error:
            if Path(path).is_symlink():
                return SourceImage(name, class_id, Rejected("a link that leads nowhere"))
            raise StorageError(f"{path} cannot be read ({error.strerror}); fix it and build again") from None
        if not stat.S_ISREG(info.st_mode):
            return SourceImage(name, class_id, Rejected("a named pipe, socket or device"))
        return SourceImage(name, class_id, Extent(path, 0, info.st_size))


def _splits_in(root: Path) -> dict[str, Path]:
    """Return the folders of splits, if there are any; DataError where they may as well be classes."""
    folders = [
        entry for entry in _folders(root) if any(may_be_image(Path(path).name) for path, _ in _files(Path(entry.path)))
    ]
    words = splits_among([entry.name for entry in folders])
    named: dict[str, list[Path]] = {}
    others = []
    for entry in folders:
        split = words.get(entry.name, SPLIT_WORDS.get(entry.name.lower()))
        if split is not None and _classes(Path(entry.path)):
            named.setdefault(split, []).append(Path(entry.path))
        elif split is None:
            others.append(entry.name)
    double = next((paths for paths in named.values() if len(paths) > 1), None)
    if double is not None:
        raise DataError(f"{root} has both {double[0].name} and {double[1].name}; name one of them as SOURCE")
    if named and others:
        split = next(iter(named))
        raise DataError(
            f"{root} has {named[split][0].name} with folders as in a split, and {others[0]} with images as in a class; "
            "name one of them as SOURCE, or take every folder as a class with --split train"
        )
    return {name: named[name][0] for name in ("train", "val", "test") if name in named}


def _refuse_odd(root: Path, classes: list[Path]) -> None:
    """Refuse folders that are not likely to be classes: all have names of splits, or one holds only folders."""
    if all(path.name.lower() in SPLIT_WORDS for path in classes):
        raise DataError(
            f"{root} has images in {classes[0].name} that are in no class folder; sort them into class folders"
        )
    inside = _scan(classes[0])
    if len(classes) == 1 and all(_is_folder(entry) for entry in inside) and len(inside) > 1:
        raise DataError(
            f"{root} has one folder, {classes[0].name}, with folders in it; name {classes[0]} as SOURCE, or take it as "
            "one class with --split train"
        )


def _scan(folder: Path | str) -> list["os.DirEntry[str]"]:
    try:
        return sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise StorageError(
            f"{error.filename} cannot be read ({error.strerror}); make it readable and build again"
        ) from None


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    return Path(entry.path).is_dir() if entry.is_symlink() else entry.is_dir()  # a link may lead to itself


def _folders(root: Path | str) -> list["os.DirEntry[str]"]:
    return [entry for entry in _scan(root) if _is_folder(entry) and not is_hidden(entry.name)]


def _classes(root: Path) -> list[Path]:
    """Return the folders that hold at least one file that may be an image."""
    folders = (Path(entry.path) for entry in _folders(root))
    return [folder for folder in folders if any(not r and may_be_image(Path(f).name) for f, r in _files(folder))]


def _files(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield path and reason ('' for a file that may be an image) of all below a folder; links are followed."""
    if folder.is_symlink() and any(folder.samefile(parent) for parent in folder.absolute().parents):
        yield str(folder), "a link to a folder above it"
        return
    inside = []
    for entry in _scan(folder):
        if is_hidden(entry.name):
            yield entry.path, "hidden"
        elif _is_folder(entry):
            inside.append(Path(entry.path))
        else:
            yield entry.path, ""
    for path in inside:
        yield from _files(path)


class Archived(Source):
    """A tar, or a compressed tar, of class folders, or of such folders for each split, also below other folders.

    For example the processed ImageNet-21k-P. It is never unpacked to disk.

    Below the folders that all images share, the folders are splits if they are named so (`splits_among`), else
    classes. Files next to them, hidden ones and others that are no images are listed. The archive is read through once
    to find this, a compressed one once more for each split.

    Args:
        path: the archive.
        split: what all images become, each folder being a class; None finds splits.

    Raises:
        DataError: a split has no class in common with train.
    """

    def __init__(self, path: Path, split: str | None = None) -> None:
        self.path = path
        folders = Counter(
            PurePosixPath(entry.name).parent
            for entry in entries(path)
            if may_be_image(PurePosixPath(entry.name).name) and not any(map(is_hidden, PurePosixPath(entry.name).parts))
        )
        shared = os.path.commonpath([str(folder) for folder in folders]) if folders else ""
        above = PurePosixPath(shared).parts
        below = {folder.parts[len(above)] for folder in folders if len(folder.parts) > len(above)}
        if PurePosixPath(shared) in folders and len(below) <= 1:  # one class; else images next to the class folders
            below, above = set(above[-1:]), above[:-1]
        self._depth = len(above)
        self._split_of = {} if split is not None else splits_among(below)
        named = next((SPLIT_WORDS[part.lower()] for part in reversed(above) if part.lower() in SPLIT_WORDS), None)
        self._split = split or named or split_in(path.name) or "train"
        counts: Counter[str] = Counter()
        classes: dict[str, set[str]] = {}
        for folder, count in folders.items():
            found, class_id = self._place(folder)
            counts[found] += count
            classes.setdefault(found, set()).update({class_id} - {""})
        splits = tuple(name for name in ("train", "val", "test") if name in counts) or (self._split,)
        for name in splits[1:]:
            if not classes[name] & classes[splits[0]]:
                raise DataError(
                    f"{path} has no class of '{splits[0]}' in '{name}': its labels are elsewhere; unpack it"
                )
        self._names = set().union(*(found for split, found in classes.items() if split))
        described = {"source": "archive of class folders", "bytes": path.stat().st_size}
        described |= {"path": printable(str(path.resolve()))}
        super().__init__(splits, described, {name: name for name in sorted(self._names)}, counts)

    def images(self, split: str) -> Iterator[SourceImage]:
        """Yield the images of a split in the order of the archive."""
        beside: Counter[str] = Counter()
        for entry, content in contents(self.path):
            path = PurePosixPath(entry.name)
            found, class_id = self._place(path.parent)
            if any(map(is_hidden, path.parts)):
                found, class_id = "", ""
            if found == split and (class_id in self._names or may_be_image(path.name)):
                usable = class_id or isinstance(content, Rejected)
                yield SourceImage(entry.name, class_id, content if usable else Rejected("is in no class folder"))
            elif not found or class_id not in self._names:
                beside[str(path.parent)] += 1
        for folder, count in beside.items() if split == self.splits[0] else ():
            yield SourceImage(f"{folder}/", "", Rejected(f"hidden, or in no class folder of a split: {count} files"))

    def _place(self, folder: PurePosixPath) -> tuple[str, str]:
        """Return the split ('' when it has none) and the class ('' when it has none) of the members of a folder."""
        parts = (*folder.parts[self._depth :], "", "")
        return (self._split_of.get(parts[0], ""), parts[1]) if self._split_of else (self._split, parts[0])
