"""The demo with a CNN by one ``--set``: killed, resumed on another number of ranks, handed off and evaluated."""

import json
from pathlib import Path

import pytest

from pretrain import convert, evaluate, export
from pretrain.checkpoints.checkpoint import list_checkpoints, read_manifest
from pretrain.metrics import read_metrics
from pretrain.outcome import ExitCode
from tests.system.launching import changes, launched

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
CNN = changes(model="{factory: examples.networks:CNN}")


def test_the_demo_trains_a_cnn_that_is_killed_resumed_on_one_rank_handed_off_and_evaluated(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, shorter = tmp_path / "demo", changes(data__path=digits, schedule__epochs=5, checkpoint__every_steps=20)
    with launched(tmp_path, *CNN, *shorter) as run:
        run.wait_for_steps(folder, 30)
        run.wait_for(lambda: bool(list_checkpoints(folder / "checkpoints")), "a checkpoint")
        run.ranks()[-1].kill()
        run.end()
        run.assert_no_rank_stays()
    for line in (
        "are seeded from (seed, step, micro-batch, rank)",
        "left out, as they are LaViT's",
        "each rank has its",
    ):
        assert line in run.output()
    saved = list_checkpoints(folder / "checkpoints")[0]
    assert (read_manifest(saved)["world_size"], len([*saved.glob("rank-*")])) == (2, 2)
    with launched(tmp_path, *CNN, *shorter, ranks=1) as resumed:
        assert resumed.end() == ExitCode.FINISHED, resumed.output()
    assert f"resuming {folder} at step" in resumed.output()
    assert "1 ranks x 64" in resumed.output()

    trained = read_metrics(folder / "metrics.jsonl", "eval")[-1]
    assert trained["top1"] > 90, "running statistics that are lost would leave it at chance"
    command, conversion = [str(folder), "--data", str(digits)], [str(folder / "handoff"), str(tmp_path / "net.onnx")]
    for refused, arguments in (
        (evaluate, command),
        (export, [str(folder)]),
        (convert, conversion),
        (convert, [conversion[0], str(tmp_path / "net.pt2"), "--image-size", "48"]),
    ):
        assert refused.main(arguments) == ExitCode.WILL_FAIL_AGAIN
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "--trust-factory" in error
    assert convert.main([*conversion, "--trust-factory"]) == ExitCode.FINISHED
    card = (folder / "handoff/README.md").read_text()
    assert r"examples.networks\:CNN" in card
    assert not [word for word in ("LaViT", "lavit\n", "trust_remote_code", "diagonality") if word in card]
    assert not list((folder / "handoff").glob("*.py"))
    for _ in range(2):  # as the run itself has handed it off, and as the command does
        assert evaluate.main([*command, "--trust-factory"]) == ExitCode.FINISHED
        found = json.loads((folder / "evaluation/digits-val.json").read_text())
        assert {name: found[name] for name in ("top1", "loss")} == {name: trained[name] for name in ("top1", "loss")}
        assert export.main([str(folder), "--trust-factory"]) == ExitCode.FINISHED
