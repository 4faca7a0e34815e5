"""The comparison of variants: its statistics, and the whole of it on a few images."""

import json
import statistics
from pathlib import Path

import numpy as np
import pytest

from benchmarks import ablation
from data_pipeline.build import main as build
from tests.pages import ROOT


def row(variant: str, seed: int, top1: float) -> dict[str, object]:
    return {"variant": variant, "seed": seed, "top1": top1}


def test_the_interval_is_students() -> None:
    found = ablation.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found["mean"] == 3.0
    assert found["half_width"] == pytest.approx(2.776 * statistics.stdev([1, 2, 3, 4, 5]) / 5**0.5, rel=1e-3)
    assert ablation.interval([1.0])["half_width"] is None


def test_differences_are_paired_by_seed_and_one_whose_interval_includes_zero_is_none() -> None:
    rows = [row("la", seed, 80 + 5 * seed + 1 + 0.1 * (seed % 2)) for seed in range(5)]
    rows += [row("vanilla", seed, 80 + 5 * seed) for seed in range(5)]
    rows += [row("reuse", seed, 80 + 5 * seed + (-1) ** seed) for seed in range(4)]
    found = ablation.compare(rows)["differences"]
    surely = found["Less Attention in place of vanilla attention"]
    assert surely["differs"]  # though the seeds lie 20 points apart
    assert surely["mean"] == pytest.approx(1.04)
    assert found["Psi and Theta, over repeating scores"]["seeds"] == 4  # of which both have a run
    assert not found["Psi and Theta, over repeating scores"]["differs"]
    assert "attention residual" not in found


@pytest.mark.slow
def test_variants_are_trained_evaluated_and_compared_and_finished_runs_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng, raw = np.random.default_rng(0), tmp_path / "raw"
    raw.mkdir()
    for name, count in (("train", 80), ("t10k", 20)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        pixels = (rng.integers(0, 60, (count, 28, 28)) + 19 * labels[:, None, None]).astype(np.uint8)
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            head = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
            (raw / f"{name}-{kind}-ubyte").write_bytes(head + array.tobytes())
    assert build([str(raw), str(tmp_path / "data"), "--workers", "1", "--val-fraction", "0.2"]) == 0

    folders = {"data": "data", "runs": "runs", "results": "", "figure": "figure.png"}
    words = ["--quick", "--recipe", str(ROOT / "recipes/fashion_mnist_lavit.yaml")]
    words += [word for name, path in folders.items() for word in (f"--{name}", str(tmp_path / path))]
    capsys.readouterr()
    assert ablation.main(words) == 0, capsys.readouterr().out
    printed = capsys.readouterr().out
    (file,) = tmp_path.glob("ablation-*-quick.json")
    content = json.loads(file.read_text())
    whole, vanilla = "la+residual+loss", "vanilla"
    assert [(one["variant"], one["seed"]) for one in content["rows"]] == [
        (variant, seed) for variant in (vanilla, whole) for seed in range(2)
    ]
    for one in content["rows"]:
        assert 0 <= one["top1"] <= 100
        assert one["images"] == 64
        assert one["seconds"] > 0
        assert one["core_seconds"] > 0
        less = [name for name in one["attention"]["after"] if name.endswith("less")]
        assert bool(less) == (one["variant"] == whole)
        assert one["attention"]["before"].keys() == one["attention"]["after"].keys()
        assert one["attention"]["before"] != one["attention"]["after"]
    assert content["rows"][0]["parameters"] > content["rows"][2]["parameters"]
    assert "all of LaViT over its vanilla twin" in content["differences"]
    assert f"| {whole} |" in printed
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")}
    assert ablation.main(words) == 0
    assert json.loads(file.read_text())["rows"] == content["rows"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")} == times
