"""Several right labels for a picture: "Are we done with ImageNet?" (Beyer et al. 2020), ``real.json``."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dataset import Dataset
from pretrain.outcome import UserError

_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})\b")


class RealLabels:
    """For each picture of a validation split the classes that count as right; pictures without any are left out.

    Args:
        path: a JSON list with one list of labels per picture, in the order of the names ILSVRC2012_val_00000001 and
            following; labels are the dataset's.
        dataset: the split that is evaluated.

    Raises:
        UserError: not such a file, or it is about another number of pictures or classes.
    """

    def __init__(self, path: Path, dataset: Dataset) -> None:
        self._path, self._dataset = path, dataset
        self._labels = _read(path, dataset.num_classes)
        split = dataset.store.manifest().splits[dataset.split]
        pictures = split.samples + len(split.rejected)
        if len(self._labels) != pictures:
            raise UserError(
                f"--real: {path} has labels of {len(self._labels)} pictures, but {dataset.path} was built from "
                f"{pictures} for its split '{dataset.split}': give the file that belongs to this split"
            )
        if pictures:
            self.number(0)

    def number(self, sample: int) -> int:
        """The number of a sample's picture, from 1.

        Raises:
            UserError: its name does not say, or there is no such number.
        """
        name = self._dataset.sample_name(sample)
        found = _NUMBER.search(name)
        if found is None or not 1 <= int(found[1]) <= len(self._labels):
            raise UserError(
                f"--real: sample {name} of {self._dataset.path} is not called ILSVRC2012_val_ and a number from 1 to "
                f"{len(self._labels)}: the file is about other pictures, or their names were lost"
            )
        return int(found[1])

    def top1(self, numbers: NDArray[np.int64], predicted: NDArray[np.int64]) -> dict[str, float | int]:
        """Share of pictures whose prediction is one of their labels, in percent, and of how many pictures.

        Args:
            numbers: (n,) of the pictures, from 1.
            predicted: (n,) their predicted labels.

        Raises:
            UserError: two samples have the same number, or no picture has a label.
        """
        if len(np.unique(numbers)) != len(numbers):
            raise UserError(f"--real: two samples of {self._dataset.path} have the same number")
        answers = [
            label in self._labels[number - 1]
            for number, label in zip(numbers.tolist(), predicted.tolist(), strict=True)
            if self._labels[number - 1]
        ]
        if not answers:
            raise UserError(f"--real: {self._path} has no label for any picture that was evaluated")
        return {
            "top1": 100 * sum(answers) / len(answers),
            "samples": len(answers),
            "without": len(numbers) - len(answers),
        }


def _read(path: Path, num_classes: int) -> Sequence[frozenset[int]]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"--real: {path} cannot be read: {error}") from None
    if not isinstance(content, list) or not all(isinstance(labels, list) for labels in content):
        raise UserError(f"--real: {path} is not a list with one list of labels per picture")
    for number, labels in enumerate(content, 1):
        for label in labels:
            if type(label) is not int or not 0 <= label < num_classes:
                raise UserError(
                    f"--real: {path}: picture {number} has label {label!r}, but the data's classes are "
                    f"0..{num_classes - 1}"
                )
    return [frozenset(labels) for labels in content]
