"""The evaluation of a hand-off: its numbers, on any number of ranks, and what it refuses."""

import io
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from data_pipeline.build import main as build
from data_pipeline.dataset import Dataset
from data_pipeline.loader import EvalLoader
from data_pipeline.manifest import FILE_NAME
from models import create_model
from pretrain.evaluate import main as door
from pretrain.evaluation.accuracy import Evaluation, evaluate
from pretrain.evaluation.class_match import match_classes
from pretrain.evaluation.confusion_picture import confusion_of_worst, draw_confusion
from pretrain.evaluation.report import Verdicts, calibration, class_table
from pretrain.handoff.folder import CONFIG, WEIGHTS, load_handoff, write_handoff
from pretrain.outcome import ExitCode, UserError
from tests.data_pipeline.images import jpeg
from tests.pretrain.ranks import start_ranks

CPU = torch.device("cpu")


def hand_off(folder: Path, class_ids: list[str], *, added: float = 0.0, **fields: Any) -> Path:
    """A small network that was never trained, but whose scores differ; to each of them something may be added."""
    torch.manual_seed(0)
    model = create_model("lavit_micro", num_classes=len(class_ids), image_size=32, depths=[1, 1, 1, 1],
                         widths=[16, 32, 32, 32], heads=[1, 2, 2, 2])  # fmt: skip
    torch.nn.init.normal_(model.head.weight)
    torch.nn.init.normal_(model.head.bias, mean=added, std=0.3)
    content: dict[str, Any] = {
        "architecture": model.config.to_dict(), "num_classes": len(class_ids),
        "class_names": class_ids, "class_ids": class_ids,
        "input": {"path": "x", "image_size": 32, "max_bad_fraction": 0.01}, "weights": "raw",
        "dataset": {"name": "x", "fingerprint": "f", "samples": 1},
        "recipe": {"name": "r", "evaluation": {"batch_size": 90}},
        "metrics": {"top1": 50.0, "top5": 100.0, "loss": 1.0}, "samples_seen": 1,
    }  # fmt: skip
    write_handoff(folder, model.state_dict(), content | fields, "")
    return folder


@pytest.fixture(scope="module")
def handoff(tmp_path_factory: pytest.TempPathFactory) -> Path:
    digits = [str(digit) for digit in range(10)]
    return hand_off(tmp_path_factory.mktemp("handoff") / "h", digits)


def examined(handoff: Path, data: Path, output: Path, *more: str) -> dict[str, Any]:
    """What the door writes about a hand-off."""
    assert door([str(handoff), "--data", str(data), "--output", str(output), *more]) == ExitCode.FINISHED
    content: dict[str, Any] = json.loads(next(output.glob("*.json")).read_text())
    return content


