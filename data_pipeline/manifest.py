"""dataset.json: what a dataset holds, how it was built, and the checksums of all its files."""

import hashlib
import json
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from data_pipeline.errors import DataError
from data_pipeline.files import write_atomically

FILE_NAME = "dataset.json"
INFO_NAME = "_info.json"
"""The file in which timm and the Hugging Face Hub describe a folder of shards."""
_PEEKED = 20_000
_WRITER = "python -m data_pipeline.build"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class File(_Part):
    """One file of the dataset."""

    name: str
    bytes: int
    sha256: str


class Shard(_Part):
    """One shard and its index."""

    samples: int
    tar: File
    idx: File


class Reject(_Part):
    """An image of the source that is not in the dataset."""

    name: str
    reason: str


class Split(_Part):
    """One split: its shards in order, its table, and what was left out."""

    samples: int
    class_counts: list[int]
    shards: list[Shard]
    table: File
    rejected: list[Reject]
    built: dict[str, Any]
    """Everything that decided the bytes: the source, its options, the versions that encode."""


class Manifest(_Part):
    """The dataset."""

    schema_version: Literal[1] = 1
    name: str
    class_ids: list[str]
    class_names: list[str]
    splits: dict[str, Split]

    def _digest(self) -> str:
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Write dataset.json atomically, with its own checksum."""
        text = json.dumps({**self.model_dump(), "sha256": self._digest()}, indent=1, ensure_ascii=False)
        write_atomically(folder / FILE_NAME, (text + "\n").encode())

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read dataset.json; DataError when it is missing or not as it was written."""
        path = folder / FILE_NAME
        try:
            content = json.loads(path.read_bytes())
            digest = content.pop("sha256")
            manifest = cls.model_validate(content)
        except FileNotFoundError:
            raise DataError(_how_to_build(folder)) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, ValidationError) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise DataError(f"{path} cannot be read ({reason}); build the dataset again") from None
        if digest != manifest._digest():  # noqa: SLF001  (our own class)
            raise DataError(f"{path} is not as it was written: its checksum differs; build the dataset again")
        return manifest


def info_text(manifest: Manifest) -> str:
    """Return the text of _info.json, by which timm's WebDataset reader takes splits by their names."""
    splits = {
        name: {
            "name": name,
            "num_samples": split.samples,
            "filenames": [shard.tar.name for shard in split.shards],
            "shard_lengths": [shard.samples for shard in split.shards],
        }
        for name, split in manifest.splits.items()
    }
    info = {"written_by": _WRITER, "num_classes": len(manifest.class_ids), "splits": splits}
    return json.dumps(info, indent=1) + "\n"


def publish(manifest: Manifest, folder: Path) -> None:
    """Write _info.json, unless another program has written one, and dataset.json."""
    path = folder / INFO_NAME
    if not path.exists() or f'"{_WRITER}"'.encode() in path.read_bytes():
        write_atomically(path, info_text(manifest).encode())
    manifest.write(folder)


def _how_to_build(folder: Path) -> str:
    """Say that a folder holds no dataset, and the command that builds one; of the folder's own images if it has any."""
    from data_pipeline.sources import SPLIT_WORDS, may_be_image  # noqa: PLC0415  (only for this message)

    if any(path.suffix and may_be_image(path.name) for path in islice(folder.rglob("*"), _PEEKED)):
        has_val = any(SPLIT_WORDS.get(path.name.lower()) == "val" for path in folder.iterdir())
        return (
            f"{folder} is a folder of images, not a dataset; build one of them, and name it here: python -m "
            f"data_pipeline.build {folder} data/{folder.resolve().name}{'' if has_val else ' --val-fraction 0.1'}"
        )
    return f"there is no dataset in {folder} (no {FILE_NAME}); build one: python -m data_pipeline.build SOURCE {folder}"


def file_of(path: Path, name: str | None = None) -> File:
    """Describe a file that is on disk; dataset.json names it by its own name, or by another."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return File(name=name or path.name, bytes=path.stat().st_size, sha256=digest)
