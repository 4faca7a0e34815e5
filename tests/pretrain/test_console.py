"""What is printed of a run: in a log one line an interval, on a terminal a view that goes up by what it takes."""

import io
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable

import pytest
from rich.console import Console

from pretrain.console import WIDEST, LiveView, RunConsole
from pretrain.engine.engine import start_up_noise

VALUES = {"loss": 1.25, "lr": 0.001}


def test_in_a_log_every_interval_is_one_line_and_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    for enabled in (True, False):
        console = RunConsole(enabled=enabled, total_steps=40, first_step=0, global_batch=8)
        for step in range(1, 21):
            console.step_done(step)
            if step % 10 == 0:
                console.log_metrics(step, step / 10, VALUES)
        console.say("eval  epoch 2.00  " + "x" * 300)
        console.close()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("step 10/40  epoch 1.00  loss 1.25  lr 0.001")
    assert [bool(re.match(r"step \d+/40  epoch \d", line)) for line in lines] == [True, True, False]
    assert re.search(r"  \d+ images/s  ETA \d:\d\d:\d\d$", lines[1])


def test_on_a_terminal_intervals_replace_each_other_and_events_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "90")
    console = RunConsole(enabled=True, total_steps=40, first_step=0, global_batch=8)
    for step in range(1, 31):
        console.step_done(step)
        console.log_metrics(step, step / 10, VALUES | {"grad_norm": 1.0 / step})
    console.say("eval  top-1 50 %")
    console._view.refresh()
    drawn = screen.getvalue().split("\x1b[2K")[-1]
    assert [line[:33] for line in drawn.replace("\r", "").split("\n")] == [
        "━" * 22 + "╌" * 8 + " st", "epoch 3.00  loss 1.25  lr 0.001  ", "· eval  top-1 50 %",
    ]  # fmt: skip
    console.close()
    text = screen.getvalue()
    assert len(re.findall("(?<!· )eval  top-1 50 %\n", text)) == 1
    assert text.endswith("step 30/40  epoch 3.00  loss 1.25  lr 0.001  grad_norm 0.03333\n")


@pytest.mark.parametrize(("columns", "bar"), [(200, 30), (80, 30), (60, 19), (47, 6), (46, 0), (40, 0)])
def test_a_narrow_terminal_takes_from_the_bar_and_not_from_the_numbers(columns: int, bar: int) -> None:
    view = LiveView(Console(file=io.StringIO(), force_terminal=True))
    view.progress, view.share = "step 59/336  1274 images/s  ETA 0:00:14", 0.5
    (line,) = view.lines(columns)
    assert line.plain == "━" * (bar // 2) + "╌" * (bar - bar // 2) + " " * (bar > 0) + view.progress


def test_a_terminal_that_became_narrower_is_cleared_of_all_rows_that_the_view_takes_by_then() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, height=30)
    view = LiveView(console)
    view.progress, view.metrics, view.events = "p" * 150, "m" * 50, ["e" * 10]
    view.start()
    view.refresh()
    assert max(len(line) for line in screen.getvalue().replace("\r", "").splitlines()) <= WIDEST + 20
    for width, rows in ((120, 3), (40, 2 + 2 + 1), (40, 3), (20, 2 + 2 + 1), (200, 3)):
        console.width = width
        screen.truncate(0)
        view.refresh()
        assert screen.getvalue().count("\x1b[1A") == rows - 1, width
    view.stop()


@pytest.mark.parametrize(("wanted", "first"), [(False, True), (False, False), (True, True)])
def test_what_libraries_print_while_starting_is_kept_out_and_their_warnings_are_told_once(
    wanted: bool, first: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with start_up_noise(wanted=wanted, first=first):
            print("MA 0.46 GB")
            warnings.warn("something real", stacklevel=1)
        print("afterwards")
        warnings.warn("later", stacklevel=1)
    assert ("MA 0.46 GB" in capsys.readouterr().out) is wanted
    assert [str(one.message) for one in told] == (["something real"] if first else []) + ["later"]


@pytest.mark.parametrize("open_pair", [os.openpty, os.pipe])
def test_a_closed_terminal_or_pipe_does_not_end_the_run(open_pair: Callable[[], tuple[int, int]]) -> None:
    program = (
        "from pretrain.console import RunConsole\n"
        "console = RunConsole(enabled=True, total_steps=1, first_step=0, global_batch=1)\n"
        "console.say('ready')\ninput()\nconsole.say('lost')\nconsole.close()"
    )
    reader, writer = open_pair()
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=writer, stderr=writer)
    os.close(writer)
    printed = b""
    while b"ready" not in printed:
        printed += (now := os.read(reader, 1000))
        assert now, printed
    os.close(reader)
    child.communicate(b"\n")
    assert child.returncode == 0
