"""From half of the classes to all of them, at a larger image size: handed-off weights are ahead of fresh ones."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.build import main as build
from data_pipeline.sources.digits import Digits
from pretrain.check import check_recipe_here
from pretrain.metrics import read_metrics
from pretrain.outcome import ExitCode, UserError
from pretrain.recipe import load_recipe
from pretrain.run_folder import RunFolder
from tests.system.launching import INJECT, RECIPE, changes, trained

NETWORK = (
    "{depths: [1, 1, 2, 1], vanilla_blocks: [1, 1, 1, 1], widths: [32, 48, 64, 80], heads: [1, 2, 2, 2], "
    "patch_size: 2, drop_path: 0.0}"
)
COMMON = {"model__overrides": NETWORK, "model__activation_checkpointing": "none", "evaluation__every_epochs": 100}
PICTURES_OF_EACH = 5
pytestmark = pytest.mark.slow


def write_digits(folder: Path, classes: range, most: int = 1000) -> Path:
    """A dataset of some digits, through the door for folders: ``most`` of each to train on, all others' to evaluate."""
    for split in ("train", "val"):
        taken = dict.fromkeys(classes, 0)
        for image in Digits().images(split):
            digit = int(image.class_id)
            if digit in classes and (split == "val" or taken[digit] < most):
                taken[digit] += 1
                place = folder / split / f"digit-{digit}"
                place.mkdir(parents=True, exist_ok=True)
                assert isinstance(image.data, bytes)
                (place / f"{image.name}.jpg").write_bytes(image.data)
        assert build([str(folder / split), str(folder / "shards"), "--split", split, "--workers", "1"]) == 0
    return folder / "shards"


def tuning(course: Path, name: str, **fields: Any) -> list[str]:
    """Arguments of a run on a few of all ten; ``fields`` are its changes to the budget that all of them have."""
    return changes(
        name=name, data__path=course / "few/shards", data__image_size=48, schedule__epochs=20,
        schedule__warmup_epochs=1.5, deepspeed__train_batch_size=25, log_every_steps=1, **COMMON, **fields,
    )  # fmt: skip


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the data of all ten digits, and what was learned from half of them: ``half/handoff``."""
    folder = tmp_path_factory.mktemp("course")
    half = write_digits(folder / "half", range(5))
    write_digits(folder / "few", range(10), PICTURES_OF_EACH)
    augment = "{affine: {degrees: 15, translate: 0.2, scale: [0.8, 1.8]}}"
    fields = changes(name="half", data__path=half, data__augment=augment, schedule__epochs=14,
                     schedule__warmup_epochs=1, deepspeed__train_batch_size=32, **COMMON)  # fmt: skip
    code, output = trained(folder, *fields)
    assert code == ExitCode.FINISHED, output
    return folder


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def probing(course: Path) -> dict[str, Any]:
    return {"probes__path": course / "few/shards", "probes__every_epochs": 5}


@pytest.fixture(scope="module")
def tuned(course: Path) -> tuple[Path, str]:
    """The run that begins with the handed-off weights, and its output; treat as read-only."""
    words = tuning(course, "tuned", initialize_from__handoff=course / "half/handoff", **probing(course))
    code, output = trained(course, *words)
    assert code == ExitCode.FINISHED, output
    return course / "tuned", output


def test_with_the_same_budget_handed_off_weights_are_ahead_of_fresh_ones(course: Path, tuned: tuple[Path, str]) -> None:
    code, output = trained(course, *tuning(course, "scratch"))
    assert code == ExitCode.FINISHED, output
    top1, scratch = (read_json(run / "summary.json")["top1"] for run in (tuned[0], course / "scratch"))
    assert top1 > scratch + 5
    assert "the head's rows of 5 classes are reused, of 5 there; 5 are new" in tuned[1]
    assert "tensors of the token grids resampled, 32 x 32 -> 48 x 48" in tuned[1]


def test_the_handoff_tells_what_training_began_with(course: Path, tuned: tuple[Path, str]) -> None:
    begun, run = read_json(course / "half/handoff/config.json")["weights_blake2"], tuned[0]
    assert read_json(run / "handoff/config.json")["initialized_from"]["weights_blake2"] == begun
    row = f"| initialized from | raw weights of half, 10,080 images of shards, digest {begun} |"
    assert row in (run / "handoff/README.md").read_text()


def test_a_crashed_run_goes_on_without_the_handoff_and_probes_where_the_untouched_one_did(
    course: Path, tuned: tuple[Path, str]
) -> None:
    handoff, gone = course / "half/handoff", course / "gone"
    arguments = tuning(course, "tuned", initialize_from__handoff=handoff, checkpoint__every_steps=10, **probing(course))
    folder = course / "crashed"
    code, output = trained(folder, *arguments, program=(INJECT, "raise=25"))
    assert code == ExitCode.RETRY, output
    handoff.rename(gone)
    try:
        code, output = trained(folder, *arguments)
    finally:
        gone.rename(handoff)
    assert code == ExitCode.FINISHED, output
    assert "resuming" in output
    assert "initialized" not in output
    crashed, untouched = folder / "tuned", tuned[0]
    losses, expected = ([row["loss"] for row in rows(run, "train")] for run in (crashed, untouched))
    assert losses == expected
    probes, expected = (rows(run, "probe") for run in (crashed, untouched))
    assert probes == expected
    assert [row["samples_seen"] for row in probes] == [250, 500, 750, 1000]
    origins = [read_json(run / "environment.json")["initialized_from"] for run in (crashed, untouched)]
    assert origins[0] == origins[1] is not None


def rows(run: Path, kind: str) -> list[dict[str, Any]]:
    found = read_metrics(run / "metrics.jsonl", kind)
    return [{name: value for name, value in row.items() if name not in ("seconds", "time")} for row in found]


def test_a_missing_handoff_is_told_before_anything_is_started_but_not_missed_by_a_run_under_way(
    course: Path, tuned: tuple[Path, str]
) -> None:
    fields = tuning(course, "new", initialize_from__handoff=course / "none")[1::2]
    recipe = load_recipe(RECIPE, fields)
    with pytest.raises(UserError, match="is not a finished hand-off"):
        check_recipe_here(recipe, RunFolder(course / "new"))
    check_recipe_here(recipe, RunFolder(tuned[0]))
