import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.engine.deepspeed_config import ResolvedDeepSpeed, read_deepspeed_config, resolve_for
from pretrain.outcome import UserError
from pretrain.recipe import load_recipe
from tests.system.launching import RECIPE

BASE = {"train_batch_size": 64, "gradient_clipping": 1.0, "zero_optimization": {"stage": 1}}


def zero(stage: Any, **section: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **section}}


def read(tmp_path: Path, content: dict[str, Any], overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    return read_deepspeed_config(path, overrides or {})


def resolve(config: dict[str, Any], *fields: str, **facts: Any) -> ResolvedDeepSpeed:
    """On two ranks without a GPU, but for these facts; with the demo's recipe and these fields, images not mixed."""
    return resolve_for(load_recipe(RECIPE, ["mixing={}", *fields]), config, **({"world_size": 2} | facts))


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
        *(
            (zero(stage), f"zero_optimization.stage is 0, 1, 2 or 3, got {stage!r}")
            for stage in (4, "auto", True, 1.0, [1])
        ),
        ({"zero_optimization": {"stag": 1}}, "stag"),
        ({"bf16": {"enabeld": True}}, "bf16: unknown key enabeld (did you mean enabled?)"),
        ({"bf16": True}, "bf16 is a section"),
        ({"bf16": {"enabled": True, "check_grad_overflow": False}}, "check_grad_overflow"),
        ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, "checkpoints hold fp32"),
        ({"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}}, "checkpoints hold fp32"),
        ({"fp16": {"enabled": True, "loss_scale": -1}}, "loss_scale"),
        ({"bfloat16": {"enabled": True}}, "write bf16"),
        ({"torch_autocast": {"enabled": True, "dtyp": "bfloat16"}}, "did you mean dtype?"),
        ({"torch_autocast": {"enabled": "auto"}}, "torch_autocast: enabled: must be true or false, got 'auto'"),
        ({"data_types": {"param_dtype": "bf16"}}, "unknown key param_dtype"),
        ({"data_types": {"grad_acum_dtype": "bf16"}}, "did you mean grad_accum_dtype?"),
        ({"gradient_clipping": "auto"}, "gradient_clipping is the largest norm"),
        ({"gradient_clipping": -1.0}, "gradient_clipping is the largest norm"),
        ({"compile": {"enabled": True}}, "model.compile"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, "only cpu and none"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "only cpu and none"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "leave it out"),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "offload_optimizer"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "untested with checkpoints"),
    ],
)
def test_keys_that_would_be_ignored_are_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, BASE | change)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no such DeepSpeed configuration"),
        ("{", "not readable as JSON"),
        ('{"train_batch_size": 64}', "gradient_clipping"),
    ],
)
def test_a_file_that_is_missing_no_json_or_without_clipping_is_refused(
    content: str | None, says: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "ds.json").write_text(content)
    with pytest.raises(UserError, match=says):
        read_deepspeed_config(tmp_path / "ds.json", {})


@pytest.mark.parametrize(
    ("world", "limit", "micro", "accumulation"), [(1, "auto", 64, 1), (2, 8, 8, 4), (2, 12, 8, 4), (4, 100, 16, 1)]
)
def test_the_global_batch_stays_whatever_the_ranks(world: int, limit: Any, micro: int, accumulation: int) -> None:
    config = BASE | {"train_micro_batch_size_per_gpu": limit}
    batch = resolve(config, world_size=world).batch
    assert (batch.micro_batch, batch.accumulation) == (micro, accumulation)
    assert batch.micro_batch * batch.accumulation * world == 64


def test_micro_batches_are_even_where_images_are_mixed_in_pairs_and_fit_the_accumulation() -> None:
    config = BASE | {"train_batch_size": 36, "train_micro_batch_size_per_gpu": 10}
    assert resolve(config).batch.micro_batch == 9
    assert resolve(config, "mixing.mixup=0.8").batch.micro_batch == 6
    with pytest.raises(UserError, match="even micro-batches"):
        resolve(BASE | {"train_batch_size": 6}, "mixing.mixup=0.8")
    with pytest.raises(UserError, match="leave gradient_accumulation_steps out"):
        resolve(config | {"gradient_accumulation_steps": 3})


def resolved(has_gpu: bool = False, optimizer: str = "adamw", **change: Any) -> ResolvedDeepSpeed:
    return resolve(BASE | change, f"optimizer.kind={optimizer}", has_gpu=has_gpu, has_bf16_gpu=has_gpu)


