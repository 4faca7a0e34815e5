"""Parameter groups, learning rates, and each optimizer against its definition."""

import math
import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

from models import create_model
from pretrain.engine.optimizers import build_optimizer, parameter_groups, peak_learning_rate
from pretrain.recipe import OptimizerSection
from tests.rounding import allowed_error, relative_error

SPARED = {"0.bias", "1.weight", "1.bias"}
LAYERS = [["0.weight", "0.bias"], ["1.weight", "1.bias"], ["2.weight", "2.bias"]]


def network() -> nn.Sequential:
    """In float64, so that an optimizer's steps can be compared with its formula."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2)).double()


def by_name(model: nn.Module, groups: list[dict[str, Any]], field: str) -> dict[str, float]:
    values = {id(parameter): group[field] for group in groups for parameter in group["params"]}
    return {name: values[id(parameter)] for name, parameter in model.named_parameters()}


def test_what_must_not_decay_is_spared() -> None:
    model = network()
    groups = parameter_groups(model, OptimizerSection(lr=1.0, weight_decay=0.3), no_decay=SPARED, layers=[])
    assert by_name(model, groups, "weight_decay") == {
        "0.weight": 0.3, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0, "2.weight": 0.3, "2.bias": 0.3,
    }  # fmt: skip
    assert set(by_name(model, groups, "lr_scale").values()) == {1.0}
    assert len(groups) == 2


def test_each_layer_learns_slower_than_the_one_above_it() -> None:
    model = network()
    section = OptimizerSection(lr=1.0, weight_decay=0.3, layer_decay=0.5)
    groups = parameter_groups(model, section, no_decay=SPARED, layers=LAYERS)
    scales = by_name(model, groups, "lr_scale")
    assert [scales[f"{layer}.{part}"] for layer in range(3) for part in ("weight", "bias")] == [
        0.25, 0.25, 0.5, 0.5, 1.0, 1.0,
    ]  # fmt: skip
    assert by_name(model, groups, "weight_decay")["0.bias"] == 0.0


def test_a_lavits_layers_go_from_stem_to_head() -> None:
    model = create_model("lavit_micro", num_classes=10, image_size=32)
    section = OptimizerSection(lr=1.0, layer_decay=0.9)
    groups = parameter_groups(model, section, no_decay=model.no_weight_decay(), layers=model.layer_groups())
    scales = by_name(model, groups, "lr_scale")
    blocks = sum(model.config.depths)
    assert scales["stages.0.embed.conv.weight"] == pytest.approx(0.9 ** (blocks + 1))
    assert scales["stages.0.blocks.0.mlp.fc1.weight"] == pytest.approx(0.9**blocks)
    assert scales["head.weight"] == 1.0


def test_frozen_parameters_are_left_out() -> None:
    model = network()
    model[0].requires_grad_(False)
    groups = parameter_groups(model, OptimizerSection(lr=1.0, layer_decay=0.5), no_decay=SPARED, layers=LAYERS)
    assert sum(len(group["params"]) for group in groups) == 4


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


def five_steps(section: OptimizerSection) -> tuple[nn.Module, list[list[torch.Tensor]], torch.optim.Optimizer]:
    """The network after five steps on fixed gradients, and those gradients."""
    model = network()
    optimizer, _ = build_optimizer(model, section, no_decay=SPARED, layers=LAYERS)
    generator = torch.Generator().manual_seed(1)
    like = {"generator": generator, "dtype": torch.float64}
    gradients = [[torch.randn(p.shape, **like) for p in model.parameters()] for _ in range(5)]
    for step in gradients:
        for parameter, gradient in zip(model.parameters(), step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return model, gradients, optimizer


def assert_equal_weights(model: nn.Module, expected: list[torch.Tensor]) -> None:
    torch.testing.assert_close([parameter.detach() for parameter in model.parameters()], expected)


@pytest.fixture
def no_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", None)


@pytest.mark.usefixtures("no_apex")
def test_lamb_is_the_papers() -> None:
    # You et al. 2020, algorithm 2: the update with its decay is given the length of the weights.
    section = OptimizerSection(kind="lamb", lr=0.05, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6)
    model, gradients, _ = five_steps(section)
    expected = []
    for index, (name, start) in enumerate(network().named_parameters()):
        weight, first, second = start.detach().clone(), torch.zeros_like(start), torch.zeros_like(start)
        for step in gradients:
            first = 0.8 * first + 0.2 * step[index]
            second = 0.9 * second + 0.1 * step[index] ** 2
            update = first / (second.sqrt() + 1e-6)
            if name in SPARED:
                weight = weight - 0.05 * update
            else:
                update = update + 0.1 * weight
                weight = weight - 0.05 * weight.norm() / update.norm() * update
        expected.append(weight)
    assert_equal_weights(model, expected)


@pytest.mark.usefixtures("no_apex")
def test_lamb_gives_the_update_the_length_of_the_weights_however_long_they_are() -> None:
    model = nn.Linear(64, 64, bias=False, dtype=torch.float64)
    nn.init.constant_(model.weight, 1.0)  # of norm 64: pytorch_optimizer would take it for 10
    optimizer, _ = build_optimizer(
        model, OptimizerSection(kind="lamb", lr=0.01, weight_decay=1e-9), no_decay=set(), layers=[]
    )
    model.weight.grad = torch.randn(64, 64, dtype=torch.float64)
    before = model.weight.detach().clone()
    optimizer.step()
    assert (model.weight - before).norm().item() == pytest.approx(0.01 * 64)


def test_sgd_is_torchs_with_momentum() -> None:
    model, gradients, _ = five_steps(OptimizerSection(kind="sgd", lr=0.05, weight_decay=0.1, momentum=0.8))
    expected = []
    for index, (name, start) in enumerate(network().named_parameters()):
        weight, speed = start.detach().clone(), torch.zeros_like(start)
        for step in gradients:
            speed = 0.8 * speed + step[index] + (0.0 if name in SPARED else 0.1) * weight
            weight = weight - 0.05 * speed
        expected.append(weight)
    assert_equal_weights(model, expected)


def test_adamw_is_the_fused_one_and_the_papers() -> None:
    model, gradients, optimizer = five_steps(OptimizerSection(lr=0.05, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6))
    assert optimizer.defaults["fused"] is True
    expected = []
    for index, (name, start) in enumerate(network().named_parameters()):
        weight, first, second = start.detach().clone(), torch.zeros_like(start), torch.zeros_like(start)
        for number, step in enumerate(gradients, start=1):
            first = 0.8 * first + 0.2 * step[index]
            second = 0.9 * second + 0.1 * step[index] ** 2
            update = first / (1 - 0.8**number) / ((second / (1 - 0.9**number)).sqrt() + 1e-6)
            weight = weight - 0.05 * (update + (0.0 if name in SPARED else 0.1) * weight)
        expected.append(weight)
    assert_equal_weights(model, expected)


class FusedLAMB(torch.optim.SGD):
    """Stands in for apex's: what it was told is what counts here."""

    def __init__(self, groups: Any, *, lr: float, **told: Any) -> None:
        super().__init__(groups, lr=lr)
        self.told = told


