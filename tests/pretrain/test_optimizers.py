"""Parameter groups, learning rates, drop path, and each optimizer against its definition."""

import math
import sys
import types
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from pretrain.engine.optimizers import build_optimizer, parameter_groups, peak_learning_rate
from pretrain.engine.schedule import drop_path_uniforms, learning_rate
from pretrain.recipe import OptimizerSection, ScheduleSection

SPARED = {"0.bias", "1.weight", "1.bias"}
SCHEDULE = ScheduleSection(epochs=10, warmup_epochs=2, min_lr=0.1)
LAYERS = [["0.weight", "0.bias"], ["1.weight", "1.bias"], ["2.weight", "2.bias"]]


def network() -> nn.Sequential:
    """In float64, so that an optimizer's steps can be compared with its formula."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2)).double()


def by_name(model: nn.Module, groups: list[dict[str, Any]], field: str) -> dict[str, float]:
    values = {id(parameter): group[field] for group in groups for parameter in group["params"]}
    return {name: values[id(parameter)] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("layer_decay", "scales", "count"), [(1.0, [1.0] * 6, 2), (0.5, [0.25, 0.25, 0.5, 0.5, 1.0, 1.0], 4)]
)
def test_what_must_not_decay_is_spared_and_each_layer_learns_slower_than_the_one_above_it(
    layer_decay: float, scales: list[float], count: int
) -> None:
    model = network()
    section = OptimizerSection(lr=1.0, weight_decay=0.3, layer_decay=layer_decay)
    groups = parameter_groups(model, section, no_decay=SPARED, layers=LAYERS)
    assert by_name(model, groups, "weight_decay") == {
        "0.weight": 0.3, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0, "2.weight": 0.3, "2.bias": 0.3,
    }  # fmt: skip
    assert list(by_name(model, groups, "lr_scale").values()) == scales
    assert len(groups) == count
    model[0].requires_grad_(False)
    groups = parameter_groups(model, section, no_decay=SPARED, layers=LAYERS)
    assert sum(len(group["params"]) for group in groups) == 4, "frozen parameters are left out"


@pytest.mark.parametrize(
    ("no_decay", "layers", "says"), [({"nothere"}, LAYERS, "nothere"), (SPARED, LAYERS[1:], "exactly one")]
)
def test_names_that_do_not_fit_the_model_are_an_error(no_decay: set[str], layers: list[list[str]], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parameter_groups(network(), OptimizerSection(lr=1.0, layer_decay=0.5), no_decay=no_decay, layers=layers)


@pytest.mark.parametrize(
    ("kind", "batch", "peak", "says"),
    [("adamw", 512, 0.5, "linearly"), ("sgd", 4096, 4.0, "linearly"), ("lamb", 4096, 2.0, "square root")],
)
def test_the_learning_rate_follows_the_batch_it_is_meant_for(kind: Any, batch: int, peak: float, says: str) -> None:
    section = OptimizerSection(kind=kind, lr=1.0, lr_for_batch=1024)
    assert peak_learning_rate(section, batch)[0] == pytest.approx(peak)
    assert says in peak_learning_rate(section, batch)[1]
    assert peak_learning_rate(OptimizerSection(kind=kind, lr=1.0), batch)[0] == 1.0
    assert "nothing rescales it" in peak_learning_rate(OptimizerSection(kind=kind, lr=1.0), batch)[1]


def test_the_schedule_warms_up_linearly_and_agrees_with_torchs_cosine_down_to_its_floor() -> None:
    def at(samples: int) -> float:
        return learning_rate(samples, peak=1.0, schedule=SCHEDULE, epoch_size=100)

    assert at(50) == pytest.approx(0.25)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=800, eta_min=0.1)
    for samples in range(200, 1000):
        assert at(samples) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        cosine.step()
    assert at(1000) == at(1100) == pytest.approx(0.1)


def test_drop_path_draws_are_the_rows_of_one_stream_for_the_global_batch() -> None:
    """Which is what runs have drawn from, so that a run that resumes sees the same masks."""
    for seed, step, size, branches in ((7, 3, 24, 5), (2**40, 2**33, 100, 36), (0, 0, 64, 1)):
        key, counter = np.array([seed, 0x64726F70], np.uint64), np.array([0, 0, 0, step], np.uint64)
        stream = np.random.Generator(np.random.Philox(key=key, counter=counter))
        whole = stream.random((size, branches), dtype=np.float32).T
        for rows in (*np.split(np.arange(size), 4), np.array([size - 1]), np.array([5, 3, 9])):
            assert np.array_equal(drop_path_uniforms(seed, step, rows, branches=branches), whole[:, rows])


def build(model: nn.Module, section: OptimizerSection) -> torch.optim.Optimizer:
    return build_optimizer(model, section, no_decay=SPARED, layers=LAYERS)[0]


def test_lamb_is_the_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    """You et al. 2020, algorithm 2: the update with its decay is given the length of the weights, however long."""
    monkeypatch.setitem(sys.modules, "apex", None)

    def long() -> nn.Module:
        model = network()
        nn.init.constant_(model[0].weight, 9.0)  # of norm 35: pytorch_optimizer would take it for 10
        return model

    section = OptimizerSection(kind="lamb", lr=0.05, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-9)
    model, expected, random = long(), [], torch.Generator().manual_seed(1)
    optimizer = build(model, section)
    gradients = [
        [torch.randn(one.shape, generator=random, dtype=torch.float64) for one in model.parameters()] for _ in range(5)
    ]
    for step in gradients:
        for parameter, gradient in zip(model.parameters(), step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    for index, (name, start) in enumerate(long().named_parameters()):
        weight, first, second = start.detach().clone(), torch.zeros_like(start), torch.zeros_like(start)
        for step in gradients:
            first = 0.8 * first + 0.2 * step[index]
            second = 0.9 * second + 0.1 * step[index] ** 2
            update = first / (second.sqrt() + 1e-9)
            if name in SPARED:
                weight = weight - 0.05 * update
            else:
                update = update + 0.1 * weight
                weight = weight - 0.05 * weight.norm() / update.norm() * update
        expected.append(weight)
    torch.testing.assert_close([parameter.detach() for parameter in model.parameters()], expected)


@pytest.mark.parametrize(
    ("kind", "settings", "plain"),
    [
        ("sgd", {"momentum": 0.8}, torch.optim.SGD),
        ("adamw", {"betas": (0.8, 0.9), "eps": 1e-6}, torch.optim.AdamW),
    ],
)
def test_sgd_and_adamw_are_torchs_fused_ones(kind: Any, settings: dict[str, Any], plain: Any) -> None:
    """With the recipe's settings; ``test_equality`` compares their steps."""
    optimizer = build(network(), OptimizerSection(kind=kind, lr=0.05, **settings))
    assert type(optimizer) is plain
    assert optimizer.defaults.items() >= {"fused": True, **settings}.items()


