"""ImageNet-1k (ILSVRC 2012) as downloaded: three archives in one folder, none of them unpacked."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.archive import contents
from data_pipeline.errors import DataError
from data_pipeline.sources import Source, SourceImage

TRAIN = "ILSVRC2012_img_train.tar"
VAL = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"


class ImageNet1k(Source):
    """The training archive of per-class archives, the validation archive, and the labels from the development kit.

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
        path = self.root / TRAIN
        outers = list(contents(path))
        classes = {outer[0].name.rpartition("/")[2].removesuffix(".tar"): outer for outer in outers}
        if len(classes) < len(outers):
            raise DataError(f"{path} holds a class twice; download it again")
        strange, missing = sorted(classes.keys() - self._names.keys()), sorted(self._names.keys() - classes.keys())
        if strange:
            raise DataError(f"{path} holds {strange[0]}, which is not a class of {DEVKIT}; download both again")
        for _ in self._val():  # also to be refused before hours of work, not after
            pass
        if missing:
            raise DataError(f"{path} lacks {len(missing)} classes, for example {missing[0]}; download it again")
        for wnid, outer in classes.items():
            found = False
            for entry, content in contents(path, outer):
                found = True
                yield SourceImage(f"{wnid}/{entry.name}", wnid, content)
            if not found:
                raise DataError(f"{outer[0].name} in {path} holds no images; download it again")

    def _val(self) -> Iterator[SourceImage]:
        path = self.root / VAL
        found, count = set(), 0
        for entry, content in contents(path):
            count += 1
            # The name ends with the image's number, from 1, which is its line in the ground truth.
            line = entry.name.removesuffix(".JPEG").rpartition("_")[2]
            if not (line.isascii() and line.isdigit()) or not 1 <= int(line) <= len(self._truth):
                raise DataError(f"{path} holds {entry.name}, for which {DEVKIT} has no label; download both again")
            found.add(int(line))
            yield SourceImage(entry.name, self._wnid_of[self._truth[int(line) - 1]], content)
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