def refusal(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The line with which the door refuses."""
    capfd.readouterr()
    assert door([str(argument) for argument in arguments]) == ExitCode.WILL_FAIL_AGAIN
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def scores(handoff: Path, data: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of the val split by torch alone, picture by picture in another batch size."""
    model, config = load_handoff(handoff)
    loader = EvalLoader(Dataset.open(data, "val"), config.input, batch_size=60, rank=0, world_size=1, device=CPU)
    with torch.no_grad():
        parts = [(model(batch.images)[batch.valid], batch.labels[batch.valid]) for batch in loader]
    loader.close()
    logits, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    return logits, labels


# --- the numbers -----------------------------------------------------------------------------------------------------


def test_the_totals_are_those_of_plain_torch(handoff: Path, digits: Path, tmp_path: Path) -> None:
    found = examined(handoff, digits, tmp_path)
    logits, labels = scores(handoff, digits)
    right = logits.argmax(1) == labels
    assert (found["samples"], found["unreadable"], found["not_finite"]) == (360, 0, 0)
    assert found["top1"] == pytest.approx(100 * right.double().mean().item(), abs=1e-12)
    five = (logits.argsort(1, descending=True)[:, :5] == labels[:, None]).any(1)
    assert found["top5"] == pytest.approx(100 * five.double().mean().item(), abs=1e-12)
    assert found["loss"] == pytest.approx(F.cross_entropy(logits.double(), labels).item(), abs=1e-6)
    assert 2 < found["top1"] < 90
    by_class = [right[labels == label].double().mean().item() for label in range(10)]
    assert [row["top1"] for row in found["per_class"]] == pytest.approx([100 * share for share in by_class])
    assert found["mean_class_top1"] == pytest.approx(100 * np.mean(by_class))
    assert sum(row["samples"] for row in found["per_class"]) == 360
    assert sum(row["predicted"] for row in found["per_class"]) == 360
    assert found["speed"]["images_per_second"] > 0


def door_of_a_rank(arguments: list[str]) -> None:
    from pretrain.evaluate import main

    assert main(arguments) == 0


@pytest.mark.slow
def test_one_two_and_three_ranks_give_the_same_report_to_the_last_bit(
    handoff: Path, digits: Path, tmp_path: Path
) -> None:
    for ranks, size in ((2, "7"), (3, "200")):  # the third has nothing but padding
        alone = examined(handoff, digits, tmp_path / f"alone-{size}", "--batch-size", size)
        assert alone.pop("speed")["ranks"] == 1
        output = tmp_path / str(ranks)
        arguments = [str(handoff), "--data", str(digits), "--output", str(output), "--batch-size", size]
        start_ranks(ranks, door_of_a_rank, [*arguments, "--local_rank=0"])
        found = json.loads((output / "digits-val.json").read_text())
        assert found.pop("speed")["ranks"] == ranks
        assert found == alone


def test_a_full_gpu_is_told_in_one_line(
    handoff: Path, digits: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def examine(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has 79.19 GiB")

    monkeypatch.setattr("pretrain.evaluate.examine", examine)
    told = refusal(capfd, handoff, "--data", digits)
    assert "the GPU's memory is full, evaluating (CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0" in told
    assert told.strip().endswith("lower --batch-size")


def totals_of(logits: torch.Tensor, labels: torch.Tensor, size: int) -> Evaluation:
    """What the loop makes of logits that are given batch by batch."""
    rows = range(0, len(labels), size)
    batches: Any = [
        SimpleNamespace(images=logits[i : i + size], labels=labels[i : i + size], valid=np.ones(size, bool))
        for i in rows
    ]
    result = evaluate(lambda images: images, batches)
    assert result is not None
    return result


def test_the_loss_does_not_depend_on_the_order_of_pictures_to_the_last_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 10, generator=generator) * torch.logspace(-6, 6, 4000)[:, None]
    labels = torch.randint(10, (4000,), generator=generator)
    turned = torch.randperm(4000, generator=generator)
    first = totals_of(logits, labels, 500)
    assert first == totals_of(logits[turned], labels[turned], 500) == totals_of(logits.flip(0), labels.flip(0), 8)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_picture_whose_scores_are_not_finite_counts_as_wrong_and_is_told(broken: float) -> None:
    logits = torch.eye(4).repeat(2, 1)
    logits[5, 1] = broken
    result = totals_of(logits, torch.arange(4).repeat(2), 4)
    assert (result.top1, result.top5, result.not_finite, result.samples) == (87.5, 87.5, 1, 8)
    assert "WARNING scores of 1 pictures are not finite" in str(result)
    assert "WARNING" not in str(totals_of(torch.eye(4), torch.arange(4), 4))


def verdicts(labels: list[int], predicted: list[int], confidence: list[float] | None = None) -> Verdicts:
    count = len(labels)
    return Verdicts(
        np.array(labels), np.array(predicted), np.ones(count, bool),
        np.array(confidence or [1.0] * count), np.zeros(count, int),
    )  # fmt: skip


def test_the_calibration_error_is_the_mean_gap_between_confidence_and_accuracy_of_15_bins() -> None:
    # Four images at 0.9, three of them right; one at 0.42, wrong; one at 1/15, where the second bin begins, right.
    found = calibration(verdicts([0] * 6, [0, 0, 0, 1, 1, 0], [0.9, 0.9, 0.9, 0.9, 0.42, 1 / 15]))
    expected = (4 * abs(0.75 - 0.9) + 0.42 + (1 - 1 / 15)) / 6
    assert found["expected_calibration_error"] == pytest.approx(100 * expected)
    table = found["table"]
    assert len(table) == 15
    assert [(row["up_to"], row["samples"]) for row in table if row["samples"]] == [
        (pytest.approx(2 / 15), 1), (pytest.approx(7 / 15), 1), (pytest.approx(14 / 15), 4),
    ]  # fmt: skip
    assert calibration(verdicts([0, 1], [0, 1]))["expected_calibration_error"] == 0


def names(count: int) -> Any:
    return SimpleNamespace(num_classes=count, class_ids=[f"n{i}" for i in range(count)],
                           class_names=[f"class {i}" for i in range(count)])  # fmt: skip


def test_each_class_has_its_row_and_its_confusions_by_id() -> None:
    rows = class_table(verdicts([0, 0, 0, 0, 1, 2, 2], [0, 1, 2, 1, 1, 0, 2]), names(4))
    assert [(row["id"], row["samples"], row["correct"], row["predicted"]) for row in rows] == [
        ("n0", 4, 1, 2), ("n1", 1, 1, 3), ("n2", 2, 1, 2), ("n3", 0, 0, 0),
    ]  # fmt: skip
    assert [row["top1"] for row in rows] == [25, 100, 50, None]
    assert list(rows[0]["confused_with"].items()) == [("n1", 2), ("n2", 1)], "the most frequent first"
    assert rows[2]["confused_with"] == {"n0": 1}


def test_the_picture_shows_the_worst_classes_and_loses_no_count() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(60), 30)
    predicted = np.where(rng.random(1800) < 0.01 * labels + 0.3, labels, rng.integers(0, 60, 1800))
    table = class_table(verdicts(labels.tolist(), predicted.tolist()), names(60))
    rows, columns, counts = confusion_of_worst(table)
    assert (len(rows), len(columns)) == (20, 20 + 10 + 1)
    assert (counts.sum(1) == 30).all()
    assert columns[-1] == "all others"
    elsewhere = {name: 0 for name in names(60).class_names if name not in columns[:20]}
    for row in table:
        if any(label.startswith(f"{row['name']} (") for label in rows):
            for other, count in row["confused_with"].items():
                name = names(60).class_names[int(other[1:])]
                elsewhere |= {name: elsewhere[name] + count} if name in elsewhere else {}
    assert counts[:, 20:30].sum(0).tolist() == sorted(elsewhere.values(), reverse=True)[:10]
    worst = sorted(row["top1"] for row in table)[:20]
    assert (100 * counts.diagonal() / 30).tolist() == pytest.approx(worst)
    with Image.open(io.BytesIO(draw_confusion(table, "costs $5 or $6"))) as picture:
        assert picture.format == "PNG"
        assert np.asarray(picture.convert("L")).std() > 10


def test_without_matplotlib_the_report_is_written_and_the_picture_missed_aloud(
    handoff: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    examined(handoff, digits, tmp_path)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["digits-val-confusion.png", "digits-val.json"]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    examined(handoff, digits, tmp_path)
    assert "matplotlib is not installed" in capfd.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["digits-val.json"]


def test_a_picture_that_cannot_be_read_is_left_out_and_told(
    handoff: Path, digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(digits, tmp_path / "digits")
    dataset = Dataset.open(data, "val")
    with dataset.shard_path(int(dataset.shard[5])).open("r+b") as shard:
        shard.seek(int(dataset.offset[5]) + 20)
        shard.write(b"broken")
    found = examined(handoff, data, tmp_path / "out")
    assert (found["samples"], found["unreadable"]) == (359, 1)
    said = capfd.readouterr()
    assert "WARNING 1 images cannot be read" in said.out
    assert "bad sample" in said.err


# --- which class is which --------------------------------------------------------------------------------------------


def test_a_model_of_more_classes_is_evaluated_on_the_ones_that_the_data_has_found_by_id(
    digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ids stand in another order, between others, at two levels of a hierarchy."""
    ids = ["x", *"9876543210", "y", "z"]
    levels = [0] + [int(digit) // 5 for digit in "9876543210"] + [0, 1]
    wide = hand_off(tmp_path / "h", ids, class_levels=levels, class_names=[f"name of {name}" for name in ids])
    found = examined(wide, digits, tmp_path / "out")
    logits, labels = scores(wide, digits)
    logits = logits[:, [10 - digit for digit in range(10)]]
    logits[torch.arange(10)[None] // 5 != labels[:, None] // 5] = -torch.inf
    assert found["top1"] == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item(), abs=1e-12)
    assert found["loss"] == pytest.approx(F.cross_entropy(logits.double(), labels).item(), abs=1e-6)
    assert found["data"]["classes"] == "by id, 10 of 13"
    said = capfd.readouterr()
    assert "WARNING the data has 10 of the hand-off's 13 classes" in said.err
    assert "the same id but another name" in said.err
    assert "classes of its own level only" in said.out


def config_of(ids: list[str] | None, class_names: str) -> Any:
    return SimpleNamespace(num_classes=len(class_names), class_ids=ids, class_names=list(class_names))


def data_of(ids: list[str], class_names: str) -> Any:
    return SimpleNamespace(num_classes=len(ids), class_ids=tuple(ids), class_names=tuple(class_names), path="data/x")


def test_classes_are_matched_by_id_aloud_where_anything_differs() -> None:
    assert match_classes(config_of(["a", "b"], "AB"), data_of(["a", "b"], "AB")).columns is None
    assert not match_classes(config_of(["a", "b"], "AB"), data_of(["a", "b"], "AB")).warnings
    turned = match_classes(config_of(["a", "b"], "AB"), data_of(["b", "a"], "BA"))
    assert turned.columns == (1, 0)
    assert "another order" in turned.warnings[0]
    (renamed,) = match_classes(config_of(["a", "b"], "AB"), data_of(["a", "b"], "AX")).warnings
    assert "'B' in the hand-off and 'X' here" in renamed
    (forced,) = match_classes(config_of(["a", "b"], "AB"), data_of(["0", "1"], "01"), by_position=True).warnings
    assert "by position" in forced
    assert match_classes(config_of(None, "AB"), data_of(["a", "b"], "AB")).columns is None


@pytest.mark.parametrize(
    ("ours", "theirs", "by_position", "said"),
    [
        ((["a", "b"], "AB"), (["a", "c"], "AC"), False, "1 of the 2 classes of data/x are none .* 'c'"),
        ((["a", "b"], "AB"), (["0", "1"], "01"), False, "--classes-by-position"),
        ((["a", "b"], "AB"), (["a", "b", "c"], "ABC"), False, "none of the hand-off's 2"),
        ((None, "AB"), (["a", "b"], "BA"), False, r"another order \(class 0: 'A' in the hand-off, 'B' here\)"),
        ((None, "AB"), (["a", "b"], "AX"), False, "1 classes of data/x are called otherwise"),
        ((None, "ABC"), (["a", "b"], "AB"), False, "3 classes and data/x has 2"),
        ((["a", "b"], "AB"), (["a"], "A"), True, "2 classes and data/x has 1"),
    ],
)
def test_classes_that_do_not_fit_are_refused(ours: Any, theirs: Any, by_position: bool, said: str) -> None:
    with pytest.raises(UserError, match=said):
        match_classes(config_of(*ours), data_of(*theirs), by_position=by_position)


def test_the_door_refuses_other_classes_missing_data_and_damaged_weights_in_one_line(
    handoff: Path, digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = hand_off(tmp_path / "other", list("abcdefghij"))
    assert "10 of the 10 classes" in refusal(capfd, other, "--data", digits)
    assert "no dataset" in refusal(capfd, handoff, "--data", tmp_path)
    assert "no split 'test'" in refusal(capfd, handoff, "--data", digits, "--split", "test")
    (other / WEIGHTS).write_bytes(b"")
    assert CONFIG in refusal(capfd, other, "--data", digits)
    assert "cannot be written" in refusal(capfd, handoff, "--data", digits, "--output", digits / FILE_NAME)


def test_scores_that_are_not_finite_are_refused(
    digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for number, broken in enumerate((torch.nan, torch.inf)):
        folder = hand_off(tmp_path / str(number), [str(digit) for digit in range(10)], added=broken)
        assert "the scores of 360 of 360 pictures are not finite" in refusal(capfd, folder, "--data", digits)


# --- several right labels --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of three classes with ImageNet's names, and one that is none and was left out."""
    root = tmp_path_factory.mktemp("named")
    for number in range(1, 14):
        folder = root / "in" / "abc"[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        content = b"no picture" if number == 4 else jpeg(number, (40, 40))
        (folder / f"ILSVRC2012_val_{number:08d}.JPEG").write_bytes(content)
    assert build([str(root / "in"), str(root / "val"), "--split", "val", "--workers", "1"]) == 0
    return root / "val"


def test_a_prediction_counts_as_right_if_it_is_any_of_the_pictures_real_labels(named: Path, tmp_path: Path) -> None:
    model = hand_off(tmp_path / "h", list("abc"))
    dataset = Dataset.open(named, "val")
    logits, _ = scores(model, named)
    predicted = {int(dataset.sample_name(i).split("val_")[1][:8]): int(logits[i].argmax()) for i in range(len(dataset))}
    assert len(predicted) == 12
    assert len(set(predicted.values())) > 1
    labels: list[list[int]] = [[] for _ in range(13)]
    for number in (1, 2, 3):
        labels[number - 1] = sorted({0, predicted[number]})
    for number in (5, 6):
        labels[number - 1] = [label for label in range(3) if label != predicted[number]]
    (tmp_path / "real.json").write_text(json.dumps(labels))
    found = examined(model, named, tmp_path / "out", "--real", str(tmp_path / "real.json"))
    assert found["real"] == {"top1": 60.0, "samples": 5, "without": 7}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[[0]]", "labels of 1 pictures, but .* was built from 13"),
        (json.dumps([[3]] + [[0]] * 12), "picture 1 has label 3, but the data's classes are 0..2"),
        (json.dumps([[True]] + [[0]] * 12), "picture 1 has label True"),
        (json.dumps([0] * 13), "not a list with one list of labels per picture"),
        ("{}", "not a list"),
        ("[[0", "cannot be read"),
        (json.dumps([[]] * 13), "no label for any picture"),
    ],
)
def test_a_file_of_labels_that_does_not_fit_is_refused(
    named: Path, tmp_path: Path, content: str, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "real.json").write_text(content)
    model = hand_off(tmp_path / "h", list("abc"))
    assert re.search(said, refusal(capfd, model, "--data", named, "--real", tmp_path / "real.json"))


def test_labels_for_pictures_that_have_no_number_in_their_names_are_refused(
    handoff: Path, digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "real.json").write_text(json.dumps([[0]] * 360))
    assert "is not called ILSVRC2012_val_" in refusal(
        capfd, handoff, "--data", digits, "--real", tmp_path / "real.json"
    )