def install_apex(monkeypatch: pytest.MonkeyPatch, fused: Any) -> None:
    apex, optimizers = types.ModuleType("apex"), types.ModuleType("apex.optimizers")
    if fused is not None:
        optimizers.FusedLAMB = fused
        monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
    monkeypatch.setitem(sys.modules, "apex", apex)


def lamb() -> tuple[torch.optim.Optimizer, str]:
    section = OptimizerSection(kind="lamb", lr=0.1)
    optimizer, notes = build_optimizer(network(), section, no_decay=SPARED, layers=LAYERS)
    (note,) = notes
    return optimizer, note


def test_lamb_is_nvidias_where_its_apex_is_installed_and_leaves_clipping_to_deepspeed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install_apex(monkeypatch, FusedLAMB)
    optimizer, note = lamb()
    assert isinstance(optimizer, FusedLAMB)
    assert optimizer.told["max_grad_norm"] == math.inf
    assert optimizer.told["bias_correction"] is False
    assert "apex (it is installed)" in note


def test_pypis_unrelated_apex_is_told_from_nvidias(monkeypatch: pytest.MonkeyPatch) -> None:
    install_apex(monkeypatch, None)
    optimizer, note = lamb()
    assert type(optimizer).__module__.startswith("pytorch_optimizer")
    assert "web toolkit" in note


def test_an_apex_without_its_extensions_is_noticed_when_the_optimizer_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("apex.optimizers.FusedLAMB requires cuda extensions")

    install_apex(monkeypatch, broken)
    optimizer, note = lamb()
    assert type(optimizer).__module__.startswith("pytorch_optimizer")
    assert "without its CUDA extensions" in note


@pytest.mark.usefixtures("no_apex")
def test_without_any_apex_the_reason_is_told() -> None:
    assert "NVIDIA's apex is not installed" in lamb()[1]


@pytest.mark.gpu
def test_apexs_lamb_steps_as_the_librarys() -> None:
    pytest.importorskip("apex.optimizers", reason="NVIDIA's apex is not installed")
    section = OptimizerSection(kind="lamb", lr=0.05, weight_decay=0.1)
    weights = []
    for hidden in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if hidden:
                patch.setitem(sys.modules, "apex", None)
            model = network().float().cuda()
            optimizer, _ = build_optimizer(model, section, no_decay=SPARED, layers=LAYERS)
            for step in range(5):
                for index, parameter in enumerate(model.parameters()):
                    generator = torch.Generator().manual_seed(100 * step + index)
                    parameter.grad = torch.randn(parameter.shape, generator=generator).cuda()
                optimizer.step()
            weights.append([parameter.detach().clone() for parameter in model.parameters()])
    # Five steps of some ten operations each; the longest sums are the norms of 15 weights. Both are rounded.
    allowed = 2 * allowed_error(operations=50, terms=15)
    assert all(relative_error(a, b.double()) < allowed for a, b in zip(*weights, strict=True))
