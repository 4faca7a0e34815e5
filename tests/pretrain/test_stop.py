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


DEFAULT = "signal.signal(signal.SIGHUP, signal.SIG_DFL)"
IGNORED = "signal.signal(signal.SIGHUP, signal.SIG_IGN)"


@pytest.mark.parametrize(
    ("before", "signals", "code", "told"),
    [
        (DEFAULT, ["SIGHUP"], ExitCode.FINISHED, "SIGHUP\n"),
        (IGNORED, ["SIGHUP"], ExitCode.FINISHED, "\n"),
        ("", ["SIGINT", "SIGINT"], ExitCode.STOPPED, "stopped immediately, not saved\n"),
    ],
    ids=["a closed terminal", "a closed terminal that is ignored", "a second interrupt"],
)
def test_what_a_signal_does(before: str, signals: list[str], code: ExitCode, told: str) -> None:
    kills = "".join(f"os.kill(os.getpid(), signal.{name})\n" for name in signals)
    program = (
        f"import os, signal\nfrom pretrain.fault_tolerance.signals import StopFlag\n{before}\nflag = StopFlag()\n"
        f"flag.install_signal_handlers()\n{kills}print(flag.reason)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (code, told)