def test_precision_is_chosen_by_the_device_and_the_reason_is_told() -> None:
    on_gpu = resolved(has_gpu=True)
    assert (on_gpu.precision, on_gpu.config["bf16"]["enabled"]) == ("bf16", True)
    assert "precision: bf16 (the GPU has it)" in on_gpu.notes
    on_cpu = resolved()
    assert on_cpu.precision == "fp32"
    assert "precision: fp32 (there is no GPU)" in on_cpu.notes
    at_stage_0 = resolved(has_gpu=True, zero_optimization={"stage": 0})
    assert at_stage_0.precision == "fp32"
    assert any("torch_autocast computes in bfloat16 at stage 0" in note for note in at_stage_0.notes)


def test_a_precision_that_is_asked_for_takes_the_place_of_auto() -> None:
    for stage in range(4):
        autocast = resolved(has_gpu=True, zero_optimization={"stage": stage}, torch_autocast={"enabled": True})
        assert autocast.precision == "bf16 autocast"
        assert autocast.config["torch_autocast"]["dtype"] == "bfloat16"
        assert autocast.config["bf16"]["enabled"] is False
    fp16 = resolved(has_gpu=True, fp16={"enabled": True, "initial_scale_power": 12}, bf16={"enabled": "auto"})
    assert (fp16.precision, fp16.config["bf16"]["enabled"]) == ("fp16", False)
    assert not any("precision" in note for note in (*autocast.notes, *fp16.notes))


BF16, FP16, CPU = {"bf16": {"enabled": True}}, {"fp16": {"enabled": True}}, {"device": "cpu"}
AUTOCAST = {"torch_autocast": {"enabled": True}}
HALF = {"torch_autocast": {"enabled": True, "dtype": "float16"}}


@pytest.mark.parametrize(
    ("change", "reason", "way_out"),
    [
        (zero(0) | BF16, "bf16 at ZeRO stage 0 starts with a spurious optimizer step", "enable torch_autocast"),
        (zero(0) | FP16 | {"has_gpu": True}, "fp16 at ZeRO stage 0", "stage 1 or more"),
        (FP16, "fp16 needs a GPU", "use bf16, torch_autocast or fp32"),
        (BF16 | AUTOCAST, "bf16 and torch_autocast are both enabled", "enable one"),
        (zero(0) | HALF, "steps are skipped without saying so", "use dtype bfloat16"),
        (zero(1) | HALF, "gradients are clipped while they are scaled", "use dtype bfloat16"),
        ({"torch_autocast": {"enabled": True, "dtype": "int8"}}, "got 'int8'", "bfloat16 is what there is"),
        ({"optimizer": "lamb"}, "lamb at ZeRO stage 1 is not LAMB", "use zero_optimization.stage 0"),
        (zero(0, offload_optimizer=CPU), "offload_optimizer needs ZeRO stage 1", "or leave it out"),
        (zero(2, offload_param=CPU), "offload_param needs ZeRO stage 3", "or leave it out"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "'bf16' does not go with fp32", "use fp32"),
        (BF16 | {"data_types": {"grad_accum_dtype": "fp16"}}, "'fp16' does not go with bf16", "leave it out"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_reason_and_the_way_out(
    change: dict[str, Any], reason: str, way_out: str
) -> None:
    with pytest.raises(UserError) as caught:
        resolved(**change)
    assert reason in str(caught.value)
    assert way_out in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("section", [BF16, AUTOCAST])
def test_a_gpu_without_bfloat16_is_not_asked_for_it(section: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="enable fp16 instead"):
        resolve(BASE | section, world_size=1, has_gpu=True)
    notes = resolve(BASE, world_size=1, has_gpu=True).notes
    assert any("the fp16 section would be faster" in note for note in notes)


def test_a_run_that_began_with_stage_auto_resumes_at_the_stage_that_it_has(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(BASE | zero("auto", reduce_bucket_size=1000)))
    for stage in (0, 1):
        config = read_deepspeed_config(path, {}, recorded_stage=stage)
        assert config["zero_optimization"] == {"stage": stage, "reduce_bucket_size": 1000}
    with pytest.raises(UserError, match="0, 1, 2 or 3, got 'auto'"):
        read_deepspeed_config(path, {})
