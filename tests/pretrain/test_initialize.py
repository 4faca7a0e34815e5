"""Beginning with a hand-off: which weights come over, which are new, and what is refused."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from models import LaViT, create_model
from pretrain.checkpoints.optimizer_shards import OptimizerShards
from pretrain.engine.deepspeed_config import resolve_for
from pretrain.engine.engine import build_engine, build_model
from pretrain.handoff.folder import CONFIG, read_handoff
from pretrain.handoff.initialize import begin, share_weights
from pretrain.outcome import UserError
from pretrain.recipe import Recipe, recipe_differences, validate_recipe
from pretrain.run_folder import RunFolder
from tests.pretrain.handoffs import SMALL, hand_off
from tests.pretrain.ranks import run_ranks
from tests.pretrain.test_equality import BATCH, whole_weights, zero

INPUT = {"path": "data/x", "image_size": 32}
KNOWN = ["n01", "n02", "n03", "n04", "n05"]


@pytest.fixture(scope="module")
def handoff(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained network, as far as can be seen: every weight is its own."""
    return write(tmp_path_factory.mktemp("source") / "handoff")


def write(folder: Path, class_ids: list[str] | None = KNOWN, seed: int = 7, lost: str = "", **content: Any) -> Path:
    torch.manual_seed(seed)
    model = create_model("lavit_micro", num_classes=5, image_size=32, **SMALL)
    weights = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    model.load_state_dict(weights)
    if lost:
        module, name = lost.split(".")
        setattr(model.get_submodule(module), name, None)
    return hand_off(
        folder, model, class_ids=class_ids, weights="average", recipe={"name": "source"}, **content,
        dataset={"name": "x", "fingerprint": "there", "samples": 100},
    )  # fmt: skip


def recipe(handoff: Path | str, size: int = 32, **fields: Any) -> Recipe:
    overrides = SMALL | fields.pop("overrides", {})
    return validate_recipe(
        {
            "name": "tuned", "data": INPUT | {"image_size": size},
            "model": {"name": "lavit_micro", "overrides": {"drop_path": 0.3, **overrides}},
            "initialize_from": {"handoff": str(handoff), **fields},
            "optimizer": {"lr": 1e-3}, "schedule": {"epochs": 1},
        },
        "here",
    )  # fmt: skip


def started(folder: Path, recipe: Recipe, class_ids: list[str], fingerprint: str = "here") -> tuple[LaViT, Any]:
    """The first start of a run in ``folder``, as far as its weights go."""
    model = build_model(recipe, len(class_ids))
    data: Any = SimpleNamespace(class_ids=class_ids, fingerprint=fingerprint)
    return model, begin(RunFolder(folder), model, recipe, data)


def test_the_trunk_comes_over_and_rows_of_known_classes_stay_theirs(handoff: Path, tmp_path: Path) -> None:
    chosen = recipe(handoff, head_init_scale=0.5, overrides={"attention_kernel": "triton"})  # removed, and ignored
    model, beginning = started(tmp_path, chosen, ["n04", "n99", "n02"])
    weights, fresh = read_handoff(handoff)[1], build_model(chosen, 3)
    for name, tensor in model.state_dict().items():
        if not name.startswith("head."):
            assert torch.equal(tensor, weights[name]), name
    assert torch.equal(model.head.weight[[0, 2]], weights["head.weight"][[3, 1]])
    assert torch.equal(model.head.bias[[0, 2]], weights["head.bias"][[3, 1]])
    assert torch.equal(model.head.weight[1], 0.5 * fresh.head.weight[1])
    assert model.config.drop_path == 0.3
    reported = "\n".join(beginning.notes)
    assert "rows of 2 classes are reused, of 5 there; 1 are new, their fresh weights times 0.5" in reported
    assert "average weights of source, 1,000 images of x" in reported


@pytest.mark.parametrize(
    ("here", "there", "fingerprint", "expected"),
    [
        (list(reversed(KNOWN)), KNOWN, "here", ([4, 3, 2, 1, 0], "rows of all 5 classes are reused")),
        (["a", "b"], KNOWN, "here", ([], "a new head .2 classes here, 5 there, none in common")),
        (["0", "1"], list("01234"), "here", ([], "a new head .*only numbers")),
        (list("01234"), list("01234"), "here", ([], "a new head .*only numbers")),
        (list("01234"), list("01234"), "there", ([0, 1, 2, 3, 4], "all 5")),
        (KNOWN, None, "here", ([], "a new head .*has no class ids")),
    ],
)
def test_classes_are_matched_by_what_their_ids_mean(
    here: list[str], there: list[str] | None, fingerprint: str, expected: tuple[list[int], str], tmp_path: Path
) -> None:
    rows, says = expected
    source = write(tmp_path / "handoff", there)
    chosen = recipe(source)
    model, beginning = started(tmp_path / "run", chosen, here, fingerprint)
    head = read_handoff(source)[1]["head.weight"][rows] if rows else build_model(chosen, len(here)).head.weight
    assert torch.equal(model.head.weight, head)
    assert any(re.search(says, note) for note in beginning.notes)


