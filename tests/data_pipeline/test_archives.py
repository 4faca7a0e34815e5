"""Archives that are damaged anywhere: refused, or every image is found or listed; never silently fewer."""

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.acceptance import Rejected
from data_pipeline.archive import headers_only, members
from data_pipeline.errors import DataError
from data_pipeline.manifest import Manifest
from data_pipeline.shards import Labels
from data_pipeline.sources import Source
from data_pipeline.sources.folder import ClassFolders
from data_pipeline.sources.imagenet import ImageNet1k, ImageNet21k
from data_pipeline.sources.shards import Shards
from tests.data_pipeline.datasets import run_build
from tests.data_pipeline.images import imagenet_1k, imagenet_21k, jpeg, tar

BLOCK = 512
CLASSES = {"n01440764": 3, "n01443537": 2, "n01484850": 2}


def write_1k(root: Path) -> tuple[Path, Source]:
    imagenet_1k(root / "1k", CLASSES, val=3)
    return root / "1k" / "ILSVRC2012_img_train.tar", ImageNet1k(root / "1k")


def write_21k(root: Path) -> tuple[Path, Source]:
    imagenet_21k(root / "winter21.tar", CLASSES)
    return root / "winter21.tar", ImageNet21k(root / "winter21.tar")


def write_folders(root: Path) -> tuple[Path, Source]:
    path = root / "folders.tar"
    path.write_bytes(tar({f"{split}/{i % 2}/{i}.jpg": jpeg(i, (9, 9)) for split in ("train", "val") for i in range(4)}))
    return path, ClassFolders(path)


def write_shard(root: Path) -> tuple[Path, Source]:
    path = root / "s.tar"
    path.write_bytes(
        tar({f"{i}.{ext}": data for i in range(5) for ext, data in (("cls", b"%d" % i), ("jpg", jpeg(i, (9, 9))))})
    )
    return path, Shards({"train": [path]}, Labels())


KINDS = {"imagenet-1k": write_1k, "imagenet-21k": write_21k, "class folders": write_folders, "shard": write_shard}


def images_of(source: Source) -> tuple[dict[str, str], int]:
    """Class id of each image that can be used, by name, and how many are listed."""
    images = list(source.images("train"))
    usable = {image.name: image.class_id for image in images if not isinstance(image.data, Rejected)}
    return usable, len(images) - len(usable)


def damages(data: bytes) -> Iterator[tuple[str, bytes]]:
    """An archive, damaged in each of its blocks and cut at each of their borders."""
    for at in range(0, len(data), BLOCK):
        if any(data[at : at + BLOCK]):
            yield f"zeros over block {at}", data[:at] + bytes(BLOCK) + data[at + BLOCK :]
            yield f"a bit of block {at}", data[: at + 130] + bytes((data[at + 130] ^ 4,)) + data[at + 131 :]
        yield f"cut at {at}", data[:at]
        yield f"cut behind {at}", data[: at + 77]
        yield f"without block {at}", data[:at] + data[at + BLOCK :]
    yield "two archives in one", data + data
    yield "text at the end", data + b"</html>"


@pytest.mark.parametrize("kind", KINDS)
def test_a_damage_anywhere_is_refused_or_every_image_is_found_or_listed(kind, tmp_path):
    path, source = KINDS[kind](tmp_path)
    data, (whole, _) = path.read_bytes(), images_of(source)
    refused = accepted = 0
    for name, damaged in damages(data):
        path.write_bytes(damaged)
        try:
            found, listed = images_of(source)
        except DataError as error:
            refused += str(path) in str(error)
        else:
            assert found.items() <= whole.items(), name
            assert len(found) + listed == len(whole), name
            accepted += 1
    assert refused + accepted == len(list(damages(data)))
    assert 20 < accepted < refused  # data blocks, whose images are decoded later, and the padding of the end


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_damage_anywhere_in_a_compressed_archive_is_refused(pack, tmp_path):
    imagenet_21k(tmp_path / "winter21.tar", CLASSES)
    packed = pack((tmp_path / "winter21.tar").read_bytes())
    path = tmp_path / "packed.tar"
    path.write_bytes(packed)
    assert len(images_of(ImageNet21k(path))[0]) == 7
    for at in range(12, len(packed), 101):
        for damaged in (packed[:at], packed[:at] + bytes((packed[at] ^ 16,)) + packed[at + 1 :]):
            path.write_bytes(damaged)
            with pytest.raises(DataError, match="packed"):
                images_of(ImageNet21k(path))


