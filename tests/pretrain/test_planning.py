"""Failures, speed, scaling and devices of a plan."""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from models import model_config
from models.cost import count_parameters
from pretrain.devices import DEVICES, find_device, peak_flops
from pretrain.engine.deepspeed_config import ResolvedDeepSpeed, resolve_deepspeed_config
from pretrain.engine.precision import Precision
from pretrain.monitoring.efficiency import model_flops_per_image
from pretrain.outcome import UserError
from pretrain.planning.data import read_speed
from pretrain.planning.failures import Conditions, best_interval, expected_finish, job_mtbf, simulate
from pretrain.planning.memory import Engine
from pretrain.planning.scaling import Network, Reading, simulate_step
from pretrain.planning.speed import Measurement, Training, read_benchmark, speed_of
from tests.benchmarks.sections import model_rows, written
from tests.pretrain.ranks import run_ranks
from tests.pretrain.test_equality import BATCH, go_on, training, zero
from tests.pretrain.test_equality import recipe as small_recipe

DAY = 86400.0
HARD = Conditions(work=5 * DAY, save=20.0, restart=600.0, mtbf=4 * 3600.0)


@pytest.mark.parametrize("interval", [300.0, 1800.0, 7200.0, 36000.0])
@pytest.mark.parametrize("mtbf", [6 * 3600.0, 2 * DAY])
def test_simulated_failures_agree_with_the_closed_form(interval: float, mtbf: float) -> None:
    conditions = Conditions(5 * DAY, 20.0, 600.0, mtbf)
    found = simulate(conditions, interval, runs=4000)
    assert found.mean == pytest.approx(expected_finish(conditions, interval), rel=0.03)
    assert found.low <= found.mean <= found.high


def test_the_best_interval_is_the_best() -> None:
    best = best_interval(HARD.save, HARD.mtbf)
    assert best == pytest.approx(math.sqrt(2 * HARD.save * HARD.mtbf), rel=0.05)  # Young's
    at_best = expected_finish(HARD, best)
    assert all(at_best < expected_finish(HARD, factor * best) for factor in (0.3, 0.6, 1.7, 4))


def test_without_failures_only_checkpoints_cost() -> None:
    calm = Conditions(1000.0, 10.0, 600.0, math.inf)
    assert expected_finish(calm, 100.0) == 1000 + 10 * 10
    assert simulate(calm, 300.0).mean == expected_finish(calm, 300.0) == 1000 + 4 * 10
    assert best_interval(10.0, math.inf) == math.inf
    assert job_mtbf(1024, 50_000) == pytest.approx(48.8, abs=0.1)


def test_the_simulation_is_repeatable_and_failures_are_as_many_as_the_time_holds() -> None:
    one, two = simulate(HARD, 700.0, seed=3), simulate(HARD, 700.0, seed=3)
    assert one == two != simulate(HARD, 700.0, seed=4)
    assert one.failures == pytest.approx(one.mean / HARD.mtbf, rel=0.05)


@pytest.mark.parametrize("interval", [0.0, -1.0, math.nan])
def test_an_interval_that_makes_no_sense_is_refused(interval: float) -> None:
    for finish in (expected_finish, simulate):
        with pytest.raises(ValueError, match="positive"):
            finish(HARD, interval)
    with pytest.raises(ValueError, match="negative"):
        Conditions(-1.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-PCIE-40GB", "a100-40"),
        ("Tesla V100-SXM2-16GB", None),
        ("AMD EPYC", None),
    ],
)
def test_gpus_are_known_by_the_names_that_torch_gives_them(name: str, known: str | None) -> None:
    assert find_device(name) is (DEVICES[known] if known else None)
    assert (peak_flops(name, torch.bfloat16) is None) == (known is None)


def test_peaks_are_those_of_dense_products() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", torch.bfloat16) == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", torch.float16) == 312e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", torch.float32) == 19.5e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", torch.float32, tf32=True) == 156e12


SECONDS = {"lavit_small": 0.5, "lavit_small_triton": 0.25, "lavit_base": 1.0}