class FusedLAMB(torch.optim.SGD):
    """Stands in for apex's: what it was told is what counts here."""

    def __init__(self, groups: Any, *, lr: float, **told: Any) -> None:
        super().__init__(groups, lr=lr)
        self.told = told


def without_extensions(*_: Any, **__: Any) -> None:
    raise RuntimeError("apex.optimizers.FusedLAMB requires cuda extensions")


@pytest.mark.parametrize(
    ("fused", "said"),
    [
        (FusedLAMB, "apex (it is installed)"),
        (without_extensions, "RuntimeError: apex.optimizers.FusedLAMB requires cuda extensions"),
        (None, "No module named 'apex.optimizers'"),  # as of PyPI's apex, which is not NVIDIA's
    ],
)
def test_lamb_is_nvidias_where_its_apex_works_and_leaves_clipping_to_deepspeed(
    fused: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    if fused is not None:
        monkeypatch.setitem(sys.modules, "apex.optimizers", mock.Mock(FusedLAMB=fused))
    section = OptimizerSection(kind="lamb", lr=0.1)
    optimizer, (note,) = build_optimizer(network(), section, no_decay=SPARED, layers=LAYERS)
    assert said in note
    if fused is FusedLAMB:
        assert isinstance(optimizer, FusedLAMB)
        assert optimizer.told["max_grad_norm"] == math.inf
        assert optimizer.told["bias_correction"] is False
    else:
        assert type(optimizer).__module__.startswith("pytorch_optimizer")
