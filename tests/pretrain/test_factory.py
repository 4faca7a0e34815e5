"""Any network through the same pipeline: what is asked of it, its random numbers, its buffers, its hand-off."""

import functools
import itertools
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from examples.networks import CNN, ViT
from pretrain import convert, evaluate
from pretrain.checkpoints.buffers import Buffers
from pretrain.checkpoints.checkpoint import load_newest, read_weights
from pretrain.checkpoints.writer import CheckpointWriter, Retention
from pretrain.engine.engine import build_model
from pretrain.factory import FactoryConfig, layers_of, load_state, spared_names, try_network
from pretrain.handoff.folder import CONFIG, load_handoff
from pretrain.monitoring.monitor import Monitor
from pretrain.outcome import UserError
from pretrain.plan import make_plan, parse_arguments
from pretrain.recipe import Recipe, load_recipe, validate_recipe
from pretrain.state import TrainState
from tests.pretrain import handoffs, test_equality, test_resume
from tests.pretrain.ranks import run_ranks
from tests.pretrain.stand_in import DEVICE, HostWaits, on_stand_in
from tests.pretrain.test_equality import CLASSES, CPU, go_on, micro_batches
from tests.pretrain.test_on_stand_in import batches_on_device
from tests.pretrain.test_resume import state
from tests.system.launching import RECIPE, changes

VIT = {"width": 32, "depth": 2, "heads": 2, "dropout": 0.2, "drop_path": 0.2}
SMALL_CNN = {"widths": [8, 16], "depths": [1, 1], "dropout": 0.2}


def recipe(network: str, checkpointing: str = "none", **arguments: Any) -> Recipe:
    """That of ``test_equality`` with everything on, for a network that draws its own random numbers."""
    content = test_equality.recipe(ema={"decay": 0.9}).model_dump(mode="json")
    given = {"ViT": VIT, "CNN": SMALL_CNN}[network] | arguments
    model = {"factory": f"examples.networks:{network}", "arguments": given, "activation_checkpointing": checkpointing}
    return validate_recipe(content | {"model": model}, "here")


def training(chosen: Recipe, **options: Any) -> Any:
    with mock.patch.object(test_equality, "Monitor", functools.partial(Monitor, macs=1)):
        run = test_equality.training(chosen, **options)
    run.loss.classification.num_classes = CLASSES
    return run


def config(factory: str, size: tuple[int, int] = (32, 32), **arguments: Any) -> FactoryConfig:
    return FactoryConfig(factory, arguments, CLASSES, size)


def refused(build: Any) -> str:
    with pytest.raises(UserError) as caught:
        build()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What is asked of a network, and what is passed to the callable that builds it.


def takes_any(**given: Any) -> nn.Module:
    return named(**given)


def named(num_classes: int, *, img_size: Any = None, extra: Any = None) -> nn.Module:
    network = CNN(num_classes, widths=[8], depths=[1])
    network.given = {"img_size": img_size, "extra": extra}
    return network


def test_classes_and_image_size_are_passed_where_they_are_taken_and_the_users_arguments_win() -> None:
    here = f"{__name__}:"
    assert config(here + "named", extra=1).build().given == {"img_size": 32, "extra": 1}
    assert config(here + "named", (32, 48)).build().given["img_size"] == (32, 48)
    assert config(here + "named", img_size=7).build().given["img_size"] == 7
    assert config(here + "takes_any").build().given["img_size"] is None, "not every network of a library takes it"
    assert config(here + "takes_any", num_classes=3).build().head.out_features == 3
    assert config("examples.networks:ViT", (16, 32), **VIT).build().position.shape[0] == 4 * 8


def raises() -> nn.Module:
    raise LookupError("this\nis missing")


def number() -> int:
    return 3


def pair() -> nn.Module:
    class Pair(CNN):
        def forward(self, images: torch.Tensor) -> Any:
            return super().forward(images), None

    return Pair(CLASSES, widths=[8], depths=[1])


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("examples.network:CNN", "ModuleNotFoundError: No module named 'examples.network'"),
        ("examples.networks:Cnn", "has no attribute 'Cnn'"),
        ("math:pi", "math:pi is a float, and cannot be called"),
        (f"{__name__}:raises", "raises(): LookupError: this is missing"),
        (f"{__name__}:number", "number gives a int, no torch.nn.Module"),
    ],
)
def test_a_factory_that_gives_no_network_is_one_line(factory: str, words: str) -> None:
    line = refused(config(factory).build)
    assert line.startswith("model.factory: ")
    assert words in line


