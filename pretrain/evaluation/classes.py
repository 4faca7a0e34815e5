"""Which output of a hand-off is which class of the dataset that it is evaluated on."""

from dataclasses import dataclass

from data_pipeline.dataset import Dataset
from pretrain.handoff.folder import HandoffConfig
from pretrain.outcome import UserError


@dataclass(frozen=True)
class ClassMatch:
    """How a dataset's classes were matched to a hand-off's outputs."""

    columns: list[int] | None
    """For each class of the data the index of its output; None: all outputs in their order."""
    how: str
    """Description for the report."""
    warnings: tuple[str, ...] = ()


def match_classes(config: HandoffConfig, dataset: Dataset, *, by_position: bool = False) -> ClassMatch:
    """Find a dataset's classes among a hand-off's by their ids; all of them must be there.

    A hand-off without ids has names only, which may occur twice: they must be equal, in the same order.

    Args:
        config: the hand-off's.
        dataset: what it is evaluated on.
        by_position: match by index, whatever the names; only the number of classes must be equal.

    Raises:
        UserError: a class of the data is none of the hand-off's, or a hand-off without ids has other names.
    """
    where, count, ids = dataset.path, dataset.num_classes, config.class_ids
    if by_position or ids is None:
        return _match_in_order(config, dataset, by_position=by_position)
    number_of = {class_id: number for number, class_id in enumerate(ids)}
    unknown = [class_id for class_id in dataset.class_ids if class_id not in number_of]
    if unknown:
        raise UserError(
            f"{len(unknown)} of the {count} classes of {where} are not among the hand-off's {len(ids)} (the first: "
            f"{unknown[0]!r}; the hand-off has {', '.join(map(repr, ids[:3]))}, ...): evaluate on data with its "
            "classes, or give --classes-by-position if only the ids differ"
        )
    columns = [number_of[class_id] for class_id in dataset.class_ids]
    names = zip((config.class_names[column] for column in columns), dataset.class_names, strict=True)
    renamed = [pair for pair in names if pair[0] != pair[1]]
    warnings = []
    if renamed:
        warnings.append(
            f"{len(renamed)} classes have the same id but another name in the data, the first "
            f"{renamed[0][0]!r} in the hand-off and {renamed[0][1]!r} here; ids are used"
        )
    if columns == list(range(len(ids))):
        return ClassMatch(None, "by id", tuple(warnings))
    if count == len(ids):
        how = "by id, in another order"
        warnings.append("the data's classes are in another order than the hand-off's; they are matched by id")
    else:
        how = f"by id, {count} of {len(ids)}"
        warnings.append(
            f"the data has {count} of the hand-off's {len(ids)} classes, matched by id; the scores of the others are "
            "left out, which is an easier task than choosing from all classes"
        )
    return ClassMatch(columns, how, tuple(warnings))


def _match_in_order(config: HandoffConfig, dataset: Dataset, *, by_position: bool) -> ClassMatch:
    where, count = dataset.path, dataset.num_classes
    if count != config.num_classes:
        why = "they must be equal" if by_position else "the hand-off is too old to have their ids"
        raise UserError(f"the hand-off has {config.num_classes} classes, {where} has {count}: {why}")
    ours, theirs = config.class_names, list(dataset.class_names)
    if config.class_ids is not None:
        ours, theirs = config.class_ids, list(dataset.class_ids)
    if ours == theirs:
        return ClassMatch(None, "by position" if by_position else "by name")
    number, one, other = next(row for row in zip(range(count), ours, theirs, strict=True) if row[1] != row[2])
    difference = f"class {number} is {one!r} in the hand-off and {other!r} in {where}"
    if not by_position:
        raise UserError(
            f"{difference}, and the hand-off is too old to have class ids: evaluate on the data it was trained for, "
            "or give --classes-by-position if only the names differ"
        )
    return ClassMatch(None, "by position", (f"classes are matched by position, though {difference}",))
