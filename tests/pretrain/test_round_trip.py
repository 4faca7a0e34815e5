"""run -> hand-off -> evaluate: the numbers of the training, whatever the number of ranks and the ZeRO stage."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from pretrain.evaluate import main as evaluate_door
from pretrain.metrics import read_metrics
from pretrain.outcome import ExitCode
from tests.pretrain.ranks import start_ranks
from tests.system.launching import RECIPE, ROOT, changes

pytestmark = pytest.mark.slow
TOTALS = ("top1", "top5", "loss", "samples")
Train = Callable[..., Path]


def through_the_door(log: Path, arguments: list[str]) -> None:
    from pretrain.main import main
    from pretrain.signals import StopFlag

    sys.stdout = log.open("w")
    assert main(StopFlag(), arguments) == ExitCode.FINISHED, log.read_text()


@pytest.fixture(scope="module")
def train(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Trains 13 steps of a small network, by the door that people use; the result is the run's folder."""

    def trained(ranks: int, *, stage: int, **fields: object) -> Path:
        folder = tmp_path_factory.mktemp("runs")
        small = "{depths: [1, 1, 2, 1], widths: [16, 32, 32, 32], heads: [1, 2, 2, 2], drop_path: 0.05}"
        assignments = changes(
            data__path=digits, schedule__epochs=0.6, schedule__warmup_epochs=0.2, ema__decay=0.9,
            model__overrides=small, deepspeed__zero_optimization__stage=stage, **fields,
        )  # fmt: skip
        arguments = ["--recipe", str(RECIPE), "--runs", str(folder), *assignments]
        arguments += ["--deepspeed_config", str(ROOT / "ds_config.json")]
        start_ranks(ranks, through_the_door, folder / "log", arguments)
        return folder / "demo"

    return trained


@pytest.fixture(scope="module")
def alone(train: Train) -> Path:
    return train(1, stage=0)


@pytest.fixture(scope="module")
def sharded(train: Train) -> Path:
    return train(2, stage=3)


def evaluated(run: Path, digits: Path, *more: str) -> dict[str, Any]:
    assert evaluate_door([str(run), "--data", str(digits), *more]) == ExitCode.FINISHED
    content: dict[str, Any] = json.loads((run / "evaluation/digits-val.json").read_text())
    return content


def in_training(run: Path) -> dict[str, Any]:
    """The last evaluation of the average, which is what is handed off."""
    return read_metrics(run / "metrics.jsonl", "eval_average")[-1]


@pytest.mark.parametrize("run", ["alone", "sharded"])
def test_the_evaluation_of_a_handoff_equals_that_of_the_training_exactly(
    run: str, digits: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(run)
    found, expected = evaluated(folder, digits), in_training(folder)
    assert [found[name] for name in TOTALS] == [expected[name] for name in TOTALS]
    assert json.loads((folder / "summary.json").read_text())["handoff_top1"] == expected["top1"]
    assert 20 < expected["top1"] < 100, "a network that learned something, and makes mistakes"


def test_the_handoff_of_two_ranks_at_zero_3_is_that_of_one_rank(alone: Path, sharded: Path) -> None:
    one, two = (load_file(run / "handoff/model.safetensors") for run in (alone, sharded))
    assert one.keys() == two.keys()
    worst = max(((one[n] - two[n]).abs().max().item(), n) for n in one)
    print(worst, sum(torch_equal(one[n], two[n]) for n in one), len(one))
    a, b = (json.loads((run / "handoff/config.json").read_text()) for run in (alone, sharded))
    print([(k, a[k] == b[k]) for k in a])


def torch_equal(a, b):
    return bool((a == b).all())


def test_trained_in_bf16(train: Train, digits: Path) -> None:
    run = train(1, stage=1, deepspeed__bf16__enabled="true")
    exp = in_training(run)
    print({k: exp[k] for k in TOTALS})
    for p in ("bf16", "fp32"):
        f = evaluated(run, digits, "--precision", p)
        print(p, {k: f[k] for k in TOTALS})
