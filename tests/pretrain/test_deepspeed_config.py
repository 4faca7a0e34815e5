import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.deepspeed_config import read_deepspeed_config, resolve_deepspeed_config
from pretrain.outcome import UserError

BASE = {"train_batch_size": 64, "gradient_clipping": 1.0, "zero_optimization": {"stage": 1}}


def read(tmp_path: Path, content: dict[str, Any], overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    return read_deepspeed_config(path, overrides or {})


def refusal(tmp_path: Path, content: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        read(tmp_path, content)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_recipes_section_is_laid_over_the_file_key_by_key(tmp_path: Path) -> None:
    content = BASE | {"zero_optimization": {"stage": 1, "overlap_comm": False}}
    merged = read(tmp_path, content, {"zero_optimization": {"stage": 2}, "train_batch_size": 8})
    assert merged["zero_optimization"] == {"stage": 2, "overlap_comm": False}
    assert merged["train_batch_size"] == 8


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"optimizer": {"type": "Adam"}}, "recipe"),
        ({"scheduler": {}}, "recipe"),
        ({"amp": {"enabled": True}}, "removed"),
        ({"gradient_cliping": 1.0}, "did you mean gradient_clipping"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization"),
        ({"zero_optimization": {"stag": 1}}, "stag"),
        ({"bf16": {"enabeld": True}}, "bf16"),
        ({"bf16": True}, "bf16 is a section"),
        ({"bf16": {"enabled": True, "check_grad_overflow": False}}, "check_grad_overflow"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer"),
    ],
)
def test_keys_that_would_be_ignored_are_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    assert says in refusal(tmp_path, BASE | change)


def test_clipping_must_be_written_down(tmp_path: Path) -> None:
    assert "gradient_clipping" in refusal(tmp_path, {"train_batch_size": 64})


def test_a_file_that_is_missing_or_no_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such DeepSpeed configuration"):
        read_deepspeed_config(tmp_path / "none.json", {})
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="not readable as JSON"):
        read_deepspeed_config(tmp_path / "bad.json", {})


@pytest.mark.parametrize(
    ("world", "limit", "micro", "accumulation"), [(1, "auto", 64, 1), (2, 8, 8, 4), (2, 12, 8, 4), (4, 100, 16, 1)]
)
def test_the_global_batch_stays_whatever_the_ranks(world: int, limit: Any, micro: int, accumulation: int) -> None:
    config = BASE | {"train_micro_batch_size_per_gpu": limit}
    batch = resolve_deepspeed_config(config, world_size=world, has_bf16_gpu=False).batch
    assert (batch.micro_batch, batch.accumulation) == (micro, accumulation)
    assert batch.micro_batch * batch.accumulation * world == 64


def test_ranks_that_do_not_divide_the_batch_are_refused_with_a_way_out() -> None:
    with pytest.raises(UserError, match=r"64 .* 3 ranks: start 2 or 4 ranks"):
        resolve_deepspeed_config(BASE, world_size=3, has_bf16_gpu=False)


def test_micro_batches_are_even_where_images_are_mixed_in_pairs() -> None:
    config = BASE | {"train_batch_size": 36, "train_micro_batch_size_per_gpu": 10}
    assert resolve_deepspeed_config(config, world_size=2, has_bf16_gpu=False).batch.micro_batch == 9
    assert resolve_deepspeed_config(config, world_size=2, has_bf16_gpu=False, pairs=True).batch.micro_batch == 6
    with pytest.raises(UserError, match="even micro-batches"):
        resolve_deepspeed_config(BASE | {"train_batch_size": 6}, world_size=2, has_bf16_gpu=False, pairs=True)


def test_accumulation_that_contradicts_the_batch_is_refused() -> None:
    config = BASE | {"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 3}
    with pytest.raises(UserError, match="gradient_accumulation_steps"):
        resolve_deepspeed_config(config, world_size=2, has_bf16_gpu=False)


def test_precision_is_chosen_by_the_device_and_the_reason_is_told() -> None:
    on_gpu = resolve_deepspeed_config(BASE, world_size=1, has_bf16_gpu=True)
    assert (on_gpu.precision, on_gpu.config["bf16"]["enabled"]) == ("bf16", True)
    assert "precision: bf16 (the GPU has it)" in on_gpu.notes
    on_cpu = resolve_deepspeed_config(BASE, world_size=1, has_bf16_gpu=False)
    assert on_cpu.precision == "fp32"
    assert any("no GPU" in note for note in on_cpu.notes)


def test_bf16_at_stage_0_is_refused() -> None:
    config = BASE | {"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}}
    with pytest.raises(UserError, match="stage 0"):
        resolve_deepspeed_config(config, world_size=1, has_bf16_gpu=True)
