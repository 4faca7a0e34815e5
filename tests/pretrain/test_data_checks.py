"""What is checked of a run's data, by which rank, and how a command ends when storage fails."""

import errno
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException

from data_pipeline import store
from data_pipeline.errors import DataError, StorageError
from pretrain.check import check_recipe_here
from pretrain.checkpoints.checkpoint import FORMAT, MANIFEST, seal
from pretrain.engine.distributed import Rank, first_of_node_checks
from pretrain.evaluate import main as evaluate
from pretrain.files import write_json
from pretrain.handoff.initialize import Beginning
from pretrain.outcome import ExitCode, UserError
from pretrain.recipe import load_recipe
from pretrain.run_folder import RunFolder
from pretrain.run_state import RunState
from tests.data_pipeline.datasets import change_table
from tests.pretrain.ranks import run_ranks, start_ranks
from tests.pretrain.test_evaluation import hand_off
from tests.system.launching import RECIPE, changes


def rank_of(local: int, local_world: int) -> Rank:
    return Rank(dist.get_rank(), 2, local, local_world, host="node", job_id="")


def one_node_and_two(control: dist.ProcessGroup) -> None:
    me = dist.get_rank()
    checked: list[bool] = []
    assert first_of_node_checks(rank_of(me, 2), control, lambda check: checked.append(check) or "sets")
    assert checked == [me == 0]
    assert first_of_node_checks(rank_of(0, 1), control, lambda check: checked.append(check) or "sets")
    assert checked[1:] == [True]


def refused_by_one(control: dist.ProcessGroup) -> None:
    for kind, (refusing, local, local_world) in itertools.product(
        (DataError, StorageError), ((0, dist.get_rank(), 2), (1, 0, 1))
    ):

        def open_sets(check: bool, kind: type[DataError] = kind, refusing: int = refusing) -> str:
            assert check, "opened although it was refused"
            if dist.get_rank() == refusing:
                raise kind("the table is another")
            return "sets"

        with pytest.raises(DataError, match=r"^the table is another$") as caught:
            first_of_node_checks(rank_of(local, local_world), control, open_sets)
        assert type(caught.value) is kind


def verdicts(control: dist.ProcessGroup) -> None:
    one_node_and_two(control)
    refused_by_one(control)


def test_the_first_rank_of_each_node_checks_files_and_its_refusal_is_that_of_all() -> None:
    run_ranks(2, verdicts)