def test_a_network_that_gives_no_logits_is_one_line() -> None:
    def tried(chosen: FactoryConfig) -> str:
        return refused(lambda: try_network(chosen.build(), chosen, CPU))

    assert "returns (2, 3) for images (2, 3, 32, 32); logits must be (2, 10)" in tried(
        config("examples.networks:CNN", num_classes=3)
    )
    assert "returns a tuple for images" in tried(config(f"{__name__}:pair"))
    assert "does not take images (2, 3, 16, 16): RuntimeError" in tried(
        config("examples.networks:ViT", (16, 16), image_size=32)
    )


def test_its_multiply_accumulates_are_counted_with_those_of_attention() -> None:
    chosen = config("examples.networks:ViT", **VIT)
    network = chosen.build()
    embed, block = 64 * 48 * 32, 64 * (12 * 32 * 32) + 2 * 64 * 64 * 32
    assert try_network(network, chosen, CPU) == embed + 2 * block + 32 * CLASSES
    assert network.training


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (["model.factory=examples.networks:CNN"], "--set 'model={factory: examples.networks:CNN}' replaces"),
        (["model={factory: CNN}"], "package.module:callable, got 'CNN'"),
        (["model={}"], "give the name of a LaViT"),
        (["model={name: lavit_micro, arguments: {width: 3}}"], "give the name of a LaViT, with overrides"),
        (["model={factory: 'a:b'}", "initialize_from={handoff: runs/x}"], "initialize_from is for a LaViT"),
    ],
)
def test_a_recipe_has_a_name_or_a_factory(assignments: list[str], words: str) -> None:
    assert words in refused(lambda: load_recipe(RECIPE, assignments))


def test_what_a_network_lacks_is_refused_where_the_recipe_asks_for_it() -> None:
    cnn = "model={factory: examples.networks:CNN, activation_checkpointing: %s}"
    for policy in ("all", "[true, true, false, false]"):
        assert "activation_checkpointing" in refused(lambda p=policy: build_model(load_recipe(RECIPE, [cnn % p]), 10))
    assert "optimizer.layer_decay" in refused(lambda: layers_of(CNN(10)))
    plain = ["model={factory: 'torchless:Net'}", "probes={path: x, every_epochs: 1}"]
    with mock.patch.dict(sys.modules, torchless=mock.Mock(Net=nn.Flatten)):
        assert "probes need get_classifier()" in refused(lambda: build_model(load_recipe(RECIPE, plain), 10))


def test_layers_and_spared_parameters_of_a_network_that_tells_them() -> None:
    network = ViT(10, 32, width=32, depth=2, heads=2)
    layers = layers_of(network)
    assert [name for layer in layers for name in layer].count("blocks.1.fc1.weight") == 1
    assert sorted(name for layer in layers for name in layer) == sorted(name for name, _ in network.named_parameters())
    spared = spared_names(network)
    assert {"position", "norm.weight", "head.bias"} <= spared
    assert not {"head.weight", "embed.weight", "blocks.0.qkv.weight"} & spared


