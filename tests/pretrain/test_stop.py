import subprocess
import sys

import pytest
import torch.distributed as dist

from pretrain.fault_tolerance.signals import StopFlag
from pretrain.fault_tolerance.stop import StopAgreement
from pretrain.outcome import ExitCode
from tests.pretrain.ranks import run_ranks


def only_rank_1_is_told(control: dist.ProcessGroup) -> None:
    flag = StopFlag()
    stop = StopAgreement(flag, control)
    for step in range(6):
        if step == 4 and dist.get_rank() == 1:
            flag.request("SIGTERM")
        assert stop.at_step_boundary() is (step == 5)
    assert stop.reason() == "SIGTERM"


def test_all_ranks_stop_at_the_same_boundary_though_one_is_told() -> None:
    run_ranks(2, only_rank_1_is_told)


@pytest.mark.parametrize(("before", "reason"), [("", "SIGHUP"), ("signal.signal(signal.SIGHUP, signal.SIG_IGN)", "")])
def test_a_closed_terminal_asks_for_a_stop_unless_that_is_ignored(before: str, reason: str) -> None:
    program = (
        f"import os, signal\nfrom pretrain.fault_tolerance.signals import StopFlag\n{before}\nflag = StopFlag()\n"
        "flag.install_signal_handlers()\nos.kill(os.getpid(), signal.SIGHUP)\nprint(flag.reason)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{reason}\n")


def test_a_second_interrupt_ends_at_once() -> None:
    program = (
        "import os, signal, time\nfrom pretrain.fault_tolerance.signals import StopFlag\nflag = StopFlag()\n"
        "flag.install_signal_handlers()\nos.kill(os.getpid(), signal.SIGINT)\nos.kill(os.getpid(), signal.SIGINT)\n"
        "time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == ExitCode.STOPPED
    assert "not saved" in done.stderr
