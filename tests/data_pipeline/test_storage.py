"""Storage that fails for a while, for good or without an end; caches that vanish."""

import errno
import itertools
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_pipeline import engine, store
from data_pipeline.dataset import Dataset
from data_pipeline.errors import DataError, StorageError
from data_pipeline.reader import Reader
from data_pipeline.store import CacheConfig, RemoteStore
from tests.data_pipeline.datasets import evaluation, settings, training

MAY_PASS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
LASTS = (errno.ENOENT, errno.EACCES)


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    slept = []
    monkeypatch.setattr(store, "PAUSES", (0.01, 0.02))
    monkeypatch.setattr(store.time, "sleep", slept.append)
    return slept


def failing(function, code: int, times: float, name: str = ".tar"):
    """Let `function` fail so often on a file whose path ends with `name`; a descriptor stands for its file."""
    left = [times]

    def fails(file, *arguments, **options):
        path = str(Path(f"/proc/self/fd/{file}").readlink() if isinstance(file, int) else file)
        if path.endswith(name) and left[0] > 0:
            left[0] -= 1
            raise OSError(code, os.strerror(code), path)
        return function(file, *arguments, **options)

    return fails


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def first_images(dataset: Dataset) -> torch.Tensor:
    with training(dataset) as loader:
        return next(iter(loader)).images.clone()


@pytest.mark.parametrize("call", ["open", "pread"])
@pytest.mark.parametrize("code", MAY_PASS, ids=errno.errorcode.get)
def test_a_storage_error_that_passes_is_tried_again_with_pauses(train, monkeypatch, pauses, code, call):
    expected = Reader(train).read(3)[0]
    reader = Reader(train)
    monkeypatch.setattr(os, call, failing(getattr(os, call), code, times=2))
    data, reason = reader.read(3)
    assert reason == ""
    assert (data == expected).all()
    assert pauses == [0.01, 0.02]


def test_a_stale_handle_is_closed_and_the_shard_opened_anew(train, monkeypatch):
    reader, opened = Reader(train), []
    reader.read(0)
    pread, real = os.pread, os.open

    def stale(*arguments):
        if not opened:
            raise OSError(errno.ESTALE, "Stale file handle")
        return pread(*arguments)

    monkeypatch.setattr(os, "pread", stale)
    monkeypatch.setattr(os, "open", lambda *arguments: opened.append(arguments) or real(*arguments))
    descriptors = open_descriptors()
    assert reader.read(1)[1] == ""
    assert len(opened) == 1
    assert open_descriptors() == descriptors


@pytest.mark.parametrize("loader_of", [training, evaluation])
@pytest.mark.parametrize("failure", [*itertools.product(["open", "pread"], [*MAY_PASS, *LASTS])], ids=str)
def test_a_storage_error_that_stays_ends_the_reader_threads_with_one_line(
    train, monkeypatch, pauses, failure, loader_of
):
    call, code = failure
    monkeypatch.setattr(os, call, failing(getattr(os, call), code, times=float("inf")))
    with loader_of(train) as loader, pytest.raises(DataError) as caught:
        next(iter(loader))
    tries = "after 3 tries " if code in MAY_PASS else ""
    assert f".tar cannot be read {tries}({os.strerror(code)})" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, StorageError) == bool(pauses) == (code in MAY_PASS)


FILES = {
    "dataset.json": ("open", "dataset.json"),
    "the table": ("open", ".npz"),
    "a shard's size": ("stat", "000002.tar"),
    "a shard's header": ("open", "000002.tar"),
}


@pytest.mark.parametrize("file", FILES)
def test_opening_a_dataset_is_tried_again_and_fails_as_reading_does(digits, train, monkeypatch, file):
    call, name = FILES[file]
    real = getattr(Path, call)
    for times in (2, float("inf")):
        monkeypatch.setattr(Path, call, failing(real, errno.ESTALE, times, name))
        if times == 2:
            assert Dataset.open(digits, "train").fingerprint == train.fingerprint
        else:
            with pytest.raises(StorageError, match=rf"{name} cannot be read after 3 tries .Stale file handle"):
                Dataset.open(digits, "train")
    monkeypatch.setattr(Path, call, failing(real, errno.EACCES, float("inf"), name))
    with pytest.raises(DataError, match="Permission denied") as caught:
        Dataset.open(digits, "train")
    assert type(caught.value) is DataError


def test_files_are_checked_where_it_is_asked_for_only(copy, train, monkeypatch):
    asked = []
    real = Path.stat
    monkeypatch.setattr(Path, "stat", lambda path, **options: asked.append(path) or real(path, **options))
    assert (Dataset.open(copy, "train", check_files=False).labels == train.labels).all()
    assert not [path for path in asked if path.suffix in {".tar", ".idx"}]
    Dataset.open(copy, "train")
    assert len([path for path in asked if path.suffix in {".tar", ".idx"}]) >= 20


def test_the_name_of_a_sample_whose_shard_is_gone_is_its_number(copy):
    dataset = Dataset.open(copy, "train")
    (copy / dataset.shards[0].tar.name).unlink()
    assert dataset.sample_name(7) == "sample 7"