def benchmark(folder: Path, device: str = "NVIDIA H100 80GB HBM3", precision: str = "bf16") -> Path:
    """A result of a GPU: lavit_small trains 4 images a second."""
    conditions = {"batch": 2, "size": 224, "precision": precision}
    file = written(folder, "model", conditions, model_rows(**SECONDS))
    content = json.loads(file.read_text())
    content["sections"]["model"]["machine"]["name"] = device
    file.write_text(json.dumps(content))
    return file


def to_train(
    name: str = "lavit_small", precision: Precision = "bf16", *, recomputed: Any = (), **fields: Any
) -> Training:
    """As ``benchmarks.model`` does, but for what is said."""
    return Training(model_config(name, **fields), False, precision, 2, recomputed)


def read(file: Path, wanted: Training) -> Measurement:
    found = read_benchmark(file, DEVICES["h100"], wanted)
    assert found is not None
    return found


def refusal(file: Path, wanted: Training) -> str:
    with pytest.raises(UserError) as raised:
        read(file, wanted)
    assert str(raised.value).startswith(f"--benchmark {file}: ")
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_benchmark_of_another_device_is_not_taken_for_this_one(tmp_path: Path) -> None:
    assert read_benchmark(benchmark(tmp_path, "AMD EPYC", "fp32"), DEVICES["h100"], to_train()) is None
    known = speed_of(989e12, model_flops_per_image(3_260_000_000), None, None)
    assert known.believed is None
    assert known.rests_on == "not measured"


def test_a_measurement_of_what_is_planned_counts_and_goes_before_an_assumed_mfu(tmp_path: Path) -> None:
    assert read(benchmark(tmp_path), to_train()).images_per_s == 4.0
    found = read(benchmark(tmp_path), dataclasses.replace(to_train("lavit_base"), compiled=True))
    assert "precision bf16" in found.conditions
    known = speed_of(989e12, model_flops_per_image(3_260_000_000), found, 0.3)
    assert known.believed == found.images_per_s == 2.0
    assert known.rests_on == f"measured: {found.file}"


def test_a_benchmark_without_this_model_or_size_is_refused(tmp_path: Path) -> None:
    file = benchmark(tmp_path)
    for model, side in (("lavit_huge", 224), ("lavit_small", 384)):
        told = f"holds no training images/s of {model}, eager, at {side} x {side} pixels"
        assert told in refusal(file, to_train(model, image_size=side))


@pytest.mark.parametrize("precision", ["fp32", "bf16 autocast", "fp16"])
def test_weights_in_bf16_measure_no_other_precision(precision: Precision, tmp_path: Path) -> None:
    told = f"was measured in bf16, and the plan trains in {precision}"
    assert told in refusal(benchmark(tmp_path), to_train(precision=precision))


def test_a_benchmark_measures_no_other_network(tmp_path: Path) -> None:
    wider = to_train(mlp_ratios=(8.0, 8.0, 4.0, 8.0), attention_residual=False)
    assert "change its mlp_ratios, attention_residual" in refusal(benchmark(tmp_path), wider)
    as_it_is = to_train(mlp_ratios=(8.0, 8.0, 4.0, 4.0))
    assert not read(benchmark(tmp_path), as_it_is).differs


def test_tritons_kernels_are_measured_by_a_row_of_their_own(tmp_path: Path) -> None:
    file = benchmark(tmp_path)
    assert read(file, to_train(attention_kernel="triton")).images_per_s == 8.0
    told = "holds no training images/s of lavit_base with attention_kernel triton, eager"
    assert told in refusal(file, to_train("lavit_base", attention_kernel="triton"))


