"""Labels of an evaluated dataset: which output of the model is which class, and several correct labels per image."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dataset import Dataset
from pretrain.handoff.folder import HandoffConfig
from pretrain.outcome import UserError

_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})\b")


@dataclass(frozen=True)
class ClassMatch:
    """How a dataset's classes were matched to a hand-off's outputs."""

    columns: tuple[int, ...] | None
    """For each class of the data the index of its output; None: all outputs in their order."""
    how: str
    """Description for the report."""
    warnings: tuple[str, ...] = ()


def match_classes(config: HandoffConfig, dataset: Dataset, *, by_position: bool = False) -> ClassMatch:
    """Find a dataset's classes among a hand-off's by their ids; all of them must be there.

    Args:
        config: the hand-off's.
        dataset: what it is evaluated on.
        by_position: match by index, whatever the names; only the number of classes must be equal.

    Raises:
        UserError: a class of the data is none of the hand-off's, or a hand-off without ids has other names.
    """
    where, count = dataset.path, dataset.num_classes
    if (by_position or config.class_ids is None) and count != config.num_classes:
        old = "the hand-off is too old to have their ids: evaluate on data with its classes"
        why = "they must be equal" if by_position else old
        raise UserError(f"the hand-off has {config.num_classes} classes, {where} has {count}: {why}")
    if by_position:
        same = tuple(config.class_ids or config.class_names) == (
            dataset.class_ids if config.class_ids else dataset.class_names
        )
        warning = "classes are taken by position, though their names differ between hand-off and data"
        return ClassMatch(None, "by position", () if same else (warning,))
    if config.class_ids is None:
        return _match_names(config, dataset)
    number_of = {class_id: number for number, class_id in enumerate(config.class_ids)}
    unknown = [class_id for class_id in dataset.class_ids if class_id not in number_of]
    if unknown:
        raise UserError(
            f"{len(unknown)} of the {count} classes of {where} are not among the hand-off's {config.num_classes} (the "
            f"first: {unknown[0]!r}; the hand-off has {_some(config.class_ids)}): evaluate on data with its classes, "
            "or give --classes-by-position if only the ids differ"
        )
    columns = tuple(number_of[class_id] for class_id in dataset.class_ids)
    names = [config.class_names[column] for column in columns]
    renamed = [pair for pair in zip(names, dataset.class_names, strict=True) if pair[0] != pair[1]]
    warnings = []
    if renamed:
        warnings.append(
            f"{len(renamed)} classes have the same id but another name in the data, the first "
            f"{renamed[0][0]!r} in the hand-off and {renamed[0][1]!r} here; ids are used"
        )
    if columns == tuple(range(config.num_classes)):
        return ClassMatch(None, "by id", tuple(warnings))
    if count == config.num_classes:
        warnings.append("the data's classes are in another order than the hand-off's; they are matched by id")
        return ClassMatch(columns, "by id, in another order", tuple(warnings))
    warnings.append(
        f"the data has {count} of the hand-off's {config.num_classes} classes, matched by id; the scores of the others "
        "are left out, which is an easier task than choosing from all classes"
    )
    return ClassMatch(columns, f"by id, {count} of {config.num_classes}", tuple(warnings))


def _match_names(config: HandoffConfig, dataset: Dataset) -> ClassMatch:
    """For an old hand-off without class ids. Names may occur twice, so only equal lists are accepted."""
    pairs = enumerate(zip(config.class_names, dataset.class_names, strict=True))
    different = [(number, ours, theirs) for number, (ours, theirs) in pairs if ours != theirs]
    if different:
        number, ours, theirs = different[0]
        raise UserError(
            f"{len(different)} classes of {dataset.path} have other names than the hand-off's or are in another "
            f"order (class {number}: {ours!r} in the hand-off, {theirs!r} here): evaluate on the data it was trained "
            "for, or give --classes-by-position if only the names differ"
        )
    return ClassMatch(None, "by name")


def _some(ids: list[str]) -> str:
    return ", ".join(repr(class_id) for class_id in ids[:3]) + (", ..." if len(ids) > 3 else "")


class RealLabels:
    """Several correct labels per image: ``real.json`` of "Are we done with ImageNet?" (Beyer et al. 2020).

    Images without a label are left out.

    Args:
        path: a JSON list with one list of labels per image, in the order of the names ILSVRC2012_val_00000001 and
            following; labels are the dataset's.
        dataset: the split that is evaluated.

    Raises:
        UserError: not such a file, or it has another number of images or classes.
    """

    def __init__(self, path: Path, dataset: Dataset) -> None:
        self._path, self._dataset = path, dataset
        self._labels = _read(path, dataset.num_classes)
        split = dataset.store.manifest().splits[dataset.split]
        images = split.samples + len(split.rejected)
        if len(self._labels) != images:
            raise UserError(
                f"--real: {path} has labels of {len(self._labels)} images, but {dataset.path} was built from "
                f"{images} for its split '{dataset.split}': give the file that belongs to this split"
            )
        if images:
            self.number(0)

    def number(self, sample: int) -> int:
        """The number of a sample's image, from 1.

        Raises:
            UserError: its name has no number, or one out of range.
        """
        name = self._dataset.sample_name(sample)
        found = _NUMBER.search(name)
        if found is None or not 1 <= int(found[1]) <= len(self._labels):
            raise UserError(
                f"--real: sample {name} of {self._dataset.path} is not named ILSVRC2012_val_ and a number from 1 to "
                f"{len(self._labels)}: give the file that belongs to this split, or shards that keep the original names"
            )
        return int(found[1])

    def top1(self, numbers: NDArray[np.int64], predicted: NDArray[np.int64]) -> dict[str, float | int]:
        """Share of images whose prediction is one of their labels, in percent, and of how many images.

        Args:
            numbers: (n,) of the images, from 1.
            predicted: (n,) their predicted labels.

        Raises:
            UserError: two samples have the same number, or no image has a label.
        """
        if len(np.unique(numbers)) != len(numbers):
            raise UserError(f"--real: two samples of {self._dataset.path} have the same number")
        hits = [
            label in self._labels[number - 1]
            for number, label in zip(numbers.tolist(), predicted.tolist(), strict=True)
            if self._labels[number - 1]
        ]
        if not hits:
            raise UserError(f"--real: {self._path} has no label for any image that was evaluated")
        return {
            "top1": 100 * sum(hits) / len(hits),
            "samples": len(hits),
            "without": len(numbers) - len(hits),
        }


def _read(path: Path, num_classes: int) -> Sequence[frozenset[int]]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--real: {path} cannot be read: {error}") from None
    if not isinstance(content, list) or not all(isinstance(labels, list) for labels in content):
        raise UserError(f"--real: {path} is not a list with one list of labels per image")
    for number, labels in enumerate(content, 1):
        for label in labels:
            if type(label) is not int or not 0 <= label < num_classes:
                raise UserError(
                    f"--real: {path}: image {number} has label {label!r}, but the data's classes are "
                    f"0..{num_classes - 1}"
                )
    return [frozenset(labels) for labels in content]
