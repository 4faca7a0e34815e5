"""What is measured and shown of a run: right, bounded, and without a trace in what is trained."""

import itertools
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from data_pipeline.preview import CELL, LINE, draw_grid, to_pixels
from models import create_model
from models.cost import count_macs
from pretrain.devices import DEVICES, FLOPS_PER_MAC
from pretrain.metrics import MetricsWriter, read_metrics
from pretrain.monitoring.attention import drawn_blocks
from pretrain.monitoring.bad_samples import BadSampleCount
from pretrain.monitoring.monitor import peak_of
from pretrain.monitoring.step_timer import MARKS, PHASES, StepTimer
from pretrain.run_folder import RunFolder
from pretrain.run_log import RunLog
from pretrain.state import TrainState
from tests.pretrain.ranks import run_ranks
from tests.pretrain.test_equality import go_on, micro_batches, recipe, training, whole_weights, zero
from tests.pretrain.test_resume import state

CPU = torch.device("cpu")


def test_the_phases_of_a_step_add_up_to_its_time_without_what_was_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count().__next__
    monkeypatch.setattr(time, "monotonic", lambda: float(clock()))
    timer = StepTimer(CPU)
    for phase in ("other", "data", "forward", "backward", "optimizer", "other", None, "other", "data", "forward"):
        timer.enter(phase)
    assert timer.split() == {"data": 2.0, "forward": 2.0, "backward": 1.0, "optimizer": 1.0, "other": 3.0}
    assert timer.split() == {"data": 0.0, "forward": 0.0, "backward": 0.0, "optimizer": 0.0, "other": 1.0}
    for _ in range(10 * MARKS):
        timer.enter("data")
    assert timer.split()["data"] == 10 * MARKS
    assert len(timer._marks) <= MARKS


def test_mfu_counts_six_flop_a_mac_against_the_peak_of_tf32_whichever_setting_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = create_model("lavit_micro", num_classes=10, image_size=32)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 32, 32)).sum().backward()
    # Autograd needs no gradient of the image itself, so a little less than three times the forward pass.
    assert counter.get_total_flops() == pytest.approx(FLOPS_PER_MAC * count_macs(model.config), rel=0.03)
    assert peak_of(CPU, "fp32") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    device, h100 = torch.device("cuda"), DEVICES["h100"]
    assert h100.peak(torch.bfloat16) == 989e12
    for setting, off, on in (("fp32_precision", "none", "tf32"), ("allow_tf32", False, True)):
        try:
            assert peak_of(device, "fp32") == h100.fp32_flops
            setattr(torch.backends.cuda.matmul, setting, on)
            assert peak_of(device, "fp32") == h100.tf32_flops
            assert peak_of(device, "bf16 autocast") == h100.tensor_flops
        finally:
            setattr(torch.backends.cuda.matmul, setting, off)


def test_bad_samples_are_counted_once_each_and_only_when_their_line_is_whole(tmp_path: Path) -> None:
    count = BadSampleCount(tmp_path / "bad_samples.jsonl")
    counted = [count()]
    with (tmp_path / "bad_samples.jsonl").open("a") as file:
        for text in ('{"id": 3}\n', '{"id": 3}\n{"id": 4}\n', '{"id": 5', "}\n", "x\n"):
            file.write(text)
            file.flush()
            counted.append(count())
    assert counted == [0, 1, 2, 2, 3, 3]


