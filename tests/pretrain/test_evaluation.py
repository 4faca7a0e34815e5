"""The evaluation of a hand-off: its report, on any number of ranks, and what it refuses."""

import io
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from data_pipeline.build import main as build
from data_pipeline.dataset import Dataset
from data_pipeline.loader import EvalLoader
from data_pipeline.manifest import FILE_NAME
from data_pipeline.transforms import InputConfig
from models import create_model
from pretrain.evaluate import main
from pretrain.evaluation.accuracy import Evaluation, Verdicts, evaluate
from pretrain.evaluation.classes import match_classes
from pretrain.evaluation.report import calibration_error, class_table, confusion_of_worst, draw_confusion
from pretrain.handoff.folder import CONFIG, WEIGHTS, load_handoff
from pretrain.outcome import ExitCode, UserError
from tests.pretrain import handoffs
from tests.pretrain.ranks import start_ranks

CPU = torch.device("cpu")
RECIPE = {"name": "r", "evaluation": {"batch_size": 90}, "data": {"max_bad_fraction": 0.01}}


def hand_off(folder: Path, ids: list[str], *, bias: float = 0.0, **fields: Any) -> Path:
    """A small untrained network with distinct scores."""
    torch.manual_seed(0)
    model = create_model("lavit_micro", num_classes=len(ids), image_size=32, **handoffs.SMALL)
    torch.nn.init.normal_(model.head.weight)
    torch.nn.init.normal_(model.head.bias, mean=bias, std=0.3)
    fields = {"class_names": ids, "class_ids": ids, "recipe": RECIPE} | fields
    return handoffs.hand_off(folder, model, **fields)


