"""What was measured reaches files, tables and goals as it is."""

import inspect
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nvidia.dali import fn

from benchmarks import __main__ as door
from benchmarks import data, end_to_end, goals, input_settings, model, page, report, tables, trainer
from benchmarks.loops import recipe_of
from models import model_config
from tests.benchmarks.sections import CPU, H100, model_rows, section, written

MODEL = {"batch": 2, "size": 224, "rounds": 3, "precision": "fp32"}
NONE: dict[str, list[dict[str, Any]]] = {kind: [] for kind in page.VERSIONS}
BF16 = MODEL | {"batch": 128, "precision": "bf16"}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_day_and_machine_have_one_file_in_which_a_section_replaces_its_former_self(tmp_path: Path) -> None:
    written(tmp_path, "model", MODEL, model_rows(lavit_small=1.0))
    written(tmp_path, "data", {}, [{"contestant": "ours", "images_per_s": [123.456789]}])
    file = written(tmp_path, "model", MODEL, model_rows(lavit_small=2.0))
    sections = json.loads(file.read_text())["sections"]
    assert set(sections) == {"model", "data"}
    assert sections["model"]["rows"][0]["training_s"] == [2.0] * 3
    assert sections["data"]["rows"][0]["images_per_s"] == [123.46]
    assert sections["model"]["versions"]["torch"]
    assert sections["model"]["revision"]


def test_a_command_does_not_tell_where_its_result_went(tmp_path: Path) -> None:
    assert str(tmp_path) not in written(tmp_path, "model", MODEL, []).read_text()


def test_a_result_that_breaks_off_leaves_the_former_one(tmp_path: Path) -> None:
    file = written(tmp_path, "model", MODEL, [])
    before = file.read_text()
    with pytest.raises(TypeError):
        written(tmp_path, "data", {}, [{"contestant": object()}])
    assert file.read_text() == before


def test_quick_results_lie_apart(tmp_path: Path) -> None:
    options = model.parse(["--quick", "--results", str(tmp_path)], "cpu")
    assert report.file_of_today(CPU, options).name.endswith("-2-cores-quick.json")
    many = H100 | {"gpus": H100["gpus"] * 8}
    assert "8-x-nvidia-h100" in report.file_of_today(many, options).name


def test_ratios_are_within_rounds_so_that_a_slow_round_spoils_none() -> None:
    assert tables.ratio([2.0, 2.0, 200.0], [1.0, 1.0, 100.0]) == (2.0, 2.0, 2.0)


def test_the_network_is_compared_with_the_one_of_its_size_and_mode() -> None:
    rows = model_rows(lavit_tiny=0.5, lavit_tiny_vanilla=0.25, lavit_small=1.0, convnext_tiny=1.5)
    lines = tables.model(section(CPU, MODEL, rows))[2:]
    found = {(cells(line)[0], cells(line)[1]): cells(line) for line in lines}
    assert found["lavit_small", "eager"][5:8] == ["2", "", "not measured"]
    assert found["lavit_tiny_vanilla", "compiled"][6].startswith("0.500")
    assert found["convnext_tiny", "compiled"][6].startswith("1.500")


def test_mfu_is_of_the_peak_in_the_precision_that_was_used() -> None:
    rate = 989e12 / (6 * 3.26e9) / 4
    assert tables.mfu(rate, 3_260_000_000, section(H100, BF16, []), "bf16") == pytest.approx(0.25)
    assert tables.mfu(rate, 3_260_000_000, section(H100, BF16, []), "bf16", devices=2) == pytest.approx(0.125)
    assert tables.mfu(rate, 3_260_000_000, section(H100, BF16, []), "fp32") > 3
    assert tables.mfu(rate, 3_260_000_000, section(CPU, MODEL, []), "fp32") is None
    unknown = section(H100 | {"name": "NVIDIA B1"}, BF16, [])
    assert tables.mfu(rate, 3_260_000_000, unknown, "bf16") is None


def whole(rates: dict[str, list[float]]) -> dict[str, Any]:
    case = {"model": "lavit_tiny", "size": 128, "micro_batch": 16, "macs": 10**9, "precision": "fp32"}
    rows = [case | {"mode": mode, "images_per_s": values} for mode, values in rates.items()]
    return section(CPU, {"ranks": 2}, rows)


def test_what_limits_is_a_number() -> None:
    (line,) = tables.end_to_end(whole({"synthetic": [100.0] * 3, "data only": [300.0] * 3, "both": [60.0] * 3}))[2:]
    assert cells(line)[5].startswith("60.0% (60.0% to 60.0%) / 80.0%")
    assert cells(line)[6] == "the network"


