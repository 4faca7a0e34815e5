"""A build that is killed, runs out of room or loses its source."""

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline import units
from data_pipeline.build import main as build
from data_pipeline.dataset import Dataset
from data_pipeline.verify import main as verify
from tests.data_pipeline.pictures import jpeg

# Small units and shards, so that there is much to be interrupted in, and slow enough to be hit in the middle.
SCRIPT = """
import sys, time
from data_pipeline import assemble, units
from data_pipeline.sources.folder import Folder
from data_pipeline.build import main
units.UNIT_PICTURES, Folder.shard_bytes = 7, 40_000
def slowly(function):
    def slow(*args):
        for item in function(*args):
            time.sleep(0.002)
            yield item
    return slow
Folder.pictures, assemble.shard_jobs = slowly(Folder.pictures), slowly(assemble.shard_jobs)
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("source")
    for label in ("ant", "bee", "cat"):
        (root / label).mkdir()
        for i in range(60):
            (root / label / f"{i}.jpg").write_bytes(jpeg(hash_of(label, i)))
    (root / "ant" / "bad.jpg").write_bytes(b"no picture")
    return root


def hash_of(label, i):
    return "abc".index(label[0]) * 1000 + i


def start(source: Path, dest: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT, str(source), str(dest), "--workers", "1", *more]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def traces(dest: Path) -> int:
    return sum(1 for _ in dest.rglob("*")) if dest.exists() else 0


def test_a_build_killed_again_and_again_gives_the_same_bytes(folder, tmp_path):
    whole = start(folder, tmp_path / "a" / "photos")
    assert whole.wait() == 0
    dest = tmp_path / "b" / "photos"
    chance, kills, seen = random.Random(7), 0, 0
    for _ in range(40):
        process = start(folder, dest)
        # Kill it after it has made a few more files than any before: every stage is hit, and it always gets on.
        goal = seen + chance.randint(5, 25)
        while process.poll() is None and traces(dest) < goal:
            time.sleep(0.002)
        seen = max(seen, traces(dest))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
            assert not (dest / "dataset.json").exists() or verify([str(dest), "--workers", "1"]) == 0
        process.communicate()
        if process.returncode == 0:
            break
    assert process.returncode == 0
    assert kills >= 4
    ours = contents(dest)
    ours.pop(".building.lock", None)
    assert ours == contents(tmp_path / "a" / "photos")


def test_an_interrupted_build_of_something_else_is_begun_anew(folder, tmp_path):
    dest = tmp_path / "photos"
    process = start(folder, dest)
    while process.poll() is None and not list(dest.glob(".building-train/unit-*.npz")):
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    other = start(folder, dest, "--max-side", "30")
    _, err = other.communicate()
    assert other.returncode == 0
    assert "starting anew" in err
    assert verify([str(dest), "--workers", "1", "--decode"]) == 0


def test_a_second_build_into_the_same_folder_is_refused(folder, tmp_path):
    first = start(folder, tmp_path / "out")
    while not list((tmp_path / "out").glob(".building-train/unit-*.npz")):
        time.sleep(0.002)
    os.killpg(first.pid, signal.SIGSTOP)
    second = start(folder, tmp_path / "out")
    _, err = second.communicate()
    os.killpg(first.pid, signal.SIGCONT)
    assert first.wait() == 0
    first.communicate()
    assert second.returncode == 1
    assert "another build is writing" in err


def test_workers_do_not_outlive_a_killed_build(folder, tmp_path):
    process = start(folder, tmp_path / "out", "--workers", "2")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None and len(children.read_text().split()) < 2:
        time.sleep(0.01)
    pids = [int(pid) for pid in children.read_text().split()]
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 10
    while any(running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert pids
    assert not any(running(pid) for pid in pids)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_full_disk_is_one_clear_line_and_the_next_build_goes_on(folder, tmp_path, monkeypatch, capsys):
    real, calls = units.make, []

    def full(job):
        calls.append(job)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(job)

    monkeypatch.setattr(units, "UNIT_PICTURES", 20)
    monkeypatch.setattr(units, "make", full)
    command = [str(folder), str(tmp_path / "out"), "--workers", "1"]
    assert build(command) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: no space left for")
    assert err.count("\n") == 1
    assert not (tmp_path / "out" / "dataset.json").exists()
    assert build(command) == 0
    assert len(calls) == 3 + 8  # ten units, two of which were there already
    assert verify([str(tmp_path / "out"), "--workers", "1"]) == 0


def test_a_file_that_cannot_be_written_leaves_nothing_that_looks_whole(folder, tmp_path):
    # The system refuses to write more than 100 kB into a file: a real failure in the middle of writing a shard.
    command = [sys.executable, "-m", "data_pipeline.build", str(folder), str(tmp_path / "out"), "--workers", "1"]

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "dataset.json").exists()
    assert not list((tmp_path / "out").glob("*.tar"))


def test_a_source_that_vanishes_is_one_clear_line(folder, tmp_path, monkeypatch, capsys):
    import shutil

    source = shutil.copytree(folder, tmp_path / "source")
    real = units.make

    def vanish(job):
        shutil.rmtree(source, ignore_errors=True)
        return real(job)

    monkeypatch.setattr(units, "UNIT_PICTURES", 20)
    monkeypatch.setattr(units, "make", vanish)
    assert build([str(source), str(tmp_path / "out"), "--workers", "1"]) == 1
    err = capsys.readouterr().err
    assert "cannot be read (No such file or directory)" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_memory_does_not_grow_with_the_number_of_pictures(tmp_path):
    """What is held per picture is the table; the pictures themselves pass through in units."""
    big, used = jpeg(1, (1200, 1200), quality=100), {}
    for count in (40, 240):
        source = tmp_path / f"in{count}" / "a"
        source.mkdir(parents=True)
        for i in range(count):
            (source / f"{i}.jpg").write_bytes(big + b"\0" * 200_000)
        script = SCRIPT.replace("sys.exit(main", "code = main").replace("1:]))", "1:])") + (
            "import re; from pathlib import Path; status = Path('/proc/self/status').read_text();"
            r"print(re.search(r'VmHWM:\s+(\d+)', status)[1]); sys.exit(code)"
        )
        script = script.replace("40_000", "2_000_000")
        command = [sys.executable, "-c", script, str(source.parent), str(tmp_path / f"out{count}"), "--workers", "1"]
        used[count] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    # 200 more pictures of at least 300 kB each are 60 MB; the difference in memory is far below that.
    assert len(big) > 100_000
    assert used[240] - used[40] < 20_000


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def folder_named_as_a_picture(path: Path) -> None:
    (path / "inner").mkdir(parents=True)
    path.chmod(0)


def forbidden(path: Path) -> None:
    path.write_bytes(jpeg(1))
    path.chmod(0)


# Permissions do not bind root, as tests are often run; without its capabilities they do.
AS_ANYBODY = """
import ctypes, sys
from data_pipeline.build import main
version, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert ctypes.CDLL(None).capset(version, nothing) == 0
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (forbidden, "Permission denied"),
        (folder_named_as_a_picture, "Permission denied"),
        (dangling, "No such file or directory"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line_that_names_it_and_the_next_build_goes_on(make, why, tmp_path):
    strange, dest = tmp_path / "in" / "ant" / "strange.jpg", tmp_path / "out"
    strange.parent.mkdir(parents=True)
    for i in range(5):
        (strange.parent / f"{i}.jpg").write_bytes(jpeg(i))
    make(strange)
    command = [sys.executable, "-c", AS_ANYBODY, str(tmp_path / "in"), str(dest), "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {strange} cannot be read ({why})")
    assert done.stderr.count("\n") == 1
    assert not (dest / "dataset.json").exists()
    assert not list(dest.glob("*.tar"))
    if make is dangling:
        strange.unlink()
    else:
        strange.chmod(0o755)
    assert subprocess.run(command, check=False).returncode == 0
    assert len(Dataset.open(dest, "train")) == (6 if make is forbidden else 5)
