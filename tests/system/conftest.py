"""What several files of whole runs look at."""

from pathlib import Path

import pytest

from pretrain.outcome import ExitCode
from tests.conftest import shared
from tests.system.launching import INJECT, changes, launched

STEPS = 20


@pytest.fixture(scope="session")
def short(digits: Path) -> list[str]:
    """Arguments of a run of 20 steps with everything on that must survive a resume; each step is logged.

    At stage 1, which a run of this size would not have by itself.
    """
    return changes(data__path=digits, schedule__epochs=0.9, schedule__warmup_epochs=0.3, log_every_steps=1,
                   checkpoint__every_steps=6, ema__decay=0.9, mixing__mixup=0.8, mixing__cutmix=1.0,
                   deepspeed__zero_optimization__stage=1)  # fmt: skip


@pytest.fixture(scope="session")
def straight(request: pytest.FixtureRequest, short: list[str]) -> Path:
    """The run without any trouble, on two ranks; treat as read-only. ``digests`` next to it has what it trained on."""
    with shared(request, "straight") as folder:
        if not (folder / "demo/summary.json").exists():
            (folder / "digests").mkdir(parents=True)
            with launched(folder, *short, program=(INJECT, f"digests={folder / 'digests'}"), anew=True) as run:
                assert run.end() == ExitCode.FINISHED, run.output()
                run.assert_no_rank_stays()
    return folder / "demo"
