"""Small JPEGs, look-alikes of the archives that users download, and photographs for comparison with Pillow."""

import io
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from data_pipeline.dataset import Dataset
from data_pipeline.transforms import AugmentConfig, InputConfig
from tests.data_pipeline.datasets import build_into, stored, training

PLAIN = {"mean": (0, 0, 0), "std": (1, 1, 1), "threads": 1}


def saved(image: Image.Image, format_: str, **save) -> bytes:
    """Return an image file."""
    out = io.BytesIO()
    image.save(out, format_, **save)
    return out.getvalue()


def jpeg(number: int, size: tuple[int, int] | None = None, **save) -> bytes:
    """Return a smooth colorful JPEG, another for each number."""
    rng = np.random.default_rng(number)
    size = tuple(rng.integers(24, 97, 2).tolist()) if size is None else size
    image = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    return saved(image, "JPEG", **({"quality": 85} | save))


def class_folders(root: Path, count: int, *names: str) -> Path:
    """Write so many JPEGs into each of some folders, by default three."""
    for name in names or ("ant", "bee", "cat"):
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i}.jpg").write_bytes(jpeg(zlib.crc32(f"{name}/{i}".encode())))
    return root


def tar(members: dict[str, bytes], mode: str = "w") -> bytes:
    """Return an archive of these members, in this order."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def per_class(classes: dict[str, int]) -> dict[str, dict[str, bytes]]:
    """Return images named as ImageNet names them, for WordNet ids and how many each has."""
    return {
        wnid: {f"{wnid}_{i}.JPEG": jpeg(int(wnid[1:]) % 100_000 + i) for i in range(count)}
        for wnid, count in classes.items()
    }


def imagenet_1k(root: Path, classes: dict[str, int], val: int) -> dict[str, dict[str, bytes]]:
    """Write look-alikes of the three archives of ImageNet-1k; classes are not numbered in the order of their ids."""
    from scipy.io import savemat

    root.mkdir()
    images = per_class(classes)
    train = {f"{wnid}.tar": tar(members) for wnid, members in images.items()}
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar(train))
    flat = {f"ILSVRC2012_val_{i:08d}.JPEG": jpeg(50_000 + i) for i in range(1, val + 1)}
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar(flat))
    wnids = sorted(classes, reverse=True)
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    rows = [(i + 1, wnid, f"words of {wnid}", 0) for i, wnid in enumerate(wnids)]
    rows.append((len(wnids) + 1, "n09999999", "an inner node", 2))
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(rows, dtype=kind)[:, None]})
    truth = "".join(f"{i % len(wnids) + 1}\n" for i in range(val)).encode()
    folder = "ILSVRC2012_devkit_t12/data"
    devkit = {f"{folder}/meta.mat": meta.getvalue(), f"{folder}/ILSVRC2012_validation_ground_truth.txt": truth}
    (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(tar(devkit, "w:gz"))
    return images | {"val": flat}


def imagenet_21k(path: Path, classes: dict[str, int], mode: str = "w") -> dict[str, dict[str, bytes]]:
    """Write a look-alike of the archive of ImageNet-21k; mode "w:gz" compresses it as winter21 is."""
    images = per_class(classes)
    path.write_bytes(tar({f"winter21_whole/{wnid}.tar": tar(members) for wnid, members in images.items()}, mode))
    return images


def photographs(root: Path) -> Dataset:
    """Three cuts of each of scikit-learn's two photographs, as a dataset."""
    for number, array in enumerate(load_sample_images().images):
        folder = root / "in" / f"class{number}"
        folder.mkdir(parents=True)
        full = Image.fromarray(array)  # 640 x 427
        for i, image in enumerate((full, full.crop((100, 50, 400, 420)), full.resize((333, 250)))):
            image.save(folder / f"{i}.jpg", quality=92)
    return Dataset.open(build_into(root / "in", root / "out"), "train")


def originals(dataset: Dataset) -> list[Image.Image]:
    """All images of a dataset, decoded by Pillow."""
    return [Image.open(io.BytesIO(stored(dataset, i))).convert("RGB") for i in range(len(dataset))]


def trained(dataset: Dataset, augment: AugmentConfig, **changes) -> dict[int, np.ndarray]:
    """One epoch of training images by sample id: (h, w, 3) in steps of 8 bits."""
    config = InputConfig(path=dataset.path, augment=augment, **(PLAIN | {"image_size": 96} | changes))
    with training(dataset, config, seed=5, global_batch=6, micro_batch=6) as loader:
        batch = next(iter(loader))
    pixels = (batch.images.float() * 255).permute(0, 2, 3, 1).numpy()
    return dict(zip(batch.sample_ids.tolist(), pixels, strict=True))


def difference(a: np.ndarray, b: Image.Image | np.ndarray) -> float:
    """Mean absolute difference."""
    return float(np.abs(a - np.asarray(b, np.float32)).mean())