@pytest.fixture
def start(tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Opens a run's folder for splits of given content; returns its state."""
    monkeypatch.setattr(RunFolder, "_wait_for_lock", lambda _: None)
    folder = RunFolder(tmp_path / "demo")
    recipe = load_recipe(RECIPE, [f"data.path={digits}"])

    def start(train: str, val: str) -> RunState:
        state, _ = folder.claim(
            recipe,
            {"train_batch_size": 64},
            {"dataset": {"fingerprint": train}},
            {"train": train, "val": val},
            rank=cast("Any", SimpleNamespace(world_size=1, job_id="", host="here")),
            begin=lambda: Beginning(None, initialized=False),
        )
        folder.write_state(state)
        return state

    return start


@pytest.mark.parametrize(("name", "is_folder"), [("failure.txt", True), ("run.json", True), ("hangs", False)])
def test_what_is_in_the_way_of_an_attempt_is_moved_aside(
    start: Any, tmp_path: Path, name: str, *, is_folder: bool
) -> None:
    obstacle = tmp_path / "demo" / name
    obstacle.mkdir(parents=True) if is_folder else (obstacle.parent.mkdir(), obstacle.touch())
    start("aa", "bb")
    assert obstacle.is_file() is (name == "run.json")
    assert len([*obstacle.parent.glob(f"{name}.damaged-*")]) == 1


def write_checkpoint(run: Path, **facts: Any) -> None:
    folder = run / "checkpoints/step-00000001"
    folder.mkdir(parents=True)
    write_json(folder / MANIFEST, seal({"format": FORMAT, "progress": {}, "files": {}} | facts))


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("remembered_by", ["run.json", "checkpoint"])
def test_a_replaced_split_is_refused_on_resume(start: Any, tmp_path: Path, split: str, remembered_by: str) -> None:
    here = {"train": "aa", "val": "bb"}
    assert start(**here).fingerprints == here
    (tmp_path / "demo/environment.json").unlink()
    if remembered_by == "checkpoint":
        (tmp_path / "demo/run.json").unlink()
        write_checkpoint(tmp_path / "demo", fingerprints=here)
    with pytest.raises(UserError, match=f"holds other images or labels for '{split}' than when .*demo was started"):
        start(**here | {split: "other"})
    assert start(**here).fingerprints == here


def test_a_run_that_recorded_no_validation_split_resumes_and_records_it(start: Any, tmp_path: Path) -> None:
    state = start("aa", "bb")
    state.fingerprints = {}
    RunFolder(tmp_path / "demo").write_state(state)
    write_checkpoint(tmp_path / "demo")
    assert start("aa", "cc").fingerprints["val"] == "cc"
    with pytest.raises(UserError, match="for 'val'"):
        start("aa", "bb")


def break_storage(name: str) -> None:
    """Every read of such a file fails with ESTALE, in this process."""
    store.PAUSES = (0.01,)
    pread, opened = os.pread, Path.open

    def fail(path: Path) -> None:
        if path.name.endswith(name):
            raise OSError(errno.ESTALE, "Stale file handle")

    def failing_pread(descriptor: int, *arguments: int) -> bytes:
        fail(Path(f"/proc/self/fd/{descriptor}").readlink())
        return pread(descriptor, *arguments)

    def failing_open(path: Path, *arguments: Any, **options: Any) -> Any:
        fail(path)
        return opened(path, *arguments, **options)

    os.pread, Path.open = failing_pread, failing_open  # type: ignore[method-assign]


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo ``break_storage``."""
    for thing, name in ((store, "PAUSES"), (os, "pread"), (Path, "open")):
        monkeypatch.setattr(thing, name, getattr(thing, name))


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("name", ["dataset.json", "val.samples.npz"])
def test_the_check_before_a_launch_says_that_another_try_may_succeed(digits: Path, name: str) -> None:
    break_storage(name)
    with pytest.raises(UserError, match=f"{name} cannot be read after 2 tries .Stale file handle") as caught:
        check_recipe_here(load_recipe(RECIPE, [f"data.path={digits}"]), RunFolder(Path("runs/there-is-none")))
    assert caught.value.code == ExitCode.RETRY


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("name", ["dataset.json", "val.samples.npz", ".tar"])
def test_an_evaluation_whose_storage_fails_ends_with_one_line_and_the_status_for_trying_again(
    tmp_path: Path, digits: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    handoff = hand_off(tmp_path / "handoff", [str(digit) for digit in range(10)])
    capfd.readouterr()
    break_storage(name)
    assert evaluate([str(handoff), "--data", str(digits)]) == ExitCode.RETRY
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert f"{name} cannot be read after 2 tries (Stale file handle)" in error


def evaluation_of_a_changed_table(folder: Path, handoff: Path, data: Path) -> None:
    sys.stderr = (folder / f"errors-{os.environ['RANK']}").open("w")
    evaluate([str(handoff), "--data", str(data)])


def test_an_evaluation_ends_when_the_rank_that_checks_its_data_refuses(tmp_path: Path, digits: Path) -> None:
    handoff = hand_off(tmp_path / "handoff", [str(digit) for digit in range(10)])
    data = Path(shutil.copytree(digits, tmp_path / "digits"))
    change_table(data, "val", label=(7, 3))
    with pytest.raises(ProcessExitedException) as ended:
        start_ranks(2, evaluation_of_a_changed_table, tmp_path, handoff, data)
    assert (ended.value.exit_code, ended.value.error_index) == (ExitCode.WILL_FAIL_AGAIN, 0)
    (line,) = (tmp_path / "errors-0").read_text().splitlines()
    assert "digits-val.samples.npz is not the file that dataset.json names" in line
    other = tmp_path / "errors-1"
    assert not other.exists() or not other.read_text()  # it may have been ended before it began


def training_whose_storage_fails(name: str, folder: Path, digits: Path) -> None:
    from pretrain.fault_tolerance.signals import StopFlag
    from pretrain.main import main

    sys.stderr = (folder / "errors").open("w")
    break_storage(name)
    main(StopFlag(), ["--recipe", str(RECIPE), "--runs", str(folder), *changes(data__path=digits)])


@pytest.mark.parametrize("name", ["dataset.json", "train-000001.tar"])
def test_a_run_whose_storage_fails_ends_with_one_line_and_the_status_for_trying_again(
    tmp_path: Path, digits: Path, name: str
) -> None:
    with pytest.raises(ProcessExitedException) as ended:
        start_ranks(1, training_whose_storage_fails, name, tmp_path, digits)
    assert ended.value.exit_code == ExitCode.RETRY
    lines = [line for line in (tmp_path / "errors").read_text().splitlines() if "WARNING" not in line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert f"{name} cannot be read after 2 tries (Stale file handle)" in lines[0]


READING = """
import sys, threading
from pathlib import Path
from data_pipeline.store import patiently
from pretrain.fault_tolerance.watchdog import Watchdog
watchdog = Watchdog(Path(sys.argv[1]), 3, start_s=0.5, step_s=5.0, on_hang=lambda reason: print(reason, flush=True))
patiently(threading.Event().wait, "/data/digits-train-000001.tar")
"""


@pytest.mark.parametrize("blocked", [False, True])
def test_a_rank_that_hangs_names_the_file_that_it_reads_and_where_its_stacks_are(tmp_path: Path, blocked: bool) -> None:
    root, hangs = Path(__file__).parents[2], tmp_path / "hangs"
    if blocked:
        hangs.touch()
    command = [sys.executable, "-c", READING, str(hangs)]
    ended = subprocess.run(command, check=False, cwd=root, capture_output=True, text=True, timeout=120)
    assert ended.returncode == ExitCode.RETRY
    assert ended.stderr.startswith("error: rank 3 hangs: starting for ")
    assert "(reading /data/digits-train-000001.tar takes " in ended.stderr
    assert f"stacks of all threads in {'the log' if blocked else hangs}" in ended.stdout
    stacks = ended.stderr if blocked else next(hangs.iterdir()).read_text()
    assert "most recent call first" in stacks
