"""What needs no cluster."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pretrain.engine.deepspeed_config import read_deepspeed_config
from pretrain.fault_tolerance.preflight import Measured, slow_ones
from pretrain.outcome import ExitCode
from pretrain.recipe import load_recipe
from slurm import job_state, release, scheduler, status
from slurm.attempt import rendezvous_port
from slurm.folder import Launch, SlurmFolder
from slurm.job import Output
from slurm.job_state import job_of
from slurm.launch import freeze
from slurm.restart import Attempt, AttemptRecord, Cause, Policy
from slurm.scheduler import Job
from slurm.status import find_runs, status_of
from tests.slurm.runs import GLOBAL_BATCH, settings
from tests.system.launching import RECIPE, ROOT

ATTEMPT = Attempt("7", 0)
LAUNCH = Launch(1, 1, GLOBAL_BATCH, (1,), Policy(max_restarts=3, retry_wait_s=0.0, save_within_s=4), "cpu")


@pytest.fixture
def folder(tmp_path: Path) -> SlurmFolder:
    """Of a run that was launched, with a folder for the logs of attempt 7-0."""
    folder = SlurmFolder(tmp_path / "demo")
    folder.write_launch(LAUNCH)
    folder.new_logs(ATTEMPT)
    return folder


def end(folder: SlurmFolder, cause: Cause, reason: str = "", step: int = 5) -> None:
    """Attempt 7-0 ends with a failure, after which it is requeued."""
    folder.end(AttemptRecord(0, cause, "b", ["c"], "7", end_step=step, reason=reason, action="requeue"))


def printed_by(program: str, log: Path) -> Output:
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    output = Output(child, log, echo=False)
    assert child.wait(30) == 0
    return output


@pytest.mark.parametrize(
    ("printed", "error"),
    [
        ("step 1\nerror: no such dataset\n", "no such dataset"),
        ("Traceback (most recent call last):\n  File x\nRuntimeError: first\n\n", "RuntimeError: first"),
        ("only words\n\n", "only words"),
        ("", ""),
    ],
)
def test_the_last_line_that_a_rank_printed_is_kept(printed: str, error: str, tmp_path: Path) -> None:
    assert printed_by(f"print({printed!r}, end='')", tmp_path / "log").last_line() == error
    assert (tmp_path / "log").read_text() == printed


def test_a_log_that_cannot_be_written_does_not_stop_the_rank() -> None:
    program = "print('x' * 1_000_000); print('error: the end')"
    assert printed_by(program, Path("/dev/full")).last_line() == "the end"


def start_rank(folder: SlurmFolder, program: Path, *, rank: int, ranks: int) -> "subprocess.Popen[bytes]":
    """``slurm.job`` for a rank of attempt 7-0 on a node "here", with ``program`` in place of main.py."""
    words = (
        f"import pathlib, slurm.job\nslurm.job.MAIN = pathlib.Path({str(program)!r})\n"
        f"slurm.job.Job(pathlib.Path({str(folder.run)!r}))()"
    )
    task = {"SLURM_JOB_ID": "7", "SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_STEP_NUM_TASKS": ranks,
            "SLURM_STEP_NUM_NODES": 1, "SLURMD_NODENAME": "here", "NODE_NAMES": "here", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": 1}  # fmt: skip
    environment = os.environ | {name: str(value) for name, value in task.items()}
    return subprocess.Popen([sys.executable, "-c", words], cwd=ROOT, env=environment, stdout=subprocess.PIPE)


def test_a_rank_that_finds_the_run_in_use_ends_with_try_again(
    folder: SlurmFolder, tmp_path: Path, digits: Path
) -> None:
    program = tmp_path / "main.py"  # waits a second for a former start to let go, not a minute and a half
    program.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom pretrain import main, run_folder\n"
        "from pretrain.fault_tolerance.signals import StopFlag\n"
        "run_folder.LOCK_WAIT_S = 1.0\nsys.exit(main.main(StopFlag()))"
    )
    recipe = load_recipe(RECIPE, settings(digits)[1::2])
    freeze(folder, recipe, read_deepspeed_config(ROOT / "ds_config.json", recipe.deepspeed), LAUNCH)
    with (folder.run / ".lock").open("a") as former:
        fcntl.flock(former, fcntl.LOCK_EX)
        rank = start_rank(folder, program, rank=0, ranks=1)
        printed, _ = rank.communicate()
    assert rank.returncode == ExitCode.RETRY, printed
    (told,) = folder.read_exits(ATTEMPT)
    assert (told.code, told.cause, told.at_fault) == (ExitCode.RETRY, "busy", False)
    assert told.message.startswith(f"another process is training {folder.run}: stop it first")


def test_asked_to_stop_before_there_was_a_rank_that_could_hear_it_none_begins_until_the_next_launch(
    folder: SlurmFolder, tmp_path: Path
) -> None:
    begun, program, asked = tmp_path / "begun", tmp_path / "main.py", "stopped with slurm.stop by someone"
    program.write_text(f"import pathlib\npathlib.Path({str(begun)!r}).touch()")
    folder.request_stop(asked)
    for number in (0, 1):
        rank = start_rank(folder, program, rank=number, ranks=2)
        printed, _ = rank.communicate()
        assert rank.returncode == 0, printed  # anything else, and Slurm would kill those that save
    told = [(told.rank, told.code, told.message) for told in folder.read_exits(ATTEMPT)]
    assert told == [(0, ExitCode.STOPPED, asked), (1, ExitCode.STOPPED, asked)]
    assert not begun.exists()
    folder.stop.unlink()
    assert start_rank(folder, program, rank=0, ranks=2).wait() == 0
    assert begun.exists()


@pytest.mark.parametrize("number", [0, 1])
def test_any_rank_that_has_not_saved_before_the_time_limit_is_ended_and_tells(
    number: int, folder: SlurmFolder, tmp_path: Path
) -> None:
    listening, program = tmp_path / "listening", tmp_path / "main.py"
    program.write_text(
        "import os, pathlib, signal, time\nsignal.signal(signal.SIGUSR2, signal.SIG_IGN)\n"
        "pathlib.Path(os.environ['EXIT_RECORD']).write_text('{\"slow\": [\"b\"]}')\n"
        f"pathlib.Path({str(listening)!r}).touch()\ntime.sleep(600)"
    )
    assert folder.slow_nodes(ATTEMPT) == ()
    rank = start_rank(folder, program, rank=number, ranks=2)
    log = folder.log(ATTEMPT, number)  # opened once slurm.job passes signals on
    while not (listening.exists() and log.exists()):
        assert rank.poll() is None
        time.sleep(0.05)
    rank.send_signal(signal.SIGUSR2)
    rank.communicate()
    assert rank.returncode == 0
    (told,) = folder.read_exits(ATTEMPT)
    assert (told.rank, told.code, told.cause) == (number, ExitCode.STOPPED, "not saved")
    assert told.message == "SIGUSR2, but had not saved within 3 s"
    assert folder.slow_nodes(ATTEMPT) == (("b",) if number == 0 else ()), "what rank 0 had recorded"


def test_two_releases_that_overlap_submit_a_lost_run_once(folder: SlurmFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {"7": Job("7", "FAILED", "NonZeroExitCode")}
    folder.begin(ATTEMPT, nodes=["a"], ranks=1, step=0)
    queue, submitted, told = dict(before), [], []

    def submit(script: Path, environment: dict[str, str], *, exclude: tuple[str, ...]) -> str:
        submitted.append((script, exclude))
        if len(submitted) == 1:  # sbatch takes its time, and cron comes again
            told.append(release.release(folder, before))
        queue["8"] = Job("8", "PENDING", "Priority")
        return "8"

    monkeypatch.setattr(scheduler, "submit", submit)
    monkeypatch.setattr(scheduler, "queue", lambda retry_s: queue)
    assert release.release(folder, before).endswith("is submitted again as job 8")
    assert told == [f"{folder.run}: another slurm.release is resubmitting it"]
    assert release.release(folder, before) == "", "one that had asked Slurm before"
    assert submitted == [(folder.script("7"), ())]


@pytest.mark.parametrize(
    ("answer", "avoided"),
    [
        ("allocation failure: Requested node configuration is not available", False),
        ("allocation failure: Required node not available (down, drained or reserved)", False),
        ("allocation failure: Requested nodes are busy", False),
        ("allocation failure: Invalid node name specified", False),
        ("allocation failure: Access/permission denied", True),
        (
            "allocation failure: Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)",
            True,
        ),
        ("", True),
    ],
)
def test_a_node_is_avoided_unless_slurm_says_that_too_few_others_are_there(
    answer: str, avoided: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def run(*words: str, retry_s: float) -> str:
        asked.extend(words)
        if answer:
            raise scheduler.failure("sbatch", answer)
        return ""

    script = tmp_path / "7_submission.sh"
    script.write_text("#!/bin/bash\n#SBATCH --exclude='bad[1-3]'\n")
    monkeypatch.setattr(scheduler, "run", run)
    assert scheduler.avoidable(script, ["a", "b"]) == (["a", "b"] if avoided else ())
    assert "--exclude=bad[1-3],a,b" in asked


def test_every_attempt_has_a_rendezvous_port_of_its_own() -> None:
    ports = [rendezvous_port(Attempt(str(job), restart)) for job in range(5000, 5100) for restart in range(20)]
    assert len({*ports}) == len(ports)
    assert all(10_000 <= port < 30_000 for port in ports)


@pytest.mark.parametrize(
    ("text", "seconds"), [("00:01:00", 60), ("1-02:03:04", 93784), ("UNLIMITED", 0), ("365-00:00:00", 31_536_000)]
)
def test_durations(text: str, seconds: int) -> None:
    assert job_state._seconds(text) == seconds


@pytest.mark.parametrize(
    ("state", "reason", "held", "launch_failed"),
    [
        ("PENDING", "launch failed requeued held", True, True),
        ("COMPLETING", "launch failed requeued held", False, False),
        ("PENDING", "job requeued in held state", True, False),
        ("PENDING", "JobHoldMaxRequeue", True, False),
        ("PENDING", "BeginTime", False, False),
    ],
)
def test_a_held_job_is_known_by_its_reason(state: str, reason: str, held: bool, launch_failed: bool) -> None:
    job = Job("7", state, reason)
    assert (job.held, job.launch_failed) == (held, launch_failed)


@pytest.mark.parametrize(
    ("seconds", "slow"),
    [
        ([(1.0, 1.0), (1.0, 1.0), (1.0, 1.0), (1.0, 1.0)], ()),
        ([(1.0, 1.0), (1.0, 4.0), (1.0, 1.0), (1.0, 1.0)], ("b",)),
        ([(1.0, 1.0), (9.0, 1.0), (1.0, 1.0), (1.0, 1.0)], ()),  # a or b
        ([(1.0, 1.0), (9.0, 1.0), (9.0, 1.0), (1.0, 1.0), (1.0, 1.0), (1.0, 1.0)], ("b",)),
    ],
)
def test_nodes_are_slow_by_their_arithmetic_or_both_links(
    seconds: list[tuple[float, float]], slow: tuple[str, ...]
) -> None:
    measured = [Measured(node, link, compute) for node, (link, compute) in zip("abcdef", seconds, strict=False)]
    assert slow_ones(measured)[1] == [*slow]


def test_a_history_whose_last_line_was_cut_is_read_up_to_there(folder: SlurmFolder) -> None:
    folder.begin(ATTEMPT, nodes=["a", "b"], ranks=2, step=0)
    end(folder, "crashed", "rank 1 on b: killed by SIGKILL")
    folder.note(ATTEMPT, "goes on as job 8", next_job="8")
    folder.begin(Attempt("7", 1), nodes=["a", "c"], ranks=2, step=5)
    with folder.history.open("a") as handle:
        handle.write('{"event": "end", "job": "7", "rest')
    one, two = folder.attempts()
    assert (one.cause, one.node, one.slow, one.end_step, one.next_job) == ("crashed", "b", ["c"], 5, "8")
    assert (two.step, two.cause, two.slow, two.ended) == (5, "lost", (), 0.0)


def test_exits_are_read_in_the_order_of_time_and_half_written_ones_passed_over(folder: SlurmFolder) -> None:
    for number, time_s, message in ((0, 20.0, "later"), (1, 10.0, "earlier")):
        of_another_version = {"rank": number, "node": "a", "code": -9, "time": time_s, "message": message, "other": 1}
        folder.exit_record(ATTEMPT, number).write_text(json.dumps(of_another_version))
    for number, text in ((2, "{"), (3, '{"cause": "failed", "phase": "training"}')):  # whose node died
        folder.exit_record(ATTEMPT, number).write_text(text)
    assert [ended.message for ended in folder.read_exits(ATTEMPT)] == ["earlier", "later"]


def test_a_job_is_a_runs_own_by_its_number_or_by_its_script(folder: SlurmFolder, tmp_path: Path) -> None:
    theirs = Job("9", "PENDING", "Priority", str(tmp_path / "demo-2/slurm/submitit/7_submission.sh"))
    unknown = Job("8", "PENDING", "Priority", str(folder.submitit / ".submission_file_0a.sh"))
    over = replace(unknown, id="10", state="FAILED")
    assert job_of(folder, [], {job.id: job for job in (theirs, unknown, over)}) == unknown
    assert job_of(folder, [], {job.id: job for job in (theirs, over)}) == over
    assert job_of(folder, [AttemptRecord(0, job="9")], {"9": theirs}) == theirs


def test_where_slurm_gives_a_number_again_both_attempts_are_told(folder: SlurmFolder) -> None:
    causes: tuple[tuple[int, Cause], ...] = ((0, "crashed"), (5, "finished"))
    for step, cause in causes:
        folder.new_logs(ATTEMPT)
        assert folder.read_exits(ATTEMPT) == []
        folder.begin(ATTEMPT, nodes=["a"], ranks=1, step=step)
        folder.exit_record(ATTEMPT, 0).write_text('{"rank": 0, "node": "a", "code": 1, "time": 20}')
        end(folder, cause, step=step + 5)
    told = [(attempt.step, attempt.cause, attempt.end_step) for attempt in folder.attempts()]
    assert told == [(0, "crashed", 5), (5, "finished", 10)]


def test_while_slurm_cannot_be_asked_a_run_that_is_to_start_again_is_told_as_restarting(folder: SlurmFolder) -> None:
    folder.begin(ATTEMPT, nodes=["a"], ranks=1, step=0)
    (folder.run / "run.json").write_text(json.dumps({"state": "running", "step": 7, "total_steps": 10, "host": "a"}))
    assert status_of(folder.run, None).state == "running"
    end(folder, "crashed", "rank 0 on a: broken")
    status = status_of(folder.run, None)
    assert (status.state, status.why) == ("restarting", "rank 0 on a: broken; Slurm did not answer")


def test_a_run_that_was_started_by_hand_and_died_is_told_as_lost(tmp_path: Path) -> None:
    run = tmp_path / "runs/one"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"state": "running", "step": 7, "total_steps": 10, "host": "here"}))
    assert find_runs(tmp_path / "runs") == [run]
    status = status_of(run, {})
    assert (status.state, status.step) == ("lost", 7)
    assert "no process of here holds the lock" in status.why


def test_the_table_has_a_row_for_each_run_whatever_its_files_and_reasons_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("crashed", "odd", "torn"):
        folder = SlurmFolder(tmp_path / name)
        folder.begin(ATTEMPT, nodes=["a"], ranks=1, step=0)
        reason = "rank 1 on b: [/gloo/pair.cc:1] closed [bold]\x1b[2J"
        folder.end(AttemptRecord(0, "crashed", job="7", reason=reason, action="none"))
    (tmp_path / "odd/run.json").write_text('{"state": ["running"], "step": "[red]"}')
    (tmp_path / "torn/run.json").write_bytes(b"\xff{")
    (tmp_path / "torn/slurm/history.jsonl").write_text('{"event": "begin"}\n')
    (tmp_path / "crashed/run.json").write_text(json.dumps({"state": "running", "step": 7}))
    assert status.main(["--runs", str(tmp_path)]) == 0
    head, crashed, odd, torn = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["run", "state"]
    for line in (crashed, odd):
        assert line.endswith(r"rank 1 on b: [/gloo/pair.cc:1] closed [bold]\x1b[2J")
    assert torn.split()[:2] == ["torn", "unknown"]
    assert "cannot be read" in torn
