"""Several correct labels per image: ``real.json`` of "Are we done with ImageNet?" (Beyer et al. 2020)."""

import re
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from data_pipeline.dataset import Dataset
from pretrain.evaluation.accuracy import Verdicts
from pretrain.outcome import UserError


class RealLabels:
    """The labels of a split's images; those without any are left out.

    Args:
        path: a JSON list with one list of the dataset's labels per image, in the order of the names
            ILSVRC2012_val_00000001 and following.
        dataset: the split.

    Raises:
        UserError: not such a file, or it has another number of images or classes.
    """

    def __init__(self, path: Path, dataset: Dataset) -> None:
        label, where = Annotated[int, Field(strict=True, ge=0, lt=dataset.num_classes)], f"--real: {path}"
        try:
            self._labels = TypeAdapter(list[list[label]]).validate_json(path.read_bytes())  # type: ignore[valid-type]
        except OSError as error:
            raise UserError(f"{where} cannot be read: {error}") from None
        except ValidationError as error:
            found = error.errors()[0]
            image = f"image {int(found['loc'][0]) + 1} has {found['input']!r:.40}: " if found["loc"] else ""
            lists = f"one list of labels from 0 to {dataset.num_classes - 1} per image"
            raise UserError(f"{where} is not a list with {lists}: {image}{found['msg']}") from None
        split = dataset.store.manifest().splits[dataset.split]
        images, self._dataset, self._where = split.samples + len(split.rejected), dataset, where
        if len(self._labels) != images:
            raise UserError(
                f"{where} has labels of {len(self._labels)} images, but {dataset.path} was built from {images} for its "
                f"split '{dataset.split}': give the file that belongs to this split"
            )
        if len(dataset):
            self.number(0)

    def number(self, sample: int) -> int:
        """The number of a sample's image, from 1; UserError: its name has none, or one out of range."""
        name = self._dataset.sample_name(sample)
        found = re.search(r"ILSVRC2012_val_(\d{8})\b", name)
        if found is None or not 1 <= int(found[1]) <= len(self._labels):
            raise UserError(
                f"--real: sample {name} of {self._dataset.path} is not named ILSVRC2012_val_ and a number from 1 to "
                f"{len(self._labels)}: give the file that belongs to this split, or shards that keep the original names"
            )
        return int(found[1])

    def top1(self, verdicts: Verdicts) -> dict[str, float | int]:
        """Share of images whose prediction is one of their labels, in percent, and how many have labels or none.

        Raises:
            UserError: two samples have the same number, or no image has a label.
        """
        if len(np.unique(verdicts.number)) != len(verdicts.number):
            raise UserError(f"--real: two samples of {self._dataset.path} have the same number")
        pairs = zip(verdicts.number.tolist(), verdicts.predicted.tolist(), strict=True)
        hits = [label in self._labels[number - 1] for number, label in pairs if self._labels[number - 1]]
        if not hits:
            raise UserError(f"{self._where} has no label for any image that was evaluated")
        return {"top1": 100 * sum(hits) / len(hits), "samples": len(hits), "without": len(verdicts.number) - len(hits)}
