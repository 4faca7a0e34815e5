"""Small real pictures, and look-alikes of the archives that people download."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def jpeg(number: int, size: tuple[int, int] | None = None, **save) -> bytes:
    """Return a smooth colourful JPEG, another for each number."""
    rng = np.random.default_rng(number)
    size = tuple(rng.integers(24, 97, 2).tolist()) if size is None else size
    image = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.save(out, "JPEG", **({"quality": 85} | save))
    return out.getvalue()


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
    """Return pictures named as ImageNet names them, for WordNet ids and how many each has."""
    return {
        wnid: {f"{wnid}_{i}.JPEG": jpeg(hash_of(wnid) + i) for i in range(count)} for wnid, count in classes.items()
    }


def hash_of(wnid: str) -> int:
    return int(wnid[1:]) % 100_000


def imagenet_1k(root: Path, classes: dict[str, int], val: int) -> dict[str, dict[str, bytes]]:
    """Write look-alikes of the three archives of ImageNet-1k; classes are not numbered in the order of their ids."""
    from scipy.io import savemat

    root.mkdir()
    pictures = per_class(classes)
    train = {f"{wnid}.tar": tar(members) for wnid, members in pictures.items()}
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
    return pictures | {"val": flat}


def imagenet_21k(path: Path, classes: dict[str, int], mode: str = "w") -> dict[str, dict[str, bytes]]:
    """Write a look-alike of the archive of ImageNet-21k; mode "w:gz" compresses it as winter21 is."""
    pictures = per_class(classes)
    path.write_bytes(tar({f"winter21_whole/{wnid}.tar": tar(members) for wnid, members in pictures.items()}, mode))
    return pictures