def test_the_whole_is_over_what_one_would_use_instead_within_the_turns() -> None:
    turns = {"synthetic": [100.0] * 3, "data only": [100.0] * 3, "both": [60.0, 60.0, 6.0]}
    (line,) = tables.end_to_end(whole(turns | {tables.ALTERNATIVE: [40.0, 40.0, 4.0]}))[2:]
    assert cells(line)[8:] == ["40 (22 to 40)", "1.500 (1.500 to 1.500)"]
    (line,) = tables.end_to_end(whole(turns))[2:]  # a section from before it was measured
    assert cells(line)[8:] == ["not measured", ""]


def trainer_section(machine: dict[str, Any], *rows: tuple[str, str | None, float]) -> dict[str, Any]:
    made = [
        {"variant": variant, "mode": "eager", "step_s": [took] * 3} | ({"precision": precision} if precision else {})
        for variant, precision, took in rows
    ]
    return section(machine, {"micro_batch": 16, "ranks": 2, "precision": "fp32"}, made)


def test_the_trainer_is_compared_with_the_bare_loop_of_its_precision() -> None:
    found = trainer_section(
        H100, ("bare DDP", "bf16 autocast", 1.0), ("stage 1", "bf16 autocast", 1.1), ("bare DDP", "bf16", 0.5),
        ("stage 1", "bf16", 0.6),
    )  # fmt: skip
    lines = {(cells(line)[0], cells(line)[2]): cells(line)[5] for line in tables.trainer(found)[2:]}
    assert lines["stage 1", "bf16 autocast"].startswith("1.100")
    assert lines["stage 1", "bf16"].startswith("1.200")
    former = tables.trainer(trainer_section(CPU, ("bare DDP", None, 1.0), ("stage 0", None, 0.9)))
    assert cells(former[-1])[2] == "fp32"
    assert cells(former[-1])[5].startswith("0.900")


def test_on_a_gpu_the_trainer_also_runs_as_it_does_there_by_default() -> None:
    found = trainer.contestants(trainer.parse([], "cuda", 8))
    assert ("compiled", "bf16", 1) in found
    assert ("compiled", "bf16", None) in found
    assert ("compiled", "bf16 autocast", 3) not in found
    assert {precision for _, precision, _ in trainer.contestants(trainer.parse([], "cpu", 8))} == {"fp32"}


def test_on_a_gpu_every_turn_of_the_trainer_has_a_line_of_metrics() -> None:
    options = trainer.parse([], "cuda", 8)
    assert options.steps == recipe_of(options, compiled=False).log_every_steps


def test_goals_that_nothing_was_measured_for_are_not_measured() -> None:
    lines = goals.table(NONE)[2:]
    assert len(lines) == len(goals.GOALS)
    assert all(cells(line)[3:] == ["not measured", ""] for line in lines)


def test_a_goal_is_reached_by_the_median_on_its_own_kind_of_device() -> None:
    rows = model_rows(lavit_small=1.0, lavit_small_vanilla=0.9, pvt_v2_b2=1.3, swin_tiny_patch4_window7_224=1.1)
    on_cpu = goals.table(NONE | {"model": [section(CPU, MODEL, rows)], "alternatives": [section(CPU, MODEL, rows)]})[2:]
    assert [cells(line)[4] for line in on_cpu[:2]] == ["no", "no"]
    assert all(cells(line)[3] == "not measured" for line in on_cpu[2:])
    gpu = section(H100, BF16, rows)
    on_gpu = {cells(line)[1]: cells(line) for line in goals.table(NONE | {"model": [gpu], "alternatives": [gpu]})}
    assert on_gpu["LaViT-S in bf16, compiled, beside pvt_v2_b2"][4] == "yes"
    assert on_gpu["the same beside swin_tiny"][4] == "no"
    assert on_gpu["MFU of LaViT-S, compiled"][3] == "0.3% (0.3% to 0.3%)"


def test_a_goal_that_lies_within_the_spread_is_said_to() -> None:
    assert goals.verdict((0.8, 0.98, 1.0), 0.97) == "yes, within the spread"
    assert goals.verdict((0.8, 0.93, 1.0), 0.97) == "no, within the spread"
    assert [goals.verdict((value,) * 3, 0.97) for value in (0.98, 0.96)] == ["yes", "no"]


def test_on_a_gpu_all_compute_in_bf16_compiled_and_decode_there_on_all_gpus() -> None:
    assert model.parse([], "cuda").compile
    assert str(model.dtype_of("cuda")) == "torch.bfloat16"
    assert model.parse([], "cuda").batch > model.parse([], "cpu").batch
    assert data.parse([], "cuda").device == "cuda"
    for parse in (trainer.parse, end_to_end.parse):
        options = parse([], "cuda", 8)
        assert (options.ranks, options.compile) == (8, True)
    assert trainer.parse([], "cuda", 8).autocast
    assert not trainer.parse([], "cpu", 64).autocast
    assert trainer.parse([], "cpu", 64).ranks == 2
    assert {case[1] for case in end_to_end.parse([], "cuda", 1).cases} == {224}


