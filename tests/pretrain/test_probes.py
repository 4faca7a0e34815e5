"""Probes: the same answer on any number of ranks and at every stage, and training that does not notice them."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from pretrain.evaluation.probes import Probes, ProbesEndedError, fit_linear, nearest, open_probe_sets
from pretrain.recipe import ProbesSection
from tests.pretrain.ranks import run_ranks
from tests.pretrain.test_equality import go_on, recipe, training, whole_weights, zero

STEPS = 3


def blobs(samples: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of seven classes that overlap."""
    labels = torch.arange(samples) % 7
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(7, 12, generator=torch.Generator().manual_seed(0))
    return centres[labels] + 0.9 * torch.randn(samples, 12, generator=generator), labels


def test_the_neighbours_vote_as_scikit_learns_do() -> None:
    (known, labels), (queries, truth) = blobs(300, 1), blobs(200, 2)
    unit = [torch.nn.functional.normalize(rows).numpy() for rows in (known, queries)]
    weights = lambda distances: np.exp((1 - distances) / 0.07)  # noqa: E731
    theirs = KNeighborsClassifier(20, metric="cosine", weights=weights).fit(unit[0], labels.numpy()).predict(unit[1])
    ours = nearest(known, labels, queries, classes=7, k=20, temperature=0.07)
    assert (ours.numpy() == theirs).all()
    assert 0.5 < (ours == truth).float().mean() < 1
    few = nearest(known[:3], labels[:3], queries, classes=7, k=20, temperature=0.07)
    assert set(few.tolist()) <= {0, 1, 2}


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_the_linear_probe_is_logistic_regression() -> None:
    (known, labels), (queries, _) = blobs(300, 1), blobs(200, 2)
    polled = []
    logits = fit_linear(known, labels, classes=7, iterations=200, poll=lambda: polled.append(0))
    mean, deviation = known.mean(0), known.std(0, correction=0)
    theirs = LogisticRegression(C=1.0, tol=1e-6, max_iter=1000).fit(
        ((known - mean) / deviation).numpy(), labels.numpy()
    )
    expected = theirs.predict_proba(((queries - mean) / deviation).numpy())
    assert np.abs(logits(queries).softmax(1).numpy() - expected).max() < 1e-3
    assert len(polled) == 20


def probes_of(run: Any, digits: Path, control: dist.ProcessGroup, **fields: Any) -> Probes:
    place = {"rank": dist.get_rank(), "world_size": dist.get_world_size(), "device": torch.device("cpu"),
             "on_bad_sample": None}  # fmt: skip
    section = ProbesSection(path=digits, every_epochs=1, **fields)
    return Probes(section, open_probe_sets(section), run.recipe.data, batch_size=90, control=control, place=place)


def they_end_together(control: dist.ProcessGroup, digits: Path) -> None:
    """Over the limit or told to stop, on all ranks at the same batch, and training can go on."""
    run = training(recipe(ema={"decay": 0.9}), zero_optimization=zero(3))
    go_on(run, 1)  # from here on the average is other than the weights
    weights = whole_weights(run.engine)
    late = probes_of(run, digits, control, time_limit_minutes=1e-6)
    with run.optimizer_shards.averaged_weights(), pytest.raises(ProbesEndedError, match="too late"):
        late.run(run.engine, run.dtype, stop=lambda: False)
    polls = itertools.count()
    with run.optimizer_shards.averaged_weights(), pytest.raises(ProbesEndedError, match="stopped"):
        probes_of(run, digits, control).run(run.engine, run.dtype, stop=lambda: next(polls) == 3)
    assert run.engine.training
    after = whole_weights(run.engine)
    assert all(torch.equal(weights[name], after[name]) for name in weights)
    go_on(run, 1)


def training_does_not_notice(control: dist.ProcessGroup, digits: Path, folder: Path) -> None:
    answers = []
    for stage in (1, 3) if dist.get_world_size() > 1 else (1,):
        chosen = recipe(ema={"decay": 0.9})
        straight, probed = (training(chosen, zero_optimization=zero(stage)) for _ in range(2))
        losses = go_on(straight, 2 * STEPS)
        generator, probes = torch.get_rng_state(), probes_of(probed, digits, control)
        answers.append(asdict(probes.run(probed.engine, probed.dtype, stop=lambda: False)))
        first = go_on(probed, STEPS)
        with probed.optimizer_shards.averaged_weights():
            probes_of(probed, digits, control, train_split="val").run(probed.engine, probed.dtype, stop=lambda: False)
        assert probed.engine.training
        assert first + go_on(probed, STEPS) == losses, f"stage {stage}: the losses are not bit-identical"
        assert torch.equal(generator, torch.get_rng_state())
    (folder / f"{dist.get_world_size()}.{dist.get_rank()}").write_text(json.dumps(answers))
    if dist.get_world_size() > 1:  # here rather than in a test of its own, whose ranks would take seconds to start
        they_end_together(control, digits)


@pytest.mark.slow
def test_losses_are_bit_identical_with_and_without_probes_and_answers_the_same_on_any_ranks_and_stage(
    digits: Path, tmp_path: Path
) -> None:
    for ranks in (1, 2):
        run_ranks(ranks, training_does_not_notice, digits, tmp_path)
    answers = [answer for file in sorted(tmp_path.iterdir()) for answer in json.loads(file.read_text())]
    assert len(answers) == 5
    assert all(answer == answers[0] for answer in answers)
    assert answers[0]["samples"] == 360
    assert 70 < answers[0]["knn_top1"] < 100
    assert 70 < answers[0]["linear_top1"] < 100
