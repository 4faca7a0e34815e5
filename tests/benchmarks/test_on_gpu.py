"""On a GPU the same command takes the GPU's way everywhere."""

import json
from pathlib import Path

import pytest

from benchmarks import data, input_settings, model
from benchmarks.__main__ import main
from benchmarks.tables import ALTERNATIVE, MODES, mfu

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.mark.timeout(1800)
def test_all_benchmarks_measure_the_gpu(tmp_path: Path) -> None:
    assert main(["--quick", "--results", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("bench-*-quick.json")
    found = json.loads(file.read_text())["sections"]
    assert set(found) == {"model", "data", "trainer", "end_to_end"}
    assert all(section["machine"]["device"] == "cuda" and section["machine"]["driver"] for section in found.values())
    assert found["model"]["conditions"]["precision"] == "bf16"
    assert {row["mode"] for row in found["model"]["rows"]} == {"eager", "compiled"}
    assert "lavit_small_triton" in {row["model"] for row in found["model"]["rows"]}
    assert found["data"]["conditions"]["device"] == "cuda"
    assert [row["contestant"] for row in found["data"]["rows"]] == data.contestants("cuda")
    compiled = {(row["precision"], row["variant"]) for row in found["trainer"]["rows"] if row["mode"] == "compiled"}
    autocast = {("bf16 autocast", variant) for variant in ("bare DDP", "stage 0", "stage 1", "stage 2")}
    assert compiled == autocast | {("bf16", "bare DDP"), ("bf16", "stage 1")}
    whole = found["end_to_end"]
    assert {row["precision"] for row in whole["rows"]} == {"bf16"}
    assert {row["mode"] for row in whole["rows"]} == {*MODES, ALTERNATIVE}
    for row in whole["rows"]:
        used = mfu(max(row["images_per_s"]), row["macs"], whole, "bf16", whole["conditions"]["ranks"])
        assert row["mode"] == "data only" or used is None or 0 < used < 1


@pytest.mark.timeout(1800)
def test_cuda_graphs_run_beside_eager_and_compiled(tmp_path: Path) -> None:
    model.main(["--quick", "--cuda-graphs", "--sizes", "tiny", "--results", str(tmp_path)])
    (file,) = tmp_path.glob("bench-*-quick.json")
    rows = json.loads(file.read_text())["sections"]["model"]["rows"]
    assert {row["mode"] for row in rows} == {"eager", "compiled", "CUDA graphs"}


@pytest.mark.timeout(1800)
def test_each_mode_takes_memory_of_its_own() -> None:
    found = model.peaks(["lavit_tiny"], list(model.MODES), "cuda", 64)
    assert set(found) == {("lavit_tiny", mode) for mode in model.MODES}
    assert len(set(found.values())) > 1


@pytest.mark.timeout(1800)
def test_settings_of_the_input_are_measured_on_the_gpu(tmp_path: Path) -> None:
    input_settings.main(["--quick", "--results", str(tmp_path)])
    (file,) = tmp_path.glob("bench-*-quick.json")
    rows = json.loads(file.read_text())["sections"]["input_settings"]["rows"]
    assert {row["settings"]["hw_decoder_load"] for row in rows} == {0, 0.65, 1}
    assert all(len(row["images_per_s"]) == 2 for row in rows)