class Odd(nn.Module):
    """Frozen parameters, tied ones, and a buffer that is replaced in every forward pass."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Linear(3, num_classes)
        self.scale = nn.Parameter(torch.full((3,), 2.0), requires_grad=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("passing", torch.zeros(2), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen = self.seen + len(images)
        return self.head(self.second(self.first(images.mean((2, 3)))) * self.scale)


def test_frozen_parameters_are_buffers_and_tied_ones_need_one_name() -> None:
    network: Any = config(f"{__name__}:Odd").build()
    assert "scale" not in dict(network.named_parameters())
    buffers = Buffers(network)
    assert set(buffers.tensors()) == {"scale", "seen"}
    network(torch.zeros(4, 3, 2, 2))
    buffers.step_done(skipped=False)
    network(torch.zeros(4, 3, 2, 2))
    buffers.step_done(skipped=torch.ones(()))
    assert int(network.seen) == int(buffers.tensors()["seen"]) == 4
    weights = {name: one + 1 for name, one in network.state_dict().items() if name != "second.weight"}
    other: Any = config(f"{__name__}:Odd").build()
    load_state(other, weights)
    assert torch.equal(other.second.weight, network.first.weight + 1)
    with pytest.raises(RuntimeError, match=r"only one of both has: first\.weight"):
        load_state(other, {name: one for name, one in weights.items() if name != "first.weight"})


# Exact on resume: random numbers and buffers.


def stopped_equals_straight(control: dist.ProcessGroup, folder: Path) -> None:
    runs = itertools.count(1)

    def unlike_the_others(*arguments: Any, **options: Any) -> Any:
        run = training(*arguments, **options)
        torch.rand(next(runs))  # another state of the generator that is not asked
        return run

    for network, count in (("ViT", 0), ("CNN", 15)):

        def with_buffers(run: Any, count: int = count) -> list[torch.Tensor]:
            buffers = run.optimizer_shards.buffers.tensors()
            assert len(buffers) == count
            return [*state(run), *buffers.values()]

        chosen = mock.Mock(return_value=recipe(network))
        with mock.patch.multiple(test_resume, recipe=chosen, training=unlike_the_others, state=with_buffers):
            test_resume.stopped_equals_straight(control, folder / network)


@pytest.mark.slow
def test_20_and_20_steps_are_40_bit_for_bit_with_dropout_and_batch_norm_at_every_stage(tmp_path: Path) -> None:
    run_ranks(2, stopped_equals_straight, tmp_path)


def draws_and_buffers(control: dist.ProcessGroup, folder: Path) -> None:
    plain, recomputed = (go_on(training(recipe("ViT", policy)), 3) for policy in ("none", "all"))
    assert plain == recomputed, "what is recomputed drew other numbers"
    still = go_on(training(recipe("ViT", dropout=0, drop_path=0)), 3)
    assert plain != still

    run = training(recipe("CNN"), accumulation=2)
    go_on(run, 2)
    buffers = run.optimizer_shards.buffers
    own = {name: one.clone() for name, one in buffers.tensors().items()}
    both: list[Any] = [None, None]
    dist.all_gather_object(both, own)
    name = "blocks.1.norm2.running_var"
    assert not torch.equal(both[0][name], both[1][name]), "each rank has its own"
    mean = ((both[0][name].double() + both[1][name].double()) / 2).float()
    with buffers.averaged():
        assert torch.equal(buffers.tensors()[name], mean)
    assert all(torch.equal(one, own[name]) for name, one in buffers.tensors().items())
    writer = CheckpointWriter(folder, run.optimizer_shards, retention=Retention(), facts={}, group=control)
    writer.start(TrainState(step=2))
    assert writer.finish() == ""
    saved = read_weights(folder / "step-00000002", average=True)
    assert torch.equal(saved[name], mean)
    assert saved["blocks.1.norm2.num_batches_tracked"] == 4
    assert saved.keys() == run.engine.module.state_dict().keys()

    broken = list(micro_batches(run.batch.micro_batch, first=2, last=3))
    broken[0].images[:] = torch.nan
    run.train_step(iter(broken))
    assert run.nonfinite.skipped() == [True]
    assert all(torch.equal(one, own[name]) for name, one in buffers.tensors().items()), "a skipped step changes nothing"


def from_two_ranks(control: dist.ProcessGroup, folder: Path) -> None:
    run = training(recipe("CNN"))
    assert load_newest(folder, run.optimizer_shards, group=control) is not None
    expected = read_weights(folder / "step-00000002")
    assert all(torch.equal(one, expected[name]) for name, one in run.optimizer_shards.buffers.tensors().items())
    with pytest.raises(UserError, match="holds another model"):
        load_newest(folder, training(recipe("CNN", depths=[2, 1])).optimizer_shards, group=control)


@pytest.mark.slow
def test_what_is_recomputed_draws_the_same_and_buffers_are_averaged_saved_and_kept_from_bad_steps(
    tmp_path: Path,
) -> None:
    run_ranks(2, draws_and_buffers, tmp_path)
    run_ranks(1, from_two_ranks, tmp_path)


def no_step_waits() -> None:
    run = training(recipe("CNN"), accumulation=2, device=DEVICE, zero_optimization={"stage": 1})
    steps = iter(batches_on_device(steps=4))
    for _ in range(3):
        run.train_step(steps)
    with HostWaits() as waits:
        run.train_step(steps)
    assert not waits.found, waits.found


@pytest.mark.slow
def test_neither_seeds_nor_buffers_let_the_host_wait_for_its_device() -> None:
    on_stand_in(no_step_waits)


# Hand-offs.


@pytest.fixture
def handoff(tmp_path: Path) -> tuple[Path, nn.Module]:
    """Of a network whose module leaves a mark where it is imported."""
    lines = ["from pathlib import Path", "from examples.networks import CNN as Net"]
    (tmp_path / "marking.py").write_text("\n".join([*lines, f"Path({str(tmp_path / 'mark')!r}).touch()"]))
    chosen = config("marking:Net", widths=[8], depths=[1])
    network = chosen.build(CNN)
    network.blocks[0].norm1.running_mean.fill_(0.25)
    described = mock.Mock(num_classes=CLASSES, image_size=(32, 32), to_dict=chosen.to_dict)
    folder = handoffs.hand_off(tmp_path / "handoff", mock.Mock(config=described, state_dict=network.state_dict))
    return folder, network.eval()


def test_loading_imports_no_name_of_a_file_unless_it_is_trusted(
    handoff: tuple[Path, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder, network), images = handoff, torch.randn(2, 3, 32, 32)
    monkeypatch.chdir(tmp_path)
    line = refused(lambda: load_handoff(folder))
    assert "marking:Net" in line
    assert "--trust-factory" in line
    loaded, _ = load_handoff(folder, factory=CNN)
    assert torch.equal(loaded(images), network(images))
    assert not loaded.training
    assert not (tmp_path / "mark").exists(), "it was imported"
    loaded, _ = load_handoff(folder, trust_factory=True)
    assert (tmp_path / "mark").exists()
    assert torch.equal(loaded(images), network(images))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("arguments", {"widths": [4], "depths": [1]}, "do not fit"),
        ("arguments", {"depth": 3}, "unexpected keyword argument 'depth'"),
        ("arguments", 7, "do not fit"),
        ("factory", ["os:system"], "do not fit"),
        ("factory", "os", "model.factory: os is found neither"),
    ],
)
def test_a_damaged_architecture_is_one_line(
    handoff: tuple[Path, nn.Module], field: str, value: Any, words: str
) -> None:
    content = json.loads((handoff[0] / CONFIG).read_text())
    content["architecture"][field] = value
    del content["config_blake2"]
    (handoff[0] / CONFIG).write_text(json.dumps(content))
    given = {"trust_factory": True} if field == "factory" else {"factory": CNN}
    assert words in refused(lambda: load_handoff(handoff[0], **given))


@pytest.mark.slow
def test_commands_want_to_be_told_that_a_hand_off_is_trusted(
    handoff: tuple[Path, nn.Module], digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    folder = str(handoff[0])
    commands = [
        (evaluate.main, [folder, "--data", str(digits), "--classes-by-position"]),
        (convert.main, [folder, "net.onnx", "--image-size", "48"]),
    ]
    for command, arguments in commands:
        assert command(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "--trust-factory" in error
    assert not (tmp_path / "mark").exists()
    for command, arguments in commands:
        assert command([*arguments, "--trust-factory"]) == 0, capsys.readouterr().err
    assert (tmp_path / "net.onnx").exists()


# Plans.


@pytest.mark.slow
def test_a_plan_counts_any_network_and_says_what_it_cannot_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def planned(*more: str) -> dict[str, Any]:
        fixed = ["--recipe", str(RECIPE), "--gpus", "8", "--images", "1437", "--classes", "10"]
        return make_plan(parse_arguments([*fixed, *more]))

    plan = planned(
        *changes(model="{factory: examples.networks:ViT, arguments: {width: 64}, activation_checkpointing: all}")
    )
    assert plan["parameters"] == sum(one.numel() for one in ViT(10, 32, width=64).parameters())
    assert plan["model"] == "examples.networks:ViT"
    rows = {(row["zero_stage"], row["recomputed"]): row for row in plan["memory"]}
    assert len(rows) == 8
    assert rows[1, "all"]["activations"] < rows[1, "none"]["activations"]
    assert [key for key, row in rows.items() if row["chosen"]] == [(1, "all")]
    cnn = planned(*changes(model="{factory: examples.networks:CNN}"))
    assert {row["recomputed"] for row in cnn["memory"]} == {"none"}

    class Reads(CNN):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images) * (2.0 if images.sum().item() else 1.0)

    monkeypatch.setitem(sys.modules, "reading", mock.Mock(Net=Reads))
    assert "cannot be traced" in refused(lambda: planned(*changes(model="{factory: reading:Net}")))
