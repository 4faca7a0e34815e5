"""Compiled and deterministic training, and what refuses them."""

import functools
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from pretrain.engine.build import _require_compilers, build_engine, build_model
from pretrain.engine.deepspeed_config import resolve_deepspeed_config
from pretrain.outcome import UserError
from tests.pretrain.ranks import run_ranks, start_ranks
from tests.pretrain.test_equality import BATCH, CLASSES, CPU, assert_equal, recipe, trained, zero


def engine_of(stage: int, **fields: Any) -> tuple[Any, list[str]]:
    config = {"train_batch_size": BATCH, "gradient_clipping": 1.0, "zero_optimization": {"stage": stage}}
    resolved = resolve_deepspeed_config(config, world_size=dist.get_world_size(), state_bytes=0, has_bf16_gpu=False)
    chosen = recipe().model_copy(update=fields)
    return build_engine(build_model(chosen, CLASSES), chosen, resolved, CPU)


def compiled_equals_eager(control: dist.ProcessGroup, backend: str) -> None:
    torch.compile = functools.partial(torch.compile, backend=backend)
    eager = recipe("all")
    compiled = eager.model_copy(update={"model": eager.model.model_copy(update={"compile": True})})
    for stage in (0, 1):
        options = {"accumulation": 2, "zero_optimization": zero(stage)}
        mine, plain = trained(compiled, **options), trained(eager, **options)
        assert mine[1].keys() == plain[1].keys(), "compiling renamed parameters"
        assert_equal(f"compiled at stage {stage}", mine, plain, loss=5e-6, weights=1e-4)


@pytest.mark.slow
def test_compiled_training_equals_eager_training() -> None:
    """What torch.compile captures, run operation by operation; `tests/system` has the compiled kernels."""
    run_ranks(1, compiled_equals_eager, "aot_eager")


def no_graph_has_open_shapes(control: dist.ProcessGroup) -> None:
    """A run that was stopped while it evaluated evaluates before it trains."""
    graphs: list[list[Any]] = []

    def look(graph: Any, inputs: list[Any]) -> Any:
        sizes = [size for one in inputs if isinstance(one, torch.Tensor) for size in one.shape]
        graphs.append([size for size in [*inputs, *sizes] if isinstance(size, torch.SymInt)])
        return graph.forward

    torch.compile = functools.partial(torch.compile, backend=look)
    model = recipe().model.model_copy(update={"compile": True, "overrides": {"drop_path": 0.0}})
    for order in ("evaluate, train", "train, evaluate"):
        torch._dynamo.reset()
        engine, _ = engine_of(1, model=model)
        for what in order.split(", "):
            engine.train(what == "train")
            if what == "train":
                logits, diagonality = engine(torch.zeros(4, 3, 32, 32), with_diagonality=True)
                engine.backward(logits.sum() + diagonality)
            else:
                with torch.no_grad():
                    engine(torch.zeros(6, 3, 32, 32))
    assert graphs == [[]] * 4


@pytest.mark.slow
def test_a_compiled_networks_shapes_are_static_whatever_came_first() -> None:
    run_ranks(1, no_graph_has_open_shapes)


def compiling_is_refused(control: dist.ProcessGroup) -> None:
    from torch._inductor import config

    compiled = recipe().model.model_copy(update={"compile": True})
    with pytest.raises(UserError, match=r"model\.compile does not go with ZeRO stage 3"):
        engine_of(3, model=compiled)
    config.cpp.cxx = ("no-such-compiler",)
    with pytest.raises(UserError, match="install g\\+\\+"):
        engine_of(1, model=compiled)


def test_compiling_at_stage_3_or_without_a_compiler_is_refused_before_training() -> None:
    run_ranks(1, compiling_is_refused)


def test_a_gpu_without_triton_or_a_compiler_is_reported_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils import _triton

    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(_triton, "has_triton_package", lambda: False)
    with pytest.raises(UserError, match=r"model\.compile needs .* finds no Triton"):
        _require_compilers(gpu)
    monkeypatch.setattr(_triton, "has_triton_package", lambda: True)
    monkeypatch.setenv("CC", "true")
    _require_compilers(gpu)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"model\.compile needs .* finds no C compiler"):
        _require_compilers(gpu)


def deterministic_twice(control: dist.ProcessGroup) -> None:
    chosen = recipe().model_copy(update={"deterministic": True})
    first, again = (trained(chosen, zero_optimization=zero(1)) for _ in range(2))
    assert torch.are_deterministic_algorithms_enabled()
    assert first[0] == again[0]
    assert all(torch.equal(first[1][name], again[1][name]) for name in first[1])


@pytest.mark.slow
def test_a_deterministic_run_trains_with_deterministic_operations_only() -> None:
    run_ranks(2, deterministic_twice)


def no_kernel_is_probed() -> None:
    import deepspeed

    from pretrain.engine.distributed import choose_device, init_distributed, read_rank

    deepspeed.ops._probe_compatible_ops = mock.Mock(side_effect=AssertionError("DeepSpeed tries compilers"))
    init_distributed(choose_device(read_rank()))


def test_starting_tries_no_compiler_for_kernels_that_nobody_uses() -> None:
    start_ranks(1, no_kernel_is_probed)
