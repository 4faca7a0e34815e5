"""Building, reading and damaging datasets in tests."""

import zlib
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from data_pipeline.build import main as build
from data_pipeline.dataset import Dataset
from data_pipeline.loader import EvalLoader, TrainLoader
from data_pipeline.manifest import Manifest, file_of
from data_pipeline.reader import Reader
from data_pipeline.transforms import InputConfig

CPU = torch.device("cpu")
ONE_RANK = {"rank": 0, "world_size": 1, "device": CPU}


def build_into(source: object, dest: Path, *options: str, status: int = 0) -> Path:
    """Build with one worker in this process; return ``dest``."""
    assert build([str(source), str(dest), "--workers", "1", *options]) == status
    return dest


def settings(dataset: Dataset, **changes) -> InputConfig:
    """Images of 32 pixels, decoded by one thread."""
    return InputConfig(path=dataset.path, **({"image_size": 32, "threads": 1, "max_bad_fraction": 0.01} | changes))


def training(dataset: Dataset, config: InputConfig | None = None, **place) -> closing[TrainLoader]:
    """A loader for one rank and global batches of 64, but for what ``place`` changes."""
    place = {"seed": 1, "global_batch": 64, "micro_batch": 64} | ONE_RANK | place
    return closing(TrainLoader(dataset, config or settings(dataset), **place))


def evaluation(dataset: Dataset, config: InputConfig | None = None, **place) -> closing[EvalLoader]:
    """A loader for one rank and batches of 100, but for what ``place`` changes."""
    return closing(EvalLoader(dataset, config or settings(dataset), **({"batch_size": 100} | ONE_RANK | place)))


def stored(dataset: Dataset, sample: int) -> bytes:
    """The bytes of an image in its shard."""
    with dataset.shard_path(int(dataset.shard[sample])).open("rb") as shard:
        shard.seek(int(dataset.offset[sample]))
        return shard.read(int(dataset.length[sample]))


def overwrite(folder: Path, sample: int, data: bytes, at: int = 0) -> None:
    """Write over a training image in its shard, ``at`` bytes after its first."""
    dataset = Dataset.open(folder, "train")
    with dataset.shard_path(int(dataset.shard[sample])).open("r+b") as shard:
        shard.seek(int(dataset.offset[sample]) + at)
        shard.write(data)


def change_table(folder: Path, split: str = "train", **changes) -> Path:
    """Change ``column=(sample, value)`` in the table, whose size stays; dataset.json knows nothing of it."""
    path = folder / f"digits-{split}.samples.npz"
    size = path.stat().st_size
    with np.load(path) as read:
        table = dict(read)
    for column, (sample, value) in changes.items():
        table[column][sample] = value
    np.savez(path, **table)
    assert path.stat().st_size == size
    return path


def retable(folder: Path, split: str = "train", **changes) -> None:
    """Change the table and dataset.json as a builder with a fault would have written them."""
    path = change_table(folder, split, **changes)
    manifest = Manifest.read(folder)
    entry = manifest.splits[split].model_copy(update={"table": file_of(path)})
    manifest.model_copy(update={"splits": manifest.splits | {split: entry}}).write(folder)


def replace_image(folder: Path, sample: int, data: bytes) -> None:
    """Put other bytes in the place of a training image, with their checksum in the table."""
    overwrite(folder, sample, data)
    retable(folder, crc32=(sample, zlib.crc32(data)))


def spoil_scan(folder: Path) -> None:
    """Replace image 70 by one whose header is right and whose scan no decoder can begin."""
    data = stored(Dataset.open(folder, "train"), 70)
    scan = data.index(b"\xff\xda")
    replace_image(folder, 70, data[: scan + 12] + b"\xff\xd8" + bytes(len(data) - scan - 14))


def classes_by_bytes(folder: Path, split: str) -> dict[bytes, str]:
    """Return class id of every image, by its bytes."""
    dataset = Dataset.open(folder, split)
    reader = Reader(dataset)
    found = {reader.read(i)[0].tobytes(): dataset.class_ids[dataset.labels[i]] for i in range(len(dataset))}
    reader.close()
    assert len(found) == len(dataset)
    return found


def listed(folder: Path, split: str = "train") -> dict[str, str]:
    """What a build left out, by name with the reason."""
    return {reject.name: reject.reason for reject in Manifest.read(folder).splits[split].rejected}


def run_build(*arguments: object) -> int:
    """Build with these arguments and one worker in this process; return the exit status."""
    return build([*map(str, arguments), "--workers", "1"])
