"""IDX files, the format of MNIST (LeCun, Cortes, Burges 1998), Fashion-MNIST, KMNIST and EMNIST, gzipped or not."""

import gzip
import hashlib
import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError, reading
from data_pipeline.sources import Source, SourceImage

_BYTES = 0x08  # the format's code for unsigned bytes, the only type these datasets use
_IMAGES = re.compile(r".*?(train|t10k|test)-images[-.]idx3-ubyte(\.gz)?")


class Idx(Source):
    """A folder with `train-images-idx3-ubyte.gz`, `train-labels-idx1-ubyte.gz`, and `t10k-...` or `test-...`.

    Images of EMNIST, which are stored transposed, are turned.

    Args:
        root: the folder.
        test: the split that the test images become.
    """

    options = ("val_fraction",)

    def __init__(self, root: Path, test: str = "val") -> None:
        train, *more = image_files(root, "train")
        if more:
            raise DataError(f"{root} holds {train.name} and {more[0].name}; give each dataset a folder of its own")
        tests = image_files(root, "test")
        if len(tests) != 1:
            raise DataError(f"{root} must hold one file of test images next to {train.name}, but holds {len(tests)}")
        self._files = {"train": train, test: tests[0]}
        self._data = {split: _pixels_and_labels(path) for split, path in self._files.items()}
        files = [file for path in self._files.values() for file in (path, _labels_of(path))]
        digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in files}
        largest = max(int(labels.max(initial=0)) for _, labels in self._data.values())
        counts = {split: len(labels) for split, (_, labels) in self._data.items()}
        classes = {str(label): str(label) for label in range(largest + 1)}
        super().__init__(("train", test), {"source": "idx", "files": digests}, classes, counts)

    def images(self, split: str) -> Iterator[SourceImage]:
        """Yield the images as PGM files, which Pillow reads."""
        pixels, labels = self._data[split]
        if self._files[split].name.startswith("emnist"):
            pixels = pixels.transpose(0, 2, 1)
        head = b"P5 %d %d 255\n" % (pixels.shape[2], pixels.shape[1])
        name = "train" if split == "train" else "val"  # whatever the split is called
        for number, label in enumerate(labels.tolist()):
            yield SourceImage(f"{name}{number:06d}", str(label), head + pixels[number].tobytes())


def _pixels_and_labels(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    pixels, labels = _read(path, 3), _read(_labels_of(path), 1)
    if len(pixels) != len(labels):
        raise DataError(
            f"{path} holds {len(pixels)} images, but {_labels_of(path)} {len(labels)} labels; download both again"
        )
    return pixels, labels


def image_files(root: Path, split: str) -> list[Path]:
    """Return the files of a folder that hold a split's images; an unpacked one takes the place of its packed copy."""
    found = [(path, _IMAGES.fullmatch(path.name)) for path in sorted(root.iterdir()) if path.is_file()]
    named = [path for path, match in found if match is not None and (match[1] == "train") == (split == "train")]
    return [path for path in named if path.suffix != ".gz" or path.with_suffix("") not in named]


def _labels_of(images: Path) -> Path:
    """Return the file of the labels, which may be packed where the images are not."""
    path = images.with_name(images.name.replace("images", "labels").replace("idx3", "idx1"))
    other = path.with_suffix("") if path.suffix == ".gz" else path.with_name(path.name + ".gz")
    return other if other.exists() and not path.exists() else path


def _read(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Read an IDX file of bytes; DataError unless it is complete and has so many dimensions."""
    if not path.exists():
        raise DataError(f"{path} does not exist; copy it here")
    with reading(path):
        data = path.read_bytes()
    try:
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error}); download it again") from None
    shape = np.frombuffer(data, ">u4", min(dimensions, max(0, len(data) - 4) // 4), offset=min(4, len(data)))
    begin = 4 + 4 * dimensions
    if data[:4] != bytes((0, 0, _BYTES, dimensions)) or len(data) != begin + math.prod(shape.tolist()):
        raise DataError(f"{path} is not a complete IDX file of bytes in {dimensions} dimensions; download it again")
    return np.frombuffer(data, np.uint8, offset=begin).reshape(shape)