def test_another_normalization_than_that_of_the_weights_is_reported(handoff: Path, tmp_path: Path) -> None:
    chosen = recipe(handoff)
    data = chosen.data.model_copy(update={"mean": (0.5, 0.5, 0.5)})
    _, beginning = started(tmp_path, chosen.model_copy(update={"data": data}), KNOWN)
    assert [note for note in beginning.notes if note.startswith("WARNING")] == [
        "WARNING initialized: the hand-off was trained with mean (0.485, 0.456, 0.406), this recipe has (0.5, 0.5, 0.5)"
    ]


@pytest.mark.parametrize(
    ("lost", "overrides", "message"),
    [
        ("", {"widths": [16, 32, 32, 64]}, "widths is .* there and .* here"),
        ("", {"pool": "mean"}, "pool is .* there and .* here"),
        ("", {"depths": [1, 1, 3, 1]}, "depths is .* there and .* here"),
        ("head.bias", {}, "lacks weights that its config names: .*head.bias"),
        ("norm.weight", {}, "lacks weights that its config names: .*norm.weight"),
    ],
)
def test_a_handoff_of_another_network_or_without_a_tensor_is_refused_in_one_line(
    lost: str, overrides: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        started(tmp_path / "run", recipe(write(tmp_path / "handoff", lost=lost), overrides=overrides), KNOWN)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_run_is_not_continued_from_another_handoff(handoff: Path, tmp_path: Path, checkpoint: bool) -> None:
    run, other = tmp_path / "run", write(tmp_path / "other", seed=8)
    _, first = started(run, recipe(handoff), KNOWN)
    RunFolder(run).write_description(recipe(handoff), {}, {"dataset": {}, "initialized_from": first.origin})
    if checkpoint:
        (run / "checkpoints/step-00000001").mkdir()
    with pytest.raises(UserError, match=r"holds other weights .* than this run was started from"):
        started(run, recipe(other), KNOWN)
    moved = shutil.copytree(handoff, tmp_path / "moved")
    assert started(run, recipe(moved), KNOWN)[1].initialized is not checkpoint
    changed = recipe(handoff, head_init_scale=0.1).model_dump(mode="json")
    assert recipe_differences(recipe(other).model_dump(mode="json"), changed) == [
        "initialize_from.head_init_scale: 1.0 -> 0.1"
    ]
    without = {**changed, "initialize_from": None}
    assert recipe_differences(without, changed)[0].startswith("initialize_from: None -> ")


def test_the_origin_remembers_where_its_own_weights_came_from(tmp_path: Path) -> None:
    first = write(tmp_path / "first")
    _, beginning = started(tmp_path / "run", recipe(first), KNOWN)
    second = write(tmp_path / "second", initialized_from=beginning.origin)
    _, again = started(tmp_path / "other", recipe(second), KNOWN)
    digest = json.loads((first / CONFIG).read_text())["weights_blake2"]
    assert again.origin["initialized_from"]["weights_blake2"] == digest


def every_rank_begins_with_them(control: dist.ProcessGroup, handoff: str, folder: Path) -> None:
    expected = read_handoff(handoff)[1]
    for stage in range(4):
        chosen = recipe(handoff)
        model = build_model(chosen, 5)
        if dist.get_rank() == 0:
            model, _ = started(folder / str(stage), chosen, KNOWN)
        share_weights(model, torch.device("cpu"))
        config = {"train_batch_size": BATCH, "gradient_clipping": 1.0, "zero_optimization": zero(stage)}
        resolved = resolve_for(chosen, config, world_size=2)
        engine, _ = build_engine(model, chosen, resolved, torch.device("cpu"))
        shards = OptimizerShards(engine, average=True)
        found = whole_weights(engine)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), stage
        for shard in shards.shards:
            whole = expected[shard.name].flatten()[shard.offset : shard.offset + shard.length]
            assert torch.equal(shard.view("parameter", shards.optimizer), whole), (stage, shard.name)
            assert torch.equal(shard.view("average", shards.optimizer), whole), (stage, shard.name)


@pytest.mark.slow
def test_all_ranks_have_them_at_every_stage_though_one_reads_them(handoff: Path, tmp_path: Path) -> None:
    run_ranks(2, every_rank_begins_with_them, str(handoff), tmp_path)
