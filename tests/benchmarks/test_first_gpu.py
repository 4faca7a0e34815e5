"""The first minutes on a GPU: a step that fails leaves the others' results, and all steps work on a CPU."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from benchmarks import first_gpu

ROOT = Path(__file__).parents[2]
APPEND = "import sys; print('{}', file=open(sys.argv[1], 'a'), flush=True); "
FAKES = {
    # Hangs, like the grandchild that it starts in a session of its own.
    "environment": "import subprocess as s, time; p = s.Popen(['sleep', '1000'], start_new_session=True); "
    "print(p.pid, file=open('{pid}', 'w'), flush=True); time.sleep(1000)",
    "pixels": "raise RuntimeError('no kernel image')",
    "loader": APPEND.format('{"one": {"images_per_s": 7.0, "cores": 2.0}}'),
    "network": APPEND.format('{"eager": {"note": "eager: so far"}}') + "import os; os.kill(os.getpid(), 11)",
    "others": "pass",
}


def driven(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The driver with steps of ours."""
    fakes = {step: source.replace("{pid}", str(folder / "pid")) for step, source in FAKES.items()}
    source = (
        "import sys; from benchmarks import first_gpu; "
        f"first_gpu.command_of = lambda step: [sys.executable, '-S', '-c', {fakes!r}[step]]; "
        f"sys.exit(first_gpu.main(['--results', {str(folder)!r}, *sys.argv[1:]]))"
    )
    return subprocess.run(
        [sys.executable, "-c", source, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_steps_that_crash_hang_or_are_killed_leave_the_others_and_are_one_line_each(tmp_path: Path) -> None:
    ended = driven(tmp_path, "--minutes", "0.4", "--only", *FAKES)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    (file,) = tmp_path.glob("first-gpu-*.json")
    content = json.loads(file.read_text())
    assert content["environment"]["status"] == "killed at its limit of 2 s"
    assert content["pixels"]["status"] == "exit status 1: RuntimeError: no kernel image"
    assert content["loader"]["status"] == content["others"]["status"] == "ok"
    assert content["network"]["status"].startswith("killed by SIGSEGV")
    assert content["loader"]["rows"] == {"one": {"images_per_s": 7.0, "cores": 2.0}}
    assert content["network"]["rows"] == {"eager": {"note": "eager: so far"}}, "what was measured before is lost"
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text())), "a grandchild lives on"

    page = ended.stdout.splitlines()
    (failed,) = (index for index, line in enumerate(page) if line.startswith("pixels: exit status 1: RuntimeError: no"))
    assert page[failed + 1] == "    not measured"
    assert page[page.index("tests: not run (0 s)") + 1] == "    not measured"
    assert {"    one: 7 images/s on 2.0 cores", "    eager: so far"} < {*page}
    assert len(page) < 60

    again = driven(tmp_path, "--only", "others")
    assert again.returncode == 0, again.stdout + again.stderr
    assert json.loads(file.read_text())["loader"] == content["loader"]


def test_a_row_that_fails_is_noted_and_the_next_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import first_gpu_steps

    def fail() -> dict[str, Any]:
        raise RuntimeError("no\nengine")

    def step(known: first_gpu.Found, scratch: Path) -> first_gpu_steps.Rows:
        yield "load 1", fail
        yield "load 0", lambda: {"images_per_s": known["pixels"]["one"]["rate"], "cores": 1.0}

    rows, known = tmp_path / "rows", tmp_path / "known"
    known.write_text(json.dumps({"pixels": {"one": {"rate": 7.0}}}))
    monkeypatch.setattr(first_gpu_steps, "loader", step)
    monkeypatch.setattr(torch.compiler, "set_stance", lambda _: None)  # which it changes on a CPU
    monkeypatch.setattr(sys, "argv", ["", "loader", str(rows), str(known), str(tmp_path)])
    assert first_gpu_steps.main() == 1
    found = dict(pair for line in rows.read_text().splitlines() for pair in json.loads(line).items())
    assert found == {"load 1": {"note": "load 1 failed: no engine"}, "load 0": {"images_per_s": 7.0, "cores": 1.0}}
    page = first_gpu.summary({"loader": {"status": "exit status 1", "seconds": 2, "rows": found}})
    assert page[page.index("loader: exit status 1 (2 s)") + 1 :][:2] == [
        "    load 1 failed: no engine",
        "    load 0: 7 images/s on 1.0 cores  <- fastest",
    ]


def test_the_fastest_is_one_of_those_that_may_be_chosen() -> None:
    rows = {"a": {"images_per_s": 1.0}, "b": {"images_per_s": 3.0}, "c": {"images_per_s": 2.0}, "d": {"note": "none"}}
    assert first_gpu.fastest(rows, [*rows]) == "b"
    assert first_gpu.fastest(rows, ["a", "c", "d"]) == "c"
    assert first_gpu.fastest(rows, ["d", "e"]) is None


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_all_steps_work_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.first_gpu", "--minutes", "30", "--results", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (file,) = tmp_path.glob("first-gpu-*.json")
    content = json.loads(file.read_text())
    assert [*content] == [*first_gpu.STEPS]
    assert {row["status"] for row in content.values()} == {"ok"}
    counts = {step: len(taken["rows"]) for step, taken in content.items()}
    assert counts["pixels"] == 4
    assert counts["loader"] == 5
    assert counts["network"] % 3 == 0
    assert counts["trainer"] == 4
    assert counts["environment"] == counts["end_to_end"] == counts["tests"] == 1
    assert all(row["same"] for row in content["pixels"]["rows"].values())
    assert all(row["waits"] == "none" for row in content["trainer"]["rows"].values())
    for step in ("loader", "network", "trainer", "end_to_end"):
        assert all(row["images_per_s"] > 0 for row in content[step]["rows"].values())
    assert "failed" not in json.dumps(content["tests"]["rows"])
    assert "    not measured" not in ended.stdout.splitlines()
