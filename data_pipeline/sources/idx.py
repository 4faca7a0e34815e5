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

from data_pipeline.errors import DataError, StorageError
from data_pipeline.sources import Source, SourceImage, held_out

_BYTES = 0x08  # the format's code for unsigned bytes, the only type these datasets use
_IMAGES = re.compile(r".*?(train|t10k|test)-images[-.]idx3-ubyte(\.gz)?")


class Idx(Source):
    """A folder with `train-images-idx3-ubyte.gz`, `train-labels-idx1-ubyte.gz`, and `t10k-...` or `test-...`.

    The test files are the val split, unless a part of the training images is. Images of EMNIST, which are stored
    transposed, are turned.

    Args:
        root: the folder.
        val_fraction: share of each class's training images that becomes the val split, chosen by a hash of their names;
            the test files are the test split then.
    """

    def __init__(self, root: Path, val_fraction: float = 0.0) -> None:
        self._fraction = val_fraction
        train, *more = image_files(root, "train")
        if more:
            raise DataError(f"{root} holds {train.name} and {more[0].name}; give each dataset a folder of its own")
        tests = image_files(root, "val")
        if len(tests) != 1:
            raise DataError(f"{root} must hold one file of test images next to {train.name}, but holds {len(tests)}")
        self._images = {"train": train, "val": tests[0]}
        self._labels = {split: _read(_labels_of(path), 1) for split, path in self._images.items()}
        self._pixels = {split: _read(path, 3) for split, path in self._images.items()}
        for split, path in self._images.items():
            if len(self._pixels[split]) != len(self._labels[split]):
                raise DataError(
                    f"{path} holds {len(self._pixels[split])} images, but {_labels_of(path)} "
                    f"{len(self._labels[split])} labels; download both again"
                )
        self._held_out: set[str] = set()
        if val_fraction:
            labels = self._labels["train"]
            for label in set(labels.tolist()):
                names = [_name("train", number) for number in np.flatnonzero(labels == label).tolist()]
                self._held_out |= held_out(names, round(val_fraction * len(names)))
        files = [file for path in self._images.values() for file in (path, _labels_of(path))]
        digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in files}
        largest = max(int(labels.max(initial=0)) for labels in self._labels.values())
        counts = {split: len(labels) for split, labels in self._labels.items()}
        if val_fraction:
            held = len(self._held_out)
            counts = {"train": counts["train"] - held, "val": held, "test": counts["val"]}
        super().__init__(
            tuple(counts),
            {"source": "idx", "files": digests} | ({"val_fraction": val_fraction} if val_fraction else {}),
            {str(label): str(label) for label in range(largest + 1)},
            counts,
        )

    def images(self, split: str) -> Iterator[SourceImage]:
        """Yield the images as PGM files, which Pillow reads."""
        # Named after the files: "val" are those of test images, whatever split they become.
        file = "train" if split == "train" or (split == "val" and self._fraction) else "val"
        path, labels, pixels = self._images[file], self._labels[file], self._pixels[file]
        if path.name.startswith("emnist"):
            pixels = pixels.transpose(0, 2, 1)
        head = b"P5 %d %d 255\n" % (pixels.shape[2], pixels.shape[1])
        for number, label in enumerate(labels.tolist()):
            name = _name(file, number)
            if file == "val" or (name in self._held_out) == (split == "val"):
                yield SourceImage(name, str(label), head + pixels[number].tobytes())


def _name(file: str, number: int) -> str:
    return f"{file}{number:06d}"


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
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; copy it here") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error}); download it again") from None
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror}); make it readable") from None
    shape = np.frombuffer(data, ">u4", min(dimensions, max(0, len(data) - 4) // 4), offset=min(4, len(data)))
    begin = 4 + 4 * dimensions
    if data[:4] != bytes((0, 0, _BYTES, dimensions)) or len(data) != begin + math.prod(shape.tolist()):
        raise DataError(f"{path} is not a complete IDX file of bytes in {dimensions} dimensions; download it again")
    return np.frombuffer(data, np.uint8, offset=begin).reshape(shape)