def test_a_read_that_hangs_is_reported_by_name_while_the_batch_waits(train, monkeypatch, capfd):
    hangs, pread = threading.Event(), os.pread

    def hanging(*arguments):
        hangs.wait(5)
        return pread(*arguments)

    monkeypatch.setattr(engine, "HANGS_S", 0.05)
    monkeypatch.setattr(os, "pread", hanging)
    threading.Timer(0.3, hangs.set).start()
    first_images(train)
    lines = capfd.readouterr().err.splitlines()
    assert lines
    assert all(line.startswith(f"WARNING waiting for data: reading {train.path}/digits-train-") for line in lines)
    assert lines[0].endswith(".tar takes 0 s so far")
    assert store.hanging_read(0) == ""


class SlowStore(store.Store):
    """Fetches shard 1 when it is let to."""

    remote = True

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.asked, self.let = threading.Event(), threading.Event()

    def file(self, file):
        if file.name.endswith("000001.tar"):
            self.asked.set()
            self.let.wait(5)
        return super().file(file)


def test_no_shard_waits_for_the_fetch_of_another(train):
    slow = SlowStore(train.path)
    reader = Reader(replace(train, store=slow))
    first = int(train.shard_sizes[0])
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(reader.read, sample) for sample in (first, first + 1)]
        assert slow.asked.wait(5)
        assert reader.read(0)[1] == reader.read(first - 1)[1] == ""
        assert not any(future.done() for future in waiting)
        descriptors = open_descriptors()
        slow.let.set()
        assert [future.result()[1] for future in waiting] == ["", ""]
    assert open_descriptors() == descriptors + 1  # both opened it, and one closed its own


@pytest.fixture
def remote(digits, tmp_path):
    return Dataset.open(f"file://{digits}", "train", CacheConfig(folder=tmp_path / "cache", gigabytes=1))


def test_a_cache_folder_that_vanishes_while_training_is_recreated(remote, train, tmp_path):
    def images(dataset, vanish):
        config = settings(dataset, cache=CacheConfig(folder=tmp_path / "cache", gigabytes=1), shuffle_window=2)
        with training(dataset, config) as loader:
            for step, batch in enumerate(itertools.islice(loader, 22)):
                if vanish and step in {3, 12}:
                    shutil.rmtree(tmp_path / "cache")
                yield batch.images.clone()

    pairs = zip(images(remote, vanish=True), images(train, vanish=False), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_a_cache_folder_that_vanishes_again_and_again_is_a_clear_error(remote, tmp_path, monkeypatch):
    fetch, fetches = RemoteStore._fetch, []

    def vanishing(*arguments):
        fetches.append(arguments)
        shutil.rmtree(tmp_path / "cache")
        fetch(*arguments)

    monkeypatch.setattr(RemoteStore, "_fetch", vanishing)
    with pytest.raises(StorageError, match=rf"{tmp_path}/cache vanished again after it was recreated"):
        remote.shard_path(0)
    assert len(fetches) == 2


@pytest.mark.parametrize("recreated", [False, True], ids=["gone", "recreated by another process"])
def test_a_cache_folder_that_vanishes_during_a_fetch_never_gives_half_a_shard(
    remote, train, tmp_path, monkeypatch, recreated
):
    download, folders = RemoteStore._download, [tmp_path / "cache"]

    def vanishing(self, name, out):
        digest = download(self, name, out)
        for folder in folders:
            shutil.rmtree(folder)
            if recreated:
                folder.mkdir()
                Path(out.name).write_bytes(b"what another process has so far")
        folders.clear()
        return digest

    monkeypatch.setattr(RemoteStore, "_download", vanishing)
    assert remote.shard_path(0).read_bytes() == train.shard_path(0).read_bytes()


# What each try of a fetch meets, and whether another start may find it otherwise.
FETCHES = {
    "no network": (ConnectionError("no route"), True),
    "a server that is down": (TimeoutError(), True),
    "an error of a package": (RuntimeError("503"), True),
    "no permission": (PermissionError("denied"), False),
    "no such file": (FileNotFoundError("nothing"), False),
    "a full disk": (OSError(errno.ENOSPC, "No space left on device"), False),
    "other content": (None, False),
}


@pytest.mark.parametrize("kind", FETCHES)
def test_a_fetch_that_gives_up_says_whether_another_start_may_succeed(remote, monkeypatch, kind):
    error, passes = FETCHES[kind]

    def download(*_):
        if error is not None:
            raise error
        return "another digest"

    monkeypatch.setattr(RemoteStore, "_download", download)
    with pytest.raises(DataError) as caught:
        remote.shard_path(0)
    assert isinstance(caught.value, StorageError) == passes
    assert "\n" not in str(caught.value)


def test_a_local_disk_under_the_cache_that_fails_for_a_while_is_tried_again(remote, monkeypatch):
    path, real = remote.shard_path(0), os.utime
    monkeypatch.setattr(os, "utime", failing(real, errno.EIO, times=2))
    assert remote.shard_path(0) == path
    monkeypatch.setattr(os, "utime", failing(real, errno.EIO, times=float("inf")))
    with pytest.raises(StorageError, match="cannot be read after 3 tries"):
        remote.shard_path(0)