def test_pictures_are_shown_as_they_were_and_their_sheet_is_bounded() -> None:
    plain = torch.rand(3, 3, 20, 30)
    mean, std = (0.2, 0.4, 0.6), (0.1, 0.2, 0.3)
    normalised = (plain - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    shown = to_pixels(normalised, mean, std)
    assert np.abs(np.stack(shown) - 255 * plain.permute(0, 2, 3, 1).numpy()).max() <= 0.51
    captioned = draw_grid(shown, ["a", "a name that is far too long for its image", ""])
    assert captioned.shape == (CELL + LINE, 3 * CELL, 3)
    many = draw_grid([np.zeros((640, 480, 3), np.uint8)] * 32, [""] * 32)
    assert many.shape == (4 * (CELL + LINE), 8 * CELL, 3)


def test_of_every_stage_the_blocks_that_differ_in_kind_are_drawn() -> None:
    config = create_model("lavit_micro", num_classes=10, image_size=32,
                          depths=[1, 2, 4, 3], vanilla_blocks=[1, 1, 2, 1]).config  # fmt: skip
    kinds = drawn_blocks(config)
    assert {place for place, kind in kinds.items() if kind == "VA"} == {(0, 0), (1, 0), (2, 1), (3, 0)}
    assert {place for place, kind in kinds.items() if kind == "LA"} == {(1, 1), (2, 2), (2, 3), (3, 1), (3, 2)}


def watched_trains_the_same(control: dist.ProcessGroup, folder: str) -> None:
    for stage in (0, 1, 3):
        results = []
        for watched in (False, True):
            run = training(recipe(), zero_optimization=zero(stage))
            losses = go_on(run, 2, measure_norms=watched)
            if watched:
                show_everything(run, Path(folder) / str(stage))
            losses += go_on(run, 2, measure_norms=watched)
            results.append((losses, [view.clone() for view in state(run)], whole_weights(run.engine)))
        (a, b, c), (d, e, f) = results
        assert a == d, f"stage {stage}: losses differ"
        assert all(torch.equal(x, y) for x, y in zip(b, e, strict=True)), f"stage {stage}: weights or moments differ"
        assert all(torch.equal(c[name], f[name]) for name in c), f"stage {stage}: the network differs"


def show_everything(run: Any, folder: Path) -> None:
    """All that a run shows at a time, as its log and its evaluation ask for it."""
    first = dist.get_rank() == 0
    metrics = None
    if first:
        folder.mkdir()
        metrics = MetricsWriter(folder, TrainState())
        RunFolder(folder).show.touch()
    log = RunLog(
        RunFolder(folder), mock.Mock(), mock.Mock(), metrics, state=TrainState(step=2), epoch_size=100, setup={}
    )
    run.log = log
    before = torch.get_rng_state()
    batch = next(micro_batches(run.batch.micro_batch))
    assert run.monitor.attention() is None, "nothing was evaluated yet"
    run.engine.eval()
    run.monitor.see_evaluation(batch, batch.labels)
    run.engine(batch.images)
    run.engine.train()
    run.monitor._steps = 1
    rows, images_requested = run.monitor.measure(global_batch=8, images_requested=log.take_image_request())
    assert images_requested, "a rank does not know that images were requested"
    assert "mfu" not in rows["train"]
    assert rows["train"]["memory_gib"] > 0.05
    assert rows["time"]["total"] == pytest.approx(sum(rows["time"][phase] for phase in PHASES), rel=1e-4)
    attention = run.monitor.attention()
    assert (attention is not None) is first
    run._show_images()
    assert not (first and log.folder.show.exists())
    assert run.monitor.show_batch is first
    if attention is not None:
        log.attention(*attention)
        run.monitor.see_batch(batch)
        assert run.monitor.training_images() is not None
        assert run.monitor.training_images() is None
        metrics.close()
        (row,) = read_metrics(folder / "metrics.jsonl", "attention")
        assert row["step"] == 2
        assert 0 < row["diagonality/stage1_va1"] <= 1
    assert not run.monitor.measure(global_batch=8, images_requested=log.take_image_request())[1]
    assert torch.equal(before, torch.get_rng_state())
    run.monitor.reset()


@pytest.mark.slow
def test_a_run_that_is_watched_trains_bit_for_bit_the_same_at_every_kind_of_stage(tmp_path: Path) -> None:
    run_ranks(2, watched_trains_the_same, str(tmp_path))