def test_gzip_members_that_were_joined_are_read_as_gunzip_does(tmp_path):
    data = tar({f"{i}.jpg": jpeg(i) for i in range(6)})
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(data[:3000]) + gzip.compress(data[3000:]))
    assert [member.name for member in members(tmp_path / "x.tar.gz")] == [f"{i}.jpg" for i in range(6)]


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_links_devices_and_names_that_are_not_utf8_are_listed_or_escaped(pack, tmp_path):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", encoding="latin-1", format=tarfile.GNU_FORMAT) as archive:
        for number, name in enumerate(("n1/café.jpg", "n1/a.jpg", f"n1/{'long' * 60}.jpg")):
            info = tarfile.TarInfo(name)
            info.size = len(jpeg(number))
            archive.addfile(info, io.BytesIO(jpeg(number)))
        archive.addfile(special("n1/hard.jpg", tarfile.LNKTYPE, "n1/a.jpg"))
        archive.addfile(special("n1/soft.jpg", tarfile.SYMTYPE, "a.jpg"))
        archive.addfile(special("n1/pipe.jpg", tarfile.FIFOTYPE))
        archive.addfile(special("n2", tarfile.DIRTYPE))
    path = tmp_path / "x.tar"
    path.write_bytes(pack(out.getvalue()))
    assert run_build(path, tmp_path / "out") == 0
    split = Manifest.read(tmp_path / "out").splits["train"]
    assert split.samples == 3
    listed = {reject.name: reject.reason for reject in split.rejected}
    assert set(listed) == {"n1/hard.jpg", "n1/soft.jpg", "n1/pipe.jpg"}
    assert "hard link" in listed["n1/hard.jpg"]
    names = [member.name for member in members(path, inline=headers_only)]
    assert names[0] == "n1/caf\\udce9.jpg"


def test_zeros_over_a_long_name_are_refused_and_headers_for_all_members_are_not(tmp_path):
    data = tar({"café/0.jpg": jpeg(0), "café/1.jpg": jpeg(1)})
    start = data.rindex(b"path=caf")
    start -= start % tarfile.BLOCKSIZE
    path = tmp_path / "x.tar"
    common = tarfile.TarInfo.create_pax_global_header({"comment": "as git archive writes it"})
    for before, pack in ((b"", bytes), (common, bytes), (common, gzip.compress)):
        damaged = data[:start] + bytes(tarfile.BLOCKSIZE) + data[start + tarfile.BLOCKSIZE :]
        path.write_bytes(pack(before + damaged))
        with pytest.raises(DataError, match="an extended header without a record"):
            list(members(path))
    path.write_bytes(common + data)
    assert [member.name for member in members(path)] == ["café/0.jpg", "café/1.jpg"]


WHOLE = tar({f"{i}.jpg": jpeg(i) for i in range(4)})


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("inner", [WHOLE[:1100], b"", tar({})], ids=["cut", "empty", "without images"])
def test_a_class_that_is_incomplete_is_named_and_nothing_is_left_behind(inner, pack, tmp_path, capsys):
    path = tmp_path / "winter21.tar"
    path.write_bytes(pack(tar({"n1.tar": WHOLE, "n2.tar": inner, "n3.tar": WHOLE})))
    assert run_build(path, tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert "n2.tar" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
