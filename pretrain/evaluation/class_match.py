"""Which output of a handed-off model stands for which class of a dataset."""

from dataclasses import dataclass

from data_pipeline.dataset import Dataset
from pretrain.handoff.folder import HandoffConfig
from pretrain.outcome import UserError


@dataclass(frozen=True)
class ClassMatch:
    """How a dataset's classes were found among a hand-off's."""

    columns: tuple[int, ...] | None
    """For each class of the data the number of its output; None: all outputs as they stand."""
    how: str
    """In words; not empty."""
    warnings: tuple[str, ...] = ()


def match_classes(config: HandoffConfig, dataset: Dataset, *, by_position: bool = False) -> ClassMatch:
    """Find a dataset's classes among a hand-off's by their ids; all of them must be there.

    Args:
        config: the hand-off's.
        dataset: what it is evaluated on.
        by_position: take the classes as they stand, whatever they are called; only their number must be the same.

    Raises:
        UserError: a class of the data is none of the hand-off's, or a hand-off that knows no ids has other names.
    """
    where, count = dataset.path, dataset.num_classes
    if by_position:
        if count != config.num_classes:
            raise UserError(f"the hand-off has {config.num_classes} classes and {where} has {count}: not by position")
        same = tuple(config.class_ids or config.class_names) == (
            dataset.class_ids if config.class_ids else dataset.class_names
        )
        warning = "classes are taken by position, though the hand-off calls them otherwise than the data"
        return ClassMatch(None, "by position", () if same else (warning,))
    if config.class_ids is None:
        return _match_names(config, dataset)
    number_of = {class_id: number for number, class_id in enumerate(config.class_ids)}
    unknown = [class_id for class_id in dataset.class_ids if class_id not in number_of]
    if unknown:
        raise UserError(
            f"{len(unknown)} of the {count} classes of {where} are none of the hand-off's {config.num_classes} (the "
            f"first: {unknown[0]!r}; the hand-off has {_some(config.class_ids)}): evaluate on data with its classes, "
            "or give --classes-by-position if only the ids are written otherwise"
        )
    columns = tuple(number_of[class_id] for class_id in dataset.class_ids)
    names = [config.class_names[column] for column in columns]
    renamed = [pair for pair in zip(names, dataset.class_names, strict=True) if pair[0] != pair[1]]
    warnings = []
    if renamed:
        warnings.append(
            f"{len(renamed)} classes have the same id but another name in the data, the first "
            f"{renamed[0][0]!r} in the hand-off and {renamed[0][1]!r} here; ids count"
        )
    if columns == tuple(range(config.num_classes)):
        return ClassMatch(None, "by id", tuple(warnings))
    if count == config.num_classes:
        warnings.append("the data's classes stand in another order than the hand-off's; they are matched by id")
        return ClassMatch(columns, "by id, in another order", tuple(warnings))
    warnings.append(
        f"the data has {count} of the hand-off's {config.num_classes} classes, found by id; the scores of the others "
        "are left out, which makes it easier than choosing among all"
    )
    return ClassMatch(columns, f"by id, {count} of {config.num_classes}", tuple(warnings))


def _match_names(config: HandoffConfig, dataset: Dataset) -> ClassMatch:
    """For a hand-off from before class ids were kept: names may occur twice, so that only equal lists are safe."""
    if dataset.num_classes != config.num_classes:
        raise UserError(
            f"the hand-off has {config.num_classes} classes and {dataset.path} has {dataset.num_classes}, and it is "
            "too old to know their ids: evaluate on data with its classes"
        )
    pairs = enumerate(zip(config.class_names, dataset.class_names, strict=True))
    different = [(number, ours, theirs) for number, (ours, theirs) in pairs if ours != theirs]
    if different:
        number, ours, theirs = different[0]
        raise UserError(
            f"{len(different)} classes of {dataset.path} are called otherwise than the hand-off's or stand in another "
            f"order (class {number}: {ours!r} in the hand-off, {theirs!r} here): evaluate on the data it was trained "
            "for, or give --classes-by-position if only the names are written otherwise"
        )
    return ClassMatch(None, "by name")


def _some(ids: list[str]) -> str:
    return ", ".join(repr(class_id) for class_id in ids[:3]) + (", ..." if len(ids) > 3 else "")
