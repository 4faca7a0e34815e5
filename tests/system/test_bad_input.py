"""Wrong input: one clear line, the exit status for "will fail again", no traceback."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.outcome import ExitCode
from pretrain.run_state import read_state
from tests.data_pipeline.datasets import change_table, retable
from tests.system.launching import ROOT, changes, launched

pytestmark = pytest.mark.slow


def error_of(folder: Path, *arguments: str, ranks: int = 0) -> str:
    """The one line on stderr of a start that must be refused."""
    with launched(folder, *arguments, ranks=ranks) as run:
        assert run.end() == ExitCode.WILL_FAIL_AGAIN, run.output()
        run.assert_no_rank_stays()
        output = run.output()
    assert "Traceback" not in output, output
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, output
    return lines[0]


def test_the_help_lists_arguments_exit_statuses_and_fields() -> None:
    command = [sys.executable, "pretrain/main.py", "--help"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for word in ("--recipe", "--deepspeed_config", "--set", "resumes", "exit status", "optimizer.lr: a number > 0"):
        assert word in text


def test_a_missing_data_folder_names_it_and_the_command_that_builds_it(tmp_path: Path) -> None:
    line = error_of(tmp_path, *changes(data__path=tmp_path / "nowhere"))
    assert str(tmp_path / "nowhere") in line
    assert "python -m data_pipeline.build" in line


def test_a_label_outside_the_classes_names_the_sample(tmp_path: Path, digits: Path) -> None:
    broken = shutil.copytree(digits, tmp_path / "digits")
    retable(broken, label=(7, 10))
    line = error_of(tmp_path, *changes(data__path=broken))
    assert "has label 10, but the classes are 0..9" in line


def test_a_changed_label_table_is_refused_by_the_first_rank_of_the_node_for_all(tmp_path: Path, digits: Path) -> None:
    broken = shutil.copytree(digits, tmp_path / "digits")
    change_table(broken, label=(7, 3))
    line = error_of(tmp_path, *changes(data__path=broken), ranks=2)
    assert "digits-train.samples.npz is not the file that dataset.json names" in line


def test_a_replaced_validation_split_is_refused_on_resume(tmp_path: Path, digits: Path) -> None:
    data = shutil.copytree(digits, tmp_path / "digits")
    fields = changes(data__path=data, log_every_steps=1)
    with launched(tmp_path, *fields, ranks=0) as run:
        run.wait_for_steps(tmp_path / "demo", 2)
        run.process.send_signal(signal.SIGTERM)
        assert run.end() == ExitCode.STOPPED, run.output()
    retable(data, "val", label=(7, 3))
    refused = "holds other images or labels for 'val' than when"
    assert refused in error_of(tmp_path, *fields)
    (tmp_path / "demo/run.json").unlink()  # the checkpoint remembers it, too
    assert refused in error_of(tmp_path, *fields)


def test_a_run_resumes_under_a_new_name_and_what_is_damaged_is_named_in_its_state(tmp_path: Path, digits: Path) -> None:
    fields = changes(data__path=digits, schedule__epochs=0.3, schedule__warmup_epochs=0.1, log_every_steps=1)
    with launched(tmp_path, *fields, ranks=0, program=("tests/system/inject.py", "hold=3")) as run:
        run.wait_for_steps(tmp_path / "demo", 2)
        run.process.send_signal(signal.SIGTERM)
        assert run.end() == ExitCode.STOPPED, run.output()
    fork = shutil.copytree(tmp_path / "demo", tmp_path / "fork")
    (tmp_path / "demo/recipe.yaml").write_text("[" * 200_000)
    line = error_of(tmp_path, *fields)
    assert f"{tmp_path}/demo/recipe.yaml cannot be read (" in line
    assert f"error: {read_state(tmp_path / 'demo').reason}" == line
    shutil.rmtree(fork / "hangs", ignore_errors=True)
    (fork / "hangs").touch()
    (fork / "run.json").write_text("[" * 200_000)
    fields += ["--set", "name=fork"]
    with launched(tmp_path, *fields, ranks=0) as run:
        assert run.end() == ExitCode.FINISHED, run.output()
        assert f"resuming {fork} at step " in run.output()
        for name in ("hangs", "run.json"):
            assert f"it is now {fork / name}.damaged-" in run.output()
    (fork / "summary.json").unlink()
    with launched(tmp_path, *fields, ranks=0) as run:
        assert run.end() == ExitCode.FINISHED, run.output()
        assert f"{fork / 'summary.json'} is missing" in run.output()
    line = error_of(tmp_path, *fields, *changes(schedule__epochs=0.6))
    assert (
        f"to train its weights further, start a new run with --set name=... --set initialize_from.handoff={fork}"
        in line
    )
    assert read_state(fork).state == "finished"
    assert "at most 200" in error_of(tmp_path, *changes(data__path=digits, name="n" * 300))


def test_ranks_that_do_not_divide_the_global_batch(tmp_path: Path, digits: Path) -> None:
    line = error_of(tmp_path, *changes(data__path=digits), ranks=3)
    assert "global batch of 64" in line
    assert "2 or 4 ranks" in line