@pytest.fixture(scope="module")
def handoff(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hand_off(tmp_path_factory.mktemp("handoff") / "h", [str(digit) for digit in range(10)])


def report_of(handoff: Path, data: Path, output: Path, *more: str) -> dict[str, Any]:
    assert main([str(handoff), "--data", str(data), "--output", str(output), *more]) == ExitCode.FINISHED
    content: dict[str, Any] = json.loads(next(output.glob("*.json")).read_text())
    return content


def error_of(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which the command fails."""
    capfd.readouterr()
    assert main([str(argument) for argument in arguments]) == ExitCode.WILL_FAIL_AGAIN
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def scores(handoff: Path, data: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of the val split by torch alone, in batches of another size."""
    model, config = load_handoff(handoff)
    settings = InputConfig(path=data, **config.input.model_dump())
    loader = EvalLoader(Dataset.open(data, "val"), settings, batch_size=60, rank=0, world_size=1, device=CPU)
    with torch.no_grad():
        parts = [(model(batch.images)[batch.valid], batch.labels[batch.valid]) for batch in loader]
    loader.close()
    logits, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    return logits, labels


def test_the_report_equals_plain_torch_and_names_are_printed_without_control_characters(
    handoff: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    found = report_of(shutil.copytree(handoff, tmp_path / "[red]:smile:\x1b[2J"), digits, output)
    assert r"/[red]:smile:\x1b[2J on " in capsys.readouterr().out
    assert [path.name for path in sorted(output.iterdir())] == ["digits-val-confusion.png", "digits-val.json"]
    logits, labels = scores(handoff, digits)
    right = logits.argmax(1) == labels
    five = (logits.argsort(1, descending=True)[:, :5] == labels[:, None]).any(1)
    assert (found["samples"], found["unreadable"], found["not_finite"]) == (360, 0, 0)
    assert found["top1"] == 100 * int(right.sum()) / 360
    assert found["top5"] == 100 * int(five.sum()) / 360
    assert found["loss"] == pytest.approx(F.cross_entropy(logits.double(), labels).item(), abs=1e-6)
    assert 2 < found["top1"] < 90
    samples, correct, taken = (torch.bincount(of, minlength=10) for of in (labels, labels[right], logits.argmax(1)))
    for row, *counts in zip(found["per_class"], samples, correct, taken, strict=True):
        assert [row["samples"], row["correct"], row["predicted"]] == counts
        assert row["samples"] - row["correct"] == sum(row["confused_with"].values())
    assert found["mean_class_top1"] == pytest.approx((100 * correct / samples).mean().item())
    assert found["speed"]["images_per_second"] > 0


def evaluate_on_rank(arguments: list[str]) -> None:
    assert main(arguments) == 0


@pytest.mark.slow
def test_one_two_and_three_ranks_give_the_same_report_to_the_last_bit(
    handoff: Path, digits: Path, tmp_path: Path
) -> None:
    for ranks, size in ((2, "7"), (3, "200")):  # the third rank has only padding
        alone = report_of(handoff, digits, tmp_path / f"alone-{size}", "--batch-size", size)
        assert alone.pop("speed")["ranks"] == 1
        output = tmp_path / str(ranks)
        arguments = [str(handoff), "--data", str(digits), "--output", str(output), "--batch-size", size]
        start_ranks(ranks, evaluate_on_rank, [*arguments, "--local_rank=0"])
        found = json.loads((output / "digits-val.json").read_text())
        assert found.pop("speed")["ranks"] == ranks
        assert found == alone


def test_a_full_gpu_is_an_error_of_one_line(
    handoff: Path, digits: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has 79.19 GiB")
    monkeypatch.setattr("pretrain.evaluate.evaluate", mock.Mock(side_effect=full))
    error = error_of(capfd, handoff, "--data", digits)
    assert "the GPU's memory is full, evaluating (CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0" in error
    assert error.strip().endswith("lower --batch-size")


def totals_of(logits: torch.Tensor, labels: torch.Tensor, size: int) -> Evaluation:
    batches: Any = [
        SimpleNamespace(images=images, labels=of, valid=np.ones(size, bool), sample_ids=np.arange(size))
        for images, of in zip(logits.split(size), labels.split(size), strict=True)
    ]
    result = evaluate(lambda images: images, batches)
    assert result is not None
    return result.total()


def test_the_loss_does_not_depend_on_the_order_of_images_to_the_last_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 10, generator=generator) * torch.logspace(-6, 6, 4000)[:, None]
    labels = torch.randint(10, (4000,), generator=generator)
    order = torch.randperm(4000, generator=generator)
    first = totals_of(logits, labels, 500)
    assert first == totals_of(logits[order], labels[order], 500) == totals_of(logits.flip(0), labels.flip(0), 8)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_an_image_whose_scores_are_not_finite_counts_as_wrong_with_a_warning(broken: float) -> None:
    logits = torch.eye(4).repeat(2, 1)
    logits[5, 1] = broken
    result = totals_of(logits, torch.arange(4).repeat(2), 4)
    assert (result.top1, result.top5, result.not_finite, result.samples) == (87.5, 87.5, 1, 8)
    assert "WARNING scores of 1 images are not finite" in str(result)
    assert "WARNING" not in str(totals_of(torch.eye(4), torch.arange(4), 4))


def verdicts(labels: Any, predicted: Any, confidence: list[float] | None = None) -> Verdicts:
    count = len(labels)
    return Verdicts(
        np.array(labels), np.array(predicted), np.ones(count, bool), np.zeros(count),
        np.array(confidence or [1.0] * count), np.zeros(count, int),
    )  # fmt: skip


def names(count: int) -> Any:
    return SimpleNamespace(num_classes=count, class_ids=[f"n{i}" for i in range(count)],
                           class_names=[f"class {i}" for i in range(count)])  # fmt: skip


def test_the_calibration_error_is_the_mean_gap_between_confidence_and_accuracy_of_15_bins() -> None:
    # Right: 1/15, where the second bin begins; three of four at 0.9; 0.95, in the last bin, as is 1, which is wrong.
    found = calibration_error(
        verdicts([0] * 8, [0, 0, 0, 1, 1, 0, 0, 1], [0.9, 0.9, 0.9, 0.9, 0.42, 1 / 15, 0.95, 1.0])
    )
    gaps = 4 * abs(0.75 - 0.9) + 0.42 + (1 - 1 / 15) + 2 * abs(0.5 - 0.975)
    assert found == pytest.approx(100 * gaps / 8)


def test_each_class_has_its_row_and_its_confusions_by_id() -> None:
    rows = class_table(verdicts([0, 0, 0, 0, 1, 2, 2], [0, 1, 2, 1, 1, 0, 2]), names(4))
    assert [(row["id"], row["samples"], row["correct"], row["predicted"]) for row in rows] == [
        ("n0", 4, 1, 2), ("n1", 1, 1, 3), ("n2", 2, 1, 2), ("n3", 0, 0, 0),
    ]  # fmt: skip
    assert [row["top1"] for row in rows] == [25, 100, 50, None]
    assert list(rows[0]["confused_with"].items()) == [("n1", 2), ("n2", 1)], "the most frequent first"
    assert rows[2]["confused_with"] == {"n0": 1}
    assert class_table(verdicts([99_999], [0]), names(100_000))[-1]["confused_with"] == {"n0": 1}, "80 GB if dense"


def test_the_confusion_matrix_shows_the_worst_classes_and_all_of_their_images() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(60), 30)
    predicted = np.where(rng.random(1800) < 0.01 * labels + 0.3, labels, rng.integers(0, 60, 1800))
    table = class_table(verdicts(labels, predicted), names(60))
    rows, columns, counts = confusion_of_worst(table)
    assert counts.shape == (len(rows), len(columns)) == (20, 20 + 10 + 1)
    assert (counts.sum(1) == 30).all()
    assert columns[-1] == "all others"
    assert (100 * counts.diagonal() / 30).tolist() == pytest.approx(sorted(row["top1"] for row in table)[:20])
    shown = [int(name.split()[1]) for name in columns[:-1]]
    matrix = np.zeros((60, 60), int)
    np.add.at(matrix, (labels, predicted), 1)
    assert (counts[:, :-1] == matrix[shown[:20]][:, shown]).all()
    elsewhere = np.delete(matrix[shown[:20]].sum(0), shown[:20])
    assert counts[:, 20:30].sum(0).tolist() == sorted(elsewhere, reverse=True)[:10]
    with Image.open(io.BytesIO(draw_confusion(table, "costs $5 or $6"))) as image:
        assert image.format == "PNG"
        assert np.asarray(image.convert("L")).std() > 10


def test_without_matplotlib_the_plot_is_left_out_with_a_warning_and_an_older_one_removed(
    handoff: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "digits-val-confusion.png").touch()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report_of(handoff, digits, tmp_path)
    assert "matplotlib is not installed" in capfd.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["digits-val.json"]


def test_an_image_that_cannot_be_read_is_left_out_with_a_warning(
    handoff: Path, digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(digits, tmp_path / "digits")
    dataset = Dataset.open(data, "val")
    with dataset.shard_path(int(dataset.shard[5])).open("r+b") as shard:
        shard.seek(int(dataset.offset[5]) + 20)
        shard.write(b"broken")
    found = report_of(handoff, data, tmp_path / "out")
    assert (found["samples"], found["unreadable"]) == (359, 1)
    printed = capfd.readouterr()
    assert "WARNING 1 images cannot be read" in printed.out
    assert "bad sample" in printed.err


def test_a_model_with_more_classes_is_evaluated_on_those_of_the_data_matched_by_id(
    digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The ids are in another order, among others, at two levels of a hierarchy."""
    ids = ["x", *"9876543210", "y", "z"]
    levels = [0] + [int(digit) // 5 for digit in "9876543210"] + [0, 1]
    wide = hand_off(tmp_path / "h", ids, class_levels=levels, class_names=[f"name of {name}" for name in ids])
    found = report_of(wide, digits, tmp_path / "out")
    logits, labels = scores(wide, digits)
    logits = logits[:, [10 - digit for digit in range(10)]]
    logits[torch.arange(10)[None] // 5 != labels[:, None] // 5] = -torch.inf
    assert found["top1"] == 100 * int((logits.argmax(1) == labels).sum()) / 360
    assert found["loss"] == pytest.approx(F.cross_entropy(logits.double(), labels).item(), abs=1e-6)
    assert found["data"]["classes"] == "by id, 10 of 13"
    printed = capfd.readouterr()
    assert "WARNING the data has 10 of the hand-off's 13 classes" in printed.err
    assert "the same id but another name" in printed.err
    assert "classes of its own level only" in printed.out


def config_of(ids: list[str] | None, class_names: str) -> Any:
    return SimpleNamespace(num_classes=len(class_names), class_ids=ids, class_names=list(class_names))


def data_of(ids: list[str], class_names: str) -> Any:
    return SimpleNamespace(num_classes=len(ids), class_ids=tuple(ids), class_names=tuple(class_names), path="data/x")


def test_classes_are_matched_by_id_with_a_warning_where_anything_differs() -> None:
    ours = config_of(["a", "b"], "AB")
    same = match_classes(ours, data_of(["a", "b"], "AB"))
    assert (same.columns, same.warnings) == (None, ())
    reordered = match_classes(ours, data_of(["b", "a"], "BA"))
    assert reordered.columns == [1, 0]
    assert "another order" in reordered.warnings[0]
    assert "'B' in the hand-off and 'X' here" in match_classes(ours, data_of(["a", "b"], "AX")).warnings[0]
    assert "by position" in match_classes(ours, data_of(["0", "1"], "01"), by_position=True).warnings[0]
    assert match_classes(config_of(None, "AB"), data_of(["a", "b"], "AB")).columns is None


@pytest.mark.parametrize(
    ("ours", "theirs", "by_position", "message"),
    [
        ((["a", "b"], "AB"), (["a", "c"], "AC"), False, "1 of the 2 classes of data/x .*'c'.*--classes-by-position"),
        ((["a", "b"], "AB"), (["a", "b", "c"], "ABC"), False, "are not among the hand-off's 2"),
        ((None, "AB"), (["a", "b"], "BA"), False, "class 0 is 'A' in the hand-off and 'B' in data/x, .* too old"),
        ((None, "ABC"), (["a", "b"], "AB"), False, "3 classes, data/x has 2: the hand-off is too old"),
        ((["a", "b"], "AB"), (["a"], "A"), True, "2 classes, data/x has 1"),
    ],
)
def test_classes_that_do_not_fit_are_refused(ours: Any, theirs: Any, by_position: bool, message: str) -> None:
    with pytest.raises(UserError, match=message):
        match_classes(config_of(*ours), data_of(*theirs), by_position=by_position)


def test_what_cannot_be_evaluated_is_an_error_of_one_line(
    handoff: Path, digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = hand_off(tmp_path / "other", list("abcdefghij"))
    assert "10 of the 10 classes" in error_of(capfd, other, "--data", digits)
    assert "no dataset" in error_of(capfd, handoff, "--data", tmp_path)
    assert "no split 'test'" in error_of(capfd, handoff, "--data", digits, "--split", "test")
    (other / WEIGHTS).write_bytes(b"")
    assert CONFIG in error_of(capfd, other, "--data", digits)
    assert "cannot be written" in error_of(capfd, handoff, "--data", digits, "--output", digits / FILE_NAME)
    (tmp_path / "real.json").write_text(json.dumps([[0]] * 360))
    error = error_of(capfd, handoff, "--data", digits, "--real", tmp_path / "real.json")
    assert "is not named ILSVRC2012_val_" in error
    broken = hand_off(tmp_path / "broken", [str(digit) for digit in range(10)], bias=torch.nan)
    assert "the scores of 360 of 360 images are not finite" in error_of(capfd, broken, "--data", digits)


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of three classes with ImageNet's names; a thirteenth file is no image and is left out."""
    root, rng = tmp_path_factory.mktemp("named"), np.random.default_rng(0)
    for number in range(1, 14):
        path = root / "in" / "abc"[number % 3] / f"ILSVRC2012_val_{number:08d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number == 4:
            path.write_bytes(b"no image")
        else:
            Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).resize((40, 40)).save(path)
    assert build([str(root / "in"), str(root / "val"), "--split", "val", "--workers", "1"]) == 0
    return root / "val"


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_prediction_is_correct_if_it_is_any_of_the_images_real_labels(
    named: Path, tmp_path: Path, ranks: int
) -> None:
    model = hand_off(tmp_path / "h", list("abc"))
    dataset = Dataset.open(named, "val")
    best = scores(model, named)[0].argmax(1).tolist()
    predicted = {int(dataset.sample_name(i).split("val_")[1][:8]): label for i, label in enumerate(best)}
    assert len(predicted) == 12
    assert len(set(predicted.values())) > 1
    labels: list[list[int]] = [[] for _ in range(13)]
    for number in (1, 2, 3):
        labels[number - 1] = sorted({0, predicted[number]})
    for number in (5, 6):
        labels[number - 1] = [label for label in range(3) if label != predicted[number]]
    (tmp_path / "real.json").write_text(json.dumps(labels))
    arguments = [str(model), "--data", str(named), "--output", str(tmp_path / "out"), "--batch-size", "2"]
    start_ranks(ranks, evaluate_on_rank, [*arguments, "--real", str(tmp_path / "real.json"), "--local_rank=0"])
    found = json.loads((tmp_path / "out/val-val.json").read_text())
    assert found["real"] == {"top1": 60.0, "samples": 5, "without": 7}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[0]]", "labels of 1 images, but .* was built from 13"),
        (json.dumps([[0], [3]] + [[0]] * 11), "one list of labels from 0 to 2 per image: image 2 has 3: "),
        (json.dumps([[True]] + [[0]] * 12), "image 1 has True: "),
        (json.dumps([0] * 13), "not a list with one list of labels .* per image: image 1 has 0: "),
        ("{}", "not a list"),
        ("[[0", "not a list with .*Invalid JSON"),
        (json.dumps([[]] * 13), "no label for any image"),
    ],
)
def test_a_file_of_labels_that_does_not_fit_is_refused(
    named: Path, tmp_path: Path, content: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "real.json").write_text(content)
    model = hand_off(tmp_path / "h", list("abc"))
    assert re.search(message, error_of(capfd, model, "--data", named, "--real", tmp_path / "real.json"))
