"""A build that is killed, runs out of room or loses its source."""

import errno
import fcntl
import itertools
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline import assemble, units
from data_pipeline.build import main as build
from data_pipeline.dataset import Dataset
from data_pipeline.errors import StorageError
from data_pipeline.sources.folder import ClassFolders
from data_pipeline.verify import main as verify
from tests.data_pipeline.images import jpeg
from tests.data_pipeline.killed_builds import contents

# Small units and shards, so that there is much to be interrupted in, and slow enough to be hit in the middle.
SCRIPT = """
import sys, time
from data_pipeline import assemble, units
from data_pipeline.sources.folder import ClassFolders
from data_pipeline.build import main
units.UNIT_IMAGES, ClassFolders.shard_bytes = 7, 40_000
def slowly(function):
    def slow(*args):
        for item in function(*args):
            time.sleep(0.002)
            yield item
    return slow
ClassFolders.images, assemble.shard_jobs = slowly(ClassFolders.images), slowly(assemble.shard_jobs)
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


@pytest.mark.parametrize(("way", "least"), [("anywhere", 45), ("again and again", 5)])
def test_a_build_killed_at_any_change_of_the_disk_gives_the_same_bytes(folder, tmp_path, way, least):
    source = folder
    if way == "anywhere":  # each death costs two builds
        source = tmp_path / "source"
        for label, i in itertools.product(("ant", "bee"), range(3)):
            (source / label).mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / label / f"{i}.jpg", source / label)
    paths = [source, tmp_path / "a" / "photos", tmp_path / "b" / "photos"]
    command = [sys.executable, "-B", "-m", "tests.data_pipeline.killed_builds", *map(str, paths), way]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= least


@pytest.mark.parametrize("moved", [0, 3])
@pytest.mark.parametrize("change", ["gains", "loses"])
def test_a_source_that_changes_while_a_build_is_interrupted_gives_what_a_new_build_gives(
    folder, tmp_path, monkeypatch, change, moved
):
    source = shutil.copytree(folder, tmp_path / "source")
    monkeypatch.setattr(units, "UNIT_IMAGES", 20)
    monkeypatch.setattr(ClassFolders, "shard_bytes", 40_000)
    real = assemble.publish

    def interrupted(shards, *paths):
        real(shards[:moved], *paths)
        raise StorageError("interrupted")

    with monkeypatch.context() as now:
        now.setattr(assemble, "publish", interrupted)
        assert build([str(source), str(tmp_path / "a" / "photos"), "--workers", "1"]) == 1
    assert len(list((tmp_path / "a" / "photos").glob("*.tar"))) == moved
    if change == "gains":
        (source / "bee" / "new.jpg").write_bytes(jpeg(7, (200, 200)))
    else:
        for i in range(30):
            (source / "bee" / f"{i}.jpg").unlink()
    for parent in ("a", "b"):
        assert build([str(source), str(tmp_path / parent / "photos"), "--workers", "1"]) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert verify([str(tmp_path / "a" / "photos"), "--workers", "1"]) == 0


def test_scratch_that_a_failing_disk_has_changed_is_one_clear_line(folder, tmp_path, monkeypatch, capsys):
    real = units.make

    def then_rots(unit, *arguments):
        made = real(unit, *arguments)
        path = unit.with_suffix(".bin")
        path.write_bytes(path.read_bytes()[:-1])  # as after a power failure
        return made

    monkeypatch.setattr(units, "make", then_rots)
    assert build([str(folder), str(tmp_path / "out"), "--workers", "1"]) == 1
    err = capsys.readouterr().err
    assert "unit-000000.bin is not as it was written" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out" / "dataset.json").exists()


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
        assert first.poll() is None, first.communicate()
        time.sleep(0.002)
    os.killpg(first.pid, signal.SIGSTOP)
    second = start(folder, tmp_path / "out")
    _, err = second.communicate()
    os.killpg(first.pid, signal.SIGCONT)
    assert first.wait() == 0
    first.communicate()
    assert second.returncode == 1
    assert "another build is writing" in err


def test_a_lock_that_another_build_has_just_removed_locks_nothing(folder, tmp_path, monkeypatch, capsys):
    real, lock = fcntl.flock, tmp_path / "out" / ".building.lock"

    def after_the_other_has_ended(stream, operation):
        lock.unlink()
        real(stream, operation)

    monkeypatch.setattr(fcntl, "flock", after_the_other_has_ended)
    assert build([str(folder), str(tmp_path / "out"), "--workers", "1"]) == 1
    assert "another build is writing" in capsys.readouterr().err


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

    def full(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(units, "UNIT_IMAGES", 20)
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
    source = shutil.copytree(folder, tmp_path / "source")
    real = units.make

    def vanish(*arguments):
        shutil.rmtree(source, ignore_errors=True)
        return real(*arguments)

    monkeypatch.setattr(units, "UNIT_IMAGES", 20)
    monkeypatch.setattr(units, "make", vanish)
    assert build([str(source), str(tmp_path / "out"), "--workers", "1"]) == 1
    err = capsys.readouterr().err
    assert "cannot be read (No such file or directory)" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out" / "dataset.json").exists()


@pytest.mark.slow
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
    strange.chmod(0o755)
    assert subprocess.run(command, check=False).returncode == 0
    assert len(Dataset.open(dest, "train")) == (6 if make is forbidden else 5)
