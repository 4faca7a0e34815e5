"""Turns, ratios and the file of results; every benchmark runs from end to end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import timing

ROOT = Path(__file__).parents[2]
MEASURED = {"model": "training_s", "data": "images_per_cpu_s", "trainer": "step_s", "end_to_end": "images_per_s"}


def test_contestants_take_turns_forwards_and_backwards_and_warm_up_first() -> None:
    order = list(timing.turns(["a", "b", "c"], rounds=2))
    assert "".join(name for name, _ in order) == "abccbaabc"
    assert [counts for _, counts in order] == [False] * 3 + [True] * 6


def test_a_ratio_is_the_median_within_the_rounds_so_that_a_slow_round_does_not_count() -> None:
    assert timing.ratio([2.0, 20.0, 2.2], [1.0, 10.0, 1.0]) == 2.0
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        timing.ratio([1.0, 2.0], [1.0])


def test_a_section_replaces_the_same_days_and_leaves_the_others(tmp_path: Path) -> None:
    for kind, value in (("model", 1.0), ("data", 2.0), ("model", 3.0)):
        words = ["--results", str(tmp_path), "--note", "x", "--rounds", "5", "--no-compile"]
        defaults = {"rounds": 3, "compile": True, "sizes": ["tiny"]}
        options = timing.parse(kind, "", words, defaults=defaults, quick={"rounds": 1})
        assert (options.rounds, options.compile, options.sizes) == (5, False, ["tiny"])
        file = timing.write(options, {"batch": 2}, [{"who": "we", "seconds": [value, value, 9.0]}])
    assert list(tmp_path.iterdir()) == [file]
    sections = json.loads(file.read_text())["sections"]
    assert {kind: one["rows"][0]["seconds"] for kind, one in sections.items()} == {
        "model": [3.0, 3.0, 9.0],
        "data": [2.0, 2.0, 9.0],
    }
    assert sections["model"]["command"].startswith("python -m benchmarks.model --results")
    assert sections["model"]["machine"]["cores"] == timing.cores()


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURED)
def test_a_benchmark_measures_each_contestant_in_each_round(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--results", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (file,) = tmp_path.glob("bench-*-quick.json")
    section = json.loads(file.read_text())["sections"][name]
    assert section["quick"]
    assert len(section["rows"]) > 1
    for row in section["rows"]:
        assert len(row[MEASURED[name]]) == section["conditions"]["rounds"]
        assert min(row[MEASURED[name]]) > 0
