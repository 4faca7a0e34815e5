"""`attention_kernel: triton`: what is proven without a GPU, what is refused or left to torch, and what needs one."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from models import create_model, fused_attention, model_config
from tests.models.test_lavit import small

ROOT = Path(__file__).parents[2]
SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that a program may have, by compute capability (CUDA's programming guide)."""
POINTERS = {
    "scores": "s", "to_scores": "s", "values": "v", "output": "v", "to_output": "v", "pooled": "fp32",
    "to_pooled": "fp32", "to_values": "fp32",
}  # fmt: skip


@pytest.mark.slow
def test_in_tritons_interpreter_the_kernels_give_torchs_numbers() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/models/interpreted_attention.py"]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert re.fullmatch(r"\d+ passed in .*", done.stdout.strip().splitlines()[-1])  # and none was skipped


def compiled(kernel, constants, types, capability):
    """A kernel as a GPU of this compute capability would be given it, made without one."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: f"*{types.get(POINTERS[name], 'fp32')}" if name in POINTERS else "i32" for name in names}
    signature |= {name: "constexpr" for name in names if name in constants}
    given = {(names.index(name),): value for name, value in constants.items() if name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in names if name not in constants}
    options = {name: value for name, value in constants.items() if name not in names}
    return compile_kernel(
        ASTSource(kernel, signature, given, aligned), target=GPUTarget("cuda", capability, 32), options=options
    )


@pytest.mark.slow
@pytest.mark.parametrize(("size", "dtype"), [(224, torch.bfloat16), (384, torch.bfloat16), (224, torch.float32)])
@pytest.mark.parametrize("capability", SHARED)
def test_without_a_gpu_the_kernels_compile_for_one_and_spill_no_register(
    capability: int, size: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton import knobs

    kernels = importlib.import_module("models.attention_kernel")
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    config = model_config("lavit_small", image_size=size)
    kind = "bf16" if dtype == torch.bfloat16 else "fp32"
    for stage, (grid, key_grid) in enumerate(config.grids((size, size))):
        keys = key_grid[0] * key_grid[1]
        scores = torch.empty(2, config.heads[stage], keys, grid[0] * grid[1], device="meta", dtype=dtype)
        values = torch.empty(2, keys, config.widths[stage], device="meta", dtype=dtype)
        given = (scores, values, grid, key_grid, config.depths[stage] > config.vanilla_blocks[stage])
        for kernel, constants in (
            (kernels.forward_kernel, fused_attention.constants(*given)),
            (kernels.backward_kernel, fused_attention.backward_constants(*given)),
        ):
            binary = compiled(kernel, constants, {"s": kind, "v": kind}, capability)
            assert binary.metadata.shared <= SHARED[capability]
            (tmp_path / "kernel.cubin").write_bytes(binary.asm["cubin"])
            used = subprocess.run(
                [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", tmp_path / "kernel.cubin"],
                capture_output=True, text=True, check=True,
            ).stdout  # fmt: skip
            assert "STACK:0" in used, used
            assert "LOCAL:0" in used, used


def test_on_a_cpu_it_is_torchs_network_bit_for_bit() -> None:
    plain, ours = small(), small(attention_kernel="triton")
    ours.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 32, 32)
    for one, other in zip(ours(images, with_diagonality=True), plain(images, with_diagonality=True), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("size", "dtype", "stages"),
    [
        ((224, 224), torch.bfloat16, [0, 1, 2, 3]),
        ((224, 224), torch.float32, [0, 1, 2, 3]),
        ((384, 384), torch.bfloat16, [0, 1, 2, 3]),
        ((384, 384), torch.float32, []),
        ((224, 224), torch.float64, []),
        ((800, 1344), torch.bfloat16, []),
    ],
)
def test_what_does_not_fit_is_left_to_torch(size, dtype, stages):
    assert fused_attention.fitting_stages(model_config("lavit_small", image_size=size), dtype) == stages


def test_pooling_over_large_places_is_left_to_torch() -> None:
    everywhere = {"vanilla_blocks": (1, 1, 1, 1), "depths": (2, 2, 2, 2)}
    config = model_config("lavit_small", image_size=384, **everywhere)
    assert fused_attention.fitting_stages(config, torch.bfloat16) == [1, 2, 3]


def test_without_triton_the_first_use_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "models.attention_kernel", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    fused_attention._kernels.cache_clear()
    with pytest.raises(RuntimeError, match=r"attention_kernel: 'triton' needs Triton.*pip install triton"):
        fused_attention.attend(torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, 4), (2, 2), (2, 2), pooled=False)


def test_devices_on_which_it_would_never_run_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="runs on NVIDIA GPUs and this is a cpu; use attention_kernel: 'torch'"):
        fused_attention.require(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    with pytest.raises(RuntimeError, match=r"compute capability 8\.0 or more, this has 7\.0"):
        fused_attention.require(torch.device("cuda"))


@pytest.mark.parametrize(("setting", "off", "on"), [("fp32_precision", "none", "tf32"), ("allow_tf32", False, True)])
def test_products_in_fp32_are_as_precise_as_torchs_whichever_setting_says_so(setting, off, on):
    given = (torch.empty(1, 1, 4, 16), torch.empty(1, 4, 16), (4, 4), (2, 2), True)
    try:
        for value, precision in ((on, "tf32"), (off, "ieee")):
            setattr(torch.backends.cuda.matmul, setting, value)
            assert fused_attention.constants(*given)["PRECISION"] == precision
    finally:
        setattr(torch.backends.cuda.matmul, setting, off)


@pytest.mark.parametrize(("capability", "taken"), [((7, 5), False), ((8, 0), True)])
def test_a_network_that_was_trained_with_them_runs_on_an_older_gpu_without(capability, taken, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    with FakeTensorMode():
        scores, values = (torch.empty(1, *shape, device="cuda") for shape in ((1, 4, 16), (4, 16)))
    assert fused_attention.can_run(scores, values, (4, 4), (2, 2), pooled=True) is taken


def gradients(model, images, dtype, *, autocast=False):
    """Logits, diagonality and all gradients of a training step on the GPU, in fp64."""
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        logits, diagonality = model(images.to(dtype), with_diagonality=True)
    (
        torch.nn.functional.cross_entropy(logits.double(), torch.arange(len(images), device="cuda")) + diagonality
    ).backward()
    found = [logits.detach(), diagonality.detach(), *(parameter.grad for parameter in model.parameters())]
    model.zero_grad()
    return [tensor.double() for tensor in found]


def on_gpu(kernel, dtype, *, name="lavit_small", checkpointed="none"):
    torch.manual_seed(0)
    model = create_model(name, attention_kernel=kernel).to("cuda", dtype)
    model.set_activation_checkpointing(checkpointed)
    return model


def far(found, exact):
    """Relative distance of all tensors together from exact ones."""
    apart = sum((one - other).square().sum() for one, other in zip(found, exact, strict=True))
    return (apart / sum(other.square().sum() for other in exact)).sqrt().item()


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["eager", "compiled", "checkpointed"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
def test_on_a_gpu_a_step_is_as_exact_as_torchs(precision, way):
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    images = torch.randn(4, 3, 224, 224, device="cuda")
    exact = gradients(on_gpu("torch", torch.float64), images, torch.float64)
    checkpointed = "all" if way == "checkpointed" else "none"
    plain, ours = (on_gpu(kernel, dtype, checkpointed=checkpointed) for kernel in ("torch", "triton"))
    run = torch.compile(ours, fullgraph=True) if way == "compiled" else ours
    autocast = precision == "autocast"
    found = gradients(run, images, dtype, autocast=autocast)
    assert far(found, exact) <= 1.5 * far(gradients(plain, images, dtype, autocast=autocast), exact)
    again = gradients(run, images, dtype, autocast=autocast)
    assert all(torch.equal(one, other) for one, other in zip(found[:2], again[:2], strict=True))


@pytest.mark.gpu
def test_on_a_gpu_the_operator_gives_the_same_bits_every_time_at_every_stage() -> None:
    for stage, (grid, key_grid) in enumerate(model_config("lavit_small").grids((224, 224))):
        heads, keys = model_config("lavit_small").heads[stage], key_grid[0] * key_grid[1]
        scores = torch.randn(8, heads, keys, grid[0] * grid[1], device="cuda", dtype=torch.bfloat16)
        values = torch.randn(8, keys, 64 * heads, device="cuda", dtype=torch.bfloat16)
        for pooled in (False, True):
            assert fused_attention.can_run(scores, values, grid, key_grid, pooled=pooled)
            found = []
            for _ in range(3):
                given = [tensor.clone().requires_grad_() for tensor in (scores, values)]
                output, square = fused_attention.attend(*given, grid, key_grid, pooled=pooled)
                (output.float().square().sum() + (0 if square is None else square.square().sum())).backward()
                found.append([output, *(() if square is None else (square,)), *(one.grad for one in given)])
            for other in found[1:]:
                assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@pytest.mark.gpu
def test_on_a_gpu_a_step_needs_less_memory_than_torchs() -> None:
    images, peaks = torch.randn(32, 3, 224, 224, device="cuda"), {}
    for kernel in ("torch", "triton"):
        model = on_gpu(kernel, torch.bfloat16)
        gradients(model, images, torch.bfloat16)
        torch.cuda.reset_peak_memory_stats()
        gradients(model, images, torch.bfloat16)
        peaks[kernel] = torch.cuda.max_memory_allocated()
        del model
    assert peaks["triton"] < peaks["torch"]
