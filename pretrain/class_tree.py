"""A hierarchy of classes from a file, as WordNet's list of "is a" relations comes with ImageNet."""

from collections.abc import Sequence
from pathlib import Path

from pretrain.outcome import UserError, storage_code


def read_ancestors(path: Path, class_ids: Sequence[str]) -> list[list[int]]:
    """Read the ancestors of every class that are classes themselves, for ``models.SemanticSoftmax``.

    Args:
        path: lines ``PARENT CHILD`` of WordNet ids, such as ``wordnet.is_a.txt``. Ids that are not classes are
            skipped; of several parents the first one listed counts; a class that is not listed has no ancestors.
        class_ids: the dataset's, in the order of its labels.

    Returns:
        rows of equal length: from the topmost ancestor to the class itself, then -1.

    Raises:
        UserError: unreadable, a line of another form, a cycle, or a file about other classes.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        code = storage_code(error) if isinstance(error, OSError) else None
        raise UserError(f"loss.class_tree: {path} cannot be read: {error}", code) from None
    parents: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2:
            raise UserError(f"loss.class_tree: {path}, line {number}: must be PARENT CHILD, got {line.strip()!r}")
        parents.setdefault(words[1], words[0])
    numbers = {class_id: number for number, class_id in enumerate(class_ids)}
    if not numbers.keys() & (parents.keys() | set(parents.values())):
        raise UserError(
            f"loss.class_tree: {path} names none of the dataset's classes ({', '.join(class_ids[:3])}, ...): give the "
            "dataset's own tree"
        )
    chains = []
    for class_id in class_ids:
        chain, seen, node = [numbers[class_id]], {class_id}, class_id
        while (parent := parents.get(node)) is not None:
            if parent in seen:
                raise UserError(f"loss.class_tree: {path}: {parent} is its own ancestor: remove one of the lines")
            seen.add(parent)
            if parent in numbers:
                chain.append(numbers[parent])
            node = parent
        chains.append(chain[::-1])
    depth = max(map(len, chains))
    return [chain + [-1] * (depth - len(chain)) for chain in chains]
