"""Compiled and deterministic training, what refuses them, and collectives that hang."""

import errno
import functools
import re
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from pretrain import devices
from pretrain.engine.distributed import limit_collectives, new_cpu_group
from pretrain.engine.engine import compilation_error
from pretrain.outcome import ExitCode, UserError
from pretrain.recipe import Recipe
from tests.pretrain.ranks import run_ranks, start_ranks
from tests.pretrain.test_equality import recipe, trained, training, zero


def compiling(checkpointing: str = "none", **model: Any) -> Recipe:
    eager = recipe(checkpointing)
    return eager.model_copy(update={"model": eager.model.model_copy(update={"compile": True, **model})})


def no_graph_has_open_shapes(control: dist.ProcessGroup) -> None:
    """A run that was stopped while it evaluated evaluates before it trains."""
    graphs: list[list[Any]] = []

    def look(graph: Any, inputs: list[Any]) -> Any:
        sizes = [size for one in inputs if isinstance(one, torch.Tensor) for size in one.shape]
        graphs.append([size for size in [*inputs, *sizes] if isinstance(size, torch.SymInt)])
        return graph.forward

    torch.compile = functools.partial(torch.compile, backend=look)
    chosen = compiling(overrides={"drop_path": 0.0})
    for order in ("evaluate, train", "train, evaluate"):
        torch._dynamo.reset()
        engine = training(chosen, zero_optimization=zero(1)).engine
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

    compiled = compiling()
    with pytest.raises(UserError, match=r"model\.compile does not go with ZeRO stage 3"):
        training(compiled, zero_optimization=zero(3))
    config.cpp.cxx = ("no-such-compiler",)
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler"):
        training(compiled, zero_optimization=zero(1))


def test_compiling_at_stage_3_or_without_a_compiler_is_refused_before_training() -> None:
    run_ranks(1, compiling_is_refused)


@pytest.mark.parametrize(
    ("failure", "code"),
    [(RuntimeError("no kernel"), ExitCode.WILL_FAIL_AGAIN), (OSError(errno.EIO, "no answer"), ExitCode.RETRY)],
)
def test_a_network_that_cannot_be_compiled_is_one_line(failure: Exception, code: ExitCode) -> None:
    network = torch.compile(torch.nn.Linear(2, 2), backend=mock.Mock(side_effect=failure), fullgraph=True)
    with pytest.raises(Exception, match=str(failure.args[-1])) as caught:
        network(torch.ones(1, 2))
    refused = compilation_error(caught.value)
    assert refused is not None
    assert refused.code == code
    assert re.fullmatch(r"model\.compile: .*; try model\.compile=false", str(refused))
    assert compilation_error(failure) is None


@pytest.mark.parametrize(
    ("wanted", "environment", "error"),
    [
        ("auto", {}, ""),
        ("auto", {"CUDA_VISIBLE_DEVICES": "0", "CROSS_RANK": "0"}, ""),
        ("auto", {"SLURM_GPUS_ON_NODE": "0"}, ""),
        ("auto", {"SLURM_GPUS_ON_NODE": "2", "DS_ACCELERATOR": "cpu"}, ""),
        ("cpu", {"SLURM_GPUS_ON_NODE": "2", "device file": "nvidia0"}, ""),
        ("auto", {"CUDA_VISIBLE_DEVICES": "0"}, "CUDA_VISIBLE_DEVICES=0: NVIDIA's driver is 535.129.03, torch "),
        ("auto", {"SLURM_GPUS_ON_NODE": "2"}, "SLURM_GPUS_ON_NODE=2: NVIDIA's driver is "),
        ("auto", {"device file": "nvidia1", "CROSS_RANK": "0"}, "nvidia1: NVIDIA's driver is "),
        ("auto", {"device file": "nvidia0", "CUDA_VISIBLE_DEVICES": ""}, "nvidia0: CUDA_VISIBLE_DEVICES='' hides "),
        ("auto", {"device file": "nvidiactl"}, ""),
        ("cuda", {"DS_ACCELERATOR": "cpu"}, "--device cuda: NVIDIA's driver is "),
    ],
)
def test_a_gpu_that_torch_does_not_find_is_an_error_unless_the_cpu_is_wanted(
    wanted: str, environment: dict[str, str], error: str, *, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_GPUS_ON_NODE", "DS_ACCELERATOR", "CROSS_RANK"):
        monkeypatch.delenv(name, raising=False)
    if device := (environment := {**environment}).pop("device file", ""):
        (tmp_path / device).touch()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\n")
    monkeypatch.setattr(devices, "DEVICE_FILES", tmp_path)
    monkeypatch.setattr(devices, "DRIVER", driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(UserError, match=re.escape(error)) if error else nullcontext():
        assert devices.use_gpu(wanted) is False


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


def late_rank(control: dist.ProcessGroup) -> None:
    patient = new_cpu_group(600.0)
    limit_collectives(1.0, exclude=(control, patient))
    if dist.get_rank() == 0:
        with pytest.raises((RuntimeError, dist.DistBackendError), match=r"(?i)timed? ?out"):
            dist.all_reduce(torch.zeros(1))
    else:
        time.sleep(4)  # longer than the limit: rank 0 has given up by then
    dist.all_reduce(torch.zeros(1), group=patient)  # rank 0 waits for seconds here, and may


def test_after_the_first_step_a_collective_that_hangs_fails_soon_but_not_where_waiting_is_right() -> None:
    run_ranks(2, late_rank)