def test_compiled_networks_that_take_turns_have_dynamos_limit_of_graphs_each() -> None:
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1):
        for bias in (True, False):
            model.compiled(torch.nn.Linear(2, 2, bias=bias), backend="eager")(torch.zeros(1, 2))


def test_what_is_asked_for_goes_before_what_suits_the_device() -> None:
    assert not model.parse(["--no-compile"], "cuda").compile
    options = end_to_end.parse(["--cases", "lavit_base:384:8", "--ranks", "1", "--no-compile"], "cuda", 8)
    assert (options.cases, options.ranks, options.compile) == ([("lavit_base", 384, 8)], 1, False)
    with pytest.raises(SystemExit):
        end_to_end.parse(["--cases", "lavit_base"], "cpu", 2)


@pytest.mark.parametrize("arguments", [[], ["--quick", "--note", "night"]])
def test_the_door_starts_each_with_options_that_it_knows(arguments: list[str], tmp_path: Path) -> None:
    options = door.parse([*arguments, "--results", str(tmp_path)])
    assert tuple(options.only) == ("model", "data", "trainer", "end_to_end")
    parsers = {"model": (model, ()), "data": (data, ()), "trainer": (trainer, (2,)), "end_to_end": (end_to_end, (2,))}
    for name in options.only:
        room, count = parsers[name]
        known = room.parse(door.command(name, options)[3:], "cpu", *count)
        assert (known.results, known.quick, known.note) == (tmp_path, options.quick, options.note)


def test_timms_networks_drop_no_more_paths_than_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, float] = {}

    def create_model(name: str, *, drop_path_rate: float) -> torch.nn.Module:
        asked[name] = drop_path_rate
        return torch.nn.Identity()

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model))
    for name in model.RIVALS:
        model.build(name, "cpu")
    assert asked == dict.fromkeys(model.RIVALS, model_config("lavit_small").drop_path)


def test_every_mode_has_the_memory_that_was_measured_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(name: str, mode: str, device: str, batch: int) -> float:
        return {"eager": 3.0, "compiled": 2.0, "CUDA graphs": 4.0}[mode]

    monkeypatch.setattr(model, "peak_memory", measured)
    on_gpu = model.peaks(["lavit_tiny"], list(model.MODES), "cuda", 128)
    assert on_gpu == {("lavit_tiny", "eager"): 3.0, ("lavit_tiny", "compiled"): 2.0, ("lavit_tiny", "CUDA graphs"): 4.0}
    monkeypatch.setattr(model, "compiled", lambda network: network)
    monkeypatch.setattr(model, "SIZE", model_config("lavit_micro").image_size[0])
    rows = model.measure(["lavit_micro"], "cpu", model.parse(["--batch", "1", "--rounds", "2"], "cpu"))
    assert {row["mode"]: row["peak_gib"] for row in rows} == {"eager": 3.0, "compiled": None}
    shown = {cells(line)[1]: cells(line)[-1] for line in tables.model(section(CPU, MODEL, rows))[2:]}
    assert shown == {"eager": "3.00", "compiled": "not measured"}


def test_a_network_is_compiled_as_its_mode_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "compiled", lambda network, **options: options)
    assert model.in_mode("lavit_micro", "compiled", "cpu") == {}
    assert model.in_mode("lavit_micro", "CUDA graphs", "cpu") == {"mode": "reduce-overhead"}
    assert model.is_ours(model.in_mode("lavit_micro", "eager", "cpu"))


def test_the_memory_of_a_mode_is_that_of_a_process_that_runs_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []

    def in_mode(name: str, mode: str, device: str) -> torch.nn.Module:
        modes.append(mode)
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * model.SIZE**2, 2))

    monkeypatch.setattr(model, "in_mode", in_mode)
    model._child("lavit_tiny", "compiled", "cpu", 1, SimpleNamespace(put=lambda grown: None))
    assert modes == ["compiled"]


def test_timms_networks_run_beside_the_size_that_is_theirs() -> None:
    extra = list(model.RIVALS) if model.has_timm() else []
    assert model.contestants("small", "cpu") == ["lavit_small", "lavit_small_vanilla", *extra]
    assert model.contestants("tiny", "cpu") == ["lavit_tiny", "lavit_tiny_vanilla"]


