"""Datasets behind a real HTTP server and a stand-in for S3, with errors and slowness."""

import http.server
import itertools
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import s3fs
import torch

from data_pipeline import store
from data_pipeline.dataset import Dataset
from data_pipeline.errors import DataError
from data_pipeline.loader import TrainLoader
from data_pipeline.store import CacheConfig
from data_pipeline.transforms import InputConfig
from tests.data_pipeline.datasets import settings, training


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files; `trouble` says what goes wrong with a request."""

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        self.server.requests.append(name)
        trouble = self.server.trouble.get(name, [])
        kind = trouble.pop(0) if trouble else None
        if kind == "error":
            self.send_error(503, "try later")
        elif kind == "gone":
            self.send_error(404)
        elif kind in {"cut", "stall", "rot"}:
            data = bytearray(Path(self.translate_path(self.path)).read_bytes())
            if kind == "rot":
                data[len(data) // 2] ^= 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data if kind == "rot" else data[: len(data) // 2])
            if kind == "stall":
                self.rfile.read(1)  # until the other side hangs up
            self.close_connection = True
        else:
            time.sleep(0.3 if kind == "slow" else 0)
            super().do_GET()

    def log_message(self, *_):
        pass


def limit(request: pytest.FixtureRequest) -> float:
    """Seconds until a server counts as stalled: short only where it does, for a busy machine is slow, too."""
    return 3.0 if getattr(request.node, "callspec", None) and "stall" in request.node.callspec.params.values() else 60.0


@pytest.fixture
def server(digits, monkeypatch, request):
    monkeypatch.setattr(store, "PAUSES", (0.01, 0.02))
    monkeypatch.setattr(store, "STALLED", limit(request))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=digits.parent)) as running:
        running.requests, running.trouble = [], {}
        running.url = f"http://127.0.0.1:{running.server_port}/digits"
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture
def cache(tmp_path):
    return CacheConfig(folder=tmp_path / "cache", gigabytes=1)


def epoch(dataset, cache=None) -> list[tuple[int, float]]:
    with training(dataset, settings(dataset, cache=cache, image_size=16, shuffle_window=2)) as loader:
        return [
            (int(i), float(s))
            for b in itertools.islice(loader, 22)
            for i, s in zip(b.sample_ids, b.images.sum((1, 2, 3)), strict=True)
        ]


def test_a_dataset_behind_http_gives_the_same_batches_as_on_disk(server, train, cache):
    remote = Dataset.open(server.url, "train", cache)
    assert remote.fingerprint == train.fingerprint
    assert epoch(remote, cache) == epoch(train)
    shards = [name for name in server.requests if name.endswith(".tar")]
    assert len(shards) == len(set(shards)) == 10  # each was fetched once
    server.requests.clear()
    assert epoch(Dataset.open(server.url, "train", cache), cache) == epoch(train)
    assert set(server.requests) <= {"dataset.json"}


@pytest.mark.parametrize("kind", ["error", "cut", "stall", "rot", "slow"])
def test_a_fetch_that_fails_twice_is_tried_again(server, train, cache, kind):
    remote = Dataset.open(server.url, "train", cache)
    server.trouble["digits-train-000004.tar"] = [kind, "error"]
    assert epoch(remote, cache) == epoch(train)
    if kind != "slow":
        assert server.requests.count("digits-train-000004.tar") >= 3


@pytest.mark.parametrize(("kind", "message"), [("error", "after 3 tries"), ("rot", "after 3 tries.*content is not")])
def test_a_shard_that_cannot_be_fetched_is_a_clear_error_that_names_it(server, tmp_path, cache, kind, message):
    remote = Dataset.open(server.url, "train", cache)
    server.trouble["digits-train-000004.tar"] = [kind] * 99
    with pytest.raises(DataError, match=rf"{server.url}/digits-train-000004.tar cannot be fetched {message}") as caught:
        epoch(remote, cache)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("*000004.tar"))


def test_a_missing_dataset_or_shard_is_named_at_once(server, cache):
    with pytest.raises(DataError, match=r"nothing/dataset.json does not exist"):
        Dataset.open(server.url + "/nothing", "train", cache)
    remote = Dataset.open(server.url, "train", cache)
    server.trouble["digits-train-000004.tar"] = ["gone"] * 99
    with pytest.raises(DataError, match=r"digits-train-000004.tar does not exist"):
        epoch(remote, cache)


def test_a_url_without_a_cache_is_refused():
    with pytest.raises(DataError, match=r"is remote; say in the recipe"):
        Dataset.open("http://127.0.0.1:9/digits", "train")


def test_the_cache_keeps_within_its_size(server, train, tmp_path):
    limit = 2.5e-3  # four shards of half a megabyte and the table
    cache = CacheConfig(folder=tmp_path / "cache", gigabytes=limit)
    remote = Dataset.open(server.url, "train", cache)
    sizes, stop = [], threading.Event()

    def watch():
        while not stop.is_set():
            sizes.append(sum(size_of(path) for path in (tmp_path / "cache").iterdir()))
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert epoch(remote, cache) == epoch(train)
    finally:
        stop.set()
        watcher.join()
    assert 0 < max(sizes) <= limit * 1e9


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def test_fetches_at_the_same_time_keep_the_cache_within_its_size(server, train, tmp_path):
    limit = int(1.5 * train.shards[0].tar.bytes)  # one shard and the table
    remote = Dataset.open(server.url, "train", CacheConfig(folder=tmp_path / "cache", gigabytes=limit / 1e9))
    for shard in range(4):
        server.trouble[train.shards[shard].tar.name] = ["slow"] * 9  # so that all are on their way at once
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(remote.shard_path, range(4)))
    assert 0 < sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= limit
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 1


@pytest.mark.parametrize("killed", ["of this shard", "of another"])
def test_what_a_killed_process_left_half_fetched_gives_its_room_back(server, train, tmp_path, killed):
    limit = int(1.5 * train.shards[0].tar.bytes)
    remote = Dataset.open(server.url, "train", CacheConfig(folder=tmp_path / "cache", gigabytes=limit / 1e9))
    path = remote.shard_path(0)
    path.unlink()
    left = path.with_name(path.name + ".part") if killed == "of this shard" else tmp_path / "cache" / "0-old.tar.part"
    left.write_bytes(bytes(limit))
    assert remote.shard_path(0).read_bytes() == train.shard_path(0).read_bytes()
    assert not left.exists()


def test_a_cache_smaller_than_a_shard_is_refused(server, tmp_path):
    cache = CacheConfig(folder=tmp_path / "cache", gigabytes=1e-4)
    remote = Dataset.open(server.url, "train", cache)
    with pytest.raises(DataError, match="give it more gigabytes"):
        remote.shard_path(0)


@pytest.mark.parametrize(
    ("order", "ranks", "shards"),  # window and lanes; this rank, and how many share the machine
    [((4, 1), (0, 1), 4), ((16, 1), (0, 1), 10), ((2, 4), (3, 1), 2), ((2, 4), (1, 2), 4), ((1, 4), (2, 4), 4)],
)
def test_a_cache_too_small_for_the_shuffle_is_refused_at_once(server, tmp_path, order, ranks, shards):
    window, lanes = order
    train = Dataset.open(server.url, "train", CacheConfig(folder=tmp_path / "cache", gigabytes=1))
    sizes = sorted((shard.tar.bytes for shard in train.shards), reverse=True)
    needed = sum(sizes[:shards])

    def load(size: int) -> TrainLoader:
        cache = CacheConfig(folder=tmp_path / "cache", gigabytes=size / 1e9)
        config = InputConfig(path=server.url, cache=cache, image_size=16, shuffle_window=window, lanes=lanes, threads=1)
        return TrainLoader(
            Dataset.open(server.url, "train", cache), config, seed=1, global_batch=64, micro_batch=16, rank=ranks[0],
            world_size=4, device=torch.device("cpu"), local_ranks=ranks[1],
        )  # fmt: skip

    load(needed + 1).close()
    server.requests.clear()
    with pytest.raises(DataError, match=f"the {shards} shards that this machine shuffles at a time") as caught:
        load(needed - 1000)
    stated = float(re.search(r"need (\S+);", str(caught.value))[1])
    assert needed <= stated * 1e9 < needed + 1e6
    assert "\n" not in str(caught.value)
    assert not any(name.endswith(".tar") for name in server.requests)


FETCH_ALL = """
import sys
from pathlib import Path
from data_pipeline.dataset import Dataset
from data_pipeline.store import CacheConfig
dataset = Dataset.open(sys.argv[1], "train", CacheConfig(folder=Path(sys.argv[2]), gigabytes=1))
print([dataset.shard_path(shard).stat().st_size for shard in range(len(dataset.shards))])
"""


def test_processes_of_a_machine_share_the_cache_and_fetch_each_shard_once(server, train, tmp_path):
    command = [sys.executable, "-c", FETCH_ALL, server.url, str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    found = [process.communicate()[0].strip() for process in processes]
    assert found == [str([shard.tar.bytes for shard in train.shards])] * 3
    shards = [name for name in server.requests if name.endswith(".tar")]
    assert sorted(shards) == sorted(shard.tar.name for shard in train.shards)


def test_shards_are_fetched_before_they_are_read(server, tmp_path, cache):
    remote = Dataset.open(server.url, "train", cache)
    config = settings(remote, cache=cache, image_size=16, shuffle_window=2)
    with training(remote, config, global_batch=8, micro_batch=8) as loader:
        batch = next(iter(loader))
        read = set(np.unique(remote.shard[batch.sample_ids]).tolist())
        deadline = time.monotonic() + 10
        while len(list((tmp_path / "cache").glob("*.tar"))) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert len(read) <= 2
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 4  # the window that is read, and the next one


class S3Proxy(http.server.BaseHTTPRequestHandler):
    """Stands before the stand-in for S3; `trouble` says what goes wrong with a request for an object."""

    def do_HEAD(self):
        self.forward()

    def do_GET(self):
        self.forward()

    def forward(self):
        name = self.path.partition("?")[0].rpartition("/")[2]
        kind = None
        if self.command == "GET" and name.endswith(".tar"):
            self.server.requests.append((name, time.monotonic()))
            trouble = self.server.trouble.get(name, [])
            kind = trouble.pop(0) if trouble else None
        if kind == "error":
            return self.answer(
                503, {}, b"<Error><Code>SlowDown</Code><Message>Reduce your request rate</Message></Error>"
            )
        if kind == "stall":
            return self.rfile.read(1)  # until the other side hangs up
        request = urllib.request.Request(self.server.behind + self.path, headers=self.headers, method=self.command)
        try:
            with urllib.request.urlopen(request) as response:
                status, headers, body = response.status, dict(response.headers), response.read()
        except urllib.error.HTTPError as error:
            status, headers, body = error.code, dict(error.headers), error.read()
        if kind == "slow":
            time.sleep(0.3)
        if kind == "rot":
            body = bytes([body[0] ^ 1]) + body[1:]
        return self.answer(status, headers, body, cut=kind == "cut")

    def answer(self, status, headers, body, *, cut=False):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            if name.lower() not in {"connection", "transfer-encoding", "server", "date"}:
                self.send_header(name, value)
        self.end_headers()
        self.close_connection = True
        if self.command != "HEAD":
            with suppress(BrokenPipeError):  # who waited too long has hung up
                self.wfile.write(body[: len(body) // 2] if cut else body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def moto(digits):
    import boto3
    from moto.server import ThreadedMotoServer

    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    running.start()
    host, port = running.get_host_and_port()
    keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", **keys)
    client.create_bucket(Bucket="pictures")
    for path in digits.iterdir():
        client.upload_file(str(path), "pictures", f"sets/digits/{path.name}")
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def s3(moto, monkeypatch, request):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(store, "PAUSES", (0.05, 0.1))
    monkeypatch.setattr(store, "STALLED", limit(request))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), S3Proxy) as running:
        running.requests, running.trouble, running.behind = [], {}, moto
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{running.server_port}")
        threading.Thread(target=running.serve_forever, daemon=True).start()
        s3fs.S3FileSystem.clear_instance_cache()  # or it keeps the address of an earlier test
        yield running
        running.shutdown()


S3_URL = "s3://pictures/sets/digits"
SHARD = "digits-train-000004.tar"


def test_a_dataset_in_s3_gives_the_same_batches_as_on_disk(s3, train, cache):
    assert epoch(Dataset.open(S3_URL, "train", cache), cache) == epoch(train)
    names = [name for name, _ in s3.requests]
    assert len(names) == len(set(names)) == 10


def test_a_shard_that_is_missing_from_s3_is_named_at_once(s3, moto, digits, cache):
    import boto3

    client = boto3.client("s3", endpoint_url=moto)
    remote = Dataset.open(S3_URL, "train", cache)
    client.delete_object(Bucket="pictures", Key=f"sets/digits/{SHARD}")
    try:
        with pytest.raises(DataError, match=rf"{S3_URL}/{SHARD} does not exist"):
            epoch(remote, cache)
    finally:
        client.upload_file(str(digits / SHARD), "pictures", f"sets/digits/{SHARD}")


@pytest.mark.parametrize("kind", ["error", "cut", "stall", "rot", "slow"])
def test_a_fetch_from_s3_that_fails_twice_is_tried_again_with_pauses(s3, train, cache, kind):
    remote = Dataset.open(S3_URL, "train", cache)
    s3.trouble[SHARD] = [kind, "error"]
    path = remote.shard_path(4)
    assert path.read_bytes() == train.shard_path(4).read_bytes()
    times = [moment for name, moment in s3.requests if name == SHARD]
    if kind == "slow":
        assert len(times) == 1
    else:
        assert len(times) == 3
        assert times[1] - times[0] >= 0.05
        assert times[2] - times[1] >= 0.1


@pytest.mark.parametrize("kind", ["error", "cut", "stall", "rot"])
def test_a_shard_that_cannot_be_fetched_from_s3_is_a_clear_error_that_names_it(s3, tmp_path, cache, kind):
    remote = Dataset.open(S3_URL, "train", cache)
    s3.trouble[SHARD] = ["error", "error", kind]
    with pytest.raises(DataError, match=rf"{S3_URL}/{SHARD} cannot be fetched after 3 tries \(.+\)") as caught:
        remote.shard_path(4)
    assert "\n" not in str(caught.value)
    assert len(s3.requests) == 3
    assert not list((tmp_path / "cache").glob("*.tar"))
    assert not list((tmp_path / "cache").glob("*.part"))