def test_what_was_measured_a_little_otherwise_is_of_use_and_says_so(tmp_path: Path) -> None:
    wanted = to_train(recomputed=(1, 2), num_classes=10, drop_path=0.1, norm="apex")
    found = read(benchmark(tmp_path), dataclasses.replace(wanted, micro_batch=64))
    assert found.images_per_s == 4.0
    assert found.differs == (
        "num_classes 10 (measured: 1000)",
        "drop_path 0.1 (measured: 0.0)",
        "norm apex (measured: torch)",
        "activation_checkpointing in stages 1, 2 (measured: none; up to a third more time)",
        "micro-batch 64 (measured: 2)",
    )
    known = speed_of(989e12, model_flops_per_image(3_260_000_000), found, None)
    assert known.rests_on == f"measured, but not as planned: {found.file}"


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        (None, "cannot be read: No such file"),
        ("| a table |", "is no result of python -m benchmarks"),
        ("[]", "has no whole section of benchmarks.model"),
        ('{"sections": {"data": {}}}', "has no whole section of benchmarks.model"),
    ],
)
def test_a_benchmark_that_is_none_is_refused_in_one_line(content: str | None, wrong: str, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    if content is not None:
        file.write_text(content)
    assert wrong in refusal(file, to_train())


def engine(stage: int, *, overlap: bool = False, **more: Any) -> Engine:
    plain = Engine(stage, 8, 1, 2, False, False, 3, False, 5_000_000, False, overlap, 0, 0, False, False)
    return dataclasses.replace(plain, **more)


def test_a_step_scales_until_talking_takes_over() -> None:
    network, free = Network(450e9, 50e9), Reading(None, 1e5)

    def step(gpus: int, stage: int = 1, *, overlap: bool = False, reading: Reading = free) -> float:
        of = engine(stage, overlap=overlap)
        return simulate_step(gpus, of, network, reading, parameters=40_000_000, work=(4096, 1500.0)).seconds

    assert step(1) == pytest.approx(4096 / 1500)
    assert step(8) == pytest.approx(step(1) / 8, rel=0.01)
    assert step(64) > step(1) / 64
    assert step(64, overlap=True) <= step(64)
    assert step(64, 3) > step(64, 0)
    assert step(64, reading=Reading(1e8, 1e5)) == pytest.approx(4096 * 1e5 / 1e8)  # the storage limits


def test_a_ring_moves_twice_the_gradients_less_one_share() -> None:
    network = Network(100e9, 100e9, latency=0.0)
    step = simulate_step(8, engine(0), network, Reading(None, 1.0), parameters=10**9, work=(8, 1.0))
    assert step.talk == pytest.approx(2 * 7 / 8 * 2e9 / 100e9)


# A step of 4.5 s, 1.5 s of them forward; 10**9 parameters in 16 bits over a link of 2e9 bytes/s on 2 GPUs: an
# all-reduce sends 2 * (2 - 1) / 2 of what is reduced, in 1 s; a gather or a scatter half of that.
COMPUTE, ALL_REDUCE, HALF = 4.5, 1.0, 0.5


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("accumulation", [1, 4, 16])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_only_what_runs_during_a_pass_hides_behind_it(stage: int, accumulation: int, *, overlap: bool) -> None:
    prefetch = 400_000_000  # two fifths of the weights come first
    of = engine(stage, overlap=overlap, accumulation=accumulation, prefetch=prefetch)
    network = Network(2e9, 2e9, latency=0.0)
    step = simulate_step(2, of, network, Reading(None, 1.0), parameters=10**9, work=(9, 1.0))
    backward, forward = 3.0 / accumulation, 1.5 / accumulation  # of one micro-batch
    reduce, gather = {0: (ALL_REDUCE, 0.0), 1: (ALL_REDUCE, HALF), 2: (ALL_REDUCE, HALF), 3: (HALF, HALF)}[stage]
    open_reduce, open_gather = max(0.0, reduce - backward) if overlap else reduce, gather
    if stage == 3 and overlap:
        open_gather = 0.4 * HALF + max(0.0, 0.6 * HALF - forward)
    reduces, gathers = {0: (1, 1), 1: (1, 1), 2: (accumulation, 1), 3: (accumulation, accumulation)}[stage]
    assert step.compute == COMPUTE
    assert step.talk == pytest.approx(reduces * reduce + gathers * gather)
    assert step.exposed == pytest.approx(reduces * open_reduce + gathers * open_gather)


def test_without_prefetching_stage_3_waits_for_all_weights() -> None:
    network = Network(2e9, 2e9, latency=0.0)
    step = simulate_step(2, engine(3, overlap=True), network, Reading(None, 1.0), parameters=10**9, work=(9, 1.0))
    assert step.exposed == pytest.approx(HALF)


def sent_as_simulated(control: dist.ProcessGroup) -> None:
    """Bytes that a step sends, whatever DeepSpeed calls to send them, are those of the simulation."""
    from deepspeed.comm import comm

    sent = {"reduce": 0, "half": 0}

    def count(owner: Any, name: str, kind: str, place: int, key: str) -> None:
        call = getattr(owner, name)

        def counted(*arguments: Any, **named: Any) -> Any:
            whole = arguments[place] if len(arguments) > place else named[key]
            sent[kind] += whole.numel() * whole.element_size()
            return call(*arguments, **named)

        setattr(owner, name, counted)

    count(dist, "all_reduce", "reduce", 0, "tensor")
    count(dist, "broadcast", "half", 0, "tensor")  # what stands for an all-gather on gloo at stages 1 and 2
    count(comm.cdb, "all_gather_function", "half", 0, "output_tensor")
    count(comm.cdb, "reduce_scatter_function", "half", 1, "input_tensor")
    network = Network(1.0, 1.0, latency=0.0)  # talking takes as many seconds as it sends bytes
    for stage, accumulation, autocast in itertools.product(range(4), (1, 2), (False, True)):
        run = training(
            small_recipe(), accumulation=accumulation, torch_autocast={"enabled": autocast},
            zero_optimization=zero(stage, stage3_param_persistence_threshold=0),
        )  # fmt: skip
        go_on(run, 2)  # in the first one stage 3 learns the order of the layers
        sent.update(reduce=0, half=0)
        go_on(run, 1)
        parameters = count_parameters(run.engine.module.config)
        low = autocast and stage > 0
        of = engine(stage, accumulation=accumulation, element=4, low_traffic=low, prefetch=50_000_000)
        step = simulate_step(2, of, network, Reading(None, 1.0), parameters=parameters, work=(BATCH, 1.0))
        # Norms stay in 32 bits under autocast, some 5 %; the metrics' own sums are some bytes.
        assert sent["reduce"] + sent["half"] / 2 == pytest.approx(step.talk, rel=0.07 if low else 0.01)


@pytest.mark.slow
def test_a_step_sends_what_the_simulation_says() -> None:
    run_ranks(2, sent_as_simulated)


def test_bf16_with_sums_in_fp32_at_stage_1_does_not_overlap() -> None:
    """DeepSpeed's BF16_Optimizer does not read overlap_comm."""
    wide, at_1 = {"data_types": {"grad_accum_dtype": "fp32"}}, {"stage": 1, "overlap_comm": True}

    def overlaps(section: dict[str, Any], **more: Any) -> bool:
        return Engine.of(small_recipe(), resolved_for_gpus(zero_optimization=at_1 | section, **more)).overlap

    assert overlaps({})
    assert not overlaps({}, **wide)
    assert overlaps({"offload_optimizer": {"device": "cpu"}}, **wide)  # another of its engines
    assert overlaps({"stage": 2}, **wide)
    assert overlaps({"stage": 3, "overlap_comm": None})  # DeepSpeed's default there


def resolved_for_gpus(**more: Any) -> ResolvedDeepSpeed:
    config = {"train_batch_size": 8, "gradient_clipping": 1.0, **more}
    return resolve_deepspeed_config(config, world_size=2, state_bytes=0, has_bf16_gpu=True)


def test_reading_speed_counts_what_was_read(tmp_path: Path) -> None:
    files = [tmp_path / name for name in "ab"]
    for file in files:
        file.write_bytes(bytes(5_000_000))
    assert read_speed(files) > 0
    assert read_speed(files, limit=1) > 0
