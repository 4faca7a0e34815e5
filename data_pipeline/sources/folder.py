"""A folder of class folders: FOLDER/CLASS/**/PICTURE."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.sources import Extent, Picture


class Folder:
    """Every file below a class folder is a picture; what does not decode is rejected with its reason."""

    shard_bytes = 256 * 2**20

    def __init__(self, root: Path, split: str) -> None:
        self.root, self.splits = root, (split,)
        try:
            self._classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        except OSError as error:
            raise DataError(f"{root} cannot be read ({error.strerror}); name a folder of class folders") from None
        if not self._classes:
            raise DataError(f"{root} has no class folders; pictures must lie in {root}/CLASS/")

    def describe(self) -> dict[str, Any]:
        """Say what decides the pictures."""
        return {"source": "folder", "root": str(self.root)}

    def class_names(self) -> dict[str, str]:
        """Return the names of the class folders, sorted."""
        return {name: name for name in self._classes}

    def count(self, split: str) -> int:  # noqa: ARG002  (one split only)
        """Count the files."""
        return sum(len(files) for name in self._classes for _, _, files in os.walk(self.root / name))

    def pictures(self, split: str) -> Iterator[Picture]:  # noqa: ARG002
        """Yield the files, class by class, sorted by name."""
        for name in self._classes:
            for folder, folders, files in os.walk(self.root / name, onerror=_stop):
                folders.sort()
                for file in sorted(files):
                    path = Path(folder, file)
                    try:
                        size = path.stat().st_size
                    except OSError as error:
                        raise DataError(f"{path} cannot be read ({error.strerror}); mend it and build again") from None
                    yield Picture(path.relative_to(self.root).as_posix(), name, Extent(str(path), 0, size))


def _stop(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read ({error.strerror}); make it readable and build again")
