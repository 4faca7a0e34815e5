"""What is printed of a run: in a log one line an interval, on a terminal a view that goes up by what it takes."""

import io
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable

import pytest

from pretrain.console import RunConsole
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


@pytest.mark.parametrize("columns", [30, 90])
def test_on_a_terminal_intervals_replace_each_other_and_events_stay(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    console = RunConsole(enabled=True, total_steps=40, first_step=0, global_batch=8)
    for step in range(1, 31):
        console.step_done(step)
        console.log_metrics(step, step / 10, VALUES | {"grad_norm": 1.0 / step})
    console.say("eval  top-1 50 %")
    console._live.refresh()
    drawn = re.sub("\x1b\\[[0-9;]*m", "", screen.getvalue().split("\x1b[2K")[-1]).replace("\r", "")
    bar, step, metrics, event = drawn.split("\n")
    assert bar.count("━") == min(columns, 79) * 30 // 40
    assert [step[:11], metrics[:22], event] == ["step 30/40 ", "epoch 3.00  loss 1.25 ", "· eval  top-1 50 %"]
    assert max(len(bar), len(step), len(metrics)) <= columns
    console.close()
    text = screen.getvalue()
    assert len(re.findall("(?<!· )eval  top-1 50 %\n", text)) == 1
    assert text.endswith("step 30/40  epoch 3.00  loss 1.25  lr 0.001  grad_norm 0.03333\n")


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
