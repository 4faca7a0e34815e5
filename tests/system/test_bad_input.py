"""Wrong input: one clear line, the exit status for "will fail again", no traceback."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.outcome import ExitCode
from pretrain.run_state import read_state
from tests.data_pipeline.datasets import change_table, retable
from tests.system.launching import INJECT, ROOT, changes, trained

pytestmark = pytest.mark.slow


def error_of(folder: Path, *arguments: str, ranks: int = 1) -> str:
    """The one line on stderr of a start that must be refused."""
    code, output = trained(folder, *arguments, ranks=ranks)
    assert code == ExitCode.WILL_FAIL_AGAIN, output
    assert "Traceback" not in output, output
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, output
    return lines[0]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> tuple[Path, list[str]]:
    """A run that was stopped in its third step, and its arguments; treat as read-only."""
    folder = tmp_path_factory.mktemp("stopped")
    fields = changes(data__path=digits, schedule__epochs=0.3, schedule__warmup_epochs=0.1, log_every_steps=1)
    code, output = trained(folder, *fields, program=(INJECT, "terminate=3"))
    assert code == ExitCode.STOPPED, output
    return folder / "demo", fields


def test_the_help_lists_arguments_exit_statuses_and_fields() -> None:
    command = [sys.executable, "pretrain/main.py", "--help"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for word in ("--recipe", "--deepspeed_config", "--set", "resumes", "exit status", "optimizer.lr: a number > 0"):
        assert word in text


def test_a_changed_label_table_is_refused_by_the_first_rank_of_the_node_for_all(tmp_path: Path, digits: Path) -> None:
    broken = shutil.copytree(digits, tmp_path / "digits")
    change_table(broken, label=(7, 3))
    line = error_of(tmp_path, *changes(data__path=broken), ranks=2)
    assert "digits-train.samples.npz is not the file that dataset.json names" in line


def test_a_replaced_validation_split_is_refused_on_resume(
    stopped: tuple[Path, list[str]], tmp_path: Path, digits: Path
) -> None:
    run, fields = stopped
    shutil.copytree(run, tmp_path / "demo")
    data = shutil.copytree(digits, tmp_path / "digits")
    retable(data, "val", label=(7, 3))
    fields = [*fields, *changes(data__path=data)]
    refused = "holds other images or labels for 'val' than when"
    assert refused in error_of(tmp_path, *fields)
    (tmp_path / "demo/run.json").unlink()  # the checkpoint remembers it, too
    assert refused in error_of(tmp_path, *fields)


def test_a_run_resumes_under_a_new_name_and_what_is_damaged_is_named_in_its_state(
    stopped: tuple[Path, list[str]], tmp_path: Path, digits: Path
) -> None:
    run, fields = stopped
    shutil.copytree(run, tmp_path / "demo")
    fork = shutil.copytree(run, tmp_path / "fork")
    (tmp_path / "demo/recipe.yaml").write_text("[" * 200_000)
    line = error_of(tmp_path, *fields)
    assert f"{tmp_path}/demo/recipe.yaml cannot be read (" in line
    assert f"error: {read_state(tmp_path / 'demo').reason}" == line
    shutil.rmtree(fork / "hangs", ignore_errors=True)
    (fork / "hangs").touch()
    (fork / "run.json").write_text("[" * 200_000)
    fields = [*fields, "--set", "name=fork"]
    code, output = trained(tmp_path, *fields)
    assert code == ExitCode.FINISHED, output
    assert f"resuming {fork} at step " in output
    for name in ("hangs", "run.json"):
        assert f"it is now {fork / name}.damaged-" in output
    (fork / "summary.json").unlink()
    code, output = trained(tmp_path, *fields)
    assert code == ExitCode.FINISHED, output
    assert f"{fork / 'summary.json'} is missing" in output
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
