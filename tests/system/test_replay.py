"""Past steps are computed again, and what went wrong in a run is found; ``tests.system.replays`` does it at length."""

from pathlib import Path

import pytest
from PIL import Image

from pretrain.files import digest_of_file
from pretrain.outcome import ExitCode
from pretrain.replay import DIFFERS
from tests.pretrain.ranks import run_ranks
from tests.system.replays import HALF, clean, inject, replayed


def contents(run: Path) -> dict[Path, str]:
    return {path: digest_of_file(path) for path in sorted(run.rglob("*")) if path.is_file()}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_that_was_killed_and_resumed_on_other_ranks_is_reproduced_and_not_touched(
    tmp_path: Path, digits: Path
) -> None:
    clean(tmp_path, digits, runs=1, seed=3)
    run, sheets = tmp_path / "0" / "demo", tmp_path / "sheets"
    before = contents(run)
    code, output = replayed(run, f"{HALF}:{HALF + 2}", "--images", str(sheets), ranks=2)
    assert code == ExitCode.FINISHED, output
    assert sorted(path.name for path in sheets.iterdir()) == ["step-00000009-1.png", "step-00000010-1.png"]
    assert Image.open(sheets / "step-00000009-1.png").size == (8 * 112, 8 * (112 + 2 * 16))
    ledger = run / "ledger.jsonl"
    lines = ledger.read_text().splitlines()
    lines[HALF + 1] = lines[HALF].replace(f'"step":{HALF + 1}', f'"step":{HALF + 2}')
    ledger.write_text("\n".join(lines))
    code, output = replayed(run, f"{HALF}:{HALF + 3}", ranks=1)
    assert code == DIFFERS, output
    assert f"DIFFERENT: step {HALF + 2} (data: other images, labels or bytes): samples_seen" in output
    code, output = replayed(run, "0:999", ranks=2)
    assert code == ExitCode.WILL_FAIL_AGAIN, output
    assert "ends before step 999" in output
    assert {path for path, digest in contents(run).items() if before.get(path) != digest} == {ledger}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_flipped_bit_is_reported_where_it_first_shows(tmp_path: Path, digits: Path) -> None:
    run_ranks(1, inject, tmp_path, digits, 1, 5)