def test_cuda_graphs_want_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert model.parse(["--cuda-graphs"], "cuda").cuda_graphs
    with pytest.raises(SystemExit):
        model.parse(["--cuda-graphs"], "cpu")
    assert "--cuda-graphs needs a GPU" in capsys.readouterr().err


def test_on_a_gpu_the_kernels_run_beside_torchs_operators() -> None:
    names = model.contestants("tiny", "cuda")
    assert names == ["lavit_tiny", "lavit_tiny_triton", "lavit_tiny_vanilla"]
    assert model.build(names[1], "cpu").config.attention_kernel == "triton"
    assert model.cost(names[1]) == model.cost(names[0])
    rows = model_rows(lavit_tiny=0.5, lavit_tiny_triton=0.25, lavit_tiny_vanilla=1.0)
    ratios = {cells(line)[0]: cells(line)[6] for line in tables.model(section(H100, BF16, rows))[2:]}
    assert ratios["lavit_tiny"] == ""
    assert ratios["lavit_tiny_triton"].startswith("0.500")
    assert ratios["lavit_tiny_vanilla"].startswith("2.000")


def test_on_a_gpu_both_loaders_are_seen_with_the_jpeg_engine() -> None:
    assert data.contestants("cpu") == ["ours", "DALI's own reader", "webdataset + Pillow"]
    assert data.contestants("cuda") == ["ours", data.WITH_ENGINE, *data.contestants("cpu")[1:]]
    assert data.CONTESTANTS[data.WITH_ENGINE].keywords == {
        "hw_decoder_load": inspect.signature(fn.decoders.image_random_crop).parameters["hw_decoder_load"].default
    }


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_pictures_of_workers_are_pinned_for_a_gpu_alone(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[bool] = []
    batch = SimpleNamespace(to=lambda where, non_blocking: copies.append(non_blocking))

    def loader(samples: Any, *, batch_size: int, num_workers: int, pin_memory: bool) -> list[Any]:
        return [(batch, 0)] if pin_memory == (device == "cuda") else []

    (tmp_path / "a.tar").touch()
    monkeypatch.setattr(torch.utils.data, "DataLoader", loader)
    assert len(list(data.pillow(tmp_path, torch.device(device), 4, threads=1))) == 1
    assert copies == [device == "cuda"]


def test_settings_of_the_input_are_measured_once_each_the_defaults_first() -> None:
    on_cpu = input_settings.grid("cpu", [1, report.cores()], [1, 2])
    assert on_cpu[0] == input_settings.defaults("cpu") == {"threads": report.cores(), "prefetch": 2}
    assert {(one["threads"], one["prefetch"]) for one in on_cpu} == {
        (n, m) for n in (1, report.cores()) for m in (1, 2)
    }
    on_gpu = input_settings.grid("cuda", [1, 99], [2, 3])
    assert on_gpu[0]["hw_decoder_load"] == 0
    assert {one["hw_decoder_load"] for one in on_gpu if one["threads"] == 99} == {0, 0.65, 1}
    changed = {name: {str(one[name]) for one in on_gpu} for name in input_settings.ON_GPU}
    assert all(len(values) > 1 for values in changed.values())
    hinted = [one for one in on_gpu if one["preallocate_hint"] != (0, 0)]
    assert {one["hw_decoder_load"] for one in hinted} == {0.65, 1}
    for found in (on_cpu, on_gpu):
        assert len({str(one) for one in found}) == len(found)


def test_settings_reach_the_loader_of_a_turn(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def loader(dataset: Any, config: Any, **where: Any) -> list[Any]:
        asked.append(config)
        return []

    monkeypatch.setattr(data, "TrainLoader", loader)
    for settings in input_settings.grid("cuda", [3], [5]):
        list(data.ours(digits, torch.device("cpu"), 8, **json.loads(json.dumps(settings))))
        assert asked[-1].model_dump() | settings == asked[-1].model_dump()


def test_a_setting_is_compared_with_the_default_of_its_round() -> None:
    rows = [
        {"settings": {"threads": 2, "preallocate_hint": hint}, "images_per_cpu_s": cpu, "images_per_s": clock}
        for hint, cpu, clock in (([0, 0], [100.0, 50.0], [10.0, 20.0]), ([375, 500], [200.0, 100.0], [5.0, 10.0]))
    ]
    head, _, default, other = tables.input_settings(section(H100, {}, rows))
    assert cells(head)[:2] == ["threads", "preallocate_hint"]
    assert cells(default)[:2] + cells(default)[4:] == ["2", "0 x 0", "", ""]
    assert cells(other)[1] == "375 x 500"
    assert cells(other)[4:] == ["2.000 (2.000 to 2.000)", "0.500 (0.500 to 0.500)"]
