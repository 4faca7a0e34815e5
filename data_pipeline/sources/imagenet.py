"""ImageNet as downloaded: archives of an archive for each class, none of them unpacked to disk."""

import hashlib
import io
import tarfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from data_pipeline.acceptance import Rejected
from data_pipeline.archive import Member, is_compressed, members
from data_pipeline.errors import DataError
from data_pipeline.sources import SPLIT_WORDS, Source, SourceImage, held_out

TRAIN = "ILSVRC2012_img_train.tar"
VAL = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
HELD_OUT = 50
ENOUGH = 500


class ImageNet1k(Source):
    """ImageNet-1k (ILSVRC 2012): the archives of training and validation, and the labels from the development kit.

    Labels count through the WordNet ids in their alphabetical order, as everywhere.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in (TRAIN, VAL, DEVKIT):
            if not (root / name).is_file():
                raise DataError(f"{root / name} does not exist; download it from image-net.org into {root}")
        self._wnid_of, self._names, self._truth = _read_devkit(root / DEVKIT)
        described = {"source": "imagenet-1k", "bytes": {name: (root / name).stat().st_size for name in (TRAIN, VAL)}}
        counts = {"val": len(self._truth)}
        super().__init__(("train", "val"), described, dict(sorted(self._names.items())), counts)

    def images(self, split: str) -> Iterator[SourceImage]:
        """Yield the images in the order of the archives."""
        return self._train() if split == "train" else self._val()

    def _train(self) -> Iterator[SourceImage]:
        for _ in self._val():  # also to be refused before hours of work, not after
            pass
        for images in _by_class(self.root / TRAIN, self._names, others=False):
            yield from images

    def _val(self) -> Iterator[SourceImage]:
        path = self.root / VAL
        found, count = set(), 0
        for member in members(path):
            count += 1
            # The name ends with the image's number, from 1, which is its line in the ground truth.
            line = member.name.removesuffix(".JPEG").rpartition("_")[2]
            if not (line.isascii() and line.isdigit()) or not 1 <= int(line) <= len(self._truth):
                raise DataError(f"{path} holds {member.name}, for which {DEVKIT} has no label; download both again")
            found.add(int(line))
            yield SourceImage(member.name, self._wnid_of[self._truth[int(line) - 1]], member.content)
        if not len(found) == count == len(self._truth):
            raise DataError(f"{path} holds {count} images, but {DEVKIT} labels {len(self._truth)}; download it again")


def _read_devkit(path: Path) -> tuple[dict[int, str], dict[str, str], list[int]]:
    """Return number -> WordNet id, WordNet id -> words, and the number of each validation image."""
    from scipy.io import loadmat  # type: ignore[import-untyped]  # noqa: PLC0415  (slow to import)

    try:
        with tarfile.open(path) as archive:
            found = {name.rpartition("/")[2]: name for name in archive.getnames()}
            meta, truth = (
                archive.extractfile(found[name]).read()  # type: ignore[union-attr]
                for name in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
            )
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        # Numbers above the leaves are inner nodes of the hierarchy, which label no image.
        leaves = [row for row in synsets if int(row["num_children"]) == 0]
        wnid_of = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaves}
        names = {str(row["WNID"]): str(row["words"]) for row in leaves}
        numbers = [int(line) for line in truth.split()]
        if not set(numbers) <= set(wnid_of):
            raise ValueError("the ground truth names classes that meta.mat does not have")
    except (tarfile.TarError, OSError, EOFError, KeyError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is not the development kit of ILSVRC 2012 ({error}); download it again") from None
    return wnid_of, names, numbers


class ImageNet21k(Source):
    """ImageNet-21k (winter21 or fall11): a tar, a compressed tar, or a folder, of one tar for each WordNet id.

    A plain tar is read in place, in parallel. A compressed one can only be read from its beginning: one class at a time
    is held in memory, once for each split. From every class with at least ENOUGH images, HELD_OUT are the val split,
    chosen by a hash of their names (ImageNet-21k itself has no validation split).

    Args:
        path: the archive, or the folder.
        classes: the WordNet ids to take, as for ImageNet-21k-P; none takes all.
    """

    options = ("classes",)

    def __init__(self, path: Path, classes: Sequence[str] = ()) -> None:
        self.path, self._classes = path, sorted(classes)
        chosen = hashlib.sha256("\n".join(self._classes).encode()).hexdigest() if self._classes else None
        size = sum(file.stat().st_size for file in (path.glob("*.tar") if path.is_dir() else [path]))
        described = {"source": "imagenet-21k", "bytes": size, "classes_sha256": chosen}
        described |= {"held_out": HELD_OUT, "held_out_from_classes_of": ENOUGH}
        # The archive does not hold the words of its WordNet ids.
        super().__init__(("train", "val"), described, {wnid: wnid for wnid in self._classes} or None)

    def images(self, split: str) -> Iterator[SourceImage]:
        """Yield the images of a split, class by class in the order of the archive."""
        for images in _by_class(self.path, self._classes, others=True):
            usable = [image.name for image in images if not isinstance(image.data, Rejected)]
            chosen = held_out(usable, HELD_OUT) if len(usable) >= ENOUGH else set()
            yield from (image for image in images if (image.name in chosen) == (split == "val"))


def _by_class(path: Path, expected: Collection[str], *, others: bool) -> Iterator[list[SourceImage]]:
    """Yield the images of each class.

    Args:
        path: an archive, or a folder, of an archive for each class.
        expected: the classes that must be there; none takes all.
        others: whether there may be other ones, which are left out.

    Raises:
        DataError: an archive is of none of the classes, or has no images, or is missing.
    """

    def class_of(name: str) -> str:
        wnid = name.rpartition("/")[2].removesuffix(".tar")
        if not name.endswith(".tar") or wnid in SPLIT_WORDS:
            raise DataError(f"{path} holds {name}, which is not the archive of a class; unpack it, and build from that")
        if expected and wnid not in expected and not others:
            raise DataError(f"{path} holds {wnid}, which is not a class of {DEVKIT}; download both again")
        return "" if expected and wnid not in expected else wnid

    def check(found: Collection[str]) -> None:
        missing = sorted(set(expected) - set(found))
        if missing:
            raise DataError(
                f"{path} has no images of {len(missing)} of the chosen classes, for example {missing[0]}; download it "
                "again, or take the list of classes that belongs to it"
            )

    streamed = not path.is_dir() and is_compressed(path)
    archives: Iterable[tuple[str, Path, Member | None]]
    if path.is_dir():
        archives = ((class_of(file.name), file, None) for file in sorted(path.glob("*.tar")))
    else:
        outer = members(path, inline=(lambda name: class_of(name) != "") if streamed else None)
        archives = ((class_of(member.name), path, member) for member in outer)
    if not streamed:
        archives = list(archives)
        check([wnid for wnid, *_ in archives])  # before hours of work, not after
    seen = set()
    for wnid, file, archive in archives:
        if wnid in seen:
            raise DataError(f"{path} holds {wnid} twice; download it again")
        if wnid:
            seen.add(wnid)
            images = [SourceImage(f"{wnid}/{member.name}", wnid, member.content) for member in members(file, archive)]
            if not images:
                raise DataError(f"{wnid}.tar in {path} holds no images; download it again, or take {wnid} out")
            yield images
    check(seen)
