"""The demo on one GPU: DALI decodes there, DeepSpeed computes in bf16 over NCCL."""

import json
from pathlib import Path

import pytest

from pretrain.outcome import ExitCode
from tests.system.launching import changes, launched

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


def test_the_demo_trains_in_bf16_on_a_gpu_and_hands_off(tmp_path: Path, digits: Path) -> None:
    with launched(tmp_path, *changes(data__path=digits), ranks=1, gpu=True) as run:
        assert run.end() == ExitCode.FINISHED, run.output()
        assert "precision: bf16 (the GPU has it)" in run.output()
    assert json.loads((tmp_path / "demo/summary.json").read_text())["top1"] >= 98.5


BF16: list[str] = []
FP16 = changes(
    deepspeed__bf16__enabled="false", deepspeed__fp16__enabled="true", deepspeed__fp16__initial_scale_power=8
)


@pytest.mark.parametrize("precision", [BF16, FP16], ids=["bf16", "fp16"])
def test_a_run_stopped_on_a_gpu_resumes_bit_for_bit(precision: list[str], tmp_path: Path, digits: Path) -> None:
    fields = changes(data__path=digits, schedule__epochs=0.9, schedule__warmup_epochs=0.3, log_every_steps=1)
    fields += changes(ema__decay=0.9, mixing__mixup=0.8)
    fields += [*precision, *changes(deterministic="true")]
    with launched(tmp_path / "straight", *fields, ranks=1, gpu=True) as run:
        assert run.end() == ExitCode.FINISHED, run.output()
    with launched(tmp_path / "stopped", *fields, ranks=1, gpu=True) as run:
        run.wait_for_steps(tmp_path / "stopped/demo", 8)
        run.process.terminate()
        run.end()
        run.assert_no_rank_stays()
    with launched(tmp_path / "stopped", *fields, ranks=1, gpu=True) as run:
        assert run.end() == ExitCode.FINISHED, run.output()
    first, second = ((tmp_path / name / "demo/metrics.jsonl").read_text() for name in ("straight", "stopped"))
    losses = [[json.loads(line)["loss"] for line in text.splitlines()] for text in (first, second)]
    assert losses[0] == losses[1]
