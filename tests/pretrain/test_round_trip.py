"""run -> hand-off -> evaluate: the numbers of the training, whatever the number of ranks and the ZeRO stage."""

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoints.checkpoint import list_checkpoints, step_of
from pretrain.evaluate import main as evaluate_door
from pretrain.export import export_run
from pretrain.handoff.folder import CONFIG
from pretrain.metrics import read_metrics
from pretrain.outcome import ExitCode, UserError
from pretrain.recipe import validate_recipe
from pretrain.run_folder import RunFolder
from tests.system.launching import changes, trained

TOTALS = ("top1", "top5", "loss", "samples")


def train(folder: Path, digits: Path, ranks: int, *, stage: int, **fields: object) -> Path:
    """Trains 13 steps of a small network, by the command that users run; the result is the run's folder."""
    small = "{depths: [1, 1, 2, 1], widths: [16, 32, 32, 32], heads: [1, 2, 2, 2], drop_path: 0.05}"
    assignments = changes(
        data__path=digits, schedule__epochs=0.6, schedule__warmup_epochs=0.2, ema__decay=0.9,
        optimizer__kind="sgd", optimizer__lr=0.3, model__overrides=small,
        deepspeed__zero_optimization__stage=stage, **fields,
    )  # fmt: skip
    code, output = trained(folder, *assignments, ranks=ranks)
    assert code == ExitCode.FINISHED, output
    return folder / "demo"


def evaluated(run: Path, digits: Path, *more: str) -> dict[str, Any]:
    assert evaluate_door([str(run), "--data", str(digits), *more]) == ExitCode.FINISHED
    content: dict[str, Any] = json.loads((run / "evaluation/digits-val.json").read_text())
    return content


def in_training(run: Path) -> dict[str, Any]:
    """The last evaluation of the average, which is what is handed off."""
    return read_metrics(run / "metrics.jsonl", "eval_average")[-1]


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_the_evaluation_of_a_handoff_equals_that_of_the_training_exactly(
    ranks: int, stage: int, digits: Path, tmp_path: Path
) -> None:
    often = {"evaluation__every_epochs": 0.3, "checkpoint__every_steps": 8}
    folder = train(tmp_path, digits, ranks, stage=stage, **often)
    found, expected = evaluated(folder, digits), in_training(folder)
    assert [found[name] for name in TOTALS] == [expected[name] for name in TOTALS]
    assert json.loads((folder / "summary.json").read_text())["handoff_top1"] == expected["top1"]
    assert 20 < expected["top1"] < 100, "a network that learned something, and makes mistakes"
    run, facts = RunFolder(folder), json.loads((folder / "environment.json").read_text())
    content = run.read_recipe()
    content["data"]["path"] = "s3://me:secret@bucket/digits?sig=secret"
    run.write_description(validate_recipe(content, "recipe"), {}, facts)
    handed_off = (export_run(run) / CONFIG).read_text()
    assert "s3://bucket/digits" in handed_off
    assert "secret" not in handed_off
    # Any checkpoint can be handed off that was taken after an evaluation.
    steps = sorted(step_of(path) for path in list_checkpoints(run.checkpoints))
    assert len(steps) > 1
    for step in steps:
        samples = json.loads((export_run(run, step=step) / CONFIG).read_text())["samples_seen"]
        assert samples * steps[-1] == expected["samples_seen"] * step
    with pytest.raises(UserError, match=rf"no checkpoint of step 1 \(there: {steps[-1]}"):
        export_run(run, step=1)


@pytest.mark.slow
def test_a_handoff_trained_in_bf16_equals_its_training_exactly_in_bf16_and_says_fp32_otherwise(
    digits: Path, tmp_path: Path
) -> None:
    """The masters are handed off, in fp32; rounded to bf16 they are the very weights that training evaluated."""
    run = train(tmp_path, digits, 1, stage=1, deepspeed__bf16__enabled="true")
    expected = in_training(run)
    narrow = evaluated(run, digits, "--precision", "bf16")
    assert [narrow[name] for name in TOTALS] == [expected[name] for name in TOTALS]
    assert json.loads((run / "summary.json").read_text())["handoff_top1"] is None, "of fp32, as it is handed off"
    wide = evaluated(run, digits)
    assert (wide["precision"], narrow["precision"]) == ("fp32", "bf16")
    assert wide["loss"] != narrow["loss"]
    # bf16 keeps 8 bits: rounding weights and activations moves a score by some 2^-8 of its size, which is a few.
    assert abs(wide["loss"] - narrow["loss"]) < 2**-8 * 10
